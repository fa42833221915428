"""Ways to lose a result, or to do harm, that were found by trying to break the programs; each must stay impossible."""

import contextlib
import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import DBTOOL, PEAK, RECORD, ROOT, SWEEP, as_nobody, kept, need, need_program, small_disk, wait_for

import dbtool

GOOD = json.dumps(RECORD).encode()
RECEIPT = ".receipt"  # what the name of a kept file's receipt ends in
NOBODY = 65534
LARGE = 6 << 20  # bytes of input that do not stay in memory


def script_of(command):
    """Return the script that has the *command*."""
    admin = ROOT / "dbadmin.py"
    return str(admin) if command in ("merge", "snapshot", "migrate", "delete") and admin.exists() else DBTOOL


def run(*arguments, script="", stdin=b"", timeout=20, before=(), **options):
    """Run a command as a real process, after the words *before*; fail if it hangs."""
    words = [*before, sys.executable, script or script_of(arguments[0]), *map(str, arguments)]
    stream = {"stdin": stdin} if isinstance(stdin, int) else {"input": stdin}
    return subprocess.run(words, capture_output=True, timeout=timeout, check=False, **stream, **options)


def sweep(*arguments, **options):
    return run(*arguments, script=SWEEP, **options)


PRINTING = ["sh", "-c", 'echo "{\\"x\\": 2}"']  # a job


@contextlib.contextmanager
def started(*arguments, script="", **options):
    """Start a command, which reads from a pipe; kill it if it is left running."""
    words = [sys.executable, script or script_of(arguments[0]), *map(str, arguments)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def traced(fault):
    """Return the words that let strace inject a *fault* into what is run after them."""
    return [need_program("strace"), "-f", "-o", "/dev/null", "-e", f"trace={fault.partition(':')[0]}",
            "-e", f"inject={fault}"]


def give(child, data):
    """Write to the child's standard input, and wait until it has read it all."""
    child.stdin.write(data)
    child.stdin.flush()
    wait_for(lambda: not struct.unpack("i", fcntl.ioctl(child.stdin, termios.FIONREAD, b"\0" * 4))[0])
    time.sleep(0.05)


def end(child, timeout=20):
    """Wait until the child ends; return it as run() does."""
    out, err = child.communicate(timeout=timeout)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def check_well(done):
    """See that a command did what it should, and said nothing."""
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def check_line(done, *words, status=1):
    """See that a command ended with *status* and one line of message that has these *words* in it; return that."""
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (status, b""), message[-500:]
    assert message.count("\n") == 1 and "Traceback" not in message, message[-500:]
    assert [str(word) for word in words if str(word) not in message] == [], message[-500:]
    return message


def check_kept(done, path, data, status=1):
    """See that a command failed with *status*, in one line, and kept *data* in the file that it names; return that."""
    check_line(done, status=status)
    (file,) = kept(path)
    assert str(file) in done.stderr.decode() and file.read_bytes() == data
    return file


def rows_of(path, table="t", columns="*"):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT {columns} FROM {table}").fetchall()


def count(path, table="t"):
    return len(rows_of(path, table))


def store(path, data):
    """Store JSON, as another process would."""
    dbtool.insert(str(path), dbtool.records([data]))


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def use_schema(tmp_path, monkeypatch):
    """Make SQL the schema of all that this test runs."""

    def use(sql):
        (tmp_path / "my.sql").write_text(sql)
        monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "my.sql"))

    return use


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def keep_by_hand(path, data=GOOD, name="20260101T000000.000000Z-node1-1.json"):
    """Put a kept file beside the database at *path*; return it."""
    folder = Path(f"{path}-kept")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


# ---------------------------------------------------------------------------- retry knows, or does not guess

NUMBERED = 'CREATE TABLE t (run INTEGER PRIMARY KEY, "learning rate" REAL NOT NULL, loss REAL);'
NAMED = "CREATE TABLE t (k TEXT PRIMARY KEY, x REAL, note TEXT DEFAULT '');"
LIKE_OTHERS = b'{"learning rate": 0.1, "loss": 2.5}'
NO_FLUSH = "fdatasync:error=EIO:when=1"  # of COMMIT
KILLED = "fsync:signal=KILL:when=1"  # retry, while it writes the receipt
FAULTS = [NO_FLUSH, slow("fdatasync:error=EIO:when=2"), "fdatasync:error=EIO:when=3"]
KILLS = [KILLED, slow("fsync:signal=KILL:when=2"), "fdatasync:signal=KILL:when=1", slow("fdatasync:signal=KILL:when=2")]


def check_left(done, file):
    """See that retry did not guess: it left the file, and says where, and how to look."""
    message = check_line(done, file.name)
    assert re.search(r"SELECT|query", message), message
    assert file.exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_retry_leaves_what_no_key_tells_apart(db_path, use_schema, fault):
    """COMMIT fails, and somebody stores an equal result."""
    use_schema(NUMBERED)
    store(db_path, LIKE_OTHERS)
    done = run("insert", db_path, stdin=LIKE_OTHERS, before=traced(fault))
    store(db_path, LIKE_OTHERS)
    if done.returncode == 0:  # SQLite does without that flush
        assert count(db_path) == 3 and not kept(db_path)
        return
    file = check_kept(done, db_path, LIKE_OTHERS, 75)
    assert count(db_path) == 2
    for _ in range(2):
        check_left(run("retry", db_path), file)
        assert count(db_path) == 2


@pytest.mark.parametrize("fault", KILLS)
def test_retry_killed_leaves_what_no_key_tells_apart(db_path, use_schema, fault):
    use_schema(NUMBERED)
    store(db_path, LIKE_OTHERS)
    file = keep_by_hand(db_path, LIKE_OTHERS)
    run("retry", db_path, before=traced(fault))
    store(db_path, LIKE_OTHERS)
    for _ in range(2):
        done = run("retry", db_path)
        if file.exists():
            check_left(done, file)
            assert count(db_path) in (2, 3)
        else:
            check_well(done)
            assert count(db_path) == 3


@pytest.mark.parametrize("fault", [NO_FLUSH, *FAULTS[1:2], slow("fdatasync:error=EIO:when=3"), *KILLS[:2],
                                   slow("fdatasync:signal=KILL:when=1"), *KILLS[3:]])
def test_retry_stores_once_what_has_a_random_key(db_path, fault):
    store(db_path, GOOD)
    if "error" in fault:
        run("insert", db_path, stdin=GOOD, before=traced(fault))
    else:
        keep_by_hand(db_path)
        run("retry", db_path, before=traced(fault))
    store(db_path, GOOD)
    for _ in range(2):
        check_well(run("retry", db_path))
        assert count(db_path, "results") == 3 and not kept(db_path)


A, B, C = {"k": "a", "x": 1}, {"k": "b", "x": 2}, {"k": "c", "x": 3}


@pytest.mark.parametrize(("records", "others", "rows"), [
    ([A], [A], 2),
    ([A], [{**A, "note": "of another"}], 2),
    ([A], [{**A, "x": 2}], None),
    slow([A, B], [A, B], 3),
    slow([A, B], [A], 3),
    ([A, B, C], [A, C], 4),
    slow([A, B, C], [A, {**B, "x": 9}, C], None),
], ids=["equal", "equal in what was given", "different", "two", "the first of two", "first and last of three",
        "the middle one differs"])
@pytest.mark.parametrize("fault", [NO_FLUSH, slow("fsync:signal=KILL:when=2")])
def test_retry_takes_a_key_that_was_given_for_a_row_only_if_all_is_equal(db_path, use_schema, records, others, rows, fault):
    """What is there with equal values is passed over, the rest is stored, and a row that differs is a conflict."""
    use_schema(NAMED)
    store(db_path, b'{"k": "first", "x": 0}')
    if "error" in fault:
        run("insert", db_path, stdin=lines_of(records), before=traced(fault))
        (file,) = kept(db_path)
    else:
        file = keep_by_hand(db_path, lines_of(records))
        run("retry", db_path, before=traced(fault))
    assert count(db_path) == 1
    store(db_path, lines_of(others))
    for _ in range(2):
        done = run("retry", db_path)
        if rows:
            check_well(done)
            assert not file.exists() and count(db_path) == rows
        else:
            check_line(done, file.name)
            assert file.read_bytes() == lines_of(records) and count(db_path) == 1 + len(others)


# ------------------------------------------------------------------------------------------------- signals

ENDING = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTRAP", "SIGABRT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGSTKFLT",
          "SIGXCPU", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSYS", "SIGRTMIN", "SIGRTMAX"]


@pytest.mark.parametrize("name", [name if name in ("SIGTERM", "SIGUSR1", "SIGXCPU") else slow(name) for name in ENDING])
def test_insert_ended_by_any_signal_keeps_its_input(db_path, name):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"this Python has no name for {name}")
    with started("insert", db_path) as child:
        give(child, GOOD)
        child.send_signal(number)
        check_kept(end(child), db_path, GOOD, 128 + number)
    assert not db_path.exists()
    check_well(run("retry", db_path))
    assert count(db_path, "results") == 1


# ------------------------------------------------------------------------------------ success means a row

SIMPLE = "CREATE TABLE t (n INTEGER NOT NULL, loss REAL);"
RESULTS = [json.dumps({"n": n, "loss": n / 2}).encode() for n in range(1, 5)]


@pytest.mark.parametrize(("before", "after"), [
    (b"\x1b[0m", b"\n"),
    (b"\x1b[1;32m", b"\x1b[0m\n"),
    (b"\x1b[?25h\x1b[2K", b"\n"),
    (b"100%|\xe2\x96\x88\xe2\x96\x88| 5/5 [00:01<00:00]\r", b"\n"),
    (b"10%|#|\r100%|##|\r\x1b[K", b"\n"),
    (b"\r\x1b[2K\r", b"\n"),
    (b"", b"\r\n"),
    (b"epoch 1\r\n", b"\r\n"),
    (b"", b"\r"),
    (b"", b"\x1b[0m"),
    (b"", b" \x1b[K "),
], ids=["escape", "colour", "escapes", "progress bar", "bar and escape", "erased line", "CRLF", "text and CRLF", "CR",
        "escape between", "escape and space between"])
def test_insert_skip_text_stores_every_result_behind_residue(db_path, use_schema, before, after):
    use_schema(SIMPLE)
    done = run("insert", db_path, "--skip-text", stdin=b"".join(before + result + after for result in RESULTS))
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert [n for n, _ in rows_of(db_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("text", [
    b"{'loss': 0.3}", b"{'loss': 0.3, 'note': \"it's\"}", b"{ something", b"{ 'a': 1 }", b"{0: 1}", b"{loss: 0.3}",
    b"{1}-norm: 3", b"\x1b[0m{'loss': 0.3}", b"{{template}}", b"{...}"])
def test_insert_skip_text_passes_over_what_only_looks_like_json(db_path, use_schema, text):
    use_schema(SIMPLE)
    done = run("insert", db_path, "--skip-text", stdin=text + b"\n" + (b"\n" + text + b"\n").join(RESULTS))
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert done.stderr.count(text) == len(RESULTS)
    assert [n for n, _ in rows_of(db_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("broken", [
    b'{"loss": 0.3', b'{ "loss": 0.3,', b'{\n "loss": 0.3', b'{"loss"}', b'{"n": 9, "loss": nan}', b'\x1b[0m{"loss": 0.3',
    b'50%|#|\r{"loss": 0.3'])
@pytest.mark.parametrize("place", [slow(0), 2, slow(4)])
def test_insert_skip_text_refuses_a_broken_result(db_path, use_schema, broken, place):
    use_schema(SIMPLE)
    data = b"\n".join([*RESULTS[:place], broken, *RESULTS[place:]]) + b"\n"
    store(db_path, RESULTS[0])
    done = run("insert", db_path, "--skip-text", stdin=data)
    assert (done.returncode, done.stdout) == (1, b""), done.stderr
    (file,) = kept(db_path)
    assert str(file) in done.stderr.decode().splitlines()[-1] and file.read_bytes() == data
    assert count(db_path) == 1


@pytest.mark.parametrize("result", [
    b'{\n  "n": 7,\n  "loss": 1\n}\n', b'{\r\n  "n": 7,\r\n  "loss": 1\r\n}\r\n', b'{ "n": 7, "loss": 1 }\n',
    b'\x1b[0m{\n"n": 7,\n"loss": 1\n}\n'])
def test_insert_skip_text_still_reads_what_is_pretty_printed(db_path, use_schema, result):
    use_schema(SIMPLE)
    check_well(run("insert", db_path, "--skip-text", stdin=result * 2))
    assert rows_of(db_path) == [(7, 1.0)] * 2


def test_sweep_stores_a_result_behind_residue(use_schema):
    use_schema(SIMPLE)
    script = r'''printf '\033[0m100%%|##|\r\033[32m{"loss": 1}\033[0m\n' '''
    done = sweep("r.db", "-p", "n=1,2", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert sorted(rows_of("r.db")) == [(1, 1.0), (2, 1.0)]


KEYED = "CREATE TABLE t (k TEXT PRIMARY KEY, x REAL);"
IGNORING = KEYED + "CREATE TRIGGER i BEFORE INSERT ON t WHEN NEW.x < 0 BEGIN SELECT RAISE(IGNORE); END;"
DELETING = KEYED + "CREATE TRIGGER d AFTER INSERT ON t WHEN NEW.x < 0 BEGIN DELETE FROM t WHERE k = NEW.k; END;"
OTHER, GONE = {"k": "o", "x": 7}, {"k": "gone", "x": -1}


@pytest.mark.parametrize(("conflict", "records"), [
    ("fail", [GONE]), ("fail", [OTHER, GONE]), ("fail", [GONE, OTHER]), slow("fail", [A, GONE, OTHER]),
    slow("fail", [A, B, C, GONE]), ("skip", [GONE]), slow("skip", [A, GONE, OTHER]), slow("replace", [GONE]),
    ("replace", [A, GONE, OTHER])],
    ids=["alone", "last", "first", "between", "after many", "skip", "skip, between", "replace", "replace, between"])
@pytest.mark.parametrize("schema", [IGNORING, DELETING], ids=["ignored", "deleted"])
def test_insert_without_a_row_is_a_failure(db_path, use_schema, schema, records, conflict):
    use_schema(schema)
    store(db_path, b'{"k": "first", "x": 1}')
    check_kept(run("insert", db_path, "--on-conflict", conflict, stdin=lines_of(records)), db_path, lines_of(records))
    assert rows_of(db_path) == [("first", 1.0)]


@pytest.mark.parametrize("schema", [IGNORING, DELETING], ids=["ignored", "deleted"])
def test_insert_without_a_row_and_without_a_key_is_a_failure(db_path, use_schema, schema):
    use_schema(schema.replace("k TEXT PRIMARY KEY", "k TEXT"))
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executescript(schema.replace("k TEXT PRIMARY KEY", "k TEXT"))
    data = lines_of([OTHER, GONE])
    check_kept(run("insert", db_path, stdin=data), db_path, data)
    assert count(db_path) == 0


@pytest.mark.parametrize("schema", [IGNORING, DELETING], ids=["ignored", "deleted"])
def test_retry_without_a_row_leaves_the_file(db_path, use_schema, schema):
    use_schema(schema)
    store(db_path, b'{"k": "first", "x": 1}')
    file = keep_by_hand(db_path, lines_of([GONE]))
    check_line(run("retry", db_path), file.name)
    assert file.read_bytes() == lines_of([GONE]) and count(db_path) == 1


@pytest.mark.parametrize("schema", [IGNORING, DELETING], ids=["ignored", "deleted"])
def test_insert_manual_without_a_row_is_a_failure(db_path, use_schema, schema):
    use_schema(schema)
    check_line(run("insert_manual", db_path, "--k", "gone", "--x", "-1"), "results.db")


@pytest.mark.slow
@pytest.mark.parametrize("schema", [IGNORING, DELETING], ids=["ignored", "deleted"])
def test_sweep_without_a_row_is_a_failure(use_schema, schema):
    use_schema(schema)
    done = sweep("r.db", "-p", "k=a,b", "--", "sh", "-c", 'test $1 = a; echo "{\\"x\\": $((1 - 2 * $?))}"', "sh", "{k}")
    assert done.returncode == 1 and b"k=b" in done.stderr, done.stderr
    assert rows_of("r.db") == [("a", 1.0)]


def test_insert_into_a_view_that_does_nothing_is_a_failure(db_path, use_schema):
    use_schema(KEYED)
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executescript("CREATE TABLE base (k TEXT PRIMARY KEY, x REAL); CREATE VIEW t AS SELECT * FROM base;"
                         "CREATE TRIGGER v INSTEAD OF INSERT ON t BEGIN SELECT 1; END;")
    check_kept(run("insert", db_path, stdin=lines_of([A])), db_path, lines_of([A]))
    assert count(db_path) == 0


AUDIT = "CREATE TABLE log (k TEXT); CREATE TRIGGER a AFTER INSERT ON t BEGIN INSERT INTO log VALUES (NEW.k); END;"


@pytest.mark.parametrize(("trigger", "conflict", "records", "left"), [
    (AUDIT, "fail", [A, B], ["a", "b", "first"]),
    (AUDIT, "skip", [{"k": "first", "x": 5}], ["first"]),
    (AUDIT, "skip", [A, {"k": "first", "x": 5}, B], ["a", "b", "first"]),
    (AUDIT, "replace", [{"k": "first", "x": 5}, A], ["a", "first"]),
    ("", "skip", [{"k": "first", "x": 5}, {"k": "first", "x": 6}], ["first"]),
    ("CREATE TRIGGER b BEFORE INSERT ON t BEGIN SELECT CASE WHEN NEW.x < 0 THEN RAISE(ABORT, 'negative') END; END;",
     "fail", [A], ["a", "first"]),
    ("CREATE TRIGGER u AFTER INSERT ON t BEGIN UPDATE t SET x = x + 1 WHERE k = NEW.k; END;", "fail", [A, B],
     ["a", "b", "first"]),
    ("CREATE TRIGGER o AFTER INSERT ON t BEGIN DELETE FROM t WHERE k <> NEW.k; END;", "fail", [A], ["a"]),
    ("CREATE TRIGGER i BEFORE INSERT ON t WHEN NEW.k = 'first' BEGIN SELECT RAISE(IGNORE); END;", "skip",
     [{"k": "first", "x": 5}, A], ["a", "first"]),
], ids=["audit", "audit, known", "audit, one known", "audit, replaced", "known twice", "check", "update", "only the latest",
        "ignored, but known"])
def test_insert_with_triggers_that_leave_the_row_is_a_success(db_path, use_schema, monkeypatch, trigger, conflict, records,
                                                               left):
    use_schema(KEYED + trigger)
    monkeypatch.setenv("DBTOOL_TABLE", "t")
    if "RAISE(IGNORE)" in trigger:
        with contextlib.closing(sqlite3.connect(db_path)) as db:
            db.executescript(KEYED + "INSERT INTO t VALUES ('first', 1);" + trigger)
    else:
        store(db_path, b'{"k": "first", "x": 1}')
    check_well(run("insert", db_path, "--on-conflict", conflict, stdin=lines_of(records)))
    assert sorted(key for key, in rows_of(db_path, columns="k")) == left


# ------------------------------------------------------------------------------------------------ receipts


@pytest.mark.parametrize("receipt", [
    "[]", "{}", "5", "null", "[[]]", '"\\ud800"', "[" * 100_000 + "]" * 100_000, '[{"id": "\\ud800"}]', "[5]",
    '[{"id": [1]}]', '[{"id": {"$hex": "zz"}}]', '[{"id": 99999999999999999999}]'],
    ids=["list", "object", "number", "null", "lists", "half a pair", "nested", "half a pair as key", "list of a number",
         "list as key", "no hex", "too large"])
def test_retry_leaves_a_file_whose_receipt_cannot_be_used(db_path, receipt):
    store(db_path, GOOD)
    file = keep_by_hand(db_path)
    Path(f"{file}{RECEIPT}").write_text(receipt)
    check_line(run("retry", db_path), file.name)
    assert file.read_bytes() == GOOD and count(db_path, "results") == 1


@pytest.mark.parametrize("receipt", [b"", b"[", b'{"ta', b'[{"id": "018f', b'[{"id": "\xc3'])
def test_retry_takes_a_torn_receipt_for_none(db_path, receipt):
    store(db_path, GOOD)
    file = keep_by_hand(db_path)
    Path(f"{file}{RECEIPT}").write_bytes(receipt)
    check_well(run("retry", db_path))
    assert count(db_path, "results") == 2 and not file.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), [
    ("TEXT PRIMARY KEY DEFAULT (hex(randomblob(16)))", ""), ("TEXT PRIMARY KEY", "n"), ("INTEGER PRIMARY KEY", "")],
    ids=["random", "given", "number"])
def test_retry_leaves_a_file_whose_receipt_is_of_another_schema(db_path, use_schema, key, name):
    """COMMIT fails, and the key's column gets another name; what is kept besides is stored."""

    def record(number, column="uid"):
        return lines_of([{column: f"{name}{number}", "x": number} if name else {"x": number}])

    use_schema(f"CREATE TABLE t (id {key}, x REAL);")
    store(db_path, record(1, "id"))
    data = record(2, "id")
    file = check_kept(run("insert", db_path, stdin=data, before=traced(NO_FLUSH)), db_path, data, 75)
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute("ALTER TABLE t RENAME COLUMN id TO uid")
        db.execute("INSERT INTO t VALUES (iif(? = 'INTEGER PRIMARY KEY', 2, 'of another'), 2)", [key])
        db.commit()
    use_schema(f"CREATE TABLE t (uid {key}, x REAL);")
    earlier = keep_by_hand(db_path, record(3))
    later = keep_by_hand(db_path, record(4), "20990101T000000.000000Z-node1-1.json")
    check_line(run("retry", db_path), file.name)
    assert kept(db_path) == [file] and not earlier.exists() and not later.exists()
    assert sorted(x for x, in rows_of(db_path, columns="x")) == [1, 2, 3, 4]


# ------------------------------------------------------------------------- what is no kept file of this user


def strange(path, kind, data=GOOD):
    """Make something at *path* that no insert has kept there; what can hold *data* does."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "symlink":
        (path.parent.parent / "elsewhere.json").write_bytes(data)
        path.symlink_to(path.parent.parent / "elsewhere.json")
    else:
        need(os.geteuid() == 0, "root, to give a file away")
        path.write_bytes(data)
        os.chown(path, NOBODY, NOBODY)


STRANGE = ["fifo", "folder", "endless", "symlink", "another user's"]
STRANGE_NAMES = ["20200101T000000.000000Z-node1-1.json", "20200101T000000.000000Z-node1-1.text.json"]


def little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


@pytest.mark.parametrize(("kind", "name"), [*((kind, STRANGE_NAMES[0]) for kind in STRANGE), ("endless", STRANGE_NAMES[1])],
                         ids=[*STRANGE, "endless text"])
def test_retry_names_what_is_no_file_of_this_user_and_passes_it_over(db_path, kind, name):
    earlier, later = (keep_by_hand(db_path, name=STRANGE_NAMES[0].replace("2020", year)) for year in ("2019", "2098"))
    place = earlier.parent / name
    strange(place, kind)
    check_line(run("retry", db_path, timeout=10, preexec_fn=little_memory), name)
    assert count(db_path, "results") == 2 and not earlier.exists() and not later.exists()
    assert os.path.lexists(place)
    if kind == "symlink":
        assert (db_path.parent / "elsewhere.json").read_bytes() == GOOD


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRANGE)
def test_sweep_names_what_is_no_file_of_this_user_and_begins(use_schema, tmp_path, kind):
    use_schema("CREATE TABLE t (n INTEGER, x REAL);")
    path = tmp_path / "r.db"
    file = keep_by_hand(path, b'{"n": 1, "x": 1}', STRANGE_NAMES[0].replace("2020", "2019"))
    strange(file.parent / STRANGE_NAMES[1], kind, b'{"n": 3, "x": 3}')
    done = sweep("r.db", "-p", "n=1,2", "--", *PRINTING, timeout=15, preexec_fn=little_memory)
    assert STRANGE_NAMES[1] in done.stderr.decode() and b"Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1) and sorted(rows_of(path)) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("kind", STRANGE)
def test_retry_does_not_store_what_others_put_among_temporary_files(db_path, temporary, kind):
    """A folder for temporary files is open to all, and what is kept there has a name that others can think of."""
    Path(f"{db_path}-kept").write_text("in the way")
    check_line(run("insert", db_path, stdin=b'{"epochs": 1}', cwd="/proc"), temporary)
    (file,) = temporary.glob("*.json")
    file.write_bytes(GOOD)
    planted = temporary / re.sub(r"\d{8}T\d{6}", "20200101T000000", file.name)
    assert planted != file
    strange(planted, kind)
    Path(f"{db_path}-kept").unlink()
    done = run("retry", db_path, cwd="/proc", timeout=10, preexec_fn=little_memory)
    assert done.stderr.count(b"\n") <= 1 and b"Traceback" not in done.stderr
    assert count(db_path, "results") == 1 and not file.exists() and os.path.lexists(planted)


def given_away(folder):
    """Return a database in *folder* that belongs, like the folder, to a user without rights, and what root kept there."""
    need(os.geteuid() == 0, "root, to give files away")
    path = folder / "results.db"
    dbtool.insert(str(path), [RECORD])
    file = keep_by_hand(path)
    for given in folder, path:
        os.chown(given, NOBODY, NOBODY)
    file.parent.chmod(0o700)
    return path, file


def test_retry_that_may_not_read_the_kept_folder_fails(public):
    path, file = given_away(public)
    status, said = as_nobody(lambda: dbtool.main(["retry", str(path)]))
    assert status == 1 and said.count("\n") == 1 and "results.db-kept" in said, said
    assert file.read_bytes() == GOOD and count(path, "results") == 1


def test_retry_that_may_not_read_the_kept_folder_fails_without_a_database_too(public):
    path, _ = given_away(public)
    path.unlink()
    status, said = as_nobody(lambda: dbtool.main(["retry", str(path)]))
    assert status == 1 and said.count("\n") == 1 and "results.db-kept" in said, said
    assert not path.exists()


# --------------------------------------------------------------------------- a file that vanishes meanwhile


@pytest.mark.slow
@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_query_makes_no_database_when_its_own_vanishes(db_path, how):
    store(db_path, GOOD)
    sql = ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)"
           " SELECT i, author FROM n, results")
    with started("query", db_path, sql) as child:
        assert child.stdout.read(1) == b"i"  # and a full pipe stops it
        if how == "renamed":
            db_path.rename("other.db")
        else:
            db_path.unlink()
        done = end(child)
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == (done.returncode != 0)
    assert not db_path.exists()


# -------------------------------------------------------------------------------- bytes that are not UTF-8

SPOILT = {
    "comment of the table": ("", "who ran it", "\xff"),
    "column of the table": ("ALTER TABLE results ADD COLUMN ZZ TEXT;", "ZZ", "\xff"),
    "comment of a view": ("CREATE VIEW v AS SELECT epochs /* ZZ */ FROM results;", "ZZ", "\xff"),
    "column of a view": ("CREATE VIEW v AS SELECT epochs AS ZZ FROM results;", "ZZ", "\xff"),
    "view of what is not there": ("CREATE VIEW v AS SELECT * FROM ZZ;", "ZZ", "\xff"),
    "view that is no SQL": ("CREATE VIEW v AS SELECT epochs AS ZZ FROM results;", "ZZ", "\xff \xff \xff"),
    "trigger that refuses": (
        "CREATE TRIGGER g BEFORE INSERT ON results BEGIN SELECT RAISE(ABORT, 'ZZ'); END;", "ZZ", "\xff"),
    "trigger that fails": ("CREATE TRIGGER g BEFORE INSERT ON results BEGIN INSERT INTO ZZ VALUES (1); END;", "ZZ", "\xff"),
}


def spoil(path, kind):
    """Put the byte 0xff into the stored schema of the database at *path*."""
    sql, old, new = SPOILT[kind]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(f"{sql} PRAGMA writable_schema = ON;")
        stored = db.execute("SELECT rowid, CAST(sql AS BLOB) FROM sqlite_master WHERE instr(sql, ?)", [old]).fetchall()
        for rowid, text in stored:
            text = text.replace(old.encode(), new.encode("latin-1"))
            db.execute("UPDATE sqlite_master SET sql = CAST(? AS TEXT) WHERE rowid = ?", (text, rowid))
    assert stored


MISTYPED = ["query", "bad.db", "SELECT epoch FROM results"]
ON_BAD = [["insert", "bad.db"], ["query", "bad.db", "SELECT count(*) FROM results"], MISTYPED, ["schema", "bad.db"],
          ["merge", "bad.db", "good.db"], ["merge", "good.db", "bad.db"], ["snapshot", "bad.db", "copy.db"],
          ["migrate", "bad.db"], ["migrate", "bad.db", "--schema", "new.sql"], ["retry", "bad.db"],
          ["bad.db", "-p", "layers=5", "--dry-run"]]
STORING = [["insert", "bad.db"], ["merge", "bad.db", "good.db"], ["retry", "bad.db"]]
ON_SPOILT = [
    *(("view that is no SQL", words) for words in ON_BAD),
    *((kind, words) for kind in ("trigger that refuses", "trigger that fails") for words in STORING),
    ("view of what is not there", MISTYPED), ("view of what is not there", ON_BAD[8]),
    *(slow(kind, words) for kind in list(SPOILT)[:4] for words in ON_BAD),
    ("column of a view", ["query", "bad.db", "SELECT * FROM v"]),
    ("column of the table", ["query", "bad.db", "SELECT * FROM results"]),
]


@pytest.mark.parametrize(("kind", "words"), ON_SPOILT, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_a_schema_that_is_not_utf_8_is_no_traceback(tmp_path, kind, words):
    for number, name in enumerate(["good.db", "bad.db"]):
        dbtool.insert(str(tmp_path / name), [{**RECORD, "epochs": number}])
    (tmp_path / "new.sql").write_text((ROOT / "schema.sql").read_text().replace("    epochs ", "    host TEXT,\n    epochs "))
    spoil("bad.db", kind)
    if words[0] == "retry":
        keep_by_hand(tmp_path / "bad.db")
    done = run(*words, script=SWEEP if words[0] == "bad.db" else "", stdin=GOOD)
    message = done.stderr.decode()
    assert done.returncode in (0, 1) and "Traceback" not in message, message[-500:]
    assert message.count("\n") == (done.returncode != 0), message
    if words[0] in ("insert", "retry"):
        with contextlib.closing(sqlite3.connect("bad.db")) as db:
            db.execute("PRAGMA writable_schema = ON")  # reads what does not parse, too
            assert db.execute("SELECT count(*) FROM results").fetchone()[0] + len(kept("bad.db")) == 2


# ------------------------------------------------------------------------------------------ temporary files


def created(log, databases):
    """Return the names of the files that were created, by a log of strace, and how each was opened first.

    Without those of SQLite beside the *databases*, and those in new folders that only this user may enter.
    """
    found, private = {}, []
    for line in log.splitlines():
        if made := re.search(r'mkdir(?:at)?\((?:\w+, )?"(.*)", 0700\) = 0', line):
            private.append(made[1])
        opened = re.search(r'^(\d+) .*open(?:at)?\((?:\w+, )?"(.*)", ([A-Z_|]*O_CREAT[A-Z_|]*).*\) = \d', line)
        if not opened:
            continue
        pid, path, flags = opened.groups()
        is_sqlite = any(path in (name, f"{name}-wal", f"{name}-shm", f"{name}-journal") for name in map(str, databases))
        is_private = os.path.dirname(path) in private and not os.path.dirname(path).endswith("-kept")
        if not (is_sqlite or is_private or path == os.devnull or path.endswith("-journal")):
            found.setdefault(path, (pid, flags))
    return found


CREATING = {
    "insert": (["insert", "results.db"], b"[1]", ""),
    "insert of much": (["insert", "results.db"], b'{"nope": "' + b"x" * LARGE + b'"}', ""),
    "insert with a receipt": (["insert", "results.db"], GOOD, NO_FLUSH),
    "retry": (["retry", "results.db"], b"", ""),
    "snapshot": (["snapshot", "results.db", "copy.db"], b"", ""),
    "snapshot .gz": (["snapshot", "results.db", "copy.db.gz"], b"", ""),
    "snapshot .xz": (["snapshot", "results.db", "copy.db.xz"], b"", ""),
    "snapshot -": (["snapshot", "results.db", "-"], b"", ""),
    "query --output": (["query", "results.db", "SELECT 1", "--output", "out.csv"], b"", ""),
}


def trace_creation(path, words, stdin, fault):
    """Run a command under strace; return the files it created, as created() does."""
    if words[0] == "retry":
        keep_by_hand(path)
    log = path.parent / "trace"
    inject = ["-e", f"inject={fault}"] if fault else []
    before = [need_program("strace"), "-f", "-o", log, "-e", "trace=open,openat,mkdir,mkdirat,fdatasync", *inject]
    done = run(*words, stdin=stdin, before=before, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert b"Traceback" not in done.stderr
    return created(log.read_text(), [path])


@pytest.mark.parametrize(("words", "stdin", "fault"), list(CREATING.values()), ids=list(CREATING))
def test_files_are_created_where_there_is_none_and_not_through_a_symlink(db_path, temporary, words, stdin, fault):
    dbtool.insert(str(db_path), [RECORD])
    found = trace_creation(db_path, words, stdin, fault)
    lax = {path: flags for path, (_, flags) in found.items() if "O_EXCL" not in flags or "O_NOFOLLOW" not in flags}
    assert lax == {}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "stdin", "fault"), [
    case if name in ("insert", "snapshot", "query --output") else slow(*case) for name, case in CREATING.items()],
    ids=list(CREATING))
def test_names_of_temporary_files_cannot_be_guessed(db_path, temporary, words, stdin, fault):
    """Apart from the process number and the time, which others can guess, two runs use different names."""
    dbtool.insert(str(db_path), [RECORD])
    names = []
    for _ in range(2):
        found = trace_creation(db_path, words, stdin, fault)
        passing = {path: pid for path, (pid, _) in found.items() if not os.path.exists(path) and not path.endswith(RECEIPT)}
        names.append({re.sub(rf"\d{{8}}T\d{{6}}\.\d{{6}}Z|\b{pid}\b", "", path) for path, pid in passing.items()})
    assert names[0] & names[1] == set()


def lock_of(tmp_path):
    return tmp_path / "r.db-sweep.lock"


@pytest.mark.parametrize("victim", ["victim", "nowhere"])
def test_sweep_does_not_write_through_a_symlink_at_its_lock(use_schema, tmp_path, victim):
    use_schema("CREATE TABLE t (n INTEGER, x REAL);")
    (tmp_path / "victim").write_text("precious")
    lock_of(tmp_path).symlink_to(tmp_path / victim)
    done = sweep("r.db", "-p", "n=1", "--", *PRINTING)
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "nowhere").exists()
    if done.returncode:
        check_line(done, "r.db-sweep.lock", status=done.returncode)
    else:
        assert count("r.db") == 1


def test_sweep_says_that_its_lock_is_a_fifo(use_schema, tmp_path):
    use_schema("CREATE TABLE t (n INTEGER, x REAL);")
    os.mkfifo(lock_of(tmp_path))
    done = sweep("r.db", "-p", "n=1", "--", *PRINTING, timeout=10)
    message = check_line(done, "r.db-sweep.lock", status=done.returncode)
    assert done.returncode in (1, 75) and "None" not in message
    assert not os.path.exists("r.db")


# -------------------------------------------------------------------------------------------------- rights


def lax_umask():
    os.umask(0o022)


def rights(path):
    return os.lstat(path).st_mode & 0o777


def too_open(folder, mode=0o600):
    """Return what under *folder* others may read, write or enter, though the database's *mode* does not let them.

    The lock of a sweep holds no results.
    """
    for_folders = mode | (mode & 0o444) >> 2
    found = {}
    for parent, folders, files in os.walk(folder):
        for names, allowed in (folders, for_folders), (files, mode):
            found.update({name: oct(rights(os.path.join(parent, name))) for name in names
                          if rights(os.path.join(parent, name)) & 0o077 & ~allowed and not name.endswith(".lock")})
    return found


@pytest.fixture(params=[0o600, slow(0o640)], ids=["0600", "0640"])
def guarded(request, tmp_path, monkeypatch):
    """A results file in a folder of its own, which is the working one, and its mode."""
    folder = tmp_path / "guarded"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "results.db"
    dbtool.insert(str(path), [RECORD])
    path.chmod(request.param)
    return path, request.param


@pytest.mark.parametrize(("stdin", "fault", "status"), [
    (b"[1]", "", 1), (b'{"nope": "' + b"x" * LARGE + b'"}', "", 1), (GOOD, NO_FLUSH, 75)],
    ids=["little", "much", "with a receipt"])
def test_insert_keeps_with_no_more_rights_than_the_database_has(guarded, stdin, fault, status):
    path, mode = guarded
    done = run("insert", "results.db", stdin=stdin, preexec_fn=lax_umask, before=traced(fault) if fault else ())
    assert done.returncode == status and len(kept(path)) == 1
    assert bool(fault) == Path(f"{kept(path)[0]}{RECEIPT}").exists()
    assert too_open(path.parent, mode) == {}


def test_insert_holds_much_input_with_no_more_rights_than_the_database_has(guarded, temporary):
    path, mode = guarded
    with started("insert", "results.db", preexec_fn=lax_umask) as child:
        give(child, json.dumps({**RECORD, "metadata": "x" * LARGE}).encode())
        # While it waits for the rest:
        assert too_open(path.parent, mode) == {} and too_open(temporary, mode) == {}
        check_well(end(child))


def test_insert_keeps_elsewhere_with_no_more_rights_than_the_database_has(guarded, temporary):
    path, mode = guarded
    Path(f"{path}-kept").write_text("in the way")
    check_line(run("insert", path, stdin=b"[1]", cwd="/proc", preexec_fn=lax_umask), temporary)
    assert len(os.listdir(temporary)) == 1 and too_open(temporary, mode) == {}


def test_insert_keeps_for_the_user_alone_where_there_is_no_database_and_the_umask_says_so(tmp_path):
    assert run("insert", "results.db", stdin=b"[1]", preexec_fn=lambda: os.umask(0o077)).returncode == 1
    (file,) = kept("results.db")
    assert rights(file) == 0o600 and too_open(tmp_path) == {}


@pytest.mark.parametrize("target", ["copy.db", "copy.db.gz", "copy.db.xz"])
def test_snapshot_has_no_more_rights_than_the_database_has(guarded, target):
    path, mode = guarded
    check_well(run("snapshot", "results.db", target, preexec_fn=lax_umask))
    assert os.path.exists(target) and too_open(path.parent, mode) == {}


def test_sweep_leaves_logs_with_no_more_rights_than_the_database_has(guarded, temporary):
    path, mode = guarded
    script = ('head -c 8000000 /dev/zero | tr "\\0" x; echo; touch "printed-$1"; while test ! -e go; do sleep 0.1; done;'
              ' exit 3')
    with started("results.db", "-p", "layers=a,b", "--jobs", "2", "--", "sh", "-c", script, "sh", "{layers}", script=SWEEP,
                 preexec_fn=lax_umask) as child:
        wait_for(lambda: os.path.exists("printed-a") and os.path.exists("printed-b"))
        for name in "printed-a", "printed-b":
            os.unlink(name)
        assert too_open(path.parent, mode) == {} and too_open(temporary, mode) == {}
        Path("go").touch(0o600)
        assert end(child).returncode == 1
    assert len(os.listdir("results.db-sweep")) == 2
    assert too_open(path.parent, mode) == {}


# ------------------------------------------------------------------------------------------- equal names

SAME_MOMENT = f"""import os, sys, time
time.time, time.time_ns, os.getpid = lambda: 1.7e9 + 0.123456, lambda: 1_700_000_000_123_456_000, lambda: 4711
sys.path.insert(0, {str(ROOT)!r})
import dbtool
sys.exit(dbtool.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("place", "at_once", "size"), [
    ("beside", False, 0), ("beside", True, LARGE), slow("beside", True, 0), slow("beside", False, LARGE),
    ("elsewhere", False, 0), slow("elsewhere", True, LARGE), slow("elsewhere", True, 0), slow("elsewhere", False, LARGE)])
def test_insert_does_not_overwrite_what_another_kept_at_the_same_moment(db_path, tmp_path, place, at_once, size):
    """As on two nodes, or in two containers, that have the same name, and there the same process number."""
    inputs = [b"[1]" + b" " * size, b"[2]" + b" " * size]
    if place == "elsewhere":
        Path(f"{db_path}-kept").write_text("in the way")
    with contextlib.ExitStack() as stack:
        children, done = [], []
        for data in inputs:
            children.append(stack.enter_context(started(SAME_MOMENT, "insert", db_path, script="-c")))
            give(children[-1], data)
            if not at_once:
                done.append(end(children[-1]))
        done = done or [end(child) for child in children]
    files = [*kept(db_path), *tmp_path.glob("dbtool-kept-*.json")]
    found = {file.read_bytes(): file for file in files}
    assert [data[:3] for data in inputs if data in found] == [b"[1]", b"[2]"]
    for child, data in zip(done, inputs):
        check_line(child, found[data])


# --------------------------------------------------------------------------------- no room for a copy


@pytest.fixture
def cramped(tmp_path, monkeypatch):
    """A disk of 1 MB with all the places where copies go."""
    with small_disk(tmp_path, 1) as disk:
        monkeypatch.chdir(disk)
        monkeypatch.setenv("TMPDIR", str(disk))
        yield disk
        monkeypatch.chdir(tmp_path)


MUCH = 80_000_000
LINEAR_S = 5.0  # of processor time: copying all that is there for each piece that comes exceeds it by far


def cpu_seconds():
    """Return the processor time of the programs that the tests have started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_sweep_takes_a_job_that_prints_much_without_room_for_it(cramped, tmp_path, use_schema):
    use_schema(SIMPLE)
    (tmp_path / "job.py").write_text(f"for _ in range({MUCH} // 1000): print('x' * 999)\nprint('{{\"loss\": 1}}')\n")
    before = cpu_seconds()
    # Where no log can be: it would take the room that the database needs.
    done = sweep("r.db", "-p", "n=1", "--logs", "/proc/logs", "--", sys.executable, str(tmp_path / "job.py"), timeout=300)
    assert cpu_seconds() - before < LINEAR_S, done.stderr[-500:]
    assert done.returncode == 0 and rows_of("r.db") == [(1, 1.0)], done.stderr[-500:]


@pytest.mark.slow
def test_insert_takes_much_without_room_for_it(cramped, use_schema):
    """It can't be stored or kept anywhere, so it stands on standard error."""
    use_schema("CREATE TABLE t (n INTEGER NOT NULL, x TEXT);")
    line = json.dumps({"n": 1, "x": "x" * 970}).encode() + b"\n"
    data = line * (MUCH // len(line))
    before = cpu_seconds()
    done = run("insert", "r.db", stdin=data, timeout=300)
    assert cpu_seconds() - before < LINEAR_S
    assert done.returncode == 75 and done.stderr.startswith(data.rstrip())
    assert done.stderr[len(data):].count(b"\n") == 1


# ------------------------------------------------------------------------------------- schemas that do more

TABLE, ATTACH, VACUUM = "CREATE TABLE t (a INTEGER);", "ATTACH 'x.db' AS x;", "VACUUM INTO 'copy.db';"


@pytest.mark.parametrize(("command", "sql"), [
    ("schema", f"{TABLE} {ATTACH} CREATE TABLE x.t (a);"), ("schema", f"{ATTACH} CREATE TABLE x.t (a); {TABLE}"),
    ("schema", TABLE + ATTACH), ("schema", f"{TABLE} ATTACH '' AS x; CREATE TABLE x.t (a);"), ("schema", TABLE + VACUUM),
    ("insert", f"{TABLE} {ATTACH} CREATE TABLE x.t (a);"), ("insert", TABLE + VACUUM), ("sweep", TABLE + VACUUM)])
def test_a_schema_that_would_open_files_is_refused(tmp_path, command, sql):
    (tmp_path / "my.sql").write_text(sql)
    if command == "sweep":
        check_line(sweep("results.db", "-p", "a=1", "--dry-run", "--schema", "my.sql"), "my.sql")
    elif command == "schema":
        check_line(run("schema", "--schema", "my.sql"), "my.sql")
    else:
        check_kept(run("insert", "results.db", "--schema", "my.sql", stdin=b'{"a": 1}'), Path("results.db"), b'{"a": 1}')
    assert set(os.listdir()) <= {"my.sql", "results.db-kept"}


@pytest.mark.parametrize("command", [["insert", "results.db"], ["schema"], ["results.db", "-p", "a=1", "--dry-run"]],
                         ids=["insert", "schema", "sweep"])
@pytest.mark.slow
def test_an_endless_schema_is_ended_by_a_signal(tmp_path, command):
    (tmp_path / "my.sql").write_text("CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
                                     " SELECT max(i) AS a FROM n;")
    is_sweep = command[0] == "results.db"
    with started(*command, "--schema", "my.sql", script=SWEEP if is_sweep else "") as child:
        child.stdin.write(b'{"a": 1}')
        child.stdin.close()
        child.stdin = None
        time.sleep(1)
        assert child.poll() is None
        child.terminate()
        done = end(child, 2)
    if command[0] == "insert":
        check_kept(done, Path("results.db"), b'{"a": 1}', 143)
    else:
        check_line(done, status=done.returncode)
        assert done.returncode in ((75, 143) if is_sweep else (143,))


# ----------------------------------------------------------------------------------------- huge values

LIMITED = pytest.mark.skipif(sys.version_info < (3, 11), reason="sqlite3 has setlimit since Python 3.11")


@LIMITED
@pytest.mark.parametrize("value", [
    "zeroblob(1000000000)", "length(printf('%900000000d', 1))", "length(hex(zeroblob(200000000)))",
    "length(replace(hex(zeroblob(40000000)), '0', 'abc'))"], ids=["zeroblob", "printf", "hex", "replace"])
@pytest.mark.parametrize("style", ["csv", slow("jsonl")])
def test_query_refuses_a_huge_value_at_once(db_path, value, style):
    dbtool.insert(str(db_path), [RECORD])
    words = [sys.executable, "-c", PEAK, sys.executable, DBTOOL, "query", "results.db", f"SELECT {value}", "--format", style]
    began = time.monotonic()
    done = subprocess.run(words, stderr=subprocess.PIPE, check=True, text=True, timeout=60,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)))
    assert time.monotonic() - began < 5
    *messages, measured = done.stderr.splitlines()
    status, peak = map(int, measured.split())
    if "printf" in value and status == 0:  # some versions of SQLite give NULL
        assert messages == []
    else:
        assert status == 1 and len(messages) == 1 and messages[0].startswith("dbtool: results.db: "), done.stderr
    assert peak < 500 * 1024


NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "


@pytest.mark.slow
@pytest.mark.parametrize("sql", [
    NUMBERS + "SELECT max(i) FROM n", NUMBERS + "SELECT count(*) FROM n WHERE printf('%9999d', i) LIKE '%a'",
    NUMBERS.replace("n)", "n LIMIT 90000000)") + "SELECT i FROM n ORDER BY i * 7919 % 1000003"],
    ids=["count", "text", "sort"])
def test_query_ends_at_once_on_ctrl_c(db_path, sql):
    dbtool.insert(str(db_path), [RECORD])
    with started("query", "results.db", sql) as child:
        time.sleep(1.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        check_line(end(child, 2), "SIGINT", status=130)


# ------------------------------------------------------------------------------------- names of files


def paste(line, folder):
    """Run a line that a message gave, where `python3` and the scripts are those of this test."""
    line = re.sub(r"\S*python3?\S* \S*?(dbtool|sweep)\.py", lambda found: f"{shlex.quote(sys.executable)} "
                  + shlex.quote(str(ROOT / f"{found[1]}.py")), line)
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=30, check=False, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "escaped"), [
    ("new\nline.db", r"new\nline.db"), ("carriage\rreturn.db", r"carriage\rreturn.db"),
    ("it's\nnew.db", r"it\'s\nnew.db"), ("back\\slash\nnew.db", r"back\\slash\nnew.db")],
    ids=["newline", "carriage return", "quote", "backslash"])
def test_insert_into_a_file_whose_name_has_several_lines(tmp_path, name, escaped):
    done = run("insert", name, stdin=b"[1]")
    message = check_line(done)
    assert "\r" not in message
    shown = [escaped, escaped.replace("\\'", "'"), escaped.replace("\\\\", "\\")]
    assert any(text in message for text in shown), message
    (file,) = kept(tmp_path / name)
    file.write_bytes(GOOD)
    check_well(paste(message.rstrip("\n").rpartition("run: ")[2], tmp_path))
    assert count(name, "results") == 1 and not file.exists()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["new\nline.db", slow("carriage\rreturn.db")], ids=["newline", "carriage return"])
def test_sweep_of_a_file_whose_name_has_several_lines(tmp_path, use_schema, name):
    use_schema(SIMPLE)
    script = 'test -e good && echo "{\\"loss\\": 1}"'
    done = sweep(name, "-p", "n=1", "--", "sh", "-c", script)
    lines = done.stderr.decode().split("\n")
    assert done.returncode == 1 and all(line.startswith("sweep: ") for line in lines[:-1]), lines
    assert lines[-1] == "" and "\r" not in done.stderr.decode() and name.encode() not in done.stderr
    (tmp_path / "good").touch()
    done = paste(lines[-2].rpartition("run: ")[2], tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows_of(name) == [(1, 1.0)]


# ----------------------------------------------------------------------- a sweep whose own pipes fail

FAILING_WRITE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Fail FAIL_TIMES writes to a pipe that are short and begin like FAIL_WRITE. */
ssize_t write(int fd, const void *data, size_t size)
{
    static ssize_t (*real)(int, const void *, size_t);
    static int failed;
    const char *wanted = getenv("FAIL_WRITE"), *times = getenv("FAIL_TIMES");
    struct stat status;
    if (!real)
        real = dlsym(RTLD_NEXT, "write");
    if (wanted && size && size < 16 && !strncmp(data, wanted, strlen(wanted)) && !fstat(fd, &status)
        && S_ISFIFO(status.st_mode) && failed < atoi(times)) {
        failed++;
        errno = EIO;
        return -1;
    }
    return real(fd, data, size);
}
"""


@pytest.fixture(scope="module")
def failing_write(tmp_path_factory):
    """A library to preload, which lets writes fail."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "write.c").write_text(FAILING_WRITE)
    subprocess.run([need_program("gcc"), "-shared", "-fPIC", "-o", folder / "write.so", folder / "write.c", "-ldl"], check=True)
    return str(folder / "write.so")


def sleeping(seconds):
    """Return how many processes sleep for so many seconds."""
    done = subprocess.run(["ps", "-ww", "-eo", "stat=,args="], capture_output=True, text=True, check=True)
    return sum(line.endswith(f" sleep {seconds}") and line[0] != "Z" for line in done.stdout.splitlines())


@contextlib.contextmanager
def sweep_of_sleepers(**options):
    """Start a sweep of 6 jobs, two at once; yield it and how long they sleep, by which they can be told from all others."""
    seconds = f"1.{os.getpid():08}"
    script = f'sleep {seconds}; echo "{{\\"loss\\": 1}}"; echo >> finished'
    with started("r.db", "-p", "n=1..6", "--jobs", "2", "--", "sh", "-c", script, script=SWEEP, **options) as child:
        yield child, seconds


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "times"), [("+", 1), ("+", 99), ("-", 1), ("-", 99), (".", 1), (".", 99)], ids=[
    "one job begins", "jobs begin", "one job ends", "jobs end", "one result is stored", "results are stored"])
def test_sweep_that_cannot_write_to_its_own_pipes_ends_and_leaves_no_job(use_schema, failing_write, prefix, times):
    """The guard is not told of a job, or the wait is not ended: no job runs on alone, and what finished is stored."""
    use_schema(SIMPLE)
    environment = {**os.environ, "LD_PRELOAD": failing_write, "FAIL_WRITE": prefix, "FAIL_TIMES": str(times)}
    most, deadline = 0, time.monotonic() + 25
    with sweep_of_sleepers(env=environment) as (child, seconds):
        while child.poll() is None:
            most = max(most, sleeping(seconds))
            assert time.monotonic() < deadline, "it hangs"
            time.sleep(0.1)
        done = end(child)
    assert most <= 2 and sleeping(seconds) == 0
    assert b"Traceback" not in done.stderr, done.stderr
    finished = len(Path("finished").read_text()) if os.path.exists("finished") else 0
    assert done.returncode in (0, 1, 75) and finished == (count("r.db") if finished else 0), done.stderr
    assert (done.returncode == 0) == (finished == 6)


@pytest.mark.slow
def test_sweep_whose_guard_is_killed_goes_on(use_schema):
    use_schema(SIMPLE)
    with sweep_of_sleepers() as (child, seconds):
        wait_for(lambda: sleeping(seconds) == 2)
        done = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(child.pid)], capture_output=True, text=True, check=True)
        (guard,) = [int(line.split()[0]) for line in done.stdout.splitlines() if "sweep.py" in line]
        os.kill(guard, signal.SIGKILL)
        done = end(child, 30)
    assert sleeping(seconds) == 0
    assert b"Traceback" not in done.stderr and done.returncode == 0 and count("r.db") == 6, done.stderr


# ---------------------------------------------------------------------------------------- command lines


def test_insert_manual_without_needed_columns_is_wrong_usage(db_path):
    check_line(run("insert_manual", db_path, "--author", "Philip"), "algorithm", "rmse_global", status=2)
    assert not db_path.exists()


@pytest.mark.parametrize("flag", ["--schema", "--table"])
def test_query_takes_no_schema(db_path, flag):
    dbtool.insert(str(db_path), [RECORD])
    check_line(run("query", db_path, "SELECT 1", flag, "results"), flag, status=2)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("flags", [[], ["--skip-text"]], ids=["plain", "skip-text"])
@pytest.mark.parametrize("data", [
    BOM + GOOD, BOM + b"\r\n" + GOOD + b"\r\n", BOM + b"[" + GOOD + b"]", BOM + GOOD + b"\n" + GOOD],
    ids=["object", "line ends", "array", "lines"])
def test_insert_accepts_a_byte_order_mark(db_path, flags, data):
    check_well(run("insert", db_path, *flags, stdin=data))
    assert count(db_path, "results") == data.count(b"Philip")


def test_merge_of_rows_that_differ_exits_1_and_counts(tmp_path, use_schema):
    use_schema(NAMED)
    dbtool.insert("here.db", [A, B])
    dbtool.insert("there.db", [A, {**B, "x": 9}, C])
    shutil.copy("here.db", "same.db")
    done = run("merge", "here.db", "there.db", "same.db")
    assert done.returncode == 1 and b"there.db: 1 added, 2 known" in done.stdout, done
    assert b"same.db: 0 added, 2 known" in done.stdout
    assert done.stderr.count(b"\n") == 1 and b"there.db" in done.stderr
    assert sorted(rows_of("here.db", columns="k, x")) == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    done = run("merge", "here.db", "same.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"same.db: 0 added, 2 known\n", b"")


# -------------------------------------------------------------------------------------------- these tests


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_tests_end_programs_by_signals_that_they_were_started_to_ignore(number):
    """As in the background of a script, or under nohup."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_nothing_lost.py", "-k",
             "a_signal_while_reading"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60, check=False,
                          preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert done.returncode == 0, done.stdout.decode()[-2000:]


# ------------------------------------------------------------------------------------------ found by a reader


@pytest.mark.parametrize("residue", ["\x1b(B\x1b[m", "\x0f", "\x1b]0;a title\x07", "\x1b]0;a title\x1b\\", "\x1b7", "\x1b8\x1b[K"],
                         ids=["sgr0", "shift in", "title", "title, ended otherwise", "save", "restore"])
def test_insert_skip_text_finds_a_result_behind_what_terminals_leave(db_path, residue):
    check_well(run("insert", db_path, "--skip-text", stdin=residue.encode() + GOOD + b"\n" + residue.encode() + GOOD))
    assert count(db_path, "results") == 2


def test_retry_of_a_key_that_is_no_random_default(db_path, use_schema):
    """An equal row of another run, at another time, does not make an unstored result a stored one."""
    use_schema("CREATE TABLE t (ts TEXT PRIMARY KEY DEFAULT (strftime('%Y-%m-%dT%H:%M:%f', 'now')), x INT);")
    store(db_path, b'{"x": 1}')
    run("insert", db_path, stdin=b'{"x": 1}', before=traced(NO_FLUSH))
    (file,) = kept(db_path)
    check_well(run("retry", db_path))
    assert count(db_path) == 2 and not file.exists()


def test_merge_names_rows_that_a_trigger_drops(db_path, tmp_path):
    dbtool.insert(str(db_path), [RECORD])
    dbtool.insert(str(tmp_path / "o.db"), [RECORD])
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executescript("CREATE TRIGGER t BEFORE INSERT ON results BEGIN SELECT RAISE(IGNORE); END;")
    check_line(run("merge", db_path, "o.db"), "1 rows are not there after merging")


def test_merge_goes_on_when_nobody_reads_what_it_says(db_path, tmp_path):
    for name in "abc":
        dbtool.insert(str(tmp_path / f"{name}.db"), [RECORD])
    subprocess.run(["bash", "-c", f"'{sys.executable}' '{script_of('merge')}' merge '{db_path}' a.db b.db c.db | true"], check=True)
    assert count(db_path, "results") == 3


def test_insert_that_has_nowhere_to_keep_and_nobody_to_tell_fails(db_path):
    done = subprocess.run(["bash", "-c", f"ulimit -f 0; trap '' XFSZ; echo [1] | '{sys.executable}' '{DBTOOL}' insert '{db_path}'"
                           " 2> >(exec true); exit ${PIPESTATUS[1]}"], check=False, capture_output=True)
    assert done.returncode not in (0, 141)


def test_insert_into_a_file_that_is_replaced_meanwhile_fails(db_path):
    dbtool.insert(str(db_path), [RECORD])
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with started("insert", db_path) as child:
            child.stdin.write(GOOD)
            child.stdin.close()
            child.stdin = None
            time.sleep(0.6)
            os.unlink(db_path)
            db.execute("ROLLBACK")
            done = end(child, 10)
    assert done.returncode == 75 and b"was removed or replaced meanwhile" in done.stderr and len(kept(db_path)) == 1


@pytest.mark.parametrize("data", [b"[]", b""], ids=["empty array", "nothing"])
def test_retry_of_a_kept_file_without_a_record_is_no_traceback(db_path, data):
    keep_by_hand(db_path, data)
    done = run("retry", db_path)
    assert b"Traceback" not in done.stderr


def test_retry_that_a_reader_held_up_leaves_no_doubt(db_path, use_schema, monkeypatch):
    """COMMIT waits for a reader of a rollback journal, in vain: that it did not happen is certain."""
    use_schema(NUMBERED)
    monkeypatch.setenv("DBTOOL_JOURNAL", "delete")
    store(db_path, LIKE_OTHERS)
    file = keep_by_hand(db_path, LIKE_OTHERS)
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM sqlite_master").fetchall()
        assert run("retry", db_path, "--timeout", "0.3").returncode == 75
        db.execute("ROLLBACK")
    check_well(run("retry", db_path))
    assert count(db_path) == 2 and not file.exists()


def test_query_output_leaves_the_users_folders_alone(db_path, tmp_path):
    dbtool.insert(str(db_path), [RECORD])
    (tmp_path / "keep-kept").mkdir()
    check_line(run("query", db_path, "SELECT abs(-9223372036854775808)", "--output", "keep-kept/o.csv"), "overflow")
    assert (tmp_path / "keep-kept").is_dir()
    assert run("query", db_path, "SELECT 1", "--output", "study-kept/o.csv").returncode == 1
    assert not (tmp_path / "study-kept").exists()

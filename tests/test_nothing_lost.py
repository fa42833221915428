"""A result that reached standard input is a row, or in a file that the message names: one test for each way to fail."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import DBTOOL, RECORD, ROOT, kept, need, need_program, peak_memory, process, small_disk

import dbtool

DATA = json.dumps(RECORD, indent=1).encode()


def count(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT count(*) FROM results").fetchone()[0]


def check_refusal(done, path, data, status=1):
    """See the status, the one line that names the database and the kept file, and the kept bytes; return that file."""
    assert (done.returncode, done.stdout) == (status, b"")
    message = done.stderr.decode()
    assert message.startswith(f"dbtool: {path}: ") and message.count("\n") == 1 and "Traceback" not in message
    (file,) = kept(path)
    assert f"the input is kept in {file}; when that is fixed, run: python3 dbtool.py retry {path}" in message
    assert file.read_bytes() == data
    assert not list(file.parent.glob(".*"))
    return file


def check_retry(path, rows=1):
    """See that retry stores what was kept, once, however often it is run."""
    for _ in range(2):
        done = process("retry", path)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert count(path) == rows
        assert kept(path) == [] and not os.path.exists(f"{path}-kept")


GOOD = json.dumps(RECORD).encode()


BAD_INPUT = [
    (GOOD.replace(b'"epochs": 1', b'"epochs": "1"'), 'record 1: column epochs: expected a 64-bit integer, got "1"'),
    (GOOD.replace(b'"epochs": 1, ', b""), "record 1: column epochs missing"),
    (GOOD.replace(b"epochs", b"epoch"), 'record 1: "epoch" is no column of results; did you mean "epochs"?'),
    (GOOD.replace(b'"Philip"', b'"\\ud800"'), "record 1: column author: "),
    (GOOD.replace(b'"epochs": 1', b'"epochs": 9223372036854775808'), "record 1: column epochs: expected a 64-bit"),
    (GOOD.replace(b'"epochs": 1', b'"epochs": 1' + b"0" * 5000), "record 1"),
    (GOOD.replace(b"1.0", b"1e999"), "record 1 (line 1): not valid JSON: the number 1e999 is too large"),
    (GOOD[:-1] + b', "metadata": ' + b"[" * 9999 + b"]" * 9999 + b"}", "record 1"),
    (GOOD + GOOD[:-9], "record 2 (line 1): not valid JSON: it ends in the middle"),
    (GOOD + b"\nbye", "record 2 (line 2): expected a JSON object"),
    (GOOD.replace(b"Philip", b"Phil\xff"), "record 1 (line 1): byte 0xff is not UTF-8"),
    (b"\xef\xbb\xbf" + GOOD[:-1], "record 1 (line 1): not valid JSON: it ends in the middle"),
    (GOOD.replace(b": 1,", b": 1 "), "record 1 (line 1): not valid JSON: expecting ',' delimiter"),
    (b"\n \n", "no JSON on standard input"),
]


@pytest.mark.parametrize(("data", "said"), [
    pytest.param(*case, id=str(number), marks=[pytest.mark.slow] if number % 3 else []) for number, case in enumerate(BAD_INPUT)])
def test_bad_input_is_kept_until_it_is_mended(db_path, data, said):
    file = check_refusal(process("insert", db_path, stdin=data), db_path, data)
    done = process("retry", db_path)
    assert done.returncode == 1 and done.stderr.decode().startswith(f"dbtool: {db_path}: {file}: {said}")
    assert done.stderr.count(b"\n") == 1 and file.read_bytes() == data
    file.write_bytes(DATA)
    check_retry(db_path)


def test_empty_input_leaves_nothing_to_keep(db_path, tmp_path):
    done = process("insert", db_path)
    assert done.returncode == 1 and done.stderr.decode() == (
        f"dbtool: {db_path}: no JSON on standard input: did the program before the pipe fail?\n")
    assert list(tmp_path.iterdir()) == []


def test_closed_standard_input(db_path):
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' '{DBTOOL}' insert '{db_path}' <&-"], capture_output=True,
                          check=False)
    assert done.returncode == 1 and b"no JSON on standard input" in done.stderr


def test_a_regular_file_needs_no_copy(db_path, tmp_path):
    (tmp_path / "bad.json").write_text("[1]")
    with open(tmp_path / "bad.json", "rb") as file:
        done = subprocess.run([sys.executable, DBTOOL, "insert", db_path], stdin=file, capture_output=True, check=False)
    assert done.returncode == 1 and b"standard input is a file, so nothing is lost" in done.stderr
    assert kept(db_path) == []
    # A file that has lost its name, as a here-document in the shell, would be gone with this process.
    with open(tmp_path / "bad.json", "rb") as file:
        os.unlink(tmp_path / "bad.json")
        done = subprocess.run([sys.executable, DBTOOL, "insert", db_path], stdin=file, capture_output=True, check=False)
    check_refusal(done, db_path, b"[1]")


def test_missing_schema(db_path):
    check_refusal(process("insert", db_path, "--schema", "none.sql", stdin=DATA), db_path, DATA)
    check_retry(db_path)


@pytest.mark.parametrize("journal", ["wal", pytest.param("delete", marks=pytest.mark.slow)])
def test_locked_past_the_timeout(db_path, journal):
    assert process("insert", db_path, stdin=DATA).returncode == 0
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
        db.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        done = process("insert", db_path, "--timeout", "0.5", stdin=DATA)
        assert 0.5 <= time.monotonic() - start < 5
        check_refusal(done, db_path, DATA, 75)
        assert b"locked by another process" in done.stderr
        done = process("retry", db_path, "--timeout", "0")
        assert done.returncode == 75 and b"locked" in done.stderr and kept(db_path)
    check_retry(db_path, 2)


def test_the_database_is_a_folder(db_path):
    db_path.mkdir()
    done = process("insert", db_path, stdin=DATA)
    check_refusal(done, db_path, DATA)
    assert b"is a folder" in done.stderr
    db_path.rmdir()
    check_retry(db_path)


def test_the_database_is_a_text_file(db_path):
    db_path.write_text("a text that is no database, and is longer than its header would be " * 9)
    done = process("insert", db_path, stdin=DATA)
    check_refusal(done, db_path, DATA)
    assert b"is not an SQLite database" in done.stderr
    db_path.unlink()
    check_retry(db_path)


def test_the_database_is_damaged(db_path, tmp_path):
    lines = b"\n".join([GOOD] * 1000)
    assert process("insert", db_path, stdin=lines).returncode == 0
    good = db_path.read_bytes()
    db_path.write_bytes(good[:4096] + b"\xaa" * (len(good) - 4096))
    done = process("insert", db_path, stdin=DATA)
    check_refusal(done, db_path, DATA)
    assert b"is damaged" in done.stderr
    db_path.write_bytes(good)
    check_retry(db_path, 1001)


def test_there_is_no_such_folder(tmp_path):
    path = tmp_path / "none" / "results.db"
    done = process("insert", path, stdin=DATA)
    assert done.returncode == 1 and f"there is no folder {tmp_path}/none".encode() in done.stderr
    path.parent.mkdir(exist_ok=True)
    check_retry(path)


@pytest.fixture
def mount(tmp_path):
    """A file system of 1 MB."""
    need(os.geteuid() == 0 and shutil.which("mount"), "root, to mount")
    folder = tmp_path / "mount"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def spare(folder):
    return sorted(folder.glob("dbtool-kept-*.json"))


def test_a_read_only_folder(mount, tmp_path):
    path = mount / "results.db"
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    done = process("insert", path, stdin=DATA)
    assert done.returncode == 1 and b"may not write" in done.stderr and done.stderr.count(b"\n") == 1
    (file,) = spare(tmp_path)
    assert file.read_bytes() == DATA and str(file).encode() in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    check_retry(path)
    assert spare(tmp_path) == []


def test_the_kept_file_goes_to_the_temporary_folder_when_the_working_one_is_read_only(mount, tmp_path):
    path, temporary = mount / "results.db", tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    done = process("insert", path, stdin=DATA, cwd=mount, env=environment)
    (file,) = spare(temporary)
    assert file.read_bytes() == DATA and str(file).encode() in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
    assert process("retry", path, cwd=mount, env=environment).returncode == 0
    assert count(path) == 1 and spare(temporary) == []


@pytest.mark.parametrize("name", ["results.db", "/no-such-folder/results.db"])
def test_the_working_directory_is_gone(tmp_path, name):
    (tmp_path / "gone").mkdir()
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(["sh", "-c", f'cd gone; rmdir ../gone; exec "{sys.executable}" {DBTOOL} insert {name}'], input=DATA,
                          capture_output=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    (file,) = spare(tmp_path / "tmp")
    assert file.read_bytes() == DATA and str(file).encode() in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit is Linux's")
def test_no_file_can_be_opened(db_path):
    import resource

    child = start(db_path)
    child.stdin.write(DATA[:9])
    child.stdin.flush()
    wait_until_read(child)
    resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (3, 3))
    _, said = child.communicate(DATA[9:], timeout=60)
    assert child.returncode in (1, 75) and b"Traceback" not in said
    assert DATA in said and b"stands above" in said


def test_a_disk_without_room_for_another_file(tmp_path):
    with small_disk(tmp_path, 1, "nr_inodes=2") as disk:
        (disk / "last").touch()
        done = process("insert", disk / "results.db", stdin=DATA)
        assert done.returncode == 75 and b"cannot be opened: No space left on device" in done.stderr
        assert [file.read_bytes() for file in spare(tmp_path)] == [DATA]


@pytest.mark.slow
def test_not_enough_memory(db_path):
    import resource

    data = json.dumps({**RECORD, "author": "x" * 60_000_000}).encode()
    done = process("insert", db_path, stdin=data,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (100 << 20, 100 << 20)))
    check_refusal(done, db_path, data, 75)
    check_retry(db_path)


@pytest.mark.slow
def test_a_copy_that_cannot_be_removed_is_no_failure(db_path):
    strace = need_program("strace")
    assert process("insert", db_path, stdin=DATA).returncode == 0
    done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", "inject=unlink:error=EIO", sys.executable, DBTOOL, "insert",
                           db_path], input=DATA * 20_000, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert count(db_path) == 20_001


def test_nowhere_to_keep_leaves_standard_error(mount):
    subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
    path = mount / "results.db"
    environment = {**os.environ, "TMPDIR": str(mount)}
    done = process("insert", path, stdin=DATA, cwd=mount, env={**environment, "PYTHONPATH": str(mount)},
                   preexec_fn=only_this_folder_can_be_written)
    assert done.returncode == 1
    assert done.stderr.startswith(DATA) and b"the input could not be kept in any file and stands above" in done.stderr


def only_this_folder_can_be_written():
    """Let no file grow: every write to a file fails, as on a disk that is full everywhere."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def fill(folder):
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 1024)


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(mount, tmp_path, exists):
    path = mount / "results.db"
    if exists:
        assert process("insert", path, stdin=DATA).returncode == 0
    fill(mount)
    done = process("insert", path, stdin=DATA)
    assert done.returncode == 75 and done.stderr.count(b"\n") == 1, done.stderr
    files = [*spare(tmp_path), *kept(path)]
    assert [file.read_bytes() for file in files] == [DATA] and str(files[0]).encode() in done.stderr
    (mount / "filler").unlink()
    check_retry(path, 1 + exists)
    assert spare(tmp_path) == []


@pytest.mark.slow
def test_the_disk_is_full_in_the_middle_of_much_input(mount, tmp_path):
    """The copy begins beside the database, does not fit, and moves."""
    data = b"\n".join([GOOD] * 40_000)
    assert len(data) > 2 * dbtool.SPOOL_BYTES
    path = mount / "results.db"
    done = process("insert", path, stdin=data)
    assert done.returncode == 75 and b"full" in done.stderr
    (file,) = spare(tmp_path)
    assert file.read_bytes() == data
    assert not list(tmp_path.glob(".*")) and not list(mount.glob("*-kept/.*"))
    subprocess.run(["mount", "-o", "remount,size=128m", mount], check=True)
    check_retry(path, 40_000)


def test_much_input_that_is_refused(db_path):
    data = b"\n".join([GOOD] * 30_000) + b"\nbye"
    check_refusal(process("insert", db_path, stdin=data), db_path, data)


def test_much_input_leaves_no_copy_when_it_is_stored(db_path, tmp_path):
    assert process("insert", db_path, stdin=b"\n".join([GOOD] * 30_000)).returncode == 0
    assert count(db_path) == 30_000
    assert [path.name for path in tmp_path.iterdir()] == ["results.db"]


# Signals


def start(path, *arguments):
    return subprocess.Popen([sys.executable, DBTOOL, "insert", str(path), *arguments], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until_read(child):
    """Wait until the child has taken all that is in its pipe."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        (waiting,) = struct.unpack("i", fcntl.ioctl(child.stdin, termios.FIONREAD, b"\0" * 4))
        if not waiting:
            time.sleep(0.05)
            return
        time.sleep(0.01)
    raise AssertionError("the child did not read")


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ONE_SIGNAL = [pytest.param(number, marks=[pytest.mark.slow] * (number != signal.SIGTERM)) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_reading(db_path, number):
    with start(db_path) as child:
        child.stdin.write(DATA)
        child.stdin.flush()
        wait_until_read(child)
        child.send_signal(number)
        status = child.wait(10)
        done = subprocess.CompletedProcess([], status, child.stdout.read(), child.stderr.read())
    check_refusal(done, db_path, DATA, 128 + number)
    assert f"stopped by {number.name}".encode() in done.stderr
    assert not db_path.exists()
    check_retry(db_path)


def test_a_signal_before_the_first_read_keeps_what_waits_in_the_pipe(db_path):
    strace = need_program("strace")
    done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", "inject=getcwd:signal=SIGTERM", sys.executable, DBTOOL,
                           "insert", "results.db"], input=DATA, capture_output=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM and b"stopped by SIGTERM; the input is kept" in done.stderr
    check_retry(db_path)


@pytest.mark.parametrize("number", ONE_SIGNAL)
def test_a_signal_while_waiting_for_the_lock(db_path, number):
    assert process("insert", db_path, stdin=DATA).returncode == 0
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with start(db_path) as child:
            child.stdin.write(DATA)
            child.stdin.flush()
            wait_until_read(child)
            child.stdin.close()
            time.sleep(0.3)
            assert child.poll() is None
            begin = time.monotonic()
            child.send_signal(number)
            status = child.wait(10)
            assert time.monotonic() - begin < 2
            done = subprocess.CompletedProcess([], status, child.stdout.read(), child.stderr.read())
        check_refusal(done, db_path, DATA, 128 + number)
    check_retry(db_path, 2)


def test_a_signal_that_the_parent_ignores_is_ignored(db_path):
    with subprocess.Popen(["nohup", sys.executable, DBTOOL, "insert", str(db_path)], stdin=subprocess.PIPE) as child:
        child.stdin.write(DATA)
        child.stdin.flush()
        wait_until_read(child)
        child.send_signal(signal.SIGHUP)
        time.sleep(0.2)
    assert child.returncode == 0 and count(db_path) == 1


@pytest.mark.slow
def test_signals_at_any_time_lose_nothing(db_path):
    """A hundred inserts, each ended at a random moment after it began to read."""
    import random

    rng = random.Random(7)
    process("insert", db_path, stdin=DATA)
    expected = 1
    for _ in range(100):
        with start(db_path) as child:
            child.stdin.write(DATA)
            child.stdin.flush()
            wait_until_read(child)
            child.stdin.close()
            time.sleep(rng.random() * 0.02)
            child.send_signal(rng.choice(SIGNALS))
            assert child.wait(20) in (0, 129, 130, 143)
            assert child.stderr.read().count(b"\n") == (child.returncode != 0)
        expected += 1
    assert count(db_path) + len(kept(db_path)) == expected
    check_retry(db_path, expected)


@pytest.mark.parametrize("second", ONE_SIGNAL)
def test_a_second_signal_loses_nothing(db_path, second):
    for _ in range(5):
        with start(db_path) as child:
            for _ in range(60):
                child.stdin.write(b'{"a": 1}\n' * 10_000)
            wait_until_read(child)
            child.send_signal(signal.SIGINT)
            time.sleep(0.002)
            child.send_signal(second)
            assert child.wait(20) in (130, 128 + second)
            assert b"the input is kept in" in child.stderr.read()
    files = kept(db_path)
    assert len(files) == 5 and all(file.stat().st_size >= 5_400_000 - 65536 for file in files)
    assert not list(files[0].parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["2>/dev/full", "2>&-", "2>&1 | head -1"])
def test_nothing_is_lost_when_standard_error_is(db_path, way):
    command = f"(echo chatter; sleep 0.3; cat rec.json) | '{sys.executable}' '{DBTOOL}' insert '{db_path}' --skip-text {way}"
    with open("rec.json", "wb") as file:
        file.write(DATA)
    subprocess.run(["bash", "-c", command], stdout=subprocess.DEVNULL, check=False, timeout=30)
    assert count(db_path) == 1


def test_a_copy_that_has_nowhere_to_go(mount, tmp_path):
    """Much input, a full disk, and a working folder that takes no files: the temporary folder does."""
    data = b"\n".join([GOOD] * 40_000)
    done = process("insert", mount / "results.db", stdin=data, cwd="/proc", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 75
    (file,) = spare(tmp_path)
    assert file.read_bytes() == data


def test_a_kept_folder_that_cannot_be(db_path, tmp_path):
    os.symlink("/nonexistent/x", f"{db_path}-kept")
    done = process("insert", db_path, stdin=b"[1]")
    assert done.returncode == 1
    (file,) = spare(tmp_path)
    assert str(file).encode() in done.stderr


def test_the_message_names_the_real_place_through_a_symlink(tmp_path):
    (tmp_path / "data").mkdir()
    os.symlink("data/real.db", "link.db")
    done = process("insert", "link.db", stdin=b"[1]")
    (file,) = (tmp_path / "data" / "real.db-kept").iterdir()
    assert str(file).encode() in done.stderr


def test_the_advice_repeats_what_retry_needs(db_path, tmp_path):
    (tmp_path / "my schema.sql").write_text("CREATE TABLE t (a INTEGER DEFAULT 1)")
    done = process("insert", "results.db", "--schema", "my schema.sql", "--skip-text", stdin=b'chatter\n{"a": "x"}')
    assert done.stderr.endswith(b"run: python3 dbtool.py retry results.db --schema 'my schema.sql'\n")
    assert process("insert", "results.db", "--schema", "my schema.sql", stdin=b"{}{}").returncode == 0
    [file] = kept(db_path)
    file.write_bytes(file.read_bytes().replace(b'"x"', b"2"))
    done = process("retry", "results.db", "--schema", "my schema.sql")  # it knows which files may hold text
    assert (done.returncode, done.stderr) == (0, b"") and not kept(db_path)


def test_typed_on_a_terminal_one_end_of_file_is_enough(db_path, tmp_path):
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, DBTOOL, "insert", str(db_path)])
    os.write(terminal, b'{"a": 1}\n\x04')
    deadline = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    (file,) = kept(db_path)
    assert file.read_bytes() == b'{"a": 1}\n'


# Receipts


RECEIPTS = [  # schema, rows there, --on-conflict, what is kept, rows in the end; None where nothing tells
    ("CREATE TABLE t (id TEXT PRIMARY KEY, x TEXT)", [{"id": "A", "x": "1"}], "skip",
     [{"id": "A", "x": "1"}, {"id": "B", "x": "2"}], 2),
    ("CREATE TABLE t (id TEXT PRIMARY KEY, x TEXT)", [{"id": "A", "x": "1"}], "replace",
     [{"id": "A", "x": "1"}, {"id": "B", "x": "2"}], 2),
    ("CREATE TABLE t (id BLOB NOT NULL PRIMARY KEY DEFAULT (randomblob(16)), x REAL)", [{"x": 1.0}], "fail",
     [{"x": 1.0}, {"x": 2.0}], 3),
    ("CREATE TABLE t (id INTEGER PRIMARY KEY, x REAL)", [{"x": 1.0}], "fail", [{"x": 1.0}, {"x": 2.0}], None),
    ("CREATE TABLE t (id INTEGER PRIMARY KEY, x REAL)", [], "fail", [{"id": None, "x": 1.0}], None),
    ("CREATE TABLE t (id INTEGER PRIMARY KEY, x REAL)", [], "fail", [{"id": 7, "x": 1.0}], 1),
    ("CREATE TABLE t (x REAL)", [], "fail", [{"x": 1.0}], None),
    ("CREATE TABLE t (host TEXT DEFAULT localhost, run INT, PRIMARY KEY (host, run))", [], "fail", [{"run": 1}], 1),
    ("CREATE TABLE t (id BLOB PRIMARY KEY DEFAULT (randomblob(16)), x TEXT);"
     "CREATE TRIGGER lower AFTER INSERT ON t BEGIN UPDATE t SET x = lower(x); END;", [], "fail", [{"x": "A"}], 1),
    ("CREATE TABLE t (at TEXT DEFAULT CURRENT_TIMESTAMP, x INT, PRIMARY KEY (at, x))", [], "fail", [{"x": 1}, {"x": 2}], 2),
]


@pytest.mark.parametrize(("schema", "there", "conflict", "data", "rows"), RECEIPTS, ids=range(len(RECEIPTS)))
@pytest.mark.parametrize("committed", [False, True])
def test_a_receipt_tells_whether_a_retry_had_stored(db_path, tmp_path, schema, there, conflict, data, rows, committed):
    """A retry that ended between writing the receipt and COMMIT, or after it, before the file was removed."""
    (tmp_path / "s.sql").write_text(schema)
    table = dbtool.read_schema(str(tmp_path / "s.sql"))
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executescript(schema)
    dbtool.insert(str(db_path), there, table)
    (tmp_path / "results.db-kept").mkdir()
    file = tmp_path / "results.db-kept" / "a.json"
    file.write_text(json.dumps(data))

    class Killed(Exception):
        pass

    with contextlib.suppress(Killed), dbtool.writing(str(db_path), table, 1) as db:
        receipt = dbtool.insert_records(db, table, dbtool.fitted(table, data), conflict)
        dbtool.write_receipts(str(file), [receipt], 0o600)
        if not committed:
            raise Killed
    for _ in range(2):
        done = process("retry", db_path, "--schema", "s.sql", "--on-conflict", conflict)
        with contextlib.closing(sqlite3.connect(db_path)) as db:
            (count,) = db.execute("SELECT count(*) FROM t").fetchone()
        if rows is None:  # it does not guess, and says what to do
            assert done.returncode == 1 and done.stderr.count(b"\n") == 1
            assert str(file).encode() in done.stderr and f"rm {file}.receipt".encode() in done.stderr
            assert count == len(there) + len(data) * committed and kept(db_path) == [file]
        else:
            assert (done.returncode, done.stderr, count, kept(db_path)) == (0, b"", rows, [])


def test_a_row_that_was_edited_meanwhile_is_known_by_its_key(db_path):
    assert process("insert", db_path, "--schema", "none.sql", stdin=GOOD).returncode == 1
    (file,) = kept(db_path)
    schema = dbtool.read_schema()
    with dbtool.writing(str(db_path), schema, 1) as db:
        receipt = dbtool.insert_records(db, schema, dbtool.fitted(schema, [json.loads(file.read_bytes())]), "fail")
    dbtool.write_receipts(str(file), [receipt], 0o600)
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("UPDATE results SET author = 'Phil'")
    check_retry(db_path)


def test_a_key_that_came_in_the_record_tells_only_with_equal_values(db_path, tmp_path, monkeypatch):
    """Somebody else's row with that key does not make an unstored result a stored one."""
    strace = need_program("strace")
    (tmp_path / "s.sql").write_text("CREATE TABLE results (name TEXT PRIMARY KEY, loss REAL) WITHOUT ROWID")
    monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "s.sql"))
    assert process("insert", db_path, stdin=b'{"name": "first", "loss": 0}').returncode == 0
    done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO", sys.executable, DBTOOL,
                           "insert", db_path], input=b'{"name": "a", "loss": 1}', capture_output=True, check=False)
    assert done.returncode == 75
    assert process("insert", db_path, stdin=b'{"name": "a", "loss": 2}').returncode == 0
    done = process("retry", db_path)
    assert done.returncode == 1 and b"such a row is there already" in done.stderr and len(kept(db_path)) == 1
    assert count(db_path) == 2


@pytest.mark.parametrize(("schema", "conflict", "there", "alike", "others", "rows"), [
    ("CREATE TABLE results (name TEXT PRIMARY KEY, loss REAL) WITHOUT ROWID;", "skip", {"name": "first", "loss": 0},
     {"name": "baseline", "loss": 1.5}, [{"name": "2", "loss": 2}, {"name": "3", "loss": 3}], 4)], ids=["natural key"])
def test_two_inputs_that_begin_alike_are_told_apart(db_path, tmp_path, monkeypatch, schema, conflict, there, alike,
                                                    others, rows):
    strace = need_program("strace")
    (tmp_path / "s.sql").write_text(schema)
    monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "s.sql"))
    assert process("insert", db_path, stdin=json.dumps(there).encode()).returncode == 0
    for other in others:
        done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO", sys.executable, DBTOOL,
                               "insert", db_path, "--on-conflict", conflict],
                              input=json.dumps([alike, other]).encode(), capture_output=True, check=False)
        assert done.returncode == 75
    assert len(kept(db_path)) == 2
    assert process("retry", db_path, "--on-conflict", conflict).returncode == 0
    assert count(db_path) == rows


def test_a_receipt_whose_input_is_just_arriving_is_left(db_path):
    assert process("insert", db_path, stdin=GOOD).returncode == 0
    folder = db_path.parent / "results.db-kept"
    folder.mkdir()
    (folder / "a.json.receipt").write_text("[]")
    temporary = folder / ".a.json.123"
    temporary.write_bytes(GOOD)
    assert process("retry", db_path).returncode == 0
    assert (folder / "a.json.receipt").exists()
    temporary.unlink()
    assert process("retry", db_path).returncode == 0
    assert not folder.exists() and count(db_path) == 1


def test_the_line_to_paste_finds_what_is_kept_elsewhere(db_path, tmp_path):
    for folder in ("here", "temporary"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results.db-kept").write_text("in the way")
    done = process("insert", db_path, stdin=b"{", cwd="here", env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert f"run: TMPDIR={tmp_path / 'here'} python3 dbtool.py retry {db_path}\n" in done.stderr.decode()
    (file,) = (tmp_path / "here").iterdir()
    file.write_bytes(GOOD)
    line = done.stderr.decode().rpartition("run: ")[2].replace("python3 dbtool.py", f"{sys.executable} {ROOT}/dbtool.py")
    assert subprocess.run(line, shell=True, capture_output=True, check=False).stderr == b""
    assert count(db_path) == 1 and not file.exists()


@pytest.mark.slow
def test_input_is_kept_where_no_more_files_can_be_opened_even_for_modules(db_path):
    need_program("strace")
    for first in range(40, 90, 3):
        done = subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", "trace=openat", "-e",
                               f"inject=openat:error=EMFILE:when={first}+", sys.executable, DBTOOL, "insert", db_path],
                              input=DATA, capture_output=True, check=False, timeout=60)
        if b"dbtool: " in done.stderr:  # it had begun
            assert DATA in done.stderr and b"Traceback" not in done.stderr, (first, done.stderr)


def test_a_file_that_is_cut_short_while_it_is_kept_ends_there(tmp_path):
    (tmp_path / "in.json").write_bytes(GOOD)
    with open(tmp_path / "in.json") as file:
        source = dbtool.StandardInput(file, [str(tmp_path / "kept.json")])
        os.truncate(tmp_path / "in.json", 5)
        kept = source.keep([{"table": "t", "row": {}}])
        assert (kept.path, kept.note) == (str(tmp_path / "kept.json"), f"the input is kept in {tmp_path / 'kept.json'}")
    assert (tmp_path / "kept.json").read_bytes() == GOOD[:5]


# COMMIT


@pytest.mark.slow
@pytest.mark.parametrize("fault", [
    "fdatasync:error=EIO", "fdatasync:error=EIO:when=1", "pwrite64:error=ENOSPC", "pwrite64:error=EIO:when=2",
    "pwrite64:error=ENOSPC:when=3"])
def test_an_io_error_at_any_step(db_path, fault):
    strace = need_program("strace")
    assert process("insert", db_path, stdin=DATA).returncode == 0
    done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", f"inject={fault}", sys.executable, DBTOOL, "insert",
                           db_path], input=DATA, capture_output=True, check=False)
    check_refusal(done, db_path, DATA, 75)
    check_retry(db_path, 2)


def lose_power(path, target):
    """Copy what a power failure would leave: all files but the -shm, which lives in memory."""
    target.mkdir()
    for name in os.listdir(path.parent):
        if name.startswith("results.db") and not name.endswith("-shm"):
            source = path.parent / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    return target / "results.db"


KEYLESS = "CREATE TABLE results (run INTEGER PRIMARY KEY, epochs INTEGER);"


@pytest.mark.parametrize("schema", [None, KEYLESS], ids=["time-ordered key", "rowid"])
def test_a_commit_that_failed_and_yet_happened_is_not_stored_twice(db_path, tmp_path, schema, monkeypatch):
    """The rows are in the -wal file, the flush fails, insert reports it; after a power failure SQLite finds the rows."""
    strace = need_program("strace")
    data = DATA
    if schema:
        (tmp_path / "s.sql").write_text(schema)
        monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "s.sql"))
        data = b'{"epochs": 3} {"epochs": 4}'
    assert process("insert", db_path, stdin=data).returncode == 0
    before = count(db_path)
    with contextlib.closing(sqlite3.connect(db_path)) as reader:  # so that the failing process leaves the -wal
        reader.execute("SELECT count(*) FROM results").fetchall()
        done = subprocess.run([strace, "-f", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO:when=2+",
                               sys.executable, DBTOOL, "insert", db_path], input=data, capture_output=True, check=False)
        check_refusal(done, db_path, data, 75)
        copy = lose_power(db_path, tmp_path / "after")
    assert count(copy) == 2 * before  # the failed transaction has come to light
    if schema:  # nothing tells: it does not guess
        for path, rows in ((copy, 2 * before), (db_path, before)):
            done = process("retry", path)
            assert done.returncode == 1 and b"its rows have no key that would tell" in done.stderr
            assert len(kept(path)) == 1 and count(path) == rows
        return
    check_retry(copy, 2 * before)
    assert count(db_path) == before  # and where it has not,
    check_retry(db_path, 2 * before)  # it is stored now


@pytest.mark.parametrize("call", ["rename", "fdatasync", "unlink"])
@pytest.mark.parametrize("when", [1, *(pytest.param(when, marks=pytest.mark.slow) for when in range(2, 7))])
def test_retry_killed_at_any_step_stores_once(db_path, call, when):
    strace = need_program("strace")
    assert process("insert", db_path, "--schema", "none.sql", stdin=GOOD * 3).returncode == 1
    subprocess.run([strace, "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={when}",
                    sys.executable, DBTOOL, "retry", db_path], capture_output=True, check=False)
    check_retry(db_path, 3)


@pytest.mark.slow
def test_retries_at_once_store_once(db_path):
    for _ in range(20):
        process("insert", db_path, "--schema", "none.sql", stdin=GOOD)
    children = [subprocess.Popen([sys.executable, DBTOOL, "retry", str(db_path)]) for _ in range(5)]
    assert [child.wait(60) for child in children] == [0] * 5
    check_retry(db_path, 20)


def test_retry_leaves_what_still_fails(db_path):
    for data in (b"[1]", GOOD, b'{"a": 1}', GOOD):
        process("insert", db_path, "--schema", "none.sql", stdin=data)
    done = process("retry", db_path)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 2
    assert count(db_path) == 2 and [file.read_bytes() for file in kept(db_path)] == [b"[1]", b'{"a": 1}']


def test_retry_with_nothing_to_do(db_path, tmp_path):
    done = process("retry", db_path)
    assert done.returncode == 1 and b"there is no such file, and nothing is kept for it" in done.stderr
    assert list(tmp_path.iterdir()) == []
    db_path.touch()
    done = process("retry", db_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("style", ["lines", "array"])
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_memory_stays_small_whatever_the_size(db_path, tmp_path, style, way):
    path = tmp_path / "many.json"
    with open(path, "wb") as file:
        file.write(b"[" if style == "array" else b"")
        file.write((b"," if style == "array" else b"\n").join([GOOD] * 300_000))
        file.write(b"]" if style == "array" else b"")
    with contextlib.ExitStack() as stack:
        if way == "pipe":
            stdin = stack.enter_context(subprocess.Popen(["cat", path], stdout=subprocess.PIPE)).stdout
        else:
            stdin = stack.enter_context(open(path, "rb"))
        assert peak_memory("insert", db_path, stdin=stdin) <= 48 * 1024
    assert count(db_path) == 300_000

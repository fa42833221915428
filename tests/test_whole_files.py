"""merge, snapshot and migrate: what a results file goes through in a year of work."""

import contextlib
import gzip
import json
import lzma
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from conftest import DBADMIN, DBTOOL, RECORD, kept, need_program, process, script_of

import dbadmin
import dbtool

DATA = json.dumps(RECORD).encode()


def sql(path, text, *values):
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute(text, values).fetchall()
        db.commit()
        return rows


def records(n, **more):
    return [{**RECORD, "epochs": i, **more} for i in range(n)]


# snapshot


def unpacked(path):
    data = path.read_bytes()
    path = path.with_suffix(".plain")
    path.write_bytes(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else lzma.decompress(data) if data[:1] == b"\xfd"
                     else data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "copy.db", "copy.db.gz", "copy.db.xz", "-"])
def test_snapshot_while_others_write(db_path, tmp_path, name):
    assert process("insert", db_path, stdin=json.dumps(records(2000)).encode()).returncode == 0
    writer = f"while :; do '{sys.executable}' '{DBTOOL}' insert '{db_path}' < rec.json || exit; done"
    (tmp_path / "rec.json").write_bytes(DATA)
    writers = [subprocess.Popen(["sh", "-c", writer], start_new_session=True) for _ in range(20)]
    try:
        time.sleep(1)
        committed = sql(db_path, "SELECT count(*) FROM results")[0][0]
        done = process("snapshot", db_path, name)
    finally:
        for child in writers:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert (done.returncode, done.stderr) == (0, b"")
    target = tmp_path / ("out.db" if name == "-" else name)
    if name == "-":
        target.write_bytes(done.stdout)
    else:
        assert done.stdout == b""
    copy = unpacked(target)
    os.chmod(copy, 0o400)
    assert sql(copy, "PRAGMA integrity_check") == [("ok",)]
    assert sql(copy, "PRAGMA journal_mode") == [("delete",)]
    assert sql(copy, "SELECT count(*) FROM results")[0][0] >= committed >= 2000
    assert process("query", copy, "SELECT count(*) FROM results").returncode == 0
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("results.db")}
    assert left == {"rec.json", target.name, copy.name}


def test_snapshot_replaces_an_older_one(expect_success, db_path, tmp_path):
    for n in (1, 2):
        expect_success("insert", db_path, stdin=RECORD)
        expect_success("snapshot", db_path, tmp_path / "copy.db")
        assert sql(tmp_path / "copy.db", "SELECT count(*) FROM results") == [(n,)]


@pytest.mark.parametrize(("source", "target", "said"), [
    ("none.db", "copy.db", "there is no such file"), ("text.db", "copy.db.gz", "is not an SQLite database"),
    ("results.db", "none/copy.db", "No such file or directory"), ("results.db", "results.db", "is the very file to copy"),
    ("results.db", ".", "is a folder or device"), ("results.db", "/dev/null", "is a folder or device"),
    ("results.db", "new/", "new/ is a folder; name a file in it"), ("cut.db", "copy.db", "is damaged; save what it holds"),
    ("results.db", "results.db-wal", "results.db-wal belongs to the database /"),
    ("results.db", "cut.db-journal", "cut.db-journal belongs to the database /")])
def test_a_snapshot_that_fails_leaves_nothing(expect_success, expect_failure, db_path, tmp_path, source, target, said):
    expect_success("insert", db_path, stdin=RECORD)
    (tmp_path / "text.db").write_text("no database " * 100)
    (tmp_path / "cut.db").write_bytes(db_path.read_bytes()[:4096])
    assert said in expect_failure("snapshot", source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.db", "results.db", "text.db"]


def test_a_snapshot_is_as_private_as_its_source_while_it_grows(expect_success, db_path, tmp_path, monkeypatch):
    expect_success("insert", db_path, stdin=RECORD)
    db_path.chmod(0o640)
    modes = set()

    def spying(file, target):
        for data in packed(file, target):
            modes.update(path.stat().st_mode & 0o777 for path in tmp_path.glob(".copy*"))
            yield data

    packed = dbadmin.packed
    monkeypatch.setattr(dbadmin, "packed", spying)
    expect_success("snapshot", db_path, "copy.db.gz")
    assert modes == {0o600, 0o640} and (tmp_path / "copy.db.gz").stat().st_mode & 0o777 == 0o640


def test_snapshot_to_a_database_in_use(expect_success, expect_failure, db_path, tmp_path):
    expect_success("insert", db_path, stdin=RECORD)
    with contextlib.closing(sqlite3.connect(tmp_path / "used.db")) as db:
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.execute("CREATE TABLE t (x)")
        assert "is in use as a database" in expect_failure("snapshot", db_path, "used.db")
    (tmp_path / "other.db-journal").touch()
    assert "is in use as a database" in expect_failure("snapshot", db_path, "other.db")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 300,000 rows."""
    path = tmp_path_factory.mktemp("large") / "large.db"
    dbtool.insert(str(path), ({**RECORD, "epochs": n, "rmse_global": n / 7} for n in range(300_000)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy.db", "copy.db.xz"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_snapshot_leaves_nothing(large, tmp_path, name, number):
    with subprocess.Popen([sys.executable, DBADMIN, "snapshot", large, name], stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in tmp_path.glob(".copy*")) and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(number)
        assert child.wait(20) == 128 + number
        assert child.stderr.read() == f"dbadmin: {large}: stopped by {number.name}\n".encode()
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in large.parent.iterdir()] == ["large.db"]


# merge


def test_merge(expect_success, call, db_path, tmp_path):
    expect_success("insert", db_path, stdin=records(3))
    expect_success("snapshot", db_path, "a.db")
    expect_success("snapshot", db_path, "b.db")
    expect_success("insert", "a.db", stdin=records(2))
    expect_success("insert", "b.db", stdin=records(4))
    before = {name: (tmp_path / name).read_bytes() for name in ("a.db", "b.db")}
    assert expect_success("merge", db_path, "a.db", "b.db") == "a.db: 2 added, 3 known\nb.db: 4 added, 3 known\n"
    assert expect_success("merge", db_path, "a.db", "b.db") == "a.db: 0 added, 5 known\nb.db: 0 added, 7 known\n"
    assert sql(db_path, "SELECT count(*), count(DISTINCT id) FROM results") == [(9, 9)]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "b.db", "results.db"]
    sql("a.db", "UPDATE results SET rmse_global = NULL WHERE epochs = 1 AND id IN (SELECT min(id) FROM results"
                " GROUP BY epochs)")
    result = call("merge", db_path, "a.db")
    assert (result.status, result.out) == (1, "a.db: 0 added, 5 known\n")
    assert result.err == f"dbadmin: {db_path}: a.db: 1 known rows have other values there; they were not taken over\n"
    assert sql(db_path, "SELECT count(*) FROM results WHERE rmse_global IS NULL") == [(0,)]


def test_merge_creates_the_file(expect_success, db_path):
    expect_success("insert", "a.db", stdin=records(2))
    assert expect_success("merge", db_path, "a.db") == "a.db: 2 added, 0 known\n"


def schema_with(tmp_path, monkeypatch, more, name="more.sql"):
    path = tmp_path / name
    path.write_text((DBTOOL_SCHEMA := open(os.path.join(os.path.dirname(DBTOOL), "schema.sql")).read()).replace(
        "metadata TEXT NOT NULL DEFAULT '{}' ", f"metadata TEXT NOT NULL DEFAULT '{{}}'{more} "))
    assert path.read_text() != DBTOOL_SCHEMA
    monkeypatch.setenv("DBTOOL_SCHEMA", str(path))
    return path


def test_merge_of_files_with_other_columns(expect_success, expect_failure, db_path, tmp_path, monkeypatch):
    expect_success("insert", "old.db", stdin=records(2))
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL DEFAULT 'n1'")
    assert expect_success("merge", db_path, "old.db") == "old.db: 2 added, 0 known\n"
    assert sql(db_path, "SELECT DISTINCT host FROM results") == [("n1",)]
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL")
    assert "old.db: column host missing, and more.sql gives no default" in expect_failure("merge", "new.db", "old.db")
    monkeypatch.delenv("DBTOOL_SCHEMA")
    assert f'{db_path}: "host" is no column of results' in expect_failure("merge", "old.db", db_path)


@pytest.mark.parametrize(("schema", "what"), [
    ("CREATE TABLE t (n INTEGER PRIMARY KEY, x)", "is a number that every file counts for itself"),
    ("CREATE TABLE t (x)", "is missing")])
def test_merge_needs_a_key(expect_success, expect_failure, db_path, tmp_path, schema, what):
    (tmp_path / "s.sql").write_text(schema)
    for name in (db_path, "a.db"):
        expect_success("insert", name, "--schema", "s.sql", stdin={"x": 1})
    message = expect_failure("merge", db_path, "a.db", "--schema", "s.sql")
    assert f"the key of t {what}" in message and "such as the id of the shipped schema.sql" in message


@pytest.mark.parametrize(("other", "said"), [
    ("none.db", "none.db: there is no such file"), ("results.db", "is the very file to merge into"),
    ("text.db", "text.db: is not an SQLite database"), ("empty.db", "empty.db: has no table results")])
def test_merge_refuses(expect_success, expect_failure, db_path, tmp_path, other, said):
    expect_success("insert", db_path, stdin=RECORD)
    (tmp_path / "text.db").write_text("no database " * 100)
    sql("empty.db", "PRAGMA journal_mode = WAL")
    sql("empty.db", "CREATE TABLE other (x)")
    assert said in expect_failure("merge", db_path, other)
    assert not list(tmp_path.glob("*-wal")) and not list(tmp_path.glob("*-shm"))
    assert sql(db_path, "SELECT count(*) FROM results") == [(1,)]


def test_merge_refuses_other_types(expect_success, expect_failure, db_path, tmp_path):
    for name, kind in ("text", "TEXT"), ("real", "REAL"), ("whole", "INTEGER"):
        (tmp_path / f"{name}.sql").write_text(f"CREATE TABLE t (k TEXT PRIMARY KEY, x {kind})")
    expect_success("insert", "other.db", "--schema", "text.sql", stdin={"k": "a", "x": "007"})
    message = expect_failure("merge", db_path, "other.db", "--schema", "real.sql")
    assert "other.db: column x is TEXT, but REAL in real.sql; write there what it is, or migrate a copy of it first" in message
    expect_success("insert", "third.db", "--schema", "real.sql", stdin={"k": "a", "x": 2.5})
    message = expect_failure("merge", db_path, "third.db", "--schema", "whole.sql")
    assert "third.db: column x is REAL, but INTEGER in whole.sql" in message
    assert not db_path.exists()


def test_merge_composite_key(expect_success, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (a TEXT, b INT, c REAL DEFAULT 0, PRIMARY KEY (b, a))")
    schema = ("--schema", "s.sql")
    expect_success("insert", db_path, *schema, stdin=[{"a": "x", "b": 1}, {"a": "y", "b": 1}])
    expect_success("insert", "o.db", *schema, stdin=[{"a": "x", "b": 1}, {"a": "x", "b": 2}])
    assert expect_success("merge", db_path, "o.db", *schema) == "o.db: 1 added, 1 known\n"


@pytest.mark.slow
def test_merge_of_ten_large_files_is_as_fast_as_one_statement(db_path, tmp_path):
    rng = random.Random(3)
    ids = [f"{n:032x}" for n in range(550_000)]
    dbtool.insert(str(db_path), ({**RECORD, "id": key, "creation_ts": "2026-01-01T00:00:00.000Z"} for key in ids[:50_000]))
    names = []
    for number in range(10):
        names.append(str(tmp_path / f"{number}.db"))
        known = rng.sample(ids[:50_000 * (number + 1)], 50_000)
        dbtool.insert(names[-1], ({**RECORD, "id": key, "creation_ts": "2026-01-01T00:00:00.000Z"}
                                  for key in sorted([*known, *ids[50_000 * (number + 1):50_000 * (number + 2)]])))
    plain = tmp_path / "plain.db"
    assert process("snapshot", db_path, plain).returncode == 0
    start = time.perf_counter()
    for name in names:
        with contextlib.closing(sqlite3.connect(plain)) as db:
            db.execute("ATTACH ? AS o", (name,))
            db.execute("INSERT OR IGNORE INTO results SELECT * FROM o.results")
            db.commit()
    bare = time.perf_counter() - start
    start = time.perf_counter()
    done = process("merge", db_path, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().count(": 50000 added, 50000 known\n") == 9 + (b"9.db: 0 added" not in done.stdout)
    assert time.perf_counter() - start < 2.5 * bare + 1  # it also compares the known rows, and flushes to disk
    assert sql(db_path, "SELECT * FROM results EXCEPT SELECT * FROM results LIMIT 1") == []
    again = process("merge", db_path, *names)
    assert again.stdout.decode().count(": 0 added, 100000 known\n") >= 9


# Pulling what is new


def test_pull_only_what_is_new(expect_success, tmp_path):
    """The README's recipe: by time-ordered key, and now and then by a list of all keys, which late rows can't escape."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    expect_success("insert", "far/results.db", stdin=records(50))
    script = open(os.path.join(os.path.dirname(DBTOOL), "examples", "pull.sh")).read()
    pull = tmp_path / "pull.sh"
    pull.write_text(script)

    def run(*arguments):
        environment = {**os.environ, "DBTOOL": f"{sys.executable} {DBTOOL}", "REMOTE": "sh -c"}
        done = subprocess.run(["bash", str(pull), "far/results.db", "near/results.db", *arguments],
                              capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, b"")

    environment = {**os.environ, "DBTOOL": f"{sys.executable} {DBTOOL}", "REMOTE": "sh -c"}
    failed = subprocess.run(["bash", pull, "far/none.db", "near/results.db"], env=environment, capture_output=True, check=False)
    assert failed.returncode != 0 and not os.path.exists("near/results.db")

    def same():
        return sql("near/results.db", "SELECT * FROM results") == sql("far/results.db", "SELECT * FROM results")

    run()
    assert same()
    run()
    assert same()
    expect_success("insert", "far/results.db", stdin=records(3))
    run()
    assert same()
    expect_success("insert", "far/results.db", stdin={**RECORD, "id": "0" * 32})  # a row that arrives late
    expect_success("insert", "near/results.db", stdin={**RECORD, "id": "f" * 32})  # and one that is only here
    run()
    assert not same()
    run("--all")
    assert sql("near/results.db", "SELECT count(*) FROM results") == [(55,)]


# migrate


def test_migrate_adds_a_column(expect_success, expect_failure, db_path, tmp_path, monkeypatch):
    expect_success("insert", db_path, stdin=records(5))
    rows = sql(db_path, "SELECT * FROM results")
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL DEFAULT 'n1', note TEXT")
    message = process("insert", db_path, stdin=json.dumps({**RECORD, "note": None}).encode())
    assert message.returncode == 1 and b"has no column host, note; add it" in message.stderr
    assert f"add it with: python3 dbadmin.py migrate {db_path} --schema ".encode() in message.stderr
    (file,) = kept(db_path)
    assert file.exists()
    before = db_path.read_bytes()
    plan = "add column host TEXT\nadd column note TEXT\nrewrite table results: 5 rows\n"
    assert expect_success("migrate", db_path, "--dry-run") == plan
    assert db_path.read_bytes() == before
    assert expect_success("migrate", db_path) == plan
    assert sql(db_path, "SELECT * FROM results") == [(*row, "n1", None) for row in rows]
    assert expect_success("migrate", db_path) == ""
    assert process("retry", db_path).returncode == 0
    assert sql(db_path, "SELECT count(*) FROM results") == [(6,)]


OLD = """CREATE TABLE t (a TEXT PRIMARY KEY, b INTEGER, c TEXT, gone REAL DEFAULT 0);
CREATE INDEX by_b ON t (b); CREATE INDEX by_gone ON t (b); CREATE VIEW v AS SELECT a, b FROM t;
CREATE TRIGGER g AFTER INSERT ON t WHEN NEW.b < 0 BEGIN SELECT RAISE(ABORT, 'negative'); END;"""
NEW = """CREATE TABLE t (n INTEGER NOT NULL, c TEXT NOT NULL, b REAL, a TEXT PRIMARY KEY, CHECK (b < 1000));
CREATE INDEX by_b ON t (b DESC); CREATE VIEW v AS SELECT a, b, n FROM t; CREATE VIEW w AS SELECT 1 AS x;
CREATE TRIGGER g AFTER INSERT ON t WHEN NEW.b < -1 BEGIN SELECT RAISE(ABORT, 'negative'); END;"""


def test_migrate_everything(expect_success, expect_failure, db_path, tmp_path):
    (tmp_path / "old.sql").write_text(OLD)
    (tmp_path / "new.sql").write_text(NEW)
    expect_success("insert", db_path, "--schema", "old.sql", stdin=b'{"a":"x","b":1,"c":"p"} {"a":"y","b":2,"c":null}')
    sql(db_path, "CREATE VIEW mine AS SELECT count(*) AS n FROM t")
    sql(db_path, "CREATE TABLE other (x REFERENCES t (a))")
    new = (db_path, "--schema", "new.sql")
    before = sql(db_path, "SELECT * FROM sqlite_master"), sql(db_path, "SELECT * FROM t")
    for arguments, said, status in [
            ((), "new.sql has no place for column gone; add it there, or drop it for good with: --drop gone", 1),
            (("--drop", "gone"), "column n is new, NOT NULL and without a default; say what the old rows get: --fill n=VALUE", 1),
            (("--drop", "gone", "--fill", "n=x"), "column n: expected a 64-bit integer", 1),
            (("--drop", "gone", "--fill", "n=7"), "NOT NULL constraint failed: t.c; nothing was changed (--fill COLUMN=VALUE", 1),
            (("--drop", "a"), "--drop a: is no column that only the file has", 2),
            (("--drop", "gonn"), "--drop gonn: is no column that only the file has; did you mean", 2),
            (("--fill", "z=1"), '--fill "z" is no column of t', 2)]:
        assert said in expect_failure("migrate", *new, *arguments, status=status)
        assert (sql(db_path, "SELECT * FROM sqlite_master"), sql(db_path, "SELECT * FROM t")) == before
    out = expect_success("migrate", *new, "--drop", "gone", "--fill", "n=7", "--fill", "c=q")
    assert out.splitlines() == [
        "add column n INTEGER", "retype column b from INTEGER to REAL", "fill column c: 1 rows", "drop column gone",
        "rewrite table t: 2 rows",
        "replace index by_b", "replace view v", "create view w", "replace trigger g"]
    assert sql(db_path, "SELECT *, typeof(b) FROM t") == [(7, "p", 1.0, "x", "real"), (7, "q", 2.0, "y", "real")]
    made = dict(sql(db_path, "SELECT name, sql FROM sqlite_master"))
    assert "before migrate" not in str(made)
    assert made["mine"] and made["by_gone"] and "REFERENCES t (a)" in made["other"]
    assert made["t"] in NEW and made["v"] in NEW and made["g"] in NEW and made["by_b"] in NEW
    assert sql(db_path, "SELECT * FROM mine") == [(2,)] and sql(db_path, "PRAGMA integrity_check") == [("ok",)]


def test_migrate_refuses_values_that_do_not_fit_the_new_type(expect_success, expect_failure, db_path, tmp_path):
    (tmp_path / "old.sql").write_text("CREATE TABLE t (a TEXT)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a INTEGER)")
    expect_success("insert", db_path, "--schema", "old.sql", stdin=[{"a": "10"}, {"a": "ten"}])
    message = expect_failure("migrate", db_path, "--schema", "new.sql")
    assert 'column a: 1 values do not fit INTEGER without a change, such as "ten"' in message
    assert sql(db_path, "SELECT a, typeof(a) FROM t") == [("10", "text"), ("ten", "text")]
    sql(db_path, "UPDATE t SET a = '11' WHERE a = 'ten'")
    expect_success("migrate", db_path, "--schema", "new.sql")
    assert sql(db_path, "SELECT a, typeof(a) FROM t") == [(10, "integer"), (11, "integer")]


def test_migrate_that_keeps_no_column_keeps_the_rows(expect_success, db_path, tmp_path):
    (tmp_path / "old.sql").write_text("CREATE TABLE t (a TEXT)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (b INTEGER DEFAULT 5, c TEXT)")
    expect_success("insert", db_path, "--schema", "old.sql", stdin=[{"a": "1"}, {"a": "2"}])
    expect_success("migrate", db_path, "--schema", "new.sql", "--drop", "a")
    assert sql(db_path, "SELECT * FROM t") == [(5, None), (5, None)]


@pytest.mark.parametrize(("old", "new", "values", "said"), [
    ("x REAL", "x REAL UNIQUE ON CONFLICT IGNORE", [1.0, 1.0], "UNIQUE constraint failed"),
    ("x REAL", "x REAL NOT NULL ON CONFLICT IGNORE", [1.0, None], "NOT NULL constraint failed"),
    ("x REAL", "x TEXT", [0.1 + 0.2], "do not fit TEXT without a change, such as 0.30000000000000004"),
    ("x INTEGER", "x REAL", [2**53 + 1], "do not fit REAL without a change"),
    ("x", "x REAL", [2**53 + 1], "do not fit REAL without a change"),
    ("x TEXT", "x INTEGER", ["007"], "do not fit INTEGER without a change"),
    ("x TEXT", "x REAL", ["1e3x"], "do not fit REAL without a change"),
    ("x TEXT", "x DECIMAL", ["007"], "do not fit DECIMAL without a change"),
    ("x TEXT", "x DATE", ["abc", "1e3"], "column x: 1 values do not fit DATE without a change, such as \"1e3\""),
    ("x TEXT", "x NUMERIC", ["12345678901234567890"], "do not fit NUMERIC without a change"),
    ("x", "x DATE", ["0012", 5, "1.0"], "column x: 2 values do not fit DATE without a change"),
    ("x REAL", "x REAL AS (1.0)", [77.0], "--drop x"),
    ("x REAL", "X REAL", [1.0], "x is X in new.sql; for SQLite these are the same"),
])
def test_migrate_changes_no_row_and_no_value(expect_success, expect_failure, db_path, tmp_path, old, new, values, said):
    sql(db_path, f"CREATE TABLE t ({old}, k)")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executemany("INSERT INTO t VALUES (?, 1)", [(value,) for value in values])
        db.commit()
    (tmp_path / "new.sql").write_text(f"CREATE TABLE t ({new}, k)")
    assert said in expect_failure("migrate", db_path, "--schema", "new.sql")
    assert sql(db_path, "SELECT x FROM t") == [(value,) for value in values]


@pytest.mark.parametrize(("old", "new", "value", "expected"), [
    ("x INTEGER", "x REAL", 10, 10.0), ("x INTEGER", "x TEXT", 10, "10"), ("x TEXT", "x REAL", "1", 1.0),
    ("x TEXT", "x REAL", "1.5", 1.5), ("x REAL", "x INTEGER", 10.0, 10), ("x", "x INTEGER", 7, 7),
    ("x REAL", "x", 1.5, 1.5), ("x TEXT", "x INTEGER", None, None), ("x TEXT", "x DATE", "2026-11-23", "2026-11-23"),
    ("x TEXT", "x NUMERIC", "10", 10), ("x TEXT", "x NUMERIC", "1.5", 1.5), ("x", "x NUMERIC", b"1", b"1"),
    ("x", "x NUMERIC", 1.5, 1.5), ("x INTEGER", "x NUMERIC", 2**53 + 1, 2**53 + 1), ("x REAL", "x NUMERIC", 1e300, 1e300)])
def test_migrate_retypes(expect_success, db_path, tmp_path, old, new, value, expected):
    sql(db_path, f"CREATE TABLE t ({old}, k)")
    sql(db_path, "INSERT INTO t VALUES (?, 1)", value)
    (tmp_path / "new.sql").write_text(f"CREATE TABLE t ({new}, k)")
    expect_success("migrate", db_path, "--schema", "new.sql")
    ((found,),) = sql(db_path, "SELECT x FROM t")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("key", ["", "n INTEGER PRIMARY KEY, ", "n INTEGER PRIMARY KEY AUTOINCREMENT, "])
def test_migrate_keeps_the_numbers_of_rows(expect_success, db_path, tmp_path, key):
    sql(db_path, f"CREATE TABLE t ({key}x TEXT)")
    for number in (5, 7, 9):
        sql(db_path, "INSERT INTO t (rowid, x) VALUES (?, 'a')", number)
    sql(db_path, "DELETE FROM t WHERE rowid = 9")
    (tmp_path / "new.sql").write_text(f"CREATE TABLE t (y TEXT DEFAULT 'b', {key}x TEXT)")
    expect_success("migrate", db_path, "--schema", "new.sql")
    assert sql(db_path, "SELECT rowid FROM t") == [(5,), (7,)]
    sql(db_path, "INSERT INTO t (x) VALUES ('c')")
    assert sql(db_path, "SELECT max(rowid) FROM t") == [(10 if "AUTO" in key else 8,)]
    assert "before" not in str(sql(db_path, "SELECT * FROM sqlite_master"))


def test_migrate_drops_the_index_of_a_dropped_column(expect_success, expect_failure, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (a TEXT, h TEXT)")
    sql(db_path, "CREATE INDEX ih ON t (h)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT)")
    sql(db_path, "CREATE VIEW v AS SELECT h FROM t")
    message = expect_failure("migrate", db_path, "--schema", "new.sql", "--drop", "h")
    assert "view v would not work any more: no such column: h" in message
    sql(db_path, "DROP VIEW v")
    out = expect_success("migrate", db_path, "--schema", "new.sql", "--drop", "h")
    assert out.splitlines()[:2] == ["drop column h", "drop index ih"]


@pytest.mark.parametrize("event", ["INSERT", "UPDATE OF a", "UPDATE", "DELETE"])
def test_migrate_refuses_what_would_break_a_trigger(expect_success, expect_failure, db_path, tmp_path, event):
    sql(db_path, "CREATE TABLE t (a TEXT, h TEXT)")
    sql(db_path, "CREATE TABLE log (what)")
    row = "OLD" if event == "DELETE" else "NEW"
    sql(db_path, f"CREATE TRIGGER own AFTER {event} ON t BEGIN INSERT INTO log VALUES ({row}.h); END")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT)")
    message = expect_failure("migrate", db_path, "--schema", "new.sql", "--drop", "h")
    assert "a trigger of t would not work any more: no such column: " in message and message.endswith("; change or drop it first\n")
    sql(db_path, "DROP TRIGGER own")
    sql(db_path, f"CREATE TRIGGER own AFTER {event.partition(' ')[0]} ON t BEGIN INSERT INTO log VALUES ({row}.a); END")
    expect_success("migrate", db_path, "--schema", "new.sql", "--drop", "h")
    sql(db_path, "INSERT INTO t VALUES ('x')")
    sql(db_path, "UPDATE t SET a = 'x'")
    sql(db_path, "DELETE FROM t")
    assert sql(db_path, "SELECT what FROM log") == [("x",)]


def test_fill_says_what_it_fills_and_does_it_once(expect_success, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (a TEXT, b TEXT)")
    sql(db_path, "INSERT INTO t VALUES (NULL, NULL), (1, NULL)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT CHECK (a IS NOT NULL), b TEXT, c TEXT)")
    command = ("migrate", db_path, "--schema", "new.sql", "--fill", "a=x", "--fill", "c=z")
    steps = "add column c TEXT\nfill column a: 1 rows\nrewrite table t: 2 rows\n"
    assert expect_success(*command, "--dry-run") == steps
    assert expect_success(*command) == steps
    assert sql(db_path, "SELECT * FROM t") == [("x", None, "z"), ("1", None, "z")]
    assert expect_success(*command) == ""
    assert expect_success("migrate", db_path, "--schema", "new.sql", "--fill", "b=y") == "fill column b: 2 rows\n"
    assert sql(db_path, "SELECT * FROM t") == [("x", "y", "z"), ("1", "y", "z")]


@pytest.mark.parametrize("trigger", [
    "AFTER UPDATE ON t BEGIN SELECT my_hash(NEW.a); END", "AFTER DELETE ON t BEGIN INSERT INTO gone VALUES (1); END",
    "INSTEAD OF INSERT ON v BEGIN INSERT INTO t (a) VALUES (NEW.a); END"])
def test_migrate_leaves_alone_what_did_not_work_before(expect_success, db_path, tmp_path, trigger):
    sql(db_path, "CREATE TABLE t (a TEXT)")
    sql(db_path, "CREATE VIEW v AS SELECT a FROM t")
    sql(db_path, "CREATE VIEW broken AS SELECT a FROM lost")
    sql(db_path, f"CREATE TRIGGER own {trigger}")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT, b TEXT)")
    expect_success("migrate", db_path, "--schema", "new.sql")
    assert len(sql(db_path, "SELECT * FROM sqlite_master")) == 4


def test_migrate_refuses_what_would_break_the_trigger_of_another_table(expect_failure, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (a TEXT, h TEXT)")
    sql(db_path, "CREATE TABLE jobs (x)")
    sql(db_path, "CREATE TRIGGER own AFTER INSERT ON jobs BEGIN INSERT INTO t (a, h) VALUES (NEW.x, NEW.x); END")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT)")
    message = expect_failure("migrate", db_path, "--schema", "new.sql", "--drop", "h")
    assert "a trigger of jobs would not work any more: table t has no column named h" in message


def test_migrate_keeps_a_trigger_of_ones_own_on_a_view_of_the_schema(expect_success, db_path, tmp_path):
    view = "CREATE VIEW w AS SELECT a FROM t;"
    (tmp_path / "old.sql").write_text(f"CREATE TABLE t (a TEXT); {view}")
    (tmp_path / "new.sql").write_text(f"CREATE TABLE t (a TEXT, b TEXT DEFAULT NULL); {view}")
    expect_success("insert", db_path, "--schema", "old.sql", stdin={"a": "x"})
    sql(db_path, "CREATE TRIGGER own INSTEAD OF INSERT ON w BEGIN INSERT INTO t (a) VALUES (NEW.a); END")
    sql(db_path, "CREATE VIEW Mine AS SELECT x FROM other")
    sql(db_path, "CREATE TRIGGER two INSTEAD OF INSERT ON mine BEGIN SELECT 1; END")
    expect_success("migrate", db_path, "--schema", "new.sql")
    sql(db_path, "INSERT INTO w VALUES ('y')")
    assert sql(db_path, "SELECT * FROM t") == [("x", None), ("y", None)]


def test_fill_of_what_is_generated(expect_failure, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (a INTEGER)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a INTEGER, g INTEGER AS (a + 1))")
    message = expect_failure("migrate", db_path, "--schema", "new.sql", "--fill", "g=5", "--dry-run", status=2)
    assert "--fill g: is generated by SQLite" in message


def test_migrate_makes_a_virtual_table(expect_success, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (a TEXT)")
    (tmp_path / "new.sql").write_text("CREATE TABLE t (a TEXT); CREATE VIRTUAL TABLE words USING fts5 (a);")
    expect_success("migrate", db_path, "--schema", "new.sql", "--table", "t")
    sql(db_path, "INSERT INTO words VALUES ('some words')")
    assert expect_success("migrate", db_path, "--schema", "new.sql", "--table", "t") == ""


@pytest.mark.parametrize(("rule", "said"), [("REPLACE", "UNIQUE constraint failed: t.k"), ("IGNORE", "UNIQUE constraint failed")])
def test_merge_drops_no_row_by_a_rule_of_the_table(expect_success, expect_failure, db_path, tmp_path, rule, said):
    (tmp_path / "s.sql").write_text(f"CREATE TABLE t (id TEXT PRIMARY KEY, k INTEGER UNIQUE ON CONFLICT {rule})")
    for name, key in (db_path, "a"), ("other.db", "b"):
        expect_success("insert", name, "--schema", "s.sql", stdin={"id": key, "k": 1})
    assert said in expect_failure("merge", db_path, "other.db", "--schema", "s.sql")
    assert sql(db_path, "SELECT id FROM t") == [("a",)]


def test_schema_shows_another_key(expect_success, db_path, tmp_path):
    sql(db_path, "CREATE TABLE t (k TEXT NOT NULL, v TEXT)")
    (tmp_path / "s.sql").write_text("CREATE TABLE t (k TEXT NOT NULL PRIMARY KEY, v TEXT)")
    out = expect_success("schema", db_path, "--schema", "s.sql", "--format", "csv")
    assert out.splitlines()[1:] == ["k,TEXT,yes,,,TEXT NOT NULL", "v,TEXT,yes,,,same"]


@pytest.mark.parametrize("old, new, rows, flags, said", [
    ("t (a)", "t (a TEXT)", [(1,), ("1",)], [], "column a: 1 values do not fit TEXT without a change"),
    ("t (Epochs, b)", "t (epochs, b)", [(1, 2)], [], "Epochs is epochs in new.sql; for SQLite these are the same"),
    ("t (a)", "t (a, b INT NOT NULL, c TEXT NOT NULL)", [(1,)], ["--dry-run"],
     "column b, c is new, NOT NULL and without a default; say what the old rows get: --fill b=VALUE --fill c=VALUE"),
], ids=["values that become one", "another case", "dry run"])
def test_migrate_refuses_what_would_lose_something(db_path, expect_failure, tmp_path, old, new, rows, flags, said):
    sql(db_path, f"CREATE TABLE {old}")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executemany(f"INSERT INTO t VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.commit()
    (tmp_path / "new.sql").write_text(f"CREATE TABLE {new};")
    assert said in expect_failure("migrate", db_path, "--schema", "new.sql", *flags)
    assert sql(db_path, "SELECT * FROM t") == rows


def test_migrate_keeps_the_highest_number_given_out(db_path, expect_success, tmp_path):
    sql(db_path, "CREATE TABLE t (id INTEGER PRIMARY KEY, b)")
    sql(db_path, "INSERT INTO t VALUES (2, 0), (9, 0)")
    for comment in ("", ", c"):
        (tmp_path / "new.sql").write_text(f"CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, b{comment});")
        expect_success("migrate", db_path, "--schema", "new.sql")
    sql(db_path, "DELETE FROM t WHERE id = 9")
    expect_success("insert", db_path, "--schema", "new.sql", stdin={"b": 1, "c": 1})
    assert sql(db_path, "SELECT id FROM t ORDER BY id") == [(2,), (10,)]


@pytest.mark.parametrize("old, new, drop, after", [
    ("t (b)", "t (a TEXT DEFAULT 'x')", "b", [("x",), ("x",)]),
    ("t (b)", "t (a)", "b", [(None,), (None,)])])
def test_migrate_may_drop_every_column(db_path, expect_success, tmp_path, old, new, drop, after):
    sql(db_path, f"CREATE TABLE {old}")
    sql(db_path, "INSERT INTO t VALUES (1), (2)")
    (tmp_path / "new.sql").write_text(f"CREATE TABLE {new};")
    expect_success("migrate", db_path, "--schema", "new.sql", "--drop", drop)
    assert sql(db_path, "SELECT * FROM t") == after


def test_merge_leaves_out_what_the_schema_generates(db_path, expect_success, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (k TEXT PRIMARY KEY, b, c AS (b + 1));")
    sql("other.db", "CREATE TABLE t (k TEXT PRIMARY KEY, b, c)")
    sql("other.db", "INSERT INTO t VALUES ('x', 1, 7)")
    expect_success("merge", db_path, "other.db", "--schema", "s.sql")
    assert sql(db_path, "SELECT * FROM t") == [("x", 1, 2)]


def test_the_copy_that_a_snapshot_to_a_pipe_makes_is_private(tmp_path, monkeypatch):
    sql("r.db", "CREATE TABLE results (a)")
    sql("r.db", "INSERT INTO results SELECT randomblob(3000000)")
    os.chmod("r.db", 0o644)
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen([sys.executable, DBADMIN, "snapshot", "r.db", "-"], stdout=subprocess.PIPE,
                          env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}) as child:
        child.stdout.read(100_000)
        [copy] = (tmp_path / "tmp").iterdir()
        assert copy.stat().st_mode & 0o777 == 0o600
        child.stdout.read()
    assert child.returncode == 0


@pytest.mark.slow
def test_merge_waits_for_a_locked_source(db_path, tmp_path):
    for name in ("results.db", "a.db"):
        assert process("insert", name, stdin=DATA, env={**os.environ, "DBTOOL_JOURNAL": "delete"}).returncode == 0
    with contextlib.closing(sqlite3.connect("a.db", isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        with subprocess.Popen([sys.executable, DBADMIN, "merge", "results.db", "a.db"], stdout=subprocess.PIPE) as child:
            time.sleep(1)
            assert child.poll() is None
            db.execute("COMMIT")
            assert child.stdout.read() == b"a.db: 1 added, 0 known\n"


def test_merge_refuses_rows_without_a_key(expect_failure, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (k TEXT PRIMARY KEY, x)")
    sql("null.db", "CREATE TABLE t (k TEXT PRIMARY KEY, x)")
    sql("null.db", "INSERT INTO t VALUES (NULL, 1)")
    sql("nokey.db", "CREATE TABLE t (x)")
    for name, said in (("null.db", 'has rows without the key "k"'), ("nokey.db", "has no column k, by which rows are told apart")):
        assert said in expect_failure("merge", db_path, name, "--schema", "s.sql")
    assert not db_path.exists()


def test_a_name_that_is_not_utf8(db_path, tmp_path):
    name = os.fsdecode(b"n\xff.db")
    assert process("insert", name, stdin=DATA).returncode == 0
    assert process("merge", db_path, name).stdout == b"n\xff.db: 1 added, 0 known\n"
    assert process("snapshot", db_path, os.fsdecode(b"o\xff.db")).returncode == 0
    assert process("query", os.fsdecode(b"o\xff.db"), "SELECT count(*) FROM results").stdout == b"count(*)\n1\n"


def test_migrate_of_comments_alone_is_nothing(expect_success, db_path, tmp_path):
    (tmp_path / "a.sql").write_text("CREATE TABLE t (a TEXT) -- old")
    (tmp_path / "b.sql").write_text('CREATE TABLE "t" (\n a TEXT -- new words\n) -- and more')
    expect_success("insert", db_path, "--schema", "a.sql", stdin={"a": "x"})
    assert expect_success("migrate", db_path, "--schema", "b.sql") == ""


def test_migrate_makes_a_missing_table(expect_success, expect_failure, db_path):
    sql(db_path, "CREATE TABLE mine (x)")
    assert "has no table results" in expect_failure("insert", db_path, stdin=RECORD)
    assert expect_success("migrate", db_path) == "create table results\ncreate view runs\n"
    expect_success("insert", db_path, stdin=RECORD)
    assert "there is no such file" in expect_failure("migrate", "none.db")


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 2, 5, 20, 60])
def test_migrate_killed_is_all_or_nothing(expect_success, db_path, tmp_path, monkeypatch, when):
    strace = need_program("strace")
    expect_success("insert", db_path, stdin=records(2000))
    rows = sql(db_path, "SELECT * FROM results")
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL DEFAULT 'n1'")
    subprocess.run([strace, "-f", "-o", "/dev/null", "-e", f"inject=pwrite64:signal=KILL:when={when}",
                    sys.executable, DBADMIN, "migrate", db_path], capture_output=True, check=False)
    found = sql(db_path, "SELECT * FROM results")
    assert found == rows
    assert sql(db_path, "PRAGMA integrity_check") == [("ok",)]
    expect_success("migrate", db_path)
    assert sql(db_path, "SELECT * FROM results") == [(*row, "n1") for row in rows]


@pytest.mark.slow
def test_inserts_during_a_migration_wait_and_succeed_or_are_told(large, tmp_path, monkeypatch):
    path = tmp_path / "results.db"
    path.write_bytes(large.read_bytes())
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL DEFAULT 'n1'")
    old = {**os.environ}
    old.pop("DBTOOL_SCHEMA")
    with subprocess.Popen([sys.executable, DBADMIN, "migrate", path], stdout=subprocess.PIPE) as migration:
        time.sleep(0.4)
        started = [subprocess.Popen([sys.executable, DBTOOL, "insert", str(path)], stdin=subprocess.PIPE, env=env,
                                    stderr=subprocess.PIPE) for env in (old, {**os.environ}) for _ in range(5)]
        for child in started:
            child.stdin.write(DATA)
            child.stdin.close()
        stored = 0
        for child in started:
            with child:
                text = child.stderr.read()
            stored += child.returncode == 0
            assert child.returncode == 0 or b"has no column host" in text, text
        assert b"rewrite table results" in migration.stdout.read()
    assert migration.returncode == 0 and stored >= 5
    assert sql(path, "SELECT count(*) FROM results") == [(300_000 + stored,)]
    assert process("retry", path).returncode == 0
    assert sql(path, "SELECT count(*), count(host) FROM results") == [(300_010, 300_010)]


# Progress


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [
    "insert copy.db < many.jsonl", "query '{large}' 'SELECT * FROM results, (VALUES (1), (2), (3), (4))' --output out.csv",
    "snapshot '{large}' copy.db.xz", "merge copy.db '{large}' large2.db", "migrate large2.db --schema more.sql"])
def test_progress_line_on_a_terminal(large, tmp_path, arguments, monkeypatch):
    tmux = need_program("tmux")
    schema_with(tmp_path, monkeypatch, ", host TEXT NOT NULL DEFAULT 'n1'")
    monkeypatch.delenv("DBTOOL_SCHEMA")
    (tmp_path / "large2.db").write_bytes(large.read_bytes())
    for letter in "xyz" if "migrate" in arguments else "xy":
        columns = ", ".join(column.name for column in dbtool.read_schema().columns[1:])
        sql("large2.db", f"INSERT INTO results SELECT '{letter}' || id, {columns} FROM results")
    (tmp_path / "many.jsonl").write_bytes(b"\n".join([DATA] * 300_000))
    socket = str(tmp_path / "tmux")
    command = f"'{sys.executable}' '{script_of(arguments.split()[0])}' {arguments.format(large=large)}; echo status $?; sleep 60"
    subprocess.run([tmux, "-S", socket, "new-session", "-d", "-x", "100", "-y", "10", command], cwd=tmp_path, check=True)
    seen, screen, deadline = [], "", time.monotonic() + 60
    try:
        while "status" not in screen and time.monotonic() < deadline:
            screen = subprocess.run([tmux, "-S", socket, "capture-pane", "-p"], capture_output=True, text=True,
                                    check=True).stdout.strip()
            if screen and "status" not in screen:
                seen.append(screen)
            time.sleep(0.05)
    finally:
        subprocess.run([tmux, "-S", socket, "kill-server"], check=False)
    assert screen.endswith("status 0")
    lines = [line for line in (text.splitlines()[-1] for text in seen) if line.endswith((" left", " s"))]
    assert lines, seen
    print(lines[-1])
    assert "left" not in screen  # the line is gone when the work is done


# The module


def test_module_functions(db_path, tmp_path):
    assert dbtool.insert(str(db_path), records(3)) == 3
    assert dbtool.query(str(db_path), "SELECT epochs FROM results WHERE epochs > :n ORDER BY 1", {"n": 0}) == [
        {"epochs": 1}, {"epochs": 2}]
    with pytest.raises(dbtool.Failure, match="record 1: column epochs"):
        dbtool.insert(str(db_path), [{**RECORD, "epochs": "x"}])
    with pytest.raises(dbtool.Failure, match="only reads"):
        dbtool.query(str(db_path), "DELETE FROM results")
    with pytest.raises(ValueError, match="takes fail, skip or replace"):
        dbtool.insert(str(db_path), [RECORD], on_conflict="ignore")
    with pytest.raises(ValueError, match="of the caller"):
        dbtool.insert(str(db_path), (RECORD if n < 2 else int("of the caller") for n in range(3)))


def test_module_functions_take_relative_paths(db_path):
    schema = dbtool.read_schema()
    assert dbtool.insert("results.db", records(3)) == 3 and dbtool.insert("b.db", records(2)) == 2
    dbadmin.snapshot("results.db", "copy.db")
    dbadmin.snapshot("results.db", "copy.db.gz")
    assert dbadmin.merge("copy.db", "b.db", schema) == (2, 0, 0)
    assert dbadmin.migrate("copy.db", schema) == [] == dbadmin.migrate("copy.db", schema, dry_run=True)


def test_leaderboard(expect_success, db_path):
    expect_success("insert", db_path, stdin=[{**RECORD, "rmse_global": n, "epochs": 10 - n} for n in range(9)])
    script = os.path.join(os.path.dirname(DBTOOL), "examples", "leaderboard.py")
    done = subprocess.run([sys.executable, script, db_path, "epochs", "--best", "2"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and [line.split()[0] for line in lines] == ["epochs", "------", "2", "3"]
    done = subprocess.run([sys.executable, script, db_path, "epoch"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and 'did you mean "epochs"?' in done.stderr and done.stderr.count("\n") == 1

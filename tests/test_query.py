"""query: it only reads, streams, formats, and stops when told to."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import DBTOOL, RECORD, as_nobody, need, peak_memory, process

import dbtool


@pytest.fixture
def filled(expect_success, db_path):
    expect_success("insert", db_path, stdin=[{**RECORD, "epochs": n, "rmse_global": n / 4} for n in range(1, 5)])
    return db_path


def snapshot_of(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            for path in sorted(folder.rglob("*"))}


ESCAPES = [
    "INSERT INTO results (id) VALUES ('x')", "UPDATE results SET epochs = 0", "DELETE FROM results",
    "REPLACE INTO results (id) VALUES ('x')", "CREATE TABLE t (x)", "CREATE TEMP TABLE t (x)", "CREATE VIEW v AS SELECT 1",
    "CREATE TEMP VIEW v AS SELECT 1", "CREATE INDEX i ON results (epochs)", "DROP TABLE results",
    "ALTER TABLE results RENAME TO r", "ATTACH 'new.db' AS n", "ATTACH 'file:new.db?mode=rwc' AS n", "DETACH main",
    "VACUUM", "VACUUM INTO 'new.db'", "REINDEX", "ANALYZE", "BEGIN", "BEGIN IMMEDIATE", "COMMIT", "SAVEPOINT s",
    "PRAGMA journal_mode = DELETE", "PRAGMA user_version = 7", "PRAGMA application_id = 7", "PRAGMA query_only = OFF",
    "PRAGMA writable_schema = ON", "PRAGMA wal_checkpoint", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA optimize",
    "PRAGMA incremental_vacuum", "PRAGMA temp_store_directory = '.'", "PRAGMA encoding = 'UTF-16'",
    "PRAGMA schema_version = 9", "PRAGMA journal_mode(delete)", "PRAGMA page_size = 512",
    "SELECT load_extension('x')", "SELECT fts3_tokenizer('simple')", "SELECT fts3_tokenizer('simple', x'00')",
    "WITH x AS (SELECT 1) INSERT INTO results (id) SELECT * FROM x", "WITH x AS (SELECT 1) DELETE FROM results",
    "SELECT 1; DELETE FROM results", "SELECT 1; SELECT 2", "EXPLAIN DELETE FROM results",
    "UPDATE sqlite_master SET sql = ''", "CREATE VIRTUAL TABLE f USING fts5(x)", "DELETE FROM results RETURNING id",
    "CREATE TRIGGER t AFTER INSERT ON results BEGIN SELECT 1; END", "SELECT writefile('new.db', 'x')",
    "", " ", "-- nothing", ";",
]


@pytest.mark.parametrize("sql", ESCAPES)
def test_query_cannot_write(expect_failure, filled, tmp_path, sql):
    before = snapshot_of(tmp_path)
    expect_failure("query", filled, sql)
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize("sql", [
    "SELECT * FROM results", "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9) SELECT * FROM n",
    "PRAGMA table_info(results)", "SELECT name FROM pragma_table_xinfo('results')", "PRAGMA user_version",
    "PRAGMA integrity_check", "PRAGMA journal_mode", "SELECT * FROM sqlite_master", "VALUES (1, 2)", "EXPLAIN SELECT 1",
    "SELECT group_concat(epochs, '-') OVER (ORDER BY epochs) FROM results", "SELECT 1 UNION SELECT 2 ORDER BY 1;",
    "SELECT * FROM results ORDER BY random()", "/* a */ SELECT 1 -- b", "-- first\nSELECT 1"])
def test_query_reads(expect_success, filled, tmp_path, sql):
    before = snapshot_of(tmp_path)
    assert expect_success("query", filled, sql)
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize(("sql", "said"), [
    ("SELECT epoch FROM results", 'no such column: epoch; did you mean "epochs"?'),
    ("SELECT * FROM result", 'no such table: result; did you mean "results"?'),
    ("SELEC 1", 'near "SELEC": syntax error'),
    ("SELECT :x", "supply a value for binding"), ("SELECT :x", "(--param NAME=VALUE gives :NAME a value)"),
    ("SELECT zzz", "no such column: zzz; or, if it is text, write it in 'single quotes'"),
    ("SELECT EPOCH FROM results", 'did you mean "epochs"?'),
    ('SELECT * FROM "disk is full"', "no such table: disk is full"),
    ("SELECT median(author) FROM results", "median, stddev and percentile take numbers"),
    ("SELECT percentile(epochs, 101) FROM results", "percentile's second is from 0 to 100"),
])
def test_query_says_what_is_wrong(expect_failure, filled, sql, said):
    message = expect_failure("query", filled, sql)
    assert message.startswith(f"dbtool: {filled}: ") and said in message


def test_query_into_a_stream_in_memory(filled, monkeypatch):
    import io
    import sys

    memory = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(memory))
    assert dbtool.main(["query", str(filled), "SELECT 1 AS one"]) == 0
    assert memory.getvalue() == b"one\n1\n"


def test_query_creates_nothing(expect_failure, tmp_path):
    assert "there is no such file" in expect_failure("query", "none.db", "SELECT 1")
    assert "is a folder" in expect_failure("query", tmp_path, "SELECT 1")
    (tmp_path / "text.db").write_text("this is a text file, not a database, and long enough")
    assert "is not an SQLite database" in expect_failure("query", "text.db", "SELECT 1")
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


@pytest.mark.parametrize(("style", "expected"), [
    ("csv", 'n,x,t\n1,0.5,"a,b"\n2,,é\n'), ("tsv", "n\tx\tt\n1\t0.5\ta,b\n2\t\té\n"),
    ("json", '[{"n": 1, "x": 0.5, "t": "a,b"},\n {"n": 2, "x": null, "t": "é"}]\n'),
    ("jsonl", '{"n": 1, "x": 0.5, "t": "a,b"}\n{"n": 2, "x": null, "t": "é"}\n'),
    ("table", "n    x  t\n-  ---  ---\n1  0.5  a,b\n2       é\n"),
])
def test_formats(expect_success, filled, style, expected):
    sql = "SELECT 1 AS n, 0.5 AS x, 'a,b' AS t UNION ALL SELECT 2, NULL, 'é'"
    assert expect_success("query", filled, sql, "--format", style) == expected
    if style in ("csv", "tsv", "table"):
        bare = expect_success("query", filled, sql, "--format", style, "--no-header", "--null", "NULL")
        assert bare.splitlines()[-1].split("\t" if style == "tsv" else "," if style == "csv" else None) == [
            "2", "NULL", "é"]


@pytest.mark.parametrize(("style", "expected"), [
    ("csv", "a,b\n"), ("tsv", "a\tb\n"), ("json", "[]\n"), ("jsonl", ""), ("table", "a  b\n")])
def test_formats_of_no_rows(expect_success, filled, style, expected):
    assert expect_success("query", filled, "SELECT 1 AS a, 2 AS b WHERE 0", "--format", style) == expected


def test_table_for_people(expect_success, filled):
    out = expect_success("query", filled, "SELECT '日本' AS name, 10 AS n, x'00ff' AS b UNION ALL SELECT 'a\nb', 2.5, NULL",
                         "--format", "table", "--null", "-")
    assert out.splitlines() == ["name    n  b", "----  ---  ----", "日本   10  00ff", "a\\nb  2.5  -"]


def test_columns_of_one_name_are_kept_apart_in_json(expect_success, filled):
    assert json.loads(expect_success("query", filled, "SELECT 1 AS a, 2 AS a, 3 AS a", "--format", "jsonl")) == {
        "a": 1, "a:1": 2, "a:2": 3}
    assert dbtool.query(filled, "SELECT 1 AS a, 2 AS a, 3 AS 'a:1'") == [{"a": 1, "a:1": 2, "a:1:1": 3}]


def test_csv_equals_the_csv_module(expect_success, db_path):
    import csv
    import io
    import random

    rng = random.Random(1)
    pieces = ["a", "None", "", ",", '"', "\n", "\r", "é", " ", "b'", "%s", "%", "'", "x" * 50]
    rows = [[rng.choice([None, rng.randint(-(2**63), 2**63 - 1), rng.gauss(0, 10.0 ** rng.randint(-300, 300)),
                         rng.random() < 0.5, "".join(rng.choices(pieces, k=rng.randint(0, 3))) * (rng.random() < 0.2)])
             for _ in range(4)] for _ in range(3000)]
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute("CREATE TABLE t (a, b, c, d)")
        db.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
        db.commit()
        rows = db.execute("SELECT * FROM t").fetchall()
    for null in ("", "NULL", 'a,"'):
        lines = []
        for row in [list("abcd"), *rows]:
            line = io.StringIO()
            csv.writer(line, lineterminator="\r\n").writerow([null if value is None else value for value in row])
            lines.append(line.getvalue()[:-2] + "\n")
        assert expect_success("query", db_path, "SELECT * FROM t", "--null", null) == "".join(lines)


def test_aggregates(expect_success, filled):
    sql = "SELECT median(x), stddev(x), percentile(x, 25), percentile(x, 100) FROM (SELECT column1 AS x FROM (VALUES {}))"
    ask = lambda values: expect_success(  # noqa: E731
        "query", filled, sql.format(values), "--no-header").strip()
    assert ask("(4), (1), (NULL), (3), (2.5)") == "2.75,1.25,2.125,4.0"
    assert ask("(NULL)") == ",,,"
    assert ask("(7)") == "7.0,,7.0,7.0"


@pytest.mark.parametrize(("value", "kind"), [("7", "integer"), ("7.5", "real"), ("1e5", "text"), ("007", "text"),
                                             ("a=b", "text"), ("", "text"), ("nan", "text")])
def test_param(expect_success, filled, value, kind):
    out = expect_success("query", filled, "SELECT :x, typeof(:x)", "--param", f"x={value}", "--no-header")
    assert out == f"{value},{kind}\n" if kind != "real" else out == "7.5,real\n"


def test_aggregates_of_the_infinite(expect_success, filled):
    sql = "SELECT median(x), stddev(x) FROM (SELECT 9e999 AS x UNION ALL SELECT 9e999)"
    assert expect_success("query", filled, sql, "--no-header") == "inf,\n"


def test_aggregates_of_the_largest(expect_success, filled):
    sql = "SELECT median(x), percentile(x, 0), percentile(x, 75) FROM (SELECT 1e308 AS x UNION ALL SELECT -1e308)"
    assert expect_success("query", filled, sql, "--no-header") == "0.0,-1e+308,5e+307\n"


def test_a_folder_called_like_a_journal_does_not_matter(expect_success, filled, tmp_path, monkeypatch):
    shutil.copy(filled, "lab")
    folder = tmp_path / "lab-journal"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert expect_success("query", filled, "SELECT 1 AS a") == "a\n1\n"
    (tmp_path / "notes").write_text("no database")
    expect_success("query", filled, "SELECT 1 AS a", "--output", tmp_path / "notes-journal")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["query", "results.db", "SELECT 1", "--output", "pipe"], ["schema", "--schema", "pipe"]])
def test_a_signal_while_a_pipe_is_opened(filled, tmp_path, command):
    os.mkfifo("pipe")
    with subprocess.Popen([sys.executable, DBTOOL, *command], stderr=subprocess.PIPE) as child:
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 143 and b"stopped by SIGTERM" in child.stderr.read()


def test_a_broken_view_does_not_hide_the_mistake(expect_failure, filled):
    with contextlib.closing(sqlite3.connect(filled)) as db:
        db.execute("CREATE VIEW broken AS SELECT lost FROM nowhere")
    for column in "epoch", "results.epoch":
        message = expect_failure("query", filled, f"SELECT {column} FROM results")
        assert f'no such column: {column}; did you mean "epochs"?' in message


def test_param_too_large(expect_failure, filled):
    assert "too large" in expect_failure("query", filled, "SELECT :n", "--param", f"n={2**63}")


def test_a_sort_that_fills_the_disk(filled, tmp_path):
    need(os.geteuid() == 0, "root, to mount")
    (tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "small"], check=True)
    try:
        done = process("query", filled, ENDLESS.replace("FROM n)", "FROM n LIMIT 300000)")
                       + "hex(randomblob(20)) AS x FROM n ORDER BY x",
                       env={**os.environ, "SQLITE_TMPDIR": str(tmp_path / "small")})
        assert done.returncode == 75 and b"full" in done.stderr and done.stderr.count(b"\n") == 1
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_sql_from_standard_input(expect_success, filled):
    assert expect_success("query", filled, "-", stdin=b"SELECT count(*) AS n\nFROM results;\n") == "n\n4\n"


def test_output_appears_whole_or_not_at_all(expect_success, expect_failure, filled, tmp_path):
    assert expect_success("query", filled, "SELECT 1 AS a", "--output", "out.csv") == ""
    assert (tmp_path / "out.csv").read_text() == "a\n1\n"
    # A failure after many rows: the last value is no UTF-8.
    sql = ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
           " SELECT iif(i = 5000, CAST(x'ff' AS TEXT), i) FROM n")
    assert "is not UTF-8" in expect_failure("query", filled, sql, "--output", "out.csv")
    assert (tmp_path / "out.csv").read_text() == "a\n1\n"
    assert "No such file or directory" in expect_failure("query", filled, "SELECT 1", "--output", "none/out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "results.db"]
    assert process("query", filled, "SELECT 1 AS a", "--output", "/dev/stdout").stdout == b"a\n1\n"
    (tmp_path / ".out.csv.part").touch()
    assert expect_success("query", filled, "SELECT 2 AS a", "--output", "out.csv") == ""


@pytest.mark.parametrize(("name", "said"), [
    ("results.db", "is a database; name another file"), ("link.db", "is a database; name another file"),
    ("other.db", "is a database; name another file"), ("results.db-wal", "results.db-wal belongs to the database /"),
    ("results.db-shm", "belongs to the database /"), ("results.db-journal", "belongs to the database /"),
    ("other.db-wal", "other.db; name another file"), ("out/", "out/ is a folder; name a file in it")])
@pytest.mark.parametrize("is_there", [True, False])
def test_output_does_not_destroy_a_database(expect_failure, filled, tmp_path, name, said, is_there):
    (tmp_path / "link.db").symlink_to(filled)
    (tmp_path / "other.db").write_bytes(filled.read_bytes())
    if is_there and "-" in name:
        (tmp_path / name).touch()
    before = snapshot_of(tmp_path)
    assert said in expect_failure("query", filled, "SELECT 1", "--output", name)
    assert snapshot_of(tmp_path) == before


@pytest.mark.slow
def test_a_signal_while_reading_the_sql(filled):
    with subprocess.Popen([sys.executable, DBTOOL, "query", filled, "-"], stdin=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        time.sleep(0.7)
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert child.stderr.read() == f"dbtool: {filled}: stopped by SIGINT\n".encode()


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "


@pytest.mark.parametrize("sql", [
    ENDLESS + "max(i) FROM n", ENDLESS + "i FROM n",
    pytest.param(ENDLESS + "i FROM n WHERE i < 0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_an_endless_query(filled, tmp_path, sql, number):
    out = tmp_path / "out.csv"
    with subprocess.Popen([sys.executable, DBTOOL, "query", filled, sql, "--output", out], stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not list(tmp_path.glob(".out.csv*")):
            time.sleep(0.05)  # for max(), no file appears before the first row: wait for the connection
            if "max" in sql or "< 0" in sql:
                time.sleep(1)
                break
        start = time.monotonic()
        child.send_signal(number)
        assert child.wait(10) == 128 + number
        assert time.monotonic() - start < 1
        assert child.stderr.read() == f"dbtool: {filled}: stopped by {number.name}\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.db"]


@pytest.mark.slow
def test_a_signal_while_the_reader_of_the_pipe_is_slow(filled):
    with subprocess.Popen([sys.executable, DBTOOL, "query", filled, ENDLESS + "i FROM n"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        child.stdout.read(1)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
        assert child.stderr.read() == f"dbtool: {filled}: stopped by SIGINT\n".encode()


@pytest.mark.parametrize("unbuffered", [None, "1"])
@pytest.mark.parametrize("style", ["csv", "jsonl", "table"])
def test_a_closed_pipe_is_silent(filled, unbuffered, style):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = unbuffered
    command = (f"'{sys.executable}' '{DBTOOL}' query '{filled}' '{ENDLESS} i, i FROM n LIMIT 3000000' --format {style}"
               " | head -1")
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=60, check=True)
    assert done.stderr == b"" and done.stdout.count(b"\n") == 1


def test_full_standard_output(filled):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, DBTOOL, "query", filled, "SELECT 1"], stdout=full,
                              stderr=subprocess.PIPE, check=False)
    assert done.returncode == 75 and b"No space left on device" in done.stderr and done.stderr.count(b"\n") == 1


def test_closed_standard_output(filled):
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' '{DBTOOL}' query '{filled}' 'SELECT 1' >&-"],
                          capture_output=True, check=False)
    assert done.returncode == 1 and b"standard output is closed" in done.stderr


# Where nothing may be written


def asked_by_nobody(path, sql):
    return as_nobody(lambda: dbtool.main(["query", str(path), sql, "--no-header"]))


@pytest.mark.parametrize("writer", [False, True], ids=["quiet", "while another writes"])
@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_query_without_rights(filled, public, writer, journal):
    path = public / "results.db"
    with contextlib.closing(sqlite3.connect(filled)) as db:
        db.execute(f"VACUUM INTO '{path}'")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        if writer:
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE results SET epochs = 100")
        before = sorted(os.listdir(public))
        assert asked_by_nobody(path, "SELECT sum(epochs) FROM results") == (0, "10\n")
        assert sorted(os.listdir(public)) == before


def test_query_reads_what_a_killed_writer_left(filled, public):
    """Committed rows that are only in the -wal file are part of the answer."""
    path = public / "results.db"
    writer = ("import os, signal, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
              " db.execute('PRAGMA journal_mode = WAL').fetchall(); db.execute('CREATE TABLE IF NOT EXISTS t (x)');"
              " db.execute('INSERT INTO t VALUES (1)'); os.kill(os.getpid(), signal.SIGKILL)")
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", writer, path], check=False).returncode == -signal.SIGKILL
    assert os.path.getsize(f"{path}-wal")
    assert asked_by_nobody(path, "SELECT sum(x) FROM t") == (0, "2\n")


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_query_on_a_read_only_mount(expect_success, filled, tmp_path, journal):
    need(os.geteuid() == 0 and os.path.exists("/bin/mount"), "root, to mount")
    with contextlib.closing(sqlite3.connect(filled, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {journal}")
    mount = tmp_path / "medium"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    try:
        (mount / "results.db").write_bytes(filled.read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        assert expect_success("query", mount / "results.db", "SELECT count(*) FROM results", "--no-header") == "4\n"
    finally:
        subprocess.run(["umount", mount], check=True)


def test_query_notices_that_an_unchanging_file_changed(filled, public):
    """Without rights and without -wal, the file is read as it is, and a change meanwhile is not passed over."""
    path = public / "results.db"
    path.write_bytes(filled.read_bytes())
    (ready, say_ready), (go, say_go) = os.pipe(), os.pipe()

    def read_slowly():
        try:
            with dbtool.reading(str(path)) as db:
                assert db.execute("SELECT count(*) FROM results").fetchone() == (4,)
                os.write(say_ready, b"!")
                os.read(go, 1)
        except dbtool.Failure as failure:
            print(failure)
            return failure.status
        return 0

    def change():
        os.read(ready, 1)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("DELETE FROM results")
        os.write(say_go, b"!")

    thread = threading.Thread(target=change)
    thread.start()
    assert as_nobody(read_slowly) == (75, "changed while it was read; run this again\n")
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("style", ["csv", "json", "jsonl", "table"])
def test_memory_stays_small(filled, style):
    sql = ENDLESS + "i, i / 3.0, 'text ' || i FROM n LIMIT 1000000"
    assert peak_memory("query", filled, sql, "--format", style) <= 32 * 1024

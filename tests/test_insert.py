"""insert and insert_manual: what they store, what they refuse, many writers, and database names."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import DBTOOL, RECORD, ROOT, kept, process

import dbtool


def test_insert_stores_a_row_and_says_nothing(expect_success, rows, db_path):
    assert expect_success("insert", db_path, stdin=RECORD) == ""
    (row,) = rows(db_path)
    assert row[2:] == [str(value) for value in RECORD.values()] + ["{}"]
    assert len(row[0]) == 32 and abs(int(row[0][:12], 16) / 1000 - time.time()) < 60
    assert row[1][:16] == time.strftime("%Y-%m-%dT%H:%M", time.gmtime(int(row[0][:12], 16) / 1000))
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert sorted(path.name for path in db_path.parent.iterdir()) == ["results.db"]


def test_insert_many_in_one_transaction(call, rows, db_path):
    lines = [json.dumps({**RECORD, "epochs": n, **({"metadata": {"n": n}} if n % 3 else {})}) for n in range(1000)]
    assert call("insert", db_path, stdin="\n".join(lines).encode()).status == 0
    assert rows(db_path, "SELECT count(*), sum(epochs), count(DISTINCT id) FROM results") == [["1000", "499500", "1000"]]
    lines[700] = json.dumps({**RECORD, "epochs": None})
    result = call("insert", db_path, stdin="\n".join(lines).encode())
    assert result.status == 1 and "record 701: column epochs: expected a 64-bit integer, got null" in result.err
    assert rows(db_path, "SELECT count(*) FROM results") == [["1000"]]


@pytest.mark.parametrize(("change", "said"), [
    ({"epoch": 3}, 'record 1: "epoch" is no column of results; did you mean "epochs"?'),
    ({"xyzzy": 3}, 'record 1: "xyzzy" is no column of results'),
    ({"layers": ...}, "record 1: column layers missing, and schema.sql gives no default"),
    ({"layers": ..., "rmse_global": ...}, "record 1: column layers, rmse_global missing"),
    ({"layers": 10}, "record 1: column layers: expected a string, got 10"),
    ({"epochs": 2.5}, "record 1: column epochs: expected a 64-bit integer, got 2.5"),
    ({"id": None}, "record 1: column id: expected a string, got null"),
])
def test_insert_refuses_a_record(call, db_path, change, said):
    record = {name: value for name, value in {**RECORD, **change}.items() if value is not ...}
    result = call("insert", db_path, stdin=record)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith(f"dbtool: {db_path}: {said}") and result.err.count("\n") == 1
    assert not db_path.exists()
    assert kept(db_path)[0].read_bytes() == json.dumps(record).encode()
    assert str(kept(db_path)[0]) in result.err


@pytest.mark.parametrize("where", [0, 1, 49, 99])
@pytest.mark.parametrize("value", [2**63, "\ud83d", "ten"])
def test_insert_names_the_bad_record_of_many(call, db_path, where, value):
    records = [dict(RECORD) for _ in range(100)]
    records[where]["author" if value == "\ud83d" else "epochs"] = value
    result = call("insert", db_path, stdin=records)
    assert result.status == 1 and f"record {where + 1}: column " in result.err


def test_on_conflict(call, expect_success, rows, db_path):
    old, new = {**RECORD, "id": "a", "epochs": 1}, {**RECORD, "id": "a", "epochs": 2, "metadata": {"new": True}}
    expect_success("insert", db_path, stdin=old)
    result = call("insert", db_path, stdin=[{**RECORD, "id": "b"}, new])
    assert result.status == 1 and "record 2: UNIQUE constraint failed: results.id" in result.err
    assert "--on-conflict skip or replace" in result.err
    expect_success("insert", db_path, "--on-conflict", "skip", stdin=[{**RECORD, "id": "b"}, new])
    assert rows(db_path, "SELECT id, epochs FROM results") == [["a", "1"], ["b", "1"]]
    expect_success("insert", db_path, "--on-conflict=replace", stdin=new)
    assert rows(db_path, "SELECT id, epochs, metadata FROM results") == [["a", "2", '{"new":true}'], ["b", "1", "{}"]]


@pytest.mark.parametrize("rule", ["IGNORE", "REPLACE", "ROLLBACK"])
def test_a_rule_of_the_table_does_not_drop_rows(call, expect_success, rows, db_path, tmp_path, rule):
    (tmp_path / "s.sql").write_text(f"CREATE TABLE t (k INTEGER UNIQUE ON CONFLICT {rule}, v REAL NOT NULL ON CONFLICT {rule})")
    schema = ("--schema", "s.sql")
    expect_success("insert", db_path, *schema, stdin={"k": 1, "v": 1})
    for bad in [{"k": 2, "v": 2}, {"k": 1, "v": 3}], [{"k": 2, "v": 2}, {"k": 2, "v": 3}]:
        result = call("insert", db_path, *schema, stdin=bad)
        assert result.status == 1 and "record 2: UNIQUE constraint failed: t.k" in result.err
    expect_success("insert", db_path, *schema, "--on-conflict", "skip", stdin=[{"k": 1, "v": 4}, {"k": 2, "v": 4}])
    assert rows(db_path, "SELECT k, v FROM t") == [["1", "1.0"], ["2", "4.0"]]
    expect_success("insert", db_path, *schema, "--on-conflict", "replace", stdin={"k": 2, "v": 5})
    assert rows(db_path, "SELECT k, v FROM t") == [["1", "1.0"], ["2", "5.0"]]


def test_the_rule_that_counts_is_that_of_the_file(call, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (k INTEGER UNIQUE, v REAL)")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute("CREATE TABLE t (k INTEGER UNIQUE ON CONFLICT REPLACE, v REAL)")
        db.execute("INSERT INTO t VALUES (1, 1)")
        db.commit()
    assert call("insert", db_path, "--schema", "s.sql", stdin={"k": 1, "v": 2}).status == 1
    assert rows(db_path, "SELECT v FROM t") == [["1.0"]]


def test_what_a_trigger_does_on_a_conflict_is_its_own_affair(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("""CREATE TABLE t (a TEXT, conflicts INTEGER DEFAULT 0); -- no conflict on conflict
        CREATE TABLE names (a TEXT UNIQUE);
        CREATE TRIGGER note AFTER INSERT ON t BEGIN INSERT OR IGNORE INTO names VALUES (NEW.a); END;""")
    expect_success("insert", db_path, "--schema", "s.sql", "--table", "t", stdin=[{"a": "x"}, {"a": "x"}])
    assert rows(db_path, "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM names)") == [["2", "1"]]


@pytest.mark.parametrize(("made", "said"), [
    ("n INTEGER, x REAL, name INTEGER", "column name is INTEGER, but TEXT in s.sql; write there what it is, or change"),
    ("n TEXT, x REAL, name TEXT", "column n is TEXT, but INTEGER in s.sql; write there what it is, or change the file"),
    ("n REAL, x REAL, name TEXT", "column n is REAL, but INTEGER in s.sql; write there what it is, or change the file"),
    ("N INTEGER, x REAL, name TEXT", "N is n in s.sql; for SQLite these are the same, so write N there")])
def test_a_file_whose_types_would_change_values_is_refused(expect_failure, db_path, tmp_path, made, said):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (n INTEGER, x REAL, name TEXT)")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute(f"CREATE TABLE t ({made})")
    message = expect_failure("insert", db_path, "--schema", "s.sql", stdin={"n": 5, "x": 1, "name": "007"})
    assert said in message and "the input is kept in" in message


def test_the_same_kind_of_type_by_another_name_is_no_difference(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (n INTEGER, x REAL, name TEXT)")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute("CREATE TABLE t (n BOOLEAN, x DOUBLE, name)")
    expect_success("insert", db_path, "--schema", "s.sql", stdin={"n": 5, "x": 1, "name": "007"})
    assert rows(db_path, "SELECT *, typeof(n), typeof(name) FROM t") == [["5", "1.0", "007", "integer", "text"]]


def test_columns_that_differ_in_the_case_of_other_letters(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text('CREATE TABLE t ("δ" REAL, "Δ" REAL)', encoding="utf-8")
    for _ in range(2):
        expect_success("insert", db_path, "--schema", "s.sql", stdin={"δ": 1, "Δ": 2})
    assert expect_success("migrate", db_path, "--schema", "s.sql") == ""
    assert rows(db_path, "SELECT * FROM t") == [["1.0", "2.0"]] * 2


def test_a_trigger_may_be_called_like_its_table(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("""CREATE TABLE t (a TEXT); CREATE TABLE log (a TEXT);
        CREATE TRIGGER t AFTER INSERT ON t BEGIN INSERT INTO log VALUES (NEW.a); END;""")
    expect_success("insert", db_path, "--schema", "s.sql", "--table", "t", stdin={"a": "x"})
    assert rows(db_path, "SELECT a FROM log") == [["x"]]


@pytest.mark.parametrize("data", ['[{"a": 1},\n{"a": 2}\n]\n', 'text\n [\n\n {"a": 1}\n, {"a": 2}]\ntext\n',
                                  '[INFO]\n[1, 2]\n[]\n[{\'b\': 1}]\n[{"a": 1}]\n{"a": 2}\n[\n'])
def test_skip_text_does_not_pass_over_arrays_of_objects(call, rows, db_path, tmp_path, data):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (a INTEGER)")
    result = call("insert", db_path, "--schema", "s.sql", "--skip-text", stdin=data.encode())
    assert (result.status, result.out) == (0, "") and '"a"' not in result.err, result.err
    assert rows(db_path, "SELECT a FROM t") == [["1"], ["2"]]
    result = call("insert", db_path, "--schema", "s.sql", "--skip-text", stdin=b'[{"a": 3},\ntext\n{"a": 4}]')
    assert result.status == 1 and 'record 2 (line 2): expected a JSON object, got "text' in result.err


@pytest.mark.parametrize(("record", "said"), [
    ({"a": {1, 2}}, "record 2: column a: expected a 64-bit integer or null, got "), ({1: 2}, "record 2: 1 is no column of t"),
    ({"m": {"k": {1}}}, "record 2: column m: expected a string or null, got "), ({"m": {(1, 2): 3}}, "column m: expected")])
def test_the_module_names_records_that_are_no_json(db_path, tmp_path, record, said):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (a INTEGER, m TEXT DEFAULT NULL)")
    with pytest.raises(dbtool.Failure) as info:
        dbtool.insert(str(db_path), [{"a": 1}, {"a": 1, **record}], dbtool.read_schema("s.sql"))
    assert said in str(info.value)


def test_a_virtual_table_beside_the_results(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (a TEXT); CREATE VIRTUAL TABLE words USING fts5 (a);")
    for name in "xy":
        expect_success("insert", db_path, "--schema", "s.sql", "--table", "t", stdin={"a": name})
    assert rows(db_path, "SELECT a FROM t") == [["x"], ["y"]]


def test_skip_text_passes_text_on(call, rows, db_path):
    result = call("insert", db_path, "--skip-text", stdin=b"epoch 1\nepoch 2\n" + json.dumps(RECORD).encode() + b"\nbye")
    assert (result.status, result.out, result.err) == (0, "", "epoch 1\nepoch 2\nbye\n")
    assert len(rows(db_path)) == 1
    result = call("insert", db_path, "--skip-text", stdin=b"epoch 1\n")
    assert result.status == 1 and "no JSON object on standard input, only text" in result.err


def test_skip_text_shows_text_while_the_run_goes_on(db_path):
    with subprocess.Popen([sys.executable, DBTOOL, "insert", db_path, "--skip-text"], stdin=subprocess.PIPE,
                          stderr=subprocess.PIPE) as child:
        child.stdin.write(b"epoch 1\n")
        child.stdin.flush()
        assert child.stderr.readline() == b"epoch 1\n"
        child.stdin.write(json.dumps(RECORD).encode())
        child.stdin.close()
        assert child.stderr.read() == b"" and child.wait(30) == 0


@pytest.mark.parametrize("name", [
    ":memory:", "file:results.db", "file:x.db?mode=memory", "a?b.db", "a#b.db", "100%.db", "%41.db", "-x.db", "ü😀.db",
    "a b.db", "a'b\".db", "?", "#"])
def test_any_name_is_a_plain_file(name, tmp_path):
    assert process("insert", "--", name, stdin=json.dumps(RECORD).encode()).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    done = process("query", "--", name, "SELECT count(*) FROM results")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"count(*)\n1\n", b"")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_empty_name_is_refused(expect_failure):
    assert "the DATABASE has no name" in expect_failure("query", "", "SELECT 1", status=2)


def test_zero_byte_file_is_filled(expect_success, rows, db_path):
    db_path.touch()
    expect_success("insert", db_path, stdin=RECORD)
    assert len(rows(db_path)) == 1


def test_schema_objects_are_all_created(expect_success, tmp_path, db_path):
    (tmp_path / "s.sql").write_text("CREATE TABLE t (x TEXT PRIMARY KEY); CREATE INDEX i ON t (x); CREATE VIEW v AS"
                                    " SELECT * FROM t; CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END;")
    expect_success("insert", db_path, "--schema", tmp_path / "s.sql", stdin={"x": "1"})
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        assert [name for name, in db.execute("SELECT name FROM sqlite_master WHERE sql IS NOT NULL")] == list("tivg")


# insert_manual


def flags(record, hyphens=False):
    for name, value in record.items():
        if value is ...:
            continue
        yield from ("--" + (name.replace("_", "-") if hyphens else name), value)


@pytest.mark.parametrize("hyphens", [False, True])
def test_insert_manual(expect_success, rows, db_path, hyphens):
    expect_success("insert_manual", db_path, *flags(RECORD, hyphens))
    (row,) = rows(db_path)
    assert row[2:-1] == [str(value) for value in RECORD.values()]


def test_insert_manual_names_all_missing_columns(expect_failure, db_path):
    message = expect_failure("insert_manual", db_path, "--author", "Philip", "--epochs=3", status=2)
    assert ("column algorithm, activation, dataset, forecast_length, prediction_gap, training_window_length,"
            " sample_window_length, layers, rmse_global missing") in message


def test_insert_manual_null(expect_success, expect_failure, rows, db_path):
    record = {name: value for name, value in RECORD.items() if name != "rmse_global"}
    expect_success("insert_manual", db_path, *flags(record), "--null", "rmse_global")
    assert rows(db_path, "SELECT rmse_global IS NULL FROM results") == [["1"]]
    assert "column epochs: expected a 64-bit integer, got null" in expect_failure(
        "insert_manual", db_path, *flags({**record, "rmse_global": 1, "epochs": ...}), "--null=epochs")
    assert "column epochs is given twice" in expect_failure(
        "insert_manual", db_path, "--epochs=1", "--epochs=2", status=2)


def test_insert_manual_column_named_as_a_flag(expect_success, rows, db_path, tmp_path):
    (tmp_path / "s.sql").write_text('CREATE TABLE results (timeout INTEGER, help TEXT, "column.x" TEXT, a_b INT);')
    schema = ("--schema", tmp_path / "s.sql")
    expect_success("insert_manual", db_path, *schema, "--column.timeout", "5", "--timeout", "7", "--column.help", "me",
                   "--column.x", "y", "--a-b=1")
    assert rows(db_path) == [["5", "me", "y", "1"]]
    help_text = expect_success("insert_manual", "--help", *schema)
    assert "--column.timeout INTEGER" in help_text and "--column.help TEXT" in help_text


def test_insert_manual_unknown_column(expect_failure, db_path):
    assert '"epoch" is no column of results; did you mean "epochs"?' in expect_failure(
        "insert_manual", db_path, "--epoch", "3", status=2)


# Usage


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "no command; there are insert"),
    (["inser"], 'unknown command inser; did you mean "insert"?; there are insert'),
    (["query", "x.db"], "query: takes DATABASE SQL|-"),
    (["query", "x.db", "SELECT 1", "more"], "query: takes DATABASE SQL|-"),
    (["query", "x.db", "SELECT 1", "--form", "csv"], "query: unknown flag --form; did you mean"),
    (["query", "x.db", "SELECT 1", "--format", "xml"], "query: --format takes csv|tsv|json|jsonl|table|markdown"),
    (["query", "x.db", "SELECT 1", "--format"], "query: --format takes a value"),
    (["query", "x.db", "SELECT 1", "--no-header=1"], "query: --no-header takes no value"),
    (["query", "x.db", "SELECT 1", "--param", "x"], "query: --param takes NAME=VALUE"),
    (["query", "x.db", "SELECT 1", "--timeout", "soon"], "query: --timeout takes seconds"),
    (["query", "x.db", "SELECT 1", "--timeout", "-1"], "query: --timeout takes seconds"),
    (["query", "x.db", "SELECT 1", "--schema", "s.sql"], "query: unknown flag --schema"),
    (["retry"], "retry: takes DATABASE"),
    (["merge", "x.db"], "merge: takes DATABASE OTHER..."),
    (["snapshot", "x.db", "y.db", "--table", "t"], "snapshot: unknown flag --table"),
])
def test_wrong_usage(expect_failure, arguments, said):
    assert said in expect_failure(*arguments, status=2)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], *(
    [command, "--help"] for command in ("insert", "insert_manual", "query", "retry"))])
def test_help(expect_success, arguments):
    assert "dbtool" in expect_success(*arguments)


@pytest.mark.parametrize("words", [["insert", "results.db", "--bogus"], ["insrt", "results.db"], ["insert"],
                                   ["--timeout", "5", "insert", "r.db"], ["insert", "r.db", "--on-conflict", "no"]], ids=" ".join)
def test_wrong_usage_of_insert_loses_nothing(tmp_path, words):
    done = process(*words, stdin=b'{"cost": "ten hours"}')
    assert done.returncode == 2 and done.stderr.count(b"\n") == 2
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == b'{"cost": "ten hours"}'
    assert done.stderr.endswith(f"the input is kept in {path}; run: python3 dbtool.py insert DATABASE < {path}\n".encode())


@pytest.mark.parametrize("command", ["merge", "snapshot", "migrate"])
def test_a_command_of_the_other_script_says_where_it_is(command):
    done = subprocess.run([sys.executable, DBTOOL, command, "my r.db", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"dbtool: {command} is a command of dbadmin.py; run: python3 dbadmin.py {command} 'my r.db' x\n")


def test_a_file_as_a_word_is_told_from_standard_input():
    assert b'takes DATABASE, got "r.db" "g.json"; it reads standard input: < g.json' in process("insert", "r.db", "g.json").stderr


def test_text_before_the_record_brings_a_hint(expect_failure, db_path):
    assert 'got "epoch 1"; insert --skip-text passes over lines of text; the input' in expect_failure("insert", db_path, stdin=b"epoch 1")


@pytest.mark.parametrize("bad, said", [
    ('{"epochs": "UNIQUE"}', 'got "UNIQUE"; the input'), ('{"author": "\\ud800"}', "which has half of a surrogate pair, or a byte that is not UTF-8; the input"),
    ('{"a": unterminated }', 'expecting value near "unterminated }"; the input')])
def test_words_of_the_input_are_not_taken_for_those_of_a_message(expect_failure, db_path, bad, said):
    record = bad if "unterminated" in bad else json.dumps({**RECORD, **json.loads(bad)})
    assert said in expect_failure("insert", db_path, stdin=record.encode())


# Many writers


def start(path):
    child = subprocess.Popen([sys.executable, DBTOOL, "insert", str(path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdin.write(json.dumps(RECORD).encode())
    child.stdin.close()
    return child


@pytest.mark.parametrize("count, exists", [
    (50, False), pytest.param(200, False, marks=pytest.mark.slow), pytest.param(200, True, marks=pytest.mark.slow)])
def test_many_processes_at_once(rows, db_path, expect_success, count, exists):
    if exists:
        expect_success("insert", db_path, stdin=RECORD)
    children = [start(db_path) for _ in range(count)]
    ends = [(child.stderr.read(), child.wait(120)) for child in children]
    for child in children:
        child.stderr.close()
    assert ends == [(b"", 0)] * count
    assert rows(db_path, "SELECT count(*) FROM results") == [[str(count + exists)]]
    assert rows(db_path, "PRAGMA integrity_check") == [["ok"]]
    assert [path.name for path in db_path.parent.iterdir()] == ["results.db"]


def test_as_a_module_it_is_compiled_once(rows, db_path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    copies = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "dbtool", "insert", "results.db"], input=json.dumps(RECORD).encode(),
                              capture_output=True, env=environment, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        copies.append([(path, path.stat().st_ino) for path in (tmp_path / "compiled").rglob("dbtool*.pyc")])
    assert len(copies[0]) == 1 and copies[0] == copies[1]
    assert rows(db_path, "SELECT count(*) FROM results") == [["2"]]


@pytest.mark.slow
def test_a_writer_that_holds_the_lock_delays_the_others(rows, db_path, expect_success):
    expect_success("insert", db_path, stdin=RECORD)
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        children = [start(db_path) for _ in range(10)]
        time.sleep(5)
        assert [child.poll() for child in children] == [None] * 10
        assert rows(db_path, "SELECT count(*) FROM results") == [["1"]]  # readers don't wait
        db.execute("COMMIT")
        for child in children:
            with child:
                assert (child.stderr.read(), child.wait(60)) == (b"", 0)
    assert rows(db_path, "SELECT count(*) FROM results") == [["11"]]


def test_a_slow_producer_does_not_hold_the_lock(rows, db_path):
    child = subprocess.Popen([sys.executable, DBTOOL, "insert", str(db_path)], stdin=subprocess.PIPE)
    with child:
        child.stdin.write(json.dumps(RECORD).encode() + b"\n")
        child.stdin.flush()
        time.sleep(0.3)
        done = process("insert", db_path, "--timeout", "0", stdin=json.dumps(RECORD).encode())
        assert (done.returncode, done.stderr) == (0, b"")
        child.stdin.write(json.dumps(RECORD).encode() + b"\n")
    assert child.returncode == 0
    assert rows(db_path, "SELECT count(*) FROM results") == [["3"]]


@pytest.mark.slow
def test_readers_while_writers_write(rows, db_path, expect_success):
    expect_success("insert", db_path, stdin=RECORD)
    done = []

    def write():
        for _ in range(10):
            done.append(process("insert", db_path, stdin=json.dumps(RECORD).encode()).returncode)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    counts = []
    while any(writer.is_alive() for writer in writers):
        answer = process("query", db_path, "SELECT count(*) FROM results", "--no-header")
        assert (answer.returncode, answer.stderr) == (0, b"")
        counts.append(int(answer.stdout))
    assert done == [0] * 30 and counts == sorted(counts)
    assert rows(db_path, "SELECT count(*) FROM results") == [["31"]]

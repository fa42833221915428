"""Any table will do: its columns, types, defaults and descriptions come from schema.sql alone."""

import ast
import json

import pytest
from conftest import RECORD, ROOT

import dbtool

OLD_LAB = """
CREATE TABLE "AlgorithmResult" (
    id TEXT NOT NULL PRIMARY KEY,
    creation_ts DATETIME NOT NULL,
    author TEXT NOT NULL,
    algorithm TEXT NOT NULL,
    activation TEXT NOT NULL,
    dataset TEXT NOT NULL,
    forecast_length INTEGER UNSIGNED NOT NULL,  -- how far, in samples
    prediction_gap INTEGER UNSIGNED NOT NULL,
    training_window_length INTEGER UNSIGNED NOT NULL,
    sample_window_length INTEGER UNSIGNED NOT NULL,
    epochs INTEGER UNSIGNED NOT NULL,
    layers TEXT NOT NULL,
    rmse_global DOUBLE,
    metadata JSON NOT NULL
);
"""
ODD_NAMES = '''
-- A comment that belongs to no column.
CREATE TABLE "my table" (
    "run id" INTEGER PRIMARY KEY,   -- counted by SQLite
    "select" TEXT NOT NULL,         -- a keyword, with a comma
    [learning rate] REAL NOT NULL CHECK ("learning rate" > 0), /* not this */ -- step of the descent
    `half` REAL GENERATED ALWAYS AS ("learning rate" / 2),
    "say ""hi""" BLOB DEFAULT (NULL)
);
CREATE INDEX "by rate" ON "my table" ("learning rate");
CREATE VIEW best AS SELECT * FROM "my table" ORDER BY "learning rate";
CREATE TRIGGER no_zero BEFORE INSERT ON "my table" WHEN NEW."select" = '0'
BEGIN SELECT RAISE(ABORT, 'a zero; it is refused'); END;
'''
NO_KEY = "CREATE TABLE log (message, level INTEGER DEFAULT 3);"


@pytest.fixture
def schema_file(tmp_path, monkeypatch):
    def write(sql):
        path = tmp_path / "other.sql"
        path.write_text(sql)
        monkeypatch.setenv("DBTOOL_SCHEMA", str(path))
        return path

    return write


def test_the_shipped_columns():
    schema = dbtool.read_schema()
    assert schema.table == "results"
    names = ("id creation_ts author algorithm activation dataset forecast_length prediction_gap"
             " training_window_length sample_window_length epochs layers rmse_global metadata")
    assert " ".join(column.name for column in schema.columns) == names
    assert [column.name for column in schema.columns if column.nullable] == ["rmse_global"]
    assert {column.name for column in schema.columns if column.needed} == set(RECORD)
    assert all(dbtool.descriptions(schema)[column.name] for column in schema.columns)


@pytest.mark.parametrize("script", ["dbtool.py", "dbadmin.py", "sweep.py"])
def test_no_column_is_named_in_the_program(script):
    import re

    text = (ROOT / script).read_text()
    text = text.replace(ast.get_docstring(ast.parse(text), clean=False) or "", "")  # its example names columns
    columns = [c.name for c in dbtool.read_schema().columns if c.name not in ("id", "metadata")]
    assert [name for name in columns if re.search(rf"\b{name}\b", text)] == []


def test_old_lab_schema(schema_file, expect_success, expect_failure, rows, db_path):
    schema_file(OLD_LAB)
    record = {**RECORD, "id": "a1", "creation_ts": "2020-01-01 00:00:00", "metadata": {"host": "n1"}}
    expect_success("insert", db_path, stdin=record)
    assert rows(db_path, 'SELECT id, epochs, typeof(epochs), metadata FROM "AlgorithmResult"') == [
        ["a1", "1", "integer", '{"host":"n1"}']]
    message = expect_failure("insert", db_path, stdin=RECORD)
    assert "record 1: column id, creation_ts, metadata missing, and other.sql gives no default" in message
    message = expect_failure("insert", db_path, stdin={**record, "epochs": "many"})
    assert 'record 1: column epochs: expected a 64-bit integer, got "many"' in message
    assert "UNIQUE" in expect_failure("insert", db_path, stdin=record)
    help_text = expect_success("insert_manual", "--help")
    assert "--forecast_length INTEGER UNSIGNED, needed" in help_text and "how far, in samples" in help_text


def test_quoted_names_generated_columns_and_rowid_key(schema_file, expect_success, expect_failure, rows, db_path):
    schema_file(ODD_NAMES)
    expect_success("insert", db_path, stdin=[{"select": "a", "learning rate": 0.5},
                                             {"select": "b", "learning rate": 1, 'say "hi"': "x"}])
    assert rows(db_path, 'SELECT * FROM "my table"') == [["1", "a", "0.5", "0.25", ""], ["2", "b", "1.0", "0.5", "x"]]
    expect_success("insert_manual", db_path, "--select", "c", "--learning rate=4", "--run id", "9")
    assert rows(db_path, 'SELECT max("run id") FROM best') == [["9"]]
    assert "column half is generated" in expect_failure(
        "insert", db_path, stdin={"select": "a", "learning rate": 1, "half": 2})
    assert "CHECK" in expect_failure("insert", db_path, stdin={"select": "a", "learning rate": -1})
    assert "record 2: a zero; it is refused" in expect_failure(
        "insert", db_path, stdin=[{"select": "1", "learning rate": 1}, {"select": "0", "learning rate": 1}])
    help_text = expect_success("insert_manual", "--help")
    for name, said in (("run id", "counted by SQLite"), ("select", "a keyword, with a comma"),
                       ("learning rate", "step of the descent"), ('say "hi"', "")):
        flag = json.dumps(f"--{name}") if " " in name else f"--{name}"
        (line,) = (line for line in help_text.splitlines() if line.strip().startswith(flag))
        assert line.endswith(said)
    assert "half" not in help_text


def test_table_without_key_or_types(schema_file, expect_success, rows, db_path):
    schema_file(NO_KEY)
    expect_success("insert", db_path, stdin=b'{"message": 1} {"message": "1"} {"message": true, "level": 1.0}')
    assert rows(db_path, "SELECT message, typeof(message), level FROM log") == [
        ["1", "integer", "3"], ["1", "text", "3"], ["1", "integer", "1"]]


def test_several_tables_need_a_name(schema_file, expect_success, expect_failure, rows, db_path, monkeypatch):
    schema_file("CREATE TABLE a (x TEXT); CREATE TABLE b (y TEXT);")
    assert "has tables a, b; name one of them with --table" in expect_failure("insert", db_path, stdin={"x": "1"})
    expect_success("insert", db_path, "--table", "b", stdin={"y": "1"})
    monkeypatch.setenv("DBTOOL_TABLE", "a")
    expect_success("insert", db_path, stdin={"x": "2"})
    assert rows(db_path, "SELECT * FROM a, b") == [["2", "1"]]
    assert "has tables a, b, and no c; name one of them" in expect_failure("insert", db_path, "--table=c", stdin={"x": "1"})


@pytest.mark.parametrize(("sql", "said"), [
    ("CREATE TABEL a (x);", 'near "TABEL": syntax error'),
    ("", "has no CREATE TABLE"),
    ("CREATE VIEW v AS SELECT 1;", "has no CREATE TABLE"),
], ids=["syntax error", "empty", "view only"])
def test_broken_schema(schema_file, expect_failure, db_path, sql, said):
    path = schema_file(sql)
    message = expect_failure("insert", db_path, stdin=RECORD)
    assert f"{path}: {said}" in message or (str(path) in message and said in message)
    assert not db_path.exists()


def test_missing_schema(expect_failure, db_path, tmp_path):
    message = expect_failure("insert", db_path, "--schema", tmp_path / "none.sql", stdin=RECORD)
    assert "none.sql: No such file or directory; name the schema with --schema" in message


def test_schema_is_found_beside_the_script_through_a_symlink(tmp_path, db_path):
    import subprocess
    import sys

    link = tmp_path / "tool"
    link.symlink_to(ROOT / "dbtool.py")
    subprocess.run([sys.executable, link, "insert", db_path], input=json.dumps(RECORD).encode(), check=True)
    assert db_path.exists()


@pytest.mark.parametrize(("sql", "said"), [
    ("CREATE TABLE results (id TEXT PRIMARY KEY)", "has no column creation_ts, author"),
    ("CREATE TABLE other (x)", "has no table results"),
    (None, ", extra TEXT NOT NULL", ), (None, ", extra TEXT"), (None, ", extra TEXT NOT NULL DEFAULT 'x'"),
], ids=["columns missing", "table missing", "extra needed", "extra nullable", "extra with default"])
def test_file_that_differs_from_the_schema(call, db_path, sql, said):
    import contextlib
    import sqlite3

    if sql is None:
        sql = (ROOT / "schema.sql").read_text().replace(
            "metadata TEXT NOT NULL DEFAULT '{}' ", f"metadata TEXT NOT NULL DEFAULT '{{}}'{said} ")
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.executescript(sql)
    result = call("insert", db_path, stdin=RECORD)
    if "extra" not in said:
        assert result.status == 1 and said in result.err and "migrate" in result.err
    elif said.endswith("NOT NULL"):
        assert result.status == 1 and "needs column extra" in result.err and f"python3 dbadmin.py migrate {db_path} --schema " in result.err
        assert " --drop extra" in result.err
    else:
        assert (result.status, result.err) == (0, ""), result.err
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == ("wal" if result.status == 0 else "delete")


def test_schema_command(expect_success, db_path):
    lines = expect_success("schema").splitlines()
    assert lines[0].split() == ["column", "type", "needed", "default", "description"] and len(lines) == 16
    assert "passes over the training windows at each step" in next(line for line in lines if line.startswith("epochs "))
    import csv
    import io

    rows = list(csv.DictReader(io.StringIO(expect_success("schema", "--format", "csv"))))
    assert rows[10] == {"column": "epochs", "type": "INTEGER", "needed": "yes", "default": "",
                        "description": "passes over the training windows at each step"}
    assert json.loads(expect_success("schema", "--format", "json"))[13]["default"] == "'{}'"


def test_schema_command_tells_what_differs(schema_file, expect_success, expect_failure, db_path, tmp_path):
    schema_file("CREATE TABLE t (a TEXT NOT NULL, b INTEGER, old REAL DEFAULT 1);")
    expect_success("insert", db_path, stdin={"a": "x", "b": 1})
    schema_file("CREATE TABLE t (a TEXT NOT NULL, b REAL, new TEXT);")
    before = db_path.read_bytes()
    rows = json.loads(expect_success("schema", db_path, "--format=json"))
    assert {row["column"]: row["file"] for row in rows} == {
        "a": "same", "b": "INTEGER", "new": "missing", "old": "only there: REAL DEFAULT 1"}
    assert db_path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["other.sql", "results.db"]
    assert "there is no such file" in expect_failure("schema", "none.db")

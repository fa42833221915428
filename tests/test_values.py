"""Which JSON value fits which column, through the real program: the table in the README, cell by cell."""

import csv
import io
import json

import pytest

SCHEMA = """CREATE TABLE t (n INTEGER DEFAULT NULL, integer INTEGER NOT NULL DEFAULT 0, real REAL NOT NULL DEFAULT 0,
    text TEXT NOT NULL DEFAULT '', numeric NUMERIC NOT NULL DEFAULT 0,
    blob BLOB NOT NULL DEFAULT 0, bare NOT NULL DEFAULT 0,
    integer0 INTEGER DEFAULT NULL, real0 REAL DEFAULT NULL, text0 TEXT DEFAULT NULL, numeric0 NUMERIC DEFAULT NULL,
    blob0 BLOB DEFAULT NULL, bare0 DEFAULT NULL);"""
NO = None
BIG = 2**63
# The JSON text; then what is stored in INTEGER, REAL, TEXT, NUMERIC, BLOB and untyped columns, or NO.
TABLE = [
    ("5", 5, 5.0, NO, 5, 5, 5),
    ("-0", 0, 0.0, NO, 0, 0, 0),
    (str(BIG - 1), BIG - 1, NO, NO, BIG - 1, BIG - 1, BIG - 1),
    (str(-BIG), -BIG, float(-BIG), NO, -BIG, -BIG, -BIG),
    (str(BIG), NO, float(BIG), NO, NO, NO, NO),
    (str(2**53 + 1), 2**53 + 1, NO, NO, 2**53 + 1, 2**53 + 1, 2**53 + 1),
    ("1" + "0" * 400, NO, NO, NO, NO, NO, NO),
    ("10.0", 10, 10.0, NO, 10, 10.0, 10.0),
    ("1e2", 100, 100.0, NO, 100, 100.0, 100.0),
    ("1e300", NO, 1e300, NO, 1e300, 1e300, 1e300),
    ("10.5", NO, 10.5, NO, 10.5, 10.5, 10.5),
    ("5e-324", NO, 5e-324, NO, 5e-324, 5e-324, 5e-324),
    ("true", 1, NO, NO, 1, 1, 1),
    ("false", 0, NO, NO, 0, 0, 0),
    ('"abc"', NO, NO, "abc", "abc", "abc", "abc"),
    ('"12"', NO, NO, "12", 12, "12", "12"),
    ('""', NO, NO, "", "", "", ""),
    ('"a\\u0000b"', NO, NO, "a\0b", "a\0b", "a\0b", "a\0b"),
    ('"\\ud83d\\ude00 ü"', NO, NO, "😀 ü", "😀 ü", "😀 ü", "😀 ü"),
    ('"\\ud83d"', NO, NO, NO, NO, NO, NO),
    ('{"a": [1, "ü"]}', *[NO] * 2, *['{"a":[1,"ü"]}'] * 4),
    ("[1, 2.50]", *[NO] * 2, *["[1,2.5]"] * 4),
    ('{"a": NaN, "b": -Infinity}', *[NO] * 2, *['{"a":null,"b":null}'] * 4),
    ('{"$hex": "00fF"}', *[NO] * 2, *[b"\x00\xff"] * 4),
    ("Infinity", NO, float("inf"), NO, float("inf"), float("inf"), float("inf")),
    ("-Infinity", NO, float("-inf"), NO, float("-inf"), float("-inf"), float("-inf")),
    ("null", NO, NO, NO, NO, NO, NO),
    ("NaN", NO, NO, NO, NO, NO, NO),
]
COLUMNS = ["integer", "real", "text", "numeric", "blob", "bare"]
CELLS = [pytest.param(text, column, cells[i], id=f"{text[:25]}-{column}")
         for text, *cells in TABLE for i, column in enumerate(COLUMNS)]


@pytest.fixture(autouse=True)
def _schema(tmp_path, monkeypatch):
    (tmp_path / "t.sql").write_text(SCHEMA)
    monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "t.sql"))


def stored(path, column):
    import contextlib
    import sqlite3

    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT {column} FROM t").fetchall()


def same(value, other):
    return value == other and type(value) is type(other)


@pytest.mark.parametrize(("text", "column", "expected"), CELLS)
@pytest.mark.parametrize("conflict", ["fail", pytest.param("replace", marks=pytest.mark.slow)])
def test_insert_fits_or_refuses(call, db_path, text, column, expected, conflict):
    result = call("insert", db_path, "--on-conflict", conflict, stdin=f'{{"{column}": {text}}}'.encode())
    if expected is NO:
        assert result.status == 1 and result.err.startswith(f"dbtool: {db_path}: record 1")
        assert f"column {column}: " in result.err
        assert not db_path.exists() or stored(db_path, column) == []
    else:
        assert (result.status, result.err) == (0, ""), result.err
        (value,), = stored(db_path, column)
        assert same(value, expected)


@pytest.mark.parametrize("column", COLUMNS)
def test_nan_is_refused_in_every_record(call, db_path, column):
    """SQLite itself would put the default there, with OR REPLACE."""
    good = '"x"' if column == "text" else "1.0"
    assert call("insert", db_path, stdin=f'{{"{column}": {good}}}'.encode()).status == 0
    data = f'{{"{column}": {good}}} {{"{column}": {good}}} {{"{column}": NaN}}'.encode()
    result = call("insert", db_path, "--on-conflict", "replace", stdin=data)
    assert result.status == 1 and f"record 3: column {column}: expected" in result.err
    assert len(stored(db_path, column)) == 1


@pytest.mark.parametrize(("text", "column"), [(text, column) for text in ("null", "NaN") for column in COLUMNS])
def test_insert_null_where_nullable(call, db_path, text, column):
    result = call("insert", db_path, stdin=f'{{"{column}0": {text}}}'.encode())
    if text == "NaN" and column == "text":
        assert result.status == 1 and "column text0: expected a string or null, got NaN" in result.err
    else:
        assert (result.status, result.err) == (0, ""), result.err
        assert stored(db_path, f"{column}0") == [(None,)]


@pytest.mark.parametrize(("column", "text", "expected"), [
    ("integer", "12", 12), ("integer", "12.0", 12), ("integer", "true", 1), ("integer", "-3", -3),
    ("integer", "1.5", NO), ("integer", "x", NO), ("integer", "", NO), ("integer", str(BIG), NO),
    ("real", "12", 12.0), ("real", "-1e-3", -0.001), ("real", "x", NO), ("real", "true", NO), ("real", "1e999", NO),
    ("real", "Infinity", float("inf")), ("real", "NaN", NO), ("real", ".5", 0.5), ("real", "1.", 1.0), ("real", "+1", 1.0),
    ("integer", "+9007199254740993", 9007199254740993), ("integer", "1e3", 1000), ("integer", "1_000", NO),
    ("real", "inf", NO), ("real", "-", NO), ("text", ".5", ".5"), ("numeric", "1_000", "1_000"),
    ("numeric", "007", 7), ("blob", "007", "007"), ("bare", "+5", "+5"),
    ("text", "12", "12"), ("text", "true", "true"), ("text", "", ""), ("text", "-5", "-5"),
    ("numeric", "12", 12), ("numeric", "1.5", 1.5), ("numeric", "abc", "abc"), ("numeric", "null", "null"),
    ("blob", "12", 12), ("bare", "x y", "x y"), ("text", '{"a": 1}', '{"a": 1}'),
])
def test_insert_manual_reads_text(call, db_path, column, text, expected):
    result = call("insert_manual", db_path, f"--{column}", text)
    if expected is NO:
        assert result.status == 1 and f"column {column}: expected" in result.err
    else:
        assert (result.status, result.err) == (0, ""), result.err
        (value,), = stored(db_path, column)
        assert same(value, expected)


@pytest.mark.parametrize("value", [
    "a,b", 'a"b', "a\nb", "a\rb", "a\r\nb", "ü😀", "", None, -0.0, 0.1 + 0.2, 1e308, 5e-324, BIG - 1, -BIG,
    "None", "b'x'", " x ", "'", "\t", "\u2028", "1,2\n"])
def test_csv_reads_back(expect_success, db_path, value):
    import contextlib
    import sqlite3

    with contextlib.closing(sqlite3.connect(db_path)) as db:
        db.execute("CREATE TABLE t (a, b, c)")
        db.executemany("INSERT INTO t VALUES (?, ?, ?)", [("x", value, 1), (value, value, value)])
        db.commit()
    expected = "" if value is None else str(value)
    whole = [["x", expected, "1"], [expected] * 3]
    for sql, rows in (("SELECT * FROM t", whole), ("SELECT b FROM t", [[expected]] * 2)):
        for style, delimiter in (("csv", ","), ("tsv", "\t")):
            out = expect_success("query", db_path, sql, "--no-header", "--format", style)
            assert list(csv.reader(io.StringIO(out, newline=""), delimiter=delimiter)) == rows
            assert out.endswith("\n") and not out.endswith("\r\n")
    if isinstance(value, float):
        assert float(rows[0][0]).hex() == value.hex()


def test_jsonl_round_trip(expect_success, db_path, tmp_path):
    records = [{"n": n, column: json.loads(text)} for n, (text, *cells) in enumerate(TABLE)
               for column, cell in zip(COLUMNS, cells) if cell is not NO and column != "integer"]
    expect_success("insert", db_path, stdin="\n".join(map(json.dumps, records)).encode())
    columns = ",".join(f"{name}, typeof({name})" for name in ["n", *COLUMNS])
    for style in ("jsonl", "json"):
        other = tmp_path / f"{style}.db"
        out = expect_success("query", db_path, "SELECT * FROM t", "--format", style)
        expect_success("insert", other, stdin=out.encode())
        assert stored(other, columns) == stored(db_path, columns) != []

#!/usr/bin/env python3
"""dbtool: keep the results of many runs in one SQLite file, and ask it questions.

    python3 mlp.py | python3 dbtool.py insert results.db
    python3 dbtool.py query results.db "SELECT layers, min(rmse_global) FROM results GROUP BY layers"

Commands (each has its own --help):

    insert         store the JSON objects on standard input as rows
    insert_manual  store one row, each column given as a flag
    query          print the answer to an SQL question as CSV
    retry          store what insert had to keep aside

The columns are those of schema.sql, beside this script. Many processes may insert at once. A result
that reached standard input is never lost: it is a row, or in a file that the message names.

Exit status: 0 done; 1 refused or failed; 2 wrong usage; 75 try again later (locked, disk full, I/O
error); 128+N stopped by signal N. Messages go to standard error, one line each.
"""

from __future__ import annotations

import codecs
import io
import itertools
import os
import sqlite3
import stat
import sys
import time

TYPE_CHECKING = False  # what `typing` calls it; importing typing would cost a tenth of an insert's time
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType
    from typing import Any, BinaryIO, TypeVar

    Result = TypeVar("Result")
else:
    import _signal as signal  # all of `signal` but its enums, which take as long to import as half of SQLite

__version__ = "0.1.0"

REFUSED, USAGE, TRY_AGAIN, SIGNALLED = 1, 2, 75, 128  # exit statuses; 75 is EX_TEMPFAIL of sysexits.h
LOCK_TIMEOUT_S = 60.0
LOCK_NAP_S = 0.05  # the longest sleep between two tries for a lock
CHUNK_BYTES = 1 << 18
SPOOL_BYTES = 1 << 22  # input beyond this waits in a file, not in memory
ROWS_AT_ONCE = 256
STOPPING: dict[int, str] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
STEPS_BETWEEN_CHECKS = 50_000  # SQLite virtual-machine steps: some milliseconds


class Failure(Exception):
    """Something the user should know: one line that says what, where and what to do, and the exit status."""

    def __init__(self, message: str, status: int = REFUSED, claim: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.claim = claim  # set when COMMIT itself failed: the row that shows whether it did happen


class Misfit(Failure):
    """A value that does not fit its column, or a record that does not fit its table."""


class Signals:
    """Ends the program on a signal, but only inside `with SIGNALS:`, where stopping loses nothing."""

    caught = 0
    open = False

    def install(self) -> None:
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or `&` in a script
                signal.signal(number, self.handle)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.caught = number
        if self.open:
            self.check()

    def check(self) -> None:
        if self.caught:
            raise Failure(f"stopped by {STOPPING[self.caught]}", SIGNALLED + self.caught)

    def pending(self) -> int:
        """Tell SQLite whether to stop; a callback for sqlite3_progress_handler."""
        for _ in range(2):  # PyPy runs signal handlers only where a loop goes round
            pass
        return self.caught

    def __enter__(self) -> None:
        self.open = True
        self.check()

    def __exit__(self, *_: object) -> None:
        self.open = False


SIGNALS = Signals()


# ---------------------------------------------------------------------------------------------- schema


class Column:
    """One column as SQLite reports it.

    `affinity` is INTEGER, REAL, TEXT, NUMERIC or BLOB; `default` is SQL text or None; `needed` means
    that a record must have it; `key` is its place in the primary key, from 1, or 0.
    """

    def __init__(self, row: Sequence[Any], rowid_alias: bool) -> None:
        _, self.name, self.type, not_null, self.default, self.key, hidden = row
        self.affinity = affinity(self.type)
        self.generated = hidden > 1
        self.nullable = not not_null
        self.needed = self.default is None and not self.generated and not (self.key and rowid_alias)


class Schema:
    """The results table of a schema.sql: its name, columns, and every CREATE statement of the file."""

    def __init__(self, path: str, table: str, columns: list[Column], made: list[tuple[str, str, str]]) -> None:
        self.path, self.table, self.columns = path, table, columns
        self.made = made  # (type, name, CREATE statement) in the file's order
        self.by_name = {column.name: column for column in columns}
        self.key = [column for column in columns if column.key]


def affinity(declared: str) -> str:
    """Return the affinity of a declared type, by the five rules of sqlite.org/datatype3.html, section 3.1."""
    declared = declared.upper()
    for name, words in (
        ("INTEGER", ("INT",)),
        ("TEXT", ("CHAR", "CLOB", "TEXT")),
        ("BLOB", ("BLOB",)),
        ("REAL", ("REAL", "FLOA", "DOUB")),
    ):
        if any(word in declared for word in words):
            return name
    return "NUMERIC" if declared else "BLOB"


def quote(name: str) -> str:
    """Return *name* as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def columns_of(db: sqlite3.Connection, table: str) -> list[Column]:
    """Return the columns of *table*, none if there is no such table."""
    rows = db.execute(f"PRAGMA table_xinfo({quote(table)})").fetchall()
    indexes = db.execute(f"PRAGMA index_list({quote(table)})").fetchall()
    # An INTEGER PRIMARY KEY needs no index of its own, as it is the rowid.
    rowid_alias = not any(index[3] == "pk" for index in indexes)
    return [Column(row, rowid_alias) for row in rows]


def read_schema(path: str | None = None, table: str | None = None) -> Schema:
    """Read the columns from an SQL file by running it in memory.

    *path* defaults to DBTOOL_SCHEMA, else to schema.sql beside this script; *table* to DBTOOL_TABLE,
    else to the file's only table. Raises Failure.
    """
    path = path or os.environ.get("DBTOOL_SCHEMA") or os.path.join(
        os.path.dirname(os.path.realpath(__file__)), "schema.sql")
    table = table or os.environ.get("DBTOOL_TABLE")
    db = sqlite3.connect(":memory:")
    try:
        with open(path, encoding="utf-8") as file:
            db.executescript(file.read())
        made = db.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
                          " AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid").fetchall()
        tables = [name for kind, name, _ in made if kind == "table"]
        if table is None and len(tables) != 1:
            raise Failure(f"{path}: has {len(tables)} tables ({', '.join(tables)}); name one with --table")
        if table is not None and table not in tables:
            raise Failure(f"{path}: no table {table}; it has {', '.join(tables) or 'none'}")
        table = table or tables[0]
        return Schema(path, table, columns_of(db, table), made)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; name the schema with --schema FILE or DBTOOL_SCHEMA") from None
    except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError) as error:
        raise Failure(f"{path}: {error}") from None
    finally:
        db.close()


def descriptions(schema: Schema) -> dict[str, str]:
    """Return what the comments in schema.sql say of each column: the `--` that ends its definition."""
    import re

    sql = next(sql for kind, name, sql in schema.made if kind == "table" and name == schema.table)
    token = re.compile(r"""--(?P<comment>[^\n]*)|/\*.*?\*/|'(?:[^']|'')*'|(?P<mark>[(),])|(?P<word>\w+)"""
                       r"""|(?P<quoted>"(?:[^"]|"")*"|`[^`]*`|\[[^]]*\])|\s+|.""", re.S)
    found: dict[str, str] = {}
    depth, current, fresh = 0, "", False
    for match in token.finditer(sql):
        word = match["word"] or (match["quoted"] or "")[1:-1].replace('""', '"')
        if match["mark"]:
            depth += {"(": 1, ")": -1, ",": 0}[match["mark"]]
            fresh = depth == 1 and match["mark"] != ")"
        elif match["comment"] is not None:
            alone = not sql[:match.start()].rpartition("\n")[2].strip()
            if current and not alone:
                found.setdefault(current, match["comment"].strip())
        elif word and fresh:
            current, fresh = (word if word in schema.by_name else ""), False
    return found


# ---------------------------------------------------------------------------------------------- values


def whole(value: float) -> int | None:
    if value != value:
        return None  # NaN is how Python prints a run that diverged; SQLite has NULL for it
    if not value.is_integer():
        raise ValueError
    return int(value)


def exact(value: int) -> float:
    if int(float(value)) != value:
        raise ValueError
    return float(value)


def no_nan(value: float) -> float:
    if value != value:
        raise ValueError
    return value


def json_text(value: Any) -> str:
    """Return compact JSON text that SQLite's JSON functions can read: NaN and Infinity become null."""
    import json

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if "NaN" in text or "Infinity" in text:
        value = json.loads(text, parse_constant=lambda name: None)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text


def structure(value: Any) -> str | bytes:
    """Return an object or array as JSON text, and {"$hex": "…"}, which query prints for a BLOB, as that BLOB."""
    if type(value) is dict and list(value) == ["$hex"] and type(value["$hex"]) is str:
        return bytes.fromhex(value["$hex"])
    return json_text(value)


# What becomes of a JSON value of each type in a column of each affinity: None stores it as it is, a
# function converts it or raises ValueError, and a type that is missing is refused.
ANYTHING: dict[type, Callable[[Any], Any] | None] = {
    int: None, float: None, bool: int, str: None, dict: structure, list: structure, bytes: None}
FITS: dict[str, dict[type, Callable[[Any], Any] | None]] = {
    "INTEGER": {int: None, float: whole, bool: int},
    "REAL": {int: exact, float: None},
    "TEXT": {str: None, dict: structure, list: structure, bytes: None},
    "NUMERIC": ANYTHING,
    "BLOB": ANYTHING,
}
WANTED = {"INTEGER": "a 64-bit integer", "REAL": "a number that a 64-bit float holds", "TEXT": "a string",
          "NUMERIC": "a number or a string", "BLOB": "a number or a string"}


def converter(column: Column, kind: type) -> Callable[[Any], Any] | None:
    """Return how a value of type *kind* is stored in *column*, as in FITS; raise ValueError if it is refused."""
    fits = FITS[column.affinity]
    if kind is type(None) and column.nullable:
        return None
    for base in (bool,) if kind is bool else kind.__mro__:  # NumPy's float64, for one, is a float
        if base in fits:
            convert = fits[base]
            return no_nan if base is float and convert is None and not column.nullable else convert
    raise ValueError


def fit(column: Column, value: Any) -> Any:
    """Return *value*, as it came from JSON, as SQLite should store it in *column*; raise Misfit if it does not fit."""
    try:
        convert = converter(column, type(value))
        stored = convert(value) if convert else value
        if stored is None and not column.nullable:
            raise ValueError
        if isinstance(stored, int) and not -(1 << 63) <= stored < 1 << 63:
            raise ValueError
        if isinstance(stored, str):
            stored.encode()
    except UnicodeEncodeError:
        raise Misfit(f"column {column.name}: {shown(value)} has half of a surrogate pair,"
                      " which is no Unicode text") from None
    except (ValueError, OverflowError, RecursionError):
        wanted = WANTED[column.affinity] + (" or null" if column.nullable else "")
        raise Misfit(f"column {column.name}: expected {wanted}, got {shown(value)}") from None
    return stored


def fit_text(column: Column, text: str) -> Any:
    """Return *text*, typed by a person, as SQLite should store it in *column*; raise Misfit if it does not fit."""
    import json

    if column.affinity == "TEXT":
        return fit(column, text)
    try:
        value = json.loads(text, parse_float=finite)
    except (ValueError, RecursionError):
        value = text
    if type(value) not in (int, float, bool):
        value = text
    return fit(column, value)


def shown(value: Any) -> str:
    """Return *value* as a short text for a message."""
    import json

    if isinstance(value, int) and abs(value) >= 1 << 128:
        return "an integer of more than 128 bits"  # Python 3.11 and newer refuse to print a huge one
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:59] + "…"


# --------------------------------------------------------------------------------------------- records


def finite(text: str) -> float:
    value = float(text)
    if value - value:  # infinite: written as a number, not as Infinity
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(max(names, key=names.count))} stands in one object twice")
    return record


def scanner() -> Any:
    """Return the function of the json module that reads one value, from its C half where there is one.

    The other half compiles regular expressions when it is imported: a tenth of the time an insert takes.
    """
    settings = {"strict": True, "parse_float": finite, "parse_int": int, "parse_constant": float,
                "object_hook": None, "object_pairs_hook": distinct, "memo": {}}
    try:
        from _json import make_scanner
    except ImportError:
        import json

        decoder: Any = json.JSONDecoder(parse_float=finite, object_pairs_hook=distinct)
        return decoder.scan_once
    return make_scanner(type("Settings", (), settings))  # type: ignore[arg-type]


SCAN = scanner()
WHITESPACE = " \t\r\n"
TAIL = 16  # an error this close to the end of the text may only mean that more is to come
# What may come next: at the top level, after "[", after an element, after ",".
TOP, FIRST, NEXT, ELEMENT = "{[", "{]", ",]", "{"


def records(chunks: Iterable[bytes], skip_text: bool = False,
            echo: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in *chunks* of UTF-8: one, many one after another, or an array.

    Memory is bounded by the longest record. With *skip_text*, lines that do not begin like an object
    go to *echo*. Raises Failure, which names the record's number and line.
    """
    incoming, decoder = iter(chunks), codecs.getincrementaldecoder("utf-8")()
    text, position, line, count = "", 0, 1, 0
    allowed, array, skipped, ended = TOP, False, False, False
    broken: UnicodeDecodeError | None = None

    def more() -> bool:
        """Append at least as much text as is unread, so that a long record is scanned only a few times."""
        nonlocal text, position, line, ended, broken
        line += text.count("\n", 0, position)
        parts, wanted = [text[position:]], max(1, len(text) - position)
        while wanted > 0 and not ended:
            chunk = next(incoming, None)
            ended = chunk is None
            try:
                parts.append(decoder.decode(chunk or b"", ended))
            except UnicodeDecodeError as error:
                parts.append(error.object[:error.start].decode())
                broken, ended = error, True
            wanted -= len(parts[-1])
        text, position = "".join(parts), 0
        return len(text) > len(parts[0])

    def malformed(why: str, at: int) -> Failure:
        return Failure(f"record {count + 1} (line {line + text.count(chr(10), 0, at)}): {why}")

    def undecodable() -> None:
        if broken:
            raise malformed(f"byte 0x{broken.object[broken.start]:02x} is not UTF-8", len(text))

    while True:
        while position < len(text) and text[position] in WHITESPACE:
            position += 1
        if position == len(text):
            if more():
                continue
            break
        char = text[position]
        if char == "{" and char in allowed:
            try:
                record, position = SCAN(text, position)
            except SystemError:  # before Python 3.12, the C half raises no error until this is imported
                __import__("json.decoder")
            except (ValueError, StopIteration, RecursionError) as error:
                reason, at = what_is_wrong(error, text, position)
                endless = reason.startswith("unterminated string")
                if (endless or at >= len(text) - TAIL) and not ended and more():
                    continue
                undecodable()
                if endless or at >= len(text.rstrip()):
                    reason = "it ends in the middle; was the program before the pipe cut off?"
                raise malformed(f"not valid JSON: {reason}", at) from None
            else:
                count += 1
                yield record
                allowed = TOP if allowed is TOP else NEXT
        elif skip_text and (start := line_start(text, position)) is not None:
            end = min((at for at in (text.find("\n", position), text.find("\r", position)) if at >= 0), default=-1)
            if end < 0 and not ended and more():
                continue
            end = end if end >= 0 else len(text)
            if echo:
                echo(text[start if end > start else 0:end] + "\n")
            position, skipped = end, True
        elif char in allowed:
            position += 1
            array = True
            allowed = {"[": FIRST, ",": ELEMENT, "]": TOP}[char]
        elif char == "\ufeff" and not count:
            raise malformed("begins with a byte order mark; write UTF-8 without one", position)
        else:
            raise malformed(f"expected a JSON object, got {shown(text[position:position + 20])}", position)
    undecodable()
    if not count and not array:
        raise Failure("no JSON object on standard input, only text" if skipped else
                      "no JSON on standard input: did the program before the pipe fail?")
    if allowed is not TOP:
        raise malformed("not valid JSON: the array does not end; was the program before the pipe cut off?", position)


def what_is_wrong(error: Exception, text: str, position: int) -> tuple[str, int]:
    """Return why the JSON in *text* at *position* does not parse, and where."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply", position
    if isinstance(error, StopIteration):
        reason, position = "expecting value", error.value
    elif hasattr(error, "pos"):  # a JSONDecodeError
        reason, position = error.msg, error.pos  # type: ignore[attr-defined]
    elif "limit" in str(error):  # Python's own limit on the digits of an integer
        return "an integer of thousands of digits", position
    else:
        return str(error), position
    near = text[position:position + 20].split("\n")[0]
    return reason[0].lower() + reason[1:] + (f" near {shown(near)}" if near else ""), position


def line_start(text: str, position: int) -> int | None:
    """Return where the line of *position* starts, or None if something other than blanks stands before it."""
    start = max(text.rfind("\n", 0, position), text.rfind("\r", 0, position)) + 1
    return None if text[start:position].strip() else start


# -------------------------------------------------------------------------------------------- database


def is_busy(error: sqlite3.Error) -> bool:
    return "is locked" in str(error) or "locking protocol" in str(error)


def as_failure(error: Exception, path: str) -> Failure:
    """Return what SQLite or the system said of the database at *path*, in the user's terms."""
    if isinstance(error, Failure):
        return error
    text = str(error)
    if isinstance(error, OSError):
        import errno

        status = TRY_AGAIN if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else REFUSED
        return Failure(f"{error.filename or path}: {error.strerror}", status)
    if isinstance(error, sqlite3.Error) and is_busy(error):
        return Failure("locked by another process; try again, or wait longer with --timeout", TRY_AGAIN)
    if "disk is full" in text or "disk I/O error" in text:
        return Failure(f"{text}; mend that and try again", TRY_AGAIN)
    folder = os.path.dirname(path)
    if "unable to open" in text or "Could not open" in text:  # the latter is PyPy's
        if os.path.isdir(path):
            text = "is a folder; name a file in it"
        elif not os.path.isdir(folder):
            text = f"there is no folder {folder}; make it first"
        elif not os.access(path if os.path.exists(path) else folder, os.W_OK) or not os.access(folder, os.W_OK):
            text = "cannot be opened: you may not write to it or to its folder"
        else:
            text = "cannot be opened, or not its -wal and -shm files beside it"
    elif "readonly" in text:
        text = "may not be written; mend its permissions or its folder's"
    elif "not a database" in text:
        text = "is not an SQLite database; name another file"
    elif "malformed" in text:
        text = "is damaged; save what it holds with: sqlite3 FILE .recover"
    return Failure(text)


def patiently(action: Callable[[], Result], deadline: float) -> Result:
    """Call *action* until the lock that it needs is free, at most until *deadline* (time.monotonic).

    SQLite's own waiting would keep a signal waiting too, and does not cover the switch to WAL.
    """
    nap = 0.001
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() >= deadline:
                raise
        with SIGNALS:
            time.sleep(min(nap, max(0.0, deadline - time.monotonic())))
        nap = min(2 * nap, LOCK_NAP_S)


def connect_to_write(path: str, schema: Schema, deadline: float) -> sqlite3.Connection:
    """Open or create the results file at *path* and begin a transaction that holds the write lock."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None)

    def one(sql: str) -> Any:
        return patiently(lambda: db.execute(sql).fetchone(), deadline)[0]

    try:
        if one("SELECT count(*) FROM sqlite_master"):
            check_columns(patiently(lambda: columns_of(db, schema.table), deadline), schema)
        if one("PRAGMA journal_mode") != "wal":
            one("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        patiently(lambda: db.execute("BEGIN IMMEDIATE"), deadline)
        if not one("SELECT count(*) FROM sqlite_master"):
            for _, _, sql in schema.made:
                db.execute(sql)
        return db
    except BaseException:
        db.close()
        raise


def check_columns(found: list[Column], schema: Schema) -> None:
    """Raise Failure if rows made for *schema* do not fit a table with the columns *found*."""
    if not found:
        raise Failure(f"has no table {schema.table}; is it another program's file? (migrate would add the table)")
    names = {column.name for column in found}
    lacking = [column.name for column in schema.columns if column.name not in names]
    if lacking:
        raise Failure(f"has no column {', '.join(lacking)}, which {schema.path} has; add it with: dbtool.py migrate")
    for column in found:
        if column.name not in schema.by_name and column.needed and not column.nullable:
            raise Failure(f"needs column {column.name}, which {schema.path} lacks;"
                          f" add it there, or drop it with: dbtool.py migrate --drop {column.name}")


class Plan:
    """How the records of one shape become rows: the statement, and which values are converted."""

    def __init__(self, schema: Schema, record: Mapping[str, Any], on_conflict: str) -> None:
        check_names(schema, record)
        self.sql = insert_statement(schema.table, record, on_conflict)
        self.conversions: list[tuple[int, Callable[[Any], Any]]] = []
        for index, (name, value) in enumerate(record.items()):
            fit(schema.by_name[name], value)
            convert = converter(schema.by_name[name], type(value))
            if convert:
                self.conversions.append((index, convert))

    def row(self, record: Mapping[str, Any]) -> Sequence[Any]:
        if not self.conversions:
            return tuple(record.values())
        values = list(record.values())
        for index, convert in self.conversions:
            values[index] = convert(values[index])
        return values


def insert_statement(table: str, names: Iterable[str], on_conflict: str) -> str:
    # OR IGNORE would also drop rows that break a NOT NULL or CHECK constraint: DO NOTHING does not.
    quoted = [quote(name) for name in names]
    return (f"INSERT{' OR REPLACE' if on_conflict == 'replace' else ''} INTO {quote(table)} ({', '.join(quoted)})"
            f" VALUES ({', '.join('?' * len(quoted))}){' ON CONFLICT DO NOTHING' if on_conflict == 'skip' else ''}")


def check_names(schema: Schema, names: Iterable[str]) -> None:
    """Raise Misfit unless *names* are columns that may be given and all that must be."""
    given = set(names)
    for name in names:
        if name not in schema.by_name:
            raise Misfit(f"{shown(name)} is no column of {schema.table}{nearest(name, schema.by_name)}")
        if schema.by_name[name].generated:
            raise Misfit(f"column {name} is generated by SQLite; leave it out")
    missing = [column.name for column in schema.columns if column.needed and column.name not in given]
    if missing:
        raise Misfit(f"column {', '.join(missing)} missing, and {os.path.basename(schema.path)} gives no default")


def nearest(name: str, names: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {shown(close[0])}?" if close else ""


class Rows:
    """Records made ready for the table: yields (statement, row), and knows which record it is at."""

    def __init__(self, schema: Schema, incoming: Iterable[Mapping[str, Any]], on_conflict: str) -> None:
        self.schema, self.incoming, self.on_conflict = schema, incoming, on_conflict
        self.number = 0
        self.record: Mapping[str, Any] = {}
        self.pairs = self.ready()

    def ready(self) -> Iterator[tuple[str, Sequence[Any]]]:
        plans: dict[tuple[Any, ...], Plan] = {}
        for record in self.incoming:
            self.number += 1
            self.record = record
            shape = (*record, *map(type, record.values()))
            plan = plans.get(shape)
            try:
                if plan is None:
                    plan = plans[shape] = Plan(self.schema, record, self.on_conflict)
                yield plan.sql, plan.row(record) if plan.conversions else tuple(record.values())
            except (Misfit, ValueError, OverflowError, RecursionError) as error:
                raise self.refusal(error) from None

    def refusal(self, error: Exception) -> Failure:
        return Failure(f"record {self.number}: {why_refused(self.schema, self.record, error)}")

    def insert(self, db: sqlite3.Connection, first: Sequence[Any]) -> dict[str, Any]:
        """Insert the row *first* and all that follow; return the claim.

        The claim is the first row with its key (given, worked out from the column's default, or the
        rowid). As a transaction happens whole or not at all, the claim tells later whether it happened.
        """
        table, key = self.schema.table, self.schema.key
        claim = dict(zip(self.record, first))
        try:
            for column in key:
                if column.name not in claim and column.default is not None:
                    claim[column.name] = db.execute(f"SELECT {column.default}").fetchone()[0]
            cursor = db.execute(insert_statement(table, claim, self.on_conflict), list(claim.values()))
            if not key or any(column.name not in claim for column in key):
                claim["_rowid_"] = cursor.lastrowid
            for sql, group in itertools.groupby(self.pairs, lambda pair: pair[0]):
                db.executemany(sql, (row for _, row in group))
        except (ValueError, OverflowError, sqlite3.IntegrityError, sqlite3.InterfaceError,
                sqlite3.ProgrammingError) as error:
            raise self.refusal(error) from None
        return claim


def why_refused(schema: Schema, record: Mapping[str, Any], error: Exception) -> str:
    """Return what is wrong with *record*, in which SQLite or a conversion found the *error*."""
    if isinstance(error, Misfit):
        return str(error)
    try:
        for name, value in record.items():
            fit(schema.by_name[name], value)
    except Misfit as misfit:
        return str(misfit)
    if "UNIQUE" in str(error):
        return f"{error}: such a row is there already (--on-conflict skip or replace says what to do with it)"
    return str(error)


def store(path: str, schema: Schema, incoming: Iterable[Mapping[str, Any]], on_conflict: str = "fail",
          timeout: float = LOCK_TIMEOUT_S, is_stored: Callable[[sqlite3.Connection], bool] = lambda db: False,
          before_commit: Callable[[dict[str, Any]], object] = lambda claim: None) -> int:
    """Insert records into the results file at *path*, all or none; return how many came.

    *on_conflict* says what to do when a row's key is there already: fail, skip or replace.
    *timeout* is in seconds. Within the transaction, *is_stored* may tell that nothing is left to do, and
    *before_commit* learns the claim. Raises sqlite3.Error, or Failure, which carries the claim if
    COMMIT failed: what was written may come to light all the same.
    """
    deadline = time.monotonic() + timeout
    rows = Rows(schema, incoming, on_conflict)
    first = next(rows.pairs, None)  # before the file is touched: the producer may be slow, or the record bad
    if first is None:
        return 0
    db = connect_to_write(path, schema, deadline)
    try:
        if is_stored(db):
            return 0
        claim = rows.insert(db, first[1])
        before_commit(claim)
        try:
            patiently(lambda: db.execute("COMMIT"), deadline)
        except sqlite3.Error as error:
            failure = as_failure(error, path)
            raise Failure(str(failure), failure.status, claim) from None
        return rows.number
    finally:
        db.close()  # without COMMIT, this rolls back


def holds(db: sqlite3.Connection, schema: Schema, claim: Mapping[str, Any]) -> bool:
    """Tell whether the row of the *claim* is there."""
    names = [name for name in claim if name in schema.by_name or name == "_rowid_"]
    where = " AND ".join(f"{quote(name)} IS ?" for name in names)
    return db.execute(f"SELECT 1 FROM {quote(schema.table)} WHERE {where}",
                      [claim[name] for name in names]).fetchone() is not None


# --------------------------------------------------------------------------------------- nothing lost


class Input:
    """Standard input, held until its records are rows: a little in memory, more of it in a file.

    A regular file needs no copy, and is read where it is. `places` are paths at which the input can
    be kept, best first.
    """

    def __init__(self, stream: BinaryIO | None, places: Iterator[str]) -> None:
        self.stream, self.places = stream, places
        self.copy: Any = io.BytesIO()
        self.part = ""  # the path of the copy, when it is a file
        self.start, self.size = 0, 0
        self.is_file = False
        try:
            status = os.fstat(stream.fileno()) if stream else None
        except OSError:  # a stream in memory
            status = None
        if stream and status and stat.S_ISREG(status.st_mode) and status.st_nlink:
            self.is_file = True  # one without a name, as bash makes for <<<, would vanish
            self.copy = io.FileIO(stream.fileno(), closefd=False)
            self.start = self.copy.tell()
            self.size = status.st_size - self.start

    def arriving(self) -> Iterator[bytes]:
        """Yield what comes in, each piece once it is held; a signal ends the wait but loses nothing."""
        if self.stream is None or self.is_file:
            return
        try:
            descriptor = self.stream.fileno()
        except OSError:
            data = self.stream.read()
            self.add(data)
            yield data
            return
        import select

        while True:
            with SIGNALS:
                select.select([descriptor], [], [])
            try:
                data = os.read(descriptor, CHUNK_BYTES)
            except BlockingIOError:
                continue
            if not data:
                return
            self.add(data)
            yield data

    def read(self, skip_text: bool = False) -> None:
        """Read to the end. With *skip_text*, show the lines that are no JSON objects as they come."""
        arriving = self.arriving()
        if skip_text:
            try:
                for _ in records(self.chunks() if self.is_file else arriving, True, show_text):
                    pass
            except Failure as failure:  # a bad record is reported when it is its turn to be stored
                if failure.status != REFUSED:
                    raise
        for _ in arriving:
            pass

    def chunks(self) -> Iterator[bytes]:
        """Yield what is held, from the start."""
        self.copy.seek(self.start)
        while True:
            SIGNALS.check()
            data = self.copy.read(CHUNK_BYTES)
            if not data:
                return
            yield data

    def add(self, data: bytes) -> None:
        while True:
            try:
                write_all(self.copy, data)
                break
            except OSError:
                self.move()
        self.size += len(data)
        if self.size > SPOOL_BYTES and not self.part:
            self.move()

    def move(self) -> None:
        """Copy what is held to a file at the next place, or back into memory when none is left."""
        old, old_part = self.copy, self.part
        for path in self.places:
            try:
                self.part, self.copy = new_part(path)
                copy_bytes(old, self.copy, self.size)
                break
            except OSError:
                self.discard()
        else:
            self.part, self.copy = "", io.BytesIO()
            copy_bytes(old, self.copy, self.size)
        old.close()
        if old_part:
            os.unlink(old_part)

    def discard(self) -> None:
        """Forget the copy: it is stored, or is elsewhere."""
        if self.part:
            self.copy.close()
            os.unlink(self.part)
            remove_kept_folder(self.part)
            self.part = ""

    def keep(self, claim: dict[str, Any] | None = None) -> str:
        """Bring what is held to a safe place; return where that is, as a message says it, or nothing."""
        if self.is_file:
            return "standard input is a file, so nothing is lost: run this again"
        if not self.size:
            return ""
        while True:
            if not self.part:
                self.move()
            if not self.part:
                sys.stderr.flush()
                write_all(sys.stderr.buffer, self.copy.getvalue())
                sys.stderr.buffer.flush()
                return "the input could not be kept in any file and stands above"
            try:
                path = final_path(self.part)
                os.fsync(self.copy.fileno())
                if claim:
                    write_claim(path, claim)
                os.rename(self.part, path)
                self.part = ""
                sync_folder(path)
                return f"the input is kept in {path}"
            except OSError:
                self.move()


def show_text(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


def write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def copy_bytes(source: Any, target: Any, size: int) -> None:
    source.seek(0)
    while size:
        data = source.read(min(CHUNK_BYTES, size))
        write_all(target, data)
        size -= len(data)


def kept_places(path: str) -> Iterator[str]:
    """Yield where input for the database at *path* can be kept: beside it, here, or with temporary files."""
    now = time.time()
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06}Z"
    name += f"-{os.uname().nodename}-{os.getpid()}.json"
    if path:
        yield os.path.join(path + "-kept", name)
    for folder in spare_folders():
        yield os.path.join(folder, spare_prefix(path) + name)


def spare_folders() -> Iterator[str]:
    import tempfile

    try:
        yield os.getcwd()
        yield tempfile.gettempdir()
    except OSError:  # the working directory is gone, or no folder takes temporary files
        pass


def spare_prefix(path: str) -> str:
    """Return how names of files begin that are kept for the database at *path* away from it."""
    import zlib

    return f"dbtool-kept-{zlib.crc32(os.fsencode(path)):08x}-"


def new_part(path: str) -> tuple[str, io.FileIO]:
    """Create the temporary file that is to become *path*; return its path, and it, open for writing."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    while True:
        if folder.endswith("-kept") and not os.path.isdir(folder):
            try:
                os.mkdir(folder)
            except FileExistsError:  # another process was faster
                pass
        try:
            return part, io.FileIO(part, "x+")
        except FileNotFoundError:
            if not folder.endswith("-kept"):
                raise  # but for a retry that removed the folder just now


def final_path(part: str) -> str:
    folder, name = os.path.split(part)
    return os.path.join(folder, name[1:-len(".part")])


def remove_kept_folder(path: str) -> None:
    """Remove the folder of *path*, if it was made to keep input and is empty now."""
    if os.path.dirname(path).endswith("-kept"):
        try:
            os.rmdir(os.path.dirname(path))
        except OSError:
            pass


def sync_folder(path: str) -> None:
    """Make the name of the file at *path* durable."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_claim(path: str, claim: Mapping[str, Any]) -> None:
    """Write beside the kept file at *path* which row shows that it is stored."""
    import json

    text = json.dumps({name: value for name, value in claim.items() if not isinstance(value, bytes)})
    part = path + ".claim.part"
    with open(part, "wb", buffering=0) as file:
        write_all(file, text.encode())
        os.fsync(file.fileno())
    os.rename(part, path + ".claim")
    sync_folder(path)


def read_claim(path: str) -> dict[str, Any] | None:
    import json

    try:
        with open(path + ".claim", encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return None


def kept_files(path: str) -> list[str]:
    """Return the files kept for the database at *path*, oldest first."""
    found = []
    for folder, prefix in [(path + "-kept", ""), *((folder, spare_prefix(path)) for folder in spare_folders())]:
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        whole = {name[:-len(".claim")] if name.endswith(".claim") else name for name in names}
        found += [os.path.join(folder, name) for name in sorted(whole)
                  if name.startswith(prefix) and name.endswith(".json") and not name.startswith(".")]
    return found


# --------------------------------------------------------------------------------------------- output

HARMLESS_PRAGMAS = frozenset((
    "application_id", "collation_list", "compile_options", "data_version", "database_list", "encoding",
    "foreign_key_check", "foreign_key_list", "freelist_count", "function_list", "index_info", "index_list",
    "index_xinfo", "integrity_check", "journal_mode", "module_list", "page_count", "page_size", "pragma_list",
    "quick_check", "schema_version", "table_info", "table_list", "table_xinfo", "user_version"))
TAKE_AN_ARGUMENT = frozenset(name for name in HARMLESS_PRAGMAS if name.endswith(("check", "_info", "_xinfo", "_list")))
HARMFUL_FUNCTIONS = frozenset(("fts3_tokenizer", "load_extension"))


SQLITE_FUNCTION, SQLITE_RECURSIVE = 31, 33  # action codes of sqlite3.h that PyPy's sqlite3 does not name


def authorize(action: int, first: Any, second: Any, *_: object) -> int:
    """Admit what reads and deny all else; a callback for sqlite3_set_authorizer."""
    if action == sqlite3.SQLITE_PRAGMA:
        name = c_text(first)
        admitted = name in HARMLESS_PRAGMAS and (not second or name in TAKE_AN_ARGUMENT)
    elif action == SQLITE_FUNCTION:
        admitted = c_text(second) not in HARMFUL_FUNCTIONS
    elif action == sqlite3.SQLITE_UPDATE:
        admitted = c_text(first) == "sqlite_master"  # how json_each and its like are declared; SQLite guards it itself
    else:
        admitted = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if admitted else sqlite3.SQLITE_DENY


def c_text(text: Any) -> str:
    """Return an authorizer's argument in lower case; PyPy hands over C strings."""
    if not isinstance(text, str):
        from _sqlite3 import _ffi  # type: ignore[attr-defined]

        text = _ffi.string(text).decode()
    return str(text).lower()


class Numbers:
    """An aggregate of the numbers that are not NULL: *answer* takes their sorted list and any further arguments."""

    def __init__(self, answer: Callable[..., float | None]) -> None:
        self.answer = answer
        self.values: list[float] = []
        self.arguments: tuple[float, ...] = ()

    def step(self, value: float | None, *arguments: float) -> None:
        self.arguments = arguments
        if value is not None:
            self.values.append(value + 0.0)

    def finalize(self) -> Any:
        return self.answer(sorted(self.values), *self.arguments)


def percentile(values: list[float], percent: float = 50.0) -> float | None:
    """Return the value below which *percent* (0 to 100) of the sorted *values* lie, interpolated linearly."""
    if not 0 <= percent <= 100:
        raise ValueError
    if not values:
        return None
    place = (len(values) - 1) * percent / 100
    low = int(place)
    if place == low:
        return values[low]
    return values[low] + (values[low + 1] - values[low]) * (place - low)


def stddev(values: list[float]) -> float | None:
    """Return the standard deviation of a sample, divided by n - 1; None for fewer than two values."""
    import statistics

    return statistics.stdev(values) if len(values) > 1 else None


def batches(cursor: sqlite3.Cursor) -> Iterator[list[tuple[Any, ...]]]:
    return iter(lambda: cursor.fetchmany(ROWS_AT_ONCE), [])


def delimited(cursor: sqlite3.Cursor, delimiter: str, null: str, header: bool) -> Iterator[str]:
    """Yield the rows as the csv module prints them, with newlines between, most of them without its help.

    It looks at every character; formatting many rows with one `%` and counting separators tells as
    well whether any value needs quotes.
    """
    names = [column[0] for column in cursor.description]
    if header:
        yield quoted_rows([names], delimiter)
    one_row = delimiter.join(["%s"] * len(names)) + "\n"
    full = one_row * ROWS_AT_ONCE
    for rows in batches(cursor):
        values = list(itertools.chain.from_iterable(rows))
        template = full if len(rows) == ROWS_AT_ONCE else one_row * len(rows)
        text = template % tuple(values)
        if "None" in text:
            values = [null if value is None else value for value in values]
            text = template % tuple(values)
        plain = (len(names) > 1 and text.count(delimiter) == len(rows) * (len(names) - 1)
                 and text.count("\n") == len(rows) and '"' not in text and "\r" not in text and "b'" not in text)
        yield text if plain else quoted_rows(
            [[null if value is None else value.hex() if type(value) is bytes else value for value in row]
             for row in rows], delimiter)


def quoted_rows(rows: Iterable[Iterable[Any]], delimiter: str) -> str:
    import csv

    lines: list[str] = []

    class Lines:
        @staticmethod
        def write(line: str) -> None:
            lines.append(line[:-2] + "\n")

    # Before Python 3.13, csv quotes a lone carriage return only if it is part of the line's end.
    csv.writer(Lines, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    return "".join(lines)


def json_rows(cursor: sqlite3.Cursor, separator: str) -> Iterator[str]:
    """Yield the rows, many at once, as JSON objects that insert reads; a BLOB is {"$hex": "…"}."""
    import json

    encode = json.JSONEncoder(ensure_ascii=False, default=lambda blob: {"$hex": blob.hex()}).encode
    names: list[str] = []
    for name, *_ in cursor.description:
        again = sum(known.partition(":")[0] == name for known in names)
        names.append(f"{name}:{again}" if again else name)  # as SQLite itself names a second one
    for rows in batches(cursor):
        yield separator.join([encode(dict(zip(names, row))) for row in rows])


def table(cursor: sqlite3.Cursor, null: str, header: bool) -> Iterator[str]:
    """Yield lines for people: columns as wide as their first values, numbers to the right."""
    import unicodedata

    def width(text: str) -> int:
        return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "FW")
                   for char in text)

    def cell(value: Any) -> str:
        if value is None:
            return null
        text = value.hex() if isinstance(value, bytes) else str(value)
        return text if text.isprintable() else repr(text)[1:-1]

    names = [cell(column[0]) for column in cursor.description]
    widths: list[int] = []
    for rows in batches(cursor):
        cells = [[cell(value) for value in row] for row in rows]
        if not widths:
            right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(names))]
            widths = [max(map(width, column)) for column in zip(*cells, names if header else cells[0])]
            lines = [names, ["-" * size for size in widths]] if header else []
            cells[:0] = lines
        for line in cells:
            padded = [(" " * (size - width(text)), text) for size, text in zip(widths, line)]
            yield "  ".join(pad + text if number else text + pad
                            for number, (pad, text) in zip(right, padded)).rstrip() + "\n"
    if not widths and header:
        yield "  ".join(names) + "\n"


def formatted(cursor: sqlite3.Cursor, style: str, null: str = "", header: bool = True) -> Iterator[str]:
    """Yield the rows of *cursor* as text in the *style* csv, tsv, json, jsonl or table."""
    if style == "table":
        yield from table(cursor, null, header)
    elif style == "jsonl":
        for text in json_rows(cursor, "\n"):
            yield text + "\n"
    elif style == "json":
        lead = "["
        for text in json_rows(cursor, ",\n "):
            yield lead + text
            lead = ",\n "
        yield "[]\n" if lead == "[" else "]\n"
    else:
        yield from delimited(cursor, "\t" if style == "tsv" else ",", null, header)


def write_out(texts: Iterable[str], target: str = "") -> None:
    """Write *texts* as UTF-8 to standard output, or to the file *target*, which appears when it is whole."""
    path = os.path.realpath(target)
    device = target.startswith("/dev/") or (os.path.exists(path) and not os.path.isfile(path))
    if target and not device:
        part, file = new_part(path)
        try:
            with file:
                for text in texts:
                    SIGNALS.check()
                    write_all(file, text.encode())
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        return
    if not target and sys.stdout is None:
        raise Failure("standard output is closed")
    out = open(target, "wb") if target else sys.stdout.buffer
    try:
        for text in texts:
            with SIGNALS:  # the reader may be slow
                write_all(out, text.encode())
        out.flush()
    except (OSError, Failure):  # what is still in the buffer would fail or wait again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise


# -------------------------------------------------------------------------------------------- reading


def reading(path: str, action: Callable[[sqlite3.Connection], Result], timeout: float = LOCK_TIMEOUT_S) -> Result:
    """Return action(db), with a connection to the file at *path* that cannot write and leaves no files behind."""
    if not os.path.isfile(path):
        raise Failure("is a folder; name a file in it" if os.path.isdir(path) else "there is no such file")
    had_wal = bool(os.path.exists(path + "-wal") and os.path.getsize(path + "-wal"))
    # SQLite needs to create files beside one in WAL mode even to read it. Where it can't, and no
    # writer is at work, the file can be read as one that does not change, if in the end it has not.
    with open(path, "rb") as file:
        is_wal = file.read(19)[18:] == b"\2"
    frozen = is_wal and not had_wal and not (os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK))
    before = os.stat(path)
    uri = "file://" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    db = sqlite3.connect(uri + ("?immutable=1" if frozen else "?mode=ro"), uri=True, timeout=0, isolation_level=None)
    try:
        patiently(lambda: db.execute("SELECT count(*) FROM sqlite_master").fetchone(), time.monotonic() + timeout)
        db.execute("PRAGMA query_only = ON")
        db.set_authorizer(authorize)
        db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
        result = action(db)
    finally:
        db.close()
        if not frozen and not had_wal and os.path.exists(path + "-wal"):
            remove_wal(path)
    after = os.stat(path)
    if frozen and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise Failure("changed while it was read; run this again", TRY_AGAIN)
    return result


def remove_wal(path: str) -> None:
    """Let SQLite remove the empty -wal and -shm files that a read-only connection had to make and may not remove."""
    db = sqlite3.connect(path, timeout=0)
    try:
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        pass  # a writer is at work, and will remove them
    finally:
        db.close()


def ask(cursor: sqlite3.Cursor, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> None:
    """Run a query, so that *cursor* yields its rows; raise Failure if *sql* is not one query that works."""
    db = cursor.connection
    db.create_aggregate("median", 1, lambda: Numbers(percentile))
    db.create_aggregate("percentile", 2, lambda: Numbers(percentile))
    db.create_aggregate("stddev", 1, lambda: Numbers(stddev))
    try:
        cursor.execute(sql, parameters)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        SIGNALS.check()
        raise Failure(why_unanswered(db, str(error))) from None
    if cursor.description is None:
        raise Failure("the SQL asks for nothing; write a SELECT")


def why_unanswered(db: sqlite3.Connection, text: str) -> str:
    if "authoriz" in text or "prohibited" in text:
        return f"query only reads, and this SQL would do more ({text})"
    if "no such column" in text or "no such table" in text:
        tables = [name for name, in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
        names = tables + [column.name for name in tables for column in columns_of(db, name)]
        return text + nearest(text.rpartition(": ")[2], names)
    if "decode" in text:
        return f"{text}; it is not UTF-8: SELECT CAST(… AS BLOB) shows its bytes"
    if "finalize" in text or "step" in text:
        return "median, stddev and percentile take numbers, and percentile's second is from 0 to 100"
    return text


# ------------------------------------------------------------------------------------------- commands


class Options:
    """The words of a command line: `words` by the names in its usage, `flags` with every value given."""

    def __init__(self, words: dict[str, str], flags: dict[str, list[str]], columns: list[tuple[str, str]]) -> None:
        self.words, self.flags, self.columns = words, flags, columns
        self.name = words.get("DATABASE", "")
        self.path = os.path.realpath(self.name)  # always a plain file, whatever SQLite makes of the name

    def last(self, flag: str, default: str) -> str:
        return self.flags.get(flag, [default])[-1]

    @property
    def timeout(self) -> float:
        text = self.last("--timeout", str(LOCK_TIMEOUT_S))
        try:
            return finite(text) if finite(text) >= 0 else finite("nan")
        except ValueError:
            raise Failure(f"--timeout takes seconds, not {shown(text)}", USAGE) from None

    @property
    def conflict(self) -> str:
        return self.last("--on-conflict", "fail")

    def schema(self) -> Schema:
        return read_schema(self.last("--schema", ""), self.last("--table", ""))

    def pairs(self, flag: str) -> list[tuple[str, str]]:
        """Return the values NAME=VALUE of *flag*, split."""
        found = []
        for text in self.flags.get(flag, []):
            name, equals, value = text.partition("=")
            if not name or not equals:
                raise Failure(f"{flag} takes NAME=VALUE, not {shown(text)}", USAGE)
            found.append((name, value))
        return found


def insert(options: Options) -> None:
    """Store the JSON objects on standard input as rows, all of them or none."""
    source = Input(sys.stdin.buffer if sys.stdin else None, kept_places(options.path))
    try:
        skip_text = "--skip-text" in options.flags
        source.read(skip_text)
        store(options.path, options.schema(), records(source.chunks(), skip_text),
              options.conflict, options.timeout)
        source.discard()
    except BaseException as error:
        where = source.keep(getattr(error, "claim", None))
        if not isinstance(error, (Failure, sqlite3.Error, OSError)):
            print(where, file=sys.stderr)
            raise  # a bug, or no memory left
        failure = as_failure(error, options.path)
        if where.startswith("the input is kept"):
            where = where.replace(options.path, options.name)
            where += f"; when that is mended, run: dbtool.py retry {options.name}"
        raise Failure(f"{failure}; {where}" if where else str(failure), failure.status) from None


def insert_manual(options: Options) -> None:
    """Store one row, each column given as a flag."""
    schema = options.schema()
    record: dict[str, Any] = {}
    for flag, text in options.columns:
        column = flag_column(schema, flag)
        record[column.name] = fit_text(column, text)
    for name in options.flags.get("--null", []):
        column = flag_column(schema, name)
        record[column.name] = fit(column, None)
    store(options.path, schema, [record], options.conflict, options.timeout)


def flag_column(schema: Schema, flag: str) -> Column:
    """Return the column that a flag names: itself, or with hyphens for underscores."""
    name = flag[len("column."):] if flag.startswith("column.") and flag not in schema.by_name else flag
    alike = [column for column in schema.columns if column.name.replace("_", "-") == name.replace("_", "-")]
    if name in schema.by_name:
        return schema.by_name[name]
    if len(alike) == 1:
        return alike[0]
    raise Failure(f"{shown(name)} is no column of {schema.table}{nearest(name, schema.by_name)}", USAGE)


def query(options: Options) -> None:
    """Print the answer to an SQL question."""
    sql = options.words["SQL"]
    if sql == "-":
        sql = sys.stdin.buffer.read().decode()
    parameters = {name: number_or_text(value) for name, value in options.pairs("--param")}

    def answer(db: sqlite3.Connection) -> None:
        cursor = db.cursor()
        try:
            ask(cursor, sql, parameters)
            write_out(formatted(cursor, options.last("--format", "csv"), options.last("--null", ""),
                                "--no-header" not in options.flags), options.last("--output", ""))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            SIGNALS.check()
            raise Failure(why_unanswered(db, str(error))) from None
        finally:
            cursor.close()  # or the connection lives on, with its files

    reading(options.path, answer, options.timeout)


def number_or_text(text: str) -> int | float | str:
    """Return a number if Python prints that number as *text*, else *text*."""
    for kind in (int, finite):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            pass
    return text


def retry(options: Options) -> None:
    """Store what insert had to keep; leave what still can't be stored, and say why."""
    schema = options.schema()
    status = 0
    for path in kept_files(options.path):
        SIGNALS.check()
        try:
            retry_one(options, schema, path)
        except (Failure, sqlite3.Error, OSError) as error:
            failure = as_failure(error, options.path)
            status = max(status, failure.status)
            report(f"{options.name}: {path.replace(options.path, options.name)}: {failure}")
            if failure.status >= TRY_AGAIN:  # the other files would fare no better
                break
        else:
            remove_kept_folder(path)
    if status:
        raise Failure("", status)


def retry_one(options: Options, schema: Schema, path: str) -> None:
    """Store one kept file exactly once, whatever becomes of this process or of another that retries it too."""

    def is_stored(db: sqlite3.Connection) -> bool:
        claim = read_claim(path)  # first: it goes after the file
        return not os.path.exists(path) or (claim is not None and holds(db, schema, claim))

    try:
        with open(path, "rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            store(options.path, schema, records(chunks, "--skip-text" in options.flags), options.conflict,
                  options.timeout, is_stored, lambda claim: write_claim(path, claim))
    except FileNotFoundError:
        pass  # another retry has stored it, or one that was stopped between the two removals
    for done in (path, path + ".claim.part", path + ".claim"):
        try:
            os.unlink(done)
        except FileNotFoundError:
            pass


# ---------------------------------------------------------------------------------------- command line

FLAGS = {
    "--schema": ("FILE", "what defines the columns (default: DBTOOL_SCHEMA, else schema.sql beside this script)"),
    "--table": ("NAME", "which table of the schema (default: DBTOOL_TABLE, else its only one)"),
    "--timeout": ("SECONDS", "how long to wait for a lock (default: 60)"),
    "--on-conflict": ("fail|skip|replace", "what to do if a row with the key is there (default: fail)"),
    "--skip-text": ("", "pass lines that are no JSON objects on to standard error"),
    "--param": ("NAME=VALUE", "the value of :NAME in the SQL; may be repeated"),
    "--format": ("csv|tsv|json|jsonl|table", "how to print (default: csv)"),
    "--output": ("FILE", "write to FILE, which appears only when it is whole"),
    "--null": ("TEXT", "how to print NULL (default: nothing)"),
    "--no-header": ("", "leave out the line with the columns' names"),
    "insert_manual --null": ("COLUMN", "give COLUMN the value NULL; may be repeated"),
}
# name: (function, words, flags besides --schema, --table and --timeout, what it does)
COMMANDS: dict[str, tuple[Callable[[Options], None], str, str, str]] = {
    "insert": (insert, "DATABASE", "--on-conflict --skip-text", "store the JSON objects on standard input as rows"),
    "insert_manual": (insert_manual, "DATABASE --COLUMN VALUE ...", "--null --on-conflict",
                      "store one row, each column given as a flag"),
    "query": (query, "DATABASE SQL|-", "--param --format --output --null --no-header",
              "print the answer to an SQL question as CSV; - reads the SQL from standard input"),
    "retry": (retry, "DATABASE", "--skip-text --on-conflict", "store what insert had to keep aside"),
}


def command_help(command: str, options: Options) -> str:
    _, words, _, purpose = COMMANDS[command]
    lines = [f"usage: dbtool.py {command} {words} [FLAG]...", "", f"{purpose[0].upper()}{purpose[1:]}.", ""]
    rows = [(f"{flag} {metavar}".rstrip(), help_text) for flag, metavar, help_text in flags_of(command)]
    if command == "insert_manual":
        schema = options.schema()
        said = descriptions(schema)
        for column in schema.columns:
            if not column.generated:
                taken = f"--{column.name}" in ("--help", *(flag for flag, _, _ in flags_of(command)))
                kind = f"{column.type or 'anything'}{', needed' if column.needed else ''}"
                rows.append((f"--{'column.' * taken}{column.name} {kind}", said.get(column.name, "")))
    width = max(len(left) for left, _ in rows if len(left) <= 40)
    return "\n".join(lines + [f"  {left:{width}}  {right}".rstrip() for left, right in rows]) + "\n"


def flags_of(command: str) -> list[tuple[str, str, str]]:
    """Return (flag, what it takes, help) for each flag of *command*."""
    flags = ["--schema", "--table", "--timeout", *COMMANDS[command][2].split()]
    return [(flag, *(FLAGS.get(f"{command} {flag}") or FLAGS[flag])) for flag in flags]


def parse(command: str, arguments: list[str]) -> Options:
    """Return what the words after *command* say; raise Failure with status 2 if they are wrong."""
    takes = {flag: metavar for flag, metavar, _ in flags_of(command)}
    flags: dict[str, list[str]] = {}
    columns: list[tuple[str, str]] = []
    words: list[str] = []
    left = iter(arguments)
    for word in left:
        if word == "--":
            words += left
        elif word in ("-h", "--help"):
            flags["--help"] = []
        elif word == "-" or not word.startswith("-") or (command == "query" and " " in word.partition("=")[0]):
            words.append(word)
        else:
            flag, equals, value = word.partition("=")
            is_column = command == "insert_manual" and flag not in takes and flag.startswith("--")
            metavar = "VALUE" if is_column else takes.get(flag)
            if metavar is None:
                raise Failure(f"unknown flag {flag}{nearest(flag, takes)}", USAGE)
            if metavar and not equals:
                value = next(left, "\0")
            if value == "\0" or (equals and not metavar):
                raise Failure(f"{flag} takes {f'a value: {metavar}' if metavar else 'no value'}", USAGE)
            if "|" in metavar and value not in metavar.split("|"):
                raise Failure(f"{flag} takes {metavar}, not {shown(value)}", USAGE)
            if is_column:
                columns.append((flag[2:], value))
            else:
                flags.setdefault(flag, []).append(value)
    names = [name for name in COMMANDS[command][1].split()[:2] if name[0] != "-"]
    if "--help" in flags:
        return Options({}, flags, [])
    if words[:1] == [""]:
        raise Failure("the DATABASE has no name", USAGE)
    if len(words) != len(names):
        raise Failure(f"takes {' '.join(names)}, got {' '.join(map(shown, words)) or 'nothing'};"
                      f" see: dbtool.py {command} --help", USAGE)
    return Options(dict(zip(("DATABASE", "SQL"), words)), flags, columns)


def report(message: str) -> None:
    if message and sys.stderr:
        print("dbtool:", " ".join(message.splitlines()), file=sys.stderr, flush=True)


def keep_unread() -> None:
    """Keep what insert would have read, had its command line been right."""
    if sys.stdin and not sys.stdin.isatty():
        source = Input(sys.stdin.buffer, kept_places(""))
        try:
            source.read()
        finally:
            report(source.keep())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, where = (arguments or [""])[0], ""
    try:
        if command in ("-h", "--help"):
            write_out([__doc__ or ""])
        elif command == "--version":
            write_out([f"dbtool {__version__}\n"])
        elif command not in COMMANDS:
            raise Failure(f"{f'unknown command {command}' if command else 'no command'}; there are"
                          f" {', '.join(COMMANDS)} (see --help)", USAGE)
        else:
            where = f"{command}: "
            options = parse(command, arguments[1:])
            where = f"{options.name}: "
            if "--help" in options.flags:
                write_out([command_help(command, options)])
            else:
                COMMANDS[command][0](options)
        return 0
    except BrokenPipeError:  # `query … | head`: the rest is not wanted
        return 0
    except (Failure, sqlite3.Error, OSError) as error:
        failure = as_failure(error, "")
        report(f"{where}{failure}" if str(failure) else "")
        if failure.status == USAGE and command == "insert":
            keep_unread()
        return failure.status


if __name__ == "__main__":
    SIGNALS.install()
    raise SystemExit(main())

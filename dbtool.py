#!/usr/bin/env python3
"""dbtool: keep the results of many runs in one SQLite file, and ask it questions.

    python3 mlp.py | python3 dbtool.py insert results.db
    python3 dbtool.py query results.db "SELECT layers, min(rmse_global) FROM results GROUP BY layers"

Commands (each has its own --help):

    insert         store the JSON objects on standard input as rows
    insert_manual  store one row, each column given as a flag
    query          print the answer to an SQL question as CSV
    retry          store what insert had to keep aside
    schema         print the columns, and how a file differs

dbadmin.py has what one does to a whole file now and then: merge, snapshot, migrate.

The columns are those of schema.sql, beside this script. Many processes may insert at once. A result
that reached standard input is never lost: it is a row, or in a file that the message names.

Exit status: 0 done; 1 refused or failed; 2 wrong usage; 75 try again later (locked, disk full, I/O
error); 128+N stopped by signal N. Messages go to standard error, one line each.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # until there is a handler, a signal would end the program with the input still in the pipe
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

try:
    import codecs
    import collections
    import contextlib
    import errno
    import functools
    import io
    import itertools
    import json
    import re
    import select
    import sqlite3
    import stat
    import time
    from os.path import abspath, basename, dirname, exists, isdir, isfile, join, realpath
except (ImportError, OSError) as missing:  # a Python without sqlite3, or no more files can be opened
    if __name__ != "__main__":
        raise
    if "insert" in sys.argv[1:2]:
        while data := os.read(0, 1 << 16):
            os.write(2, data)
    raise SystemExit(f"\ndbtool: {missing}: this Python can't be used; input, if any, stands above") from None

TYPE_CHECKING = False  # what `typing` calls it; importing typing would cost a tenth of an insert's time
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from sqlite3 import Connection, Cursor
    from types import FrameType
    from typing import Any, Optional, TextIO, TypeVar

    Result = TypeVar("Result")
    Converter = Optional[Callable[[Any], Any]]
    SchemaObject = tuple[str, str, str]  # of a CREATE statement: type, name, SQL
    Batch = Sequence[Sequence[Any]]  # some rows
    Receipt = dict[str, Any]  # what tells whether a transaction happened: see insert_records

__version__ = "0.1.0"

REFUSED, USAGE, TRY_AGAIN, SIGNALLED = 1, 2, 75, 128  # exit statuses; 75 is EX_TEMPFAIL of sysexits.h
LOCK_TIMEOUT_S = 60.0
LOCK_NAP_S = 0.05  # the longest sleep between two tries for a lock
CHUNK_BYTES = 1 << 18
SPOOL_BYTES = 1 << 22  # input beyond this waits in a file, not in memory
VALUE_BYTES = 100_000_000  # the largest value that a query may make
ROWS_AT_ONCE = 256
STEPS_BETWEEN_CHECKS = 50_000  # SQLite virtual-machine steps: some milliseconds
UNSAFE_FUNCTIONS = ("fts3_tokenizer", "load_extension")


# ------------------------------------------------------------------------- failures, signals, progress


class Failure(Exception):
    """Something the user should know: *why* in one line that says what and where, a *hint* what to do, and the
    exit *status*."""

    def __init__(self, why: str, status: int = REFUSED, hint: str = "") -> None:
        super().__init__(why + hint)
        self.why, self.status, self.hint = why, status, hint


class RecordRefused(Failure):
    """A value that does not fit its column, or a record that does not fit its table; `number` says which record."""

    number = 0  # from 1; 0 where only one is meant

    def __str__(self) -> str:
        return f"record {self.number}: {super().__str__()}" if self.number else super().__str__()


class NoRecord(Failure):
    """Input without any JSON object."""


class TextRefused(Failure):
    """Input with a line of text where only JSON may be."""


class CannotTell(Failure):
    """Nothing tells whether a transaction has happened."""


class CommitFailed(Failure):
    """COMMIT itself failed: what was written may come to light all the same, which `receipts` tell later."""

    receipts: Collection[Receipt] = ()


# Signals whose default is not to end a program, which no program can catch, or which tell of a fault in it.
NOT_STOPPING = ("KILL", "STOP", "CHLD", "CONT", "TSTP", "TTIN", "TTOU", "URG", "WINCH", "INFO",
                "SEGV", "BUS", "ILL", "FPE")
STOPPING = frozenset(signal.valid_signals()) - {getattr(signal, f"SIG{name}", 0) for name in NOT_STOPPING}


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class Signals:
    """Ends the program on a signal, but only inside `with SIGNALS:`, where stopping loses nothing."""

    caught = 0
    open = False

    def install(self, numbers: Iterable[int] = STOPPING) -> None:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or `&` in a script
                signal.signal(number, self.handle)

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.caught = number
        if self.open:
            self.check()

    def check(self) -> None:
        if self.caught:
            self.open = False
            raise Failure(f"stopped by {signal_name(self.caught)}", SIGNALLED + self.caught)

    def pending(self) -> int:
        """Tell SQLite whether to stop; a callback for sqlite3_progress_handler."""
        PROGRESS.tick()
        return self.caught

    def __enter__(self) -> None:
        self.open = True
        self.check()

    def __exit__(self, *_: object) -> None:
        self.open = False


SIGNALS = Signals()
if __name__ == "__main__":
    SIGNALS.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def complain(text: str) -> None:
    """Write to standard error, if there is any: a message that can't be shown must not stop the work."""
    try:
        if sys.stderr:
            sys.stderr.write(text)
            sys.stderr.flush()
    except OSError:
        pass


def pass_on(line: str) -> None:
    with SIGNALS:  # who reads it may be slow
        complain(line)


def one_line(text: str) -> str:
    """Return *text* with an escape for each character that can't be printed, such as a newline in a file's name."""
    return text if text.isprintable() else "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in text)


program_name = "dbtool"  # of the script that runs, for its messages


def report(message: str) -> None:
    PROGRESS.clear()
    complain(f"{program_name}: {one_line(message)}\n")


def script(name: str = "dbtool") -> str:
    """Return how to call a script of this project."""
    return f"python3 {name}.py"


def for_shell(word: str) -> str:
    """Quote a word for the shell: as shlex does, but in one line whatever is in it."""
    if not word.isprintable():
        escapes = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "'": "\\'", "\\": "\\\\"}
        return "$'" + "".join(escapes.get(char) or (char if char.isprintable() else "".join(
            f"\\x{byte:02x}" for byte in os.fsencode(char))) for char in word) + "'"
    is_plain = word.isascii() and all(char.isalnum() or char in "@%+=:,./_-" for char in word)
    return word if word and is_plain else "'" + word.replace("'", "'\\''") + "'"


class Progress:
    """A line on a terminal that tells how far long work has got. Elsewhere, and in the first second, nothing."""

    measure: Callable[[], tuple[str, float]] | None = None  # what SQLite's work shows: a text, and the fraction done
    shown = False
    start, next = 0.0, float("inf")

    def begin(self) -> None:
        """Count from now. What only imports this module has its terminal to itself."""
        self.start = time.monotonic()
        self.next = self.start + 1.0 if sys.stderr and sys.stderr.isatty() else float("inf")

    def show(self, text: str, fraction: float = 0.0) -> None:
        """Show *text* and, if the *fraction* that is done is known, percent and time left."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next, self.shown = now + 0.2, True
        ending = f"{int(now - self.start)} s"
        if fraction:
            fraction = min(fraction, 0.99)
            seconds = int((now - self.start) * (1 / fraction - 1))
            ending = f"{fraction:.0%}, {seconds // 60}:{seconds % 60:02} left"
        complain(f"\r\x1b[K{text}, {ending}")

    def tick(self) -> None:
        if self.measure:
            self.show(*self.measure())

    def clear(self) -> None:
        self.measure = None
        if self.shown:
            complain("\r\x1b[K")
            self.shown = False


PROGRESS = Progress()


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
        self.rowid = bool(self.key and rowid_alias)
        self.needed = self.default is None and not self.generated and not self.rowid

    def in_words(self) -> str:
        default = "" if self.default is None else f" DEFAULT {' '.join(self.default.split())}"
        key = " PRIMARY KEY" if self.key else ""
        return f"{self.type}{'' if self.nullable else ' NOT NULL'}{key}{default}".strip() or "any type"


class Schema:
    """The results table of a schema.sql: its name, its columns, and every CREATE statement of the file."""

    def __init__(self, path: str, table: str, by_name: dict[str, Column], objects: list[SchemaObject]) -> None:
        self.path, self.table, self.by_name = path, table, by_name
        self.objects = objects  # (type, name, CREATE statement) in the file's order
        self.columns = list(by_name.values())
        self.key = [column for column in self.columns if column.key]

    def flags(self) -> list[str]:
        """Return the flags that name this schema in a command to paste, whatever the environment says by then."""
        several = [kind for kind, _, _ in self.objects].count("table") > 1
        return ["--schema", self.path, *(["--table", self.table] if several else [])]


# By what a declared type contains, the first that does: sqlite.org/datatype3.html, section 3.1.
AFFINITIES = {"INT": "INTEGER", "CHAR": "TEXT", "CLOB": "TEXT", "TEXT": "TEXT", "BLOB": "BLOB",
              "REAL": "REAL", "FLOA": "REAL", "DOUB": "REAL"}


def affinity(declared: str) -> str:
    for word, name in AFFINITIES.items():
        if word in declared.upper():
            return name
    return "NUMERIC" if declared else "BLOB"


def quote(name: str) -> str:
    """Return *name* as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def columns_of(db: Connection, table: str) -> dict[str, Column]:
    """Return the columns of *table* by their names, none if there is no such table."""
    rows = db.execute(f"PRAGMA main.table_xinfo({quote(table)})").fetchall()
    indexes = db.execute(f"PRAGMA main.index_list({quote(table)})").fetchall()
    # An INTEGER PRIMARY KEY needs no index of its own, as it is the rowid.
    rowid_alias = "pk" not in [index[3] for index in indexes]
    return {row[1]: Column(row, rowid_alias) for row in rows}


SELECT_OBJECTS = ("SELECT type, name, sql FROM sqlite_master"
                  " WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid")


def scalar(db: Connection, sql: str, parameters: Sequence[Any] = ()) -> Any:
    """Return the first value of the first row."""
    return db.execute(sql, parameters).fetchone()[0]


def authorize_schema(action: int, first: str | None, second: str | None, *_: object) -> int:
    """Deny what would reach beyond the database in memory; a callback for sqlite3_set_authorizer."""
    reaches_out = (
        action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH)  # VACUUM INTO attaches, too
        or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in UNSAFE_FUNCTIONS)
        or (action == sqlite3.SQLITE_PRAGMA and str(first).lower().endswith("_directory")))
    return sqlite3.SQLITE_DENY if reaches_out else sqlite3.SQLITE_OK


def read_schema(path: str | None = None, table: str | None = None) -> Schema:
    """Read the columns from an SQL file by running it in memory, where it can reach no other file.

    *path* defaults to DBTOOL_SCHEMA, else to schema.sql beside this script; *table* to DBTOOL_TABLE,
    else to the file's only table. Raises Failure.
    """
    path = path or os.environ.get("DBTOOL_SCHEMA") or join(dirname(realpath(__file__)), "schema.sql")
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            db.set_authorizer(authorize_schema)
            db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
            with SIGNALS, open(path, encoding="utf-8") as file:
                text = file.read()
            db.executescript(text)
            objects = db.execute(SELECT_OBJECTS).fetchall()
            table = chosen_table(path, [name for kind, name, _ in objects if kind == "table"], table)
            return Schema(path, table, columns_of(db, table), objects)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; name the schema with --schema FILE or DBTOOL_SCHEMA") from None
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # the last if it is not UTF-8, or holds a NUL
        SIGNALS.check()
        raise Failure(f"{path}: {error}") from None


def chosen_table(path: str, tables: list[str], wanted: str | None) -> str:
    wanted = wanted or os.environ.get("DBTOOL_TABLE")
    if not tables:
        raise Failure(f"{path}: has no CREATE TABLE")
    if wanted in tables:
        return wanted
    if wanted or len(tables) > 1:
        raise Failure(f"{path}: has tables {', '.join(tables)}{f', and no {wanted}' if wanted else ''}; name one of"
                      " them with --table")
    return tables[0]


TOKEN = re.compile(r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*\]|\w+|\n|\S""", re.S)


def unquoted(token: str) -> str:
    return token[1:-1].replace('""', '"') if token[0] in '"`[' else token


def normalized_tokens(sql: str) -> list[str]:
    """Return what SQL says without comments, white space and the quotes of names."""
    return [unquoted(token) for token in TOKEN.findall(sql) if not token.startswith(("--", "/*", "\n"))]


def descriptions(schema: Schema) -> dict[str, str]:
    """Return what the comments in schema.sql say of each column: the `--` that ends its definition."""
    (sql,) = (sql for kind, name, sql in schema.objects if kind == "table" and name == schema.table)
    found: dict[str, str] = {}
    depth, column, previous = 0, "", "\n"
    name_is_next = False
    for token in TOKEN.findall(sql):
        if token in "(,)":
            depth += {"(": 1, ")": -1, ",": 0}[token]
            name_is_next = depth == 1 and token != ")"
        elif token.startswith("--"):
            if previous != "\n":
                found.setdefault(column, token[2:].strip())
        elif name_is_next and not token.startswith(("\n", "/*")):
            column, name_is_next = unquoted(token), False
        previous = token
    return found


# ---------------------------------------------------------------------------------------------- values


def whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError
    return int(value)


def whole_or_nan(value: float) -> int | None:
    return whole(value) if value == value else None


def exact(value: int) -> float:
    if int(float(value)) != value:
        raise ValueError
    return float(value)


def no_nan(value: float) -> float:
    if value != value:
        raise ValueError
    return value


encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_text(value: Any) -> str:
    """Return compact JSON text that SQLite's JSON functions can read: NaN and Infinity become null."""
    text = encode_json(value)
    if "NaN" in text or "Infinity" in text:
        text = encode_json(json.loads(text, parse_constant=lambda name: None))
    return text


def json_or_blob(value: Any) -> str | bytes:
    """Return an object or array as JSON text, and {"$hex": "…"}, which query prints for a BLOB, as that BLOB."""
    if type(value) is dict and list(value) == ["$hex"] and type(value["$hex"]) is str:
        return bytes.fromhex(value["$hex"])
    return json_text(value)


def blob_as_json(blob: bytes) -> dict[str, str]:
    """Return a BLOB as what json_or_blob() makes one of; for the json module."""
    return {"$hex": blob.hex()}


class Rule:
    """How columns of one affinity take the values of JSON.

    `conversions` says what becomes of a value of each type: None stores it as it is, a function converts
    it or raises ValueError, and a type that is missing is refused. `wanted` are the words of a refusal.
    `keeps` are the affinities whose values it stores as they are, or as an equal number.
    """

    def __init__(self, wanted: str, conversions: dict[type, Converter], keeps: Sequence[str]) -> None:
        self.wanted, self.conversions, self.keeps = wanted, conversions, keeps


def rule_for_anything(*keeps: str) -> Rule:
    return Rule("a 64-bit integer or float, text, an object or an array",
                {int: None, float: no_nan, bool: int, str: None, dict: json_or_blob, list: json_or_blob, bytes: None},
                keeps)


RULES = {
    "INTEGER": Rule("a 64-bit integer", {int: None, float: whole, bool: int}, ("INTEGER", "REAL", "NUMERIC")),
    "REAL": Rule("a number that a 64-bit float holds", {int: exact, float: no_nan}, ("REAL",)),
    "TEXT": Rule("a string", {str: None, dict: json_or_blob, list: json_or_blob, bytes: None}, ("TEXT",)),
    "NUMERIC": rule_for_anything("INTEGER", "REAL", "NUMERIC"),
    "BLOB": rule_for_anything("INTEGER", "REAL", "TEXT", "NUMERIC", "BLOB"),
}
# NaN is how Python prints a run that diverged; SQLite has NULL for it, and makes that of it by itself.
WHERE_NULLABLE: dict[Converter, Converter] = {no_nan: None, whole: whole_or_nan}
CONVERSION_ERRORS = (ValueError, OverflowError, RecursionError, TypeError)  # how a conversion says that it can't


def converter(column: Column, kind: type) -> Converter:
    """Return how a value of type *kind* is stored in *column*, as in its Rule; raise ValueError if it is refused."""
    if kind is type(None) and column.nullable:
        return None
    conversions = RULES[column.affinity].conversions
    for base in (bool,) if kind is bool else kind.__mro__:  # NumPy's float64, for one, is a float
        if base in conversions:
            convert = conversions[base]
            return WHERE_NULLABLE.get(convert, convert) if column.nullable else convert
    raise ValueError


def fit(column: Column, value: Any) -> Any:
    """Return *value*, as it came from JSON, as SQLite should store it in *column*; raise RecordRefused if it does not
    fit."""
    try:
        convert = converter(column, type(value))
        stored = convert(value) if convert else value
        if isinstance(stored, int) and not -(1 << 63) <= stored < 1 << 63:
            raise ValueError
        if isinstance(stored, str):
            stored.encode()  # half of a surrogate pair is no text
        return stored
    except CONVERSION_ERRORS as error:
        wanted = RULES[column.affinity].wanted + (" or null" if column.nullable else "")
        why = ""
        if isinstance(error, UnicodeEncodeError):
            why = ", which has half of a surrogate pair, or a byte that is not UTF-8"
        elif isinstance(value, float) and value != value:
            why = ", which SQLite makes NULL"
        raise RecordRefused(f"column {column.name}: expected {wanted}, got {shown(value)}{why}") from None


def fit_text(column: Column, text: str) -> Any:
    """Return *text*, typed by a person, as SQLite should store it in *column*; raise RecordRefused if it does not
    fit."""
    if column.affinity == "TEXT":
        return fit(column, text)
    readers: list[Callable[[str], Any]] = [lambda text: json.loads(text, parse_float=finite)]
    if column.affinity != "BLOB" and not text.strip("0123456789+-.eE"):
        readers += [int, finite]  # .5, 1. and +1 are no JSON, but numbers in a column of numbers
    for read in readers:
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
        return fit(column, value if isinstance(value, (int, float)) else text)
    return fit(column, text)


def shown(value: Any) -> str:
    """Return *value* as a short text for a message."""
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError, TypeError):
        return f"one that can't be shown ({type(value).__name__})"
    return text if len(text) <= 60 else text[:59] + "…"


# --------------------------------------------------------------------------------------------- records


class NotJSON(ValueError):
    """What this program, and not the json module, has against a text."""


def finite(text: str) -> float:
    value = float(text)
    if value - value:  # infinite: written as a number, not as Infinity
        raise NotJSON(f"the number {text[:40]} is too large")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise NotJSON(f"the key {shown(max(names, key=names.count))} stands in one object twice")
    return record


read_value = json.JSONDecoder(parse_float=finite, object_pairs_hook=distinct).raw_decode
WHITESPACE = " \t\r\n\ufeff"  # between records; PowerShell and others write a byte order mark
# ANSI escape sequences (ECMA-35, ECMA-48; xterm's titles), and the SI that `tput sgr0` sends some terminals.
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])|\x0f")
RECORD_BEGINS = re.compile(r'(?:\[\s*)?\{\s*(["}]|\Z)|\[\s*\Z')  # as far as can be seen
ESCAPE_LENGTH = 32  # no longer one is waited for
TAIL = 16  # an error this close to the end of the text may only mean that more is to come
TOP, FIRST, NEXT, ELEMENT = "top level", 'after "["', "after an element", 'after ","'  # where a list of records is
MAY_COME = {TOP: "{[", FIRST: "{]", NEXT: ",]", ELEMENT: "{"}


class Text:
    """JSON text that comes in pieces: what is unread of it, and where that stands in the whole."""

    def __init__(self, chunks: Iterable[bytes], skip_text: bool) -> None:
        self.incoming, self.skip_text = iter(chunks), skip_text
        # A byte that is not UTF-8 becomes half of a surrogate pair, which no record may hold, but a line of text may.
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if skip_text else "strict")
        # A progress bar ends a line by going back to its start.
        self.decoder: Any = io.IncrementalNewlineDecoder(decoder, translate=True) if skip_text else decoder
        self.text, self.position, self.line, self.count = "", 0, 1, 0
        self.broken, self.ended, self.starts_line = "", False, True

    def more(self) -> bool:
        """Add as much text as is unread, so that a long record is scanned only a few times; False if it has ended."""
        if self.ended:
            return False
        start = self.text.rfind("\n", 0, self.position) + 1 if self.starts_line else self.position  # with its indent
        self.line += self.text.count("\n", 0, start)
        pieces = [self.text[start:]]
        wanted = len(pieces[0])
        while wanted >= 0 and not self.ended:
            pieces.append(self.decoded(next(self.incoming, None)))
            wanted -= len(pieces[-1])
        self.text, self.position = "".join(pieces), self.position - start
        return True

    def decoded(self, chunk: bytes | None) -> str:
        self.ended = chunk is None
        try:
            return str(self.decoder.decode(chunk or b"", self.ended))
        except UnicodeDecodeError as error:
            self.broken, self.ended = f"byte 0x{error.object[error.start]:02x} is not UTF-8", True
            return error.object[:error.start].decode()

    def next(self) -> str:
        """Go on to the next character that is no white space; return it, or nothing at the end."""
        while True:
            while self.position < len(self.text):
                char = self.text[self.position]
                if char in "\x1b\x0f" and self.skip_text and (length := self.escape_length()):
                    self.position += length
                elif char in WHITESPACE:
                    self.starts_line = self.starts_line or char == "\n"
                    self.position += 1
                else:
                    return char
            if not self.more():
                return ""

    def escape_length(self) -> int:
        """Return how many characters of an ANSI escape stand here, such as a progress bar leaves before a result."""
        while len(self.text) - self.position < ESCAPE_LENGTH and self.more():
            pass
        match = ESCAPE.match(self.text, self.position)
        return match.end() - self.position if match else 0

    def record(self) -> dict[str, Any]:
        """Read the object that begins here."""
        while True:
            try:
                record: dict[str, Any]
                record, self.position = read_value(self.text, self.position)
                self.count += 1
                return record
            except (ValueError, RecursionError) as error:
                self.extend(error)

    def extend(self, error: Exception) -> None:
        """Read on, if the object may just not have ended yet; otherwise raise why it does not parse."""
        why, at, is_endless = "", self.position, False
        if isinstance(error, json.JSONDecodeError):
            why, at = f"{error.msg.lower()} near {shown(self.text[error.pos:error.pos + 20])}", error.pos
            is_endless = error.msg.startswith("Unterminated string")  # with the place where it starts
        elif isinstance(error, RecursionError):
            why = "it is nested too deeply"
        else:  # Python's own limit is on the digits of an integer
            why = str(error) if isinstance(error, NotJSON) else "an integer of thousands of digits"
        is_near_end = is_endless or at >= len(self.text) - TAIL
        if is_near_end and self.more():
            return
        if is_near_end and self.broken:
            raise self.malformed(self.broken, len(self.text)) from None
        if is_endless or at >= len(self.text.rstrip()):
            why = "it ends in the middle; was the program before the pipe cut off?"
        raise self.malformed(f"not valid JSON: {why}", at) from None

    def begins_record(self) -> bool:
        """Tell whether an object, or an array of objects, begins here, and not a line of text such as {'a': 1}."""
        while match := RECORD_BEGINS.match(self.text, self.position):
            if match[1] or not self.more():
                return bool(match[1]) or self.text[self.position] == "{"  # cut off in the middle
        return False

    def rest_of_line(self) -> str:
        while (end := self.text.find("\n", self.position)) < 0 and self.more():
            pass
        start = self.text.rfind("\n", 0, self.position) + 1
        self.position = len(self.text) if end < 0 else end
        return self.text[start:self.position] + "\n"

    def unexpected(self, char: str) -> Failure:
        why = f"expected a JSON object, got {shown(self.text[self.position:self.position + 20])}"
        if char.isalpha() and not self.skip_text:
            return TextRefused(self.malformed(why).why, hint="; insert --skip-text passes over lines of text")
        return self.malformed(why)

    def malformed(self, why: str, at: int | None = None) -> Failure:
        line = self.line + self.text.count("\n", 0, self.position if at is None else at)
        return Failure(f"record {self.count + 1} (line {line}): {why}")


def records(chunks: Iterable[bytes], skip_text: bool = False,
            echo: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in *chunks* of UTF-8: one, many one after another, or an array.

    Memory is bounded by the longest record. With *skip_text*, lines that do not begin like an object,
    or an array of them, go to *echo*. Raises Failure, which names the record's number and line, and
    NoRecord if there is none.
    """
    text = Text(chunks, skip_text)
    where, is_empty, skipped = TOP, True, False
    while char := text.next():
        if skip_text and text.starts_line and where == TOP and not text.begins_record():
            line, skipped = text.rest_of_line(), True
            if echo:
                echo(line)
            continue
        if char not in MAY_COME[where]:
            raise text.unexpected(char)
        if char == "{":
            yield text.record()
            where = TOP if where == TOP else NEXT
        else:
            text.position += 1
            where = {"[": FIRST, ",": ELEMENT, "]": TOP}[char]
        is_empty = text.starts_line = False
    if text.broken:
        raise text.malformed(text.broken)
    if is_empty:
        raise NoRecord("no JSON object on standard input, only text" if skipped else
                       "no JSON on standard input: did the program before the pipe fail?")
    if where != TOP:
        raise text.malformed("not valid JSON: the array does not end; was the program before the pipe cut off?")


# -------------------------------------------------------------------------------------------- database

DATABASE_ERRORS = (sqlite3.Error, sqlite3.Warning, UnicodeError)  # the last where a name in the file is not UTF-8
# What SQLite says, the exit status, and what to tell the user.
MEANINGS: dict[str, tuple[int, str]] = {
    "database or disk is full": (TRY_AGAIN, "the disk is full; fix that and try again"),
    "disk I/O error": (TRY_AGAIN, "disk I/O error; fix that and try again"),
    "attempt to write a readonly database": (
        REFUSED, "may not be written, not even to roll back what a writer left unfinished; fix its permissions or"
                 " its folder's; if they are right, the next insert rolls that back"),
    "file is not a database": (REFUSED, "is not an SQLite database; name another file"),
    "database disk image is malformed": (REFUSED, "is damaged; save what it holds with: sqlite3 FILE .recover"),
}


def is_busy(error: Exception) -> bool:
    return str(error).startswith(("database is locked", "database table is locked", "database schema is locked",
                                  "locking protocol"))


def as_failure(error: Exception, path: str) -> Failure:
    """Return what SQLite or the system said of the database at *path*, in the user's terms."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, OSError):
        status = TRY_AGAIN if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else REFUSED
        return Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), status)
    if isinstance(error, MemoryError):
        return Failure("there is not enough memory for that", TRY_AGAIN)
    if isinstance(error, UnicodeError):
        return Failure("holds a name or an SQL text that is not UTF-8; only sqlite3 can change that")
    if is_busy(error):
        return Failure("locked by another process", TRY_AGAIN, "; try again, or wait longer with --timeout")
    said = str(error)
    if "unable to open" in said:
        return why_not_opened(path)
    for words, (status, meaning) in MEANINGS.items():
        if said.startswith(words):
            return Failure(meaning, status)
    return Failure(said)


def why_not_opened(path: str) -> Failure:
    if isdir(path):
        return Failure("is a folder; name a file in it")
    if not isdir(dirname(path)):
        return Failure(f"there is no folder {dirname(path)}; make it first")
    try:
        temporary, file = new_temporary(path)
        file.close()
        unlink(temporary)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Failure(f"cannot be opened: {error.strerror}", as_failure(error, path).status)
    return Failure("cannot be opened: you may not write to it, to its folder, or to its -wal and -shm files there")


def patiently(action: Callable[..., Result], deadline: float, *arguments: Any) -> Result:
    """Return action(*arguments), called until the lock that it needs is free, or until *deadline* (time.monotonic).

    SQLite's own waiting would keep a signal waiting too, and does not cover the switch to WAL.
    """
    nap = 0.001
    while True:
        try:
            return action(*arguments)
        except sqlite3.OperationalError as error:
            left = deadline - time.monotonic()
            if not is_busy(error) or left <= 0:
                raise
        PROGRESS.show("waiting for the lock")
        with SIGNALS:
            time.sleep(min(nap, left))
        nap = min(2 * nap, LOCK_NAP_S)


# Where several hosts may see one file. WAL needs memory that all its users share, which hosts don't:
# sqlite.org/wal.html. A rollback journal needs only locks.
NETWORK = frozenset((
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.ceph", "fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs"))


def file_system(path: str, mountinfo: str) -> str:
    """Return the type of the file system that holds *path*, by the text of /proc/self/mountinfo (proc(5)), or ''."""
    for char in "\\ \t\n":  # as they stand there
        path = path.replace(char, f"\\{ord(char):03o}")
    found = kind = ""
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        point = fields.split(" ")[4]
        # Of two at one place, the later one hides the other.
        if len(point) >= len(found) and f"{path}/".startswith(point.rstrip("/") + "/"):
            found, kind = point, source.split(" ")[0]
    return kind


def wanted_journal(path: str) -> tuple[str, str]:
    """Return the journal mode for the file at *path*, wal or delete, and its file system if that is the reason."""
    mode = os.environ.get("DBTOOL_JOURNAL", "").lower()
    if mode in ("wal", "delete"):
        return mode, ""
    if mode:
        raise Failure(f"DBTOOL_JOURNAL is {shown(mode)}; it takes wal or delete", USAGE)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            kind = file_system(path, file.read())
    except OSError:  # not Linux
        kind = ""
    return ("delete", kind) if kind in NETWORK else ("wal", "")


def file_uri(path: str) -> str:
    """Return the URI of a file; a byte of its name that is not UTF-8 is half a surrogate pair in *path* (PEP 383)."""
    return "file://" + "".join(f"%{ord(char) & 255:02x}" if char in "%?#" or "\udc80" <= char <= "\udcff" else char
                               for char in path)


def lenient_text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def connect(uri: str) -> Connection:
    """Open a database; a signal stops what SQLite does there."""
    db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
    db.text_factory = lenient_text  # a schema that is not UTF-8 should not matter where its names don't
    db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
    return db


@contextlib.contextmanager
def writing(path: str, schema: Schema | None, timeout: float) -> Iterator[Connection]:
    """Give a connection to the file at *path*, in a transaction that holds the write lock; commit it in the end.

    A missing or empty file is made from *schema*; without one, the file is taken as it is. *timeout* is
    in seconds. Raises Failure, with nothing changed, or CommitFailed.
    """
    deadline = time.monotonic() + timeout
    try:
        with contextlib.closing(connect(file_uri(path) + "?mode=rwc")) as db:  # closing rolls back, without COMMIT
            opened = os.stat(path)
            begin_to_write(db, path, schema, deadline)
            yield db
            if not exists(path) or not os.path.samestat(opened, os.stat(path)):
                raise Failure("was removed or replaced meanwhile, so nothing was written", TRY_AGAIN)
            SIGNALS.check()
            db.set_progress_handler(None, 0)  # from here on, a signal comes too late
            try:
                patiently(db.execute, deadline, "COMMIT")
            except sqlite3.Error as error:
                failure = as_failure(error, path)
                raise failure if is_busy(error) else CommitFailed(failure.why, failure.status, failure.hint) from None
    except DATABASE_ERRORS as error:
        SIGNALS.check()
        raise as_failure(error, path) from None
    finally:
        PROGRESS.clear()


def begin_to_write(db: Connection, path: str, schema: Schema | None, deadline: float) -> None:
    network = switch_journal(db, path, schema, deadline) if schema else ""
    patiently(db.execute, deadline, "PRAGMA synchronous = FULL")
    patiently(db.execute, deadline, "BEGIN IMMEDIATE")
    if schema and is_empty(db, schema):
        create_objects(db, schema.objects)
    if network:
        report(f"{path}: is on {network}, a network file system, so it has a DELETE journal instead of WAL;"
               " let only one host write to it at a time (DBTOOL_JOURNAL=wal|delete overrides)")


def create_objects(db: Connection, objects: Iterable[SchemaObject]) -> None:
    for kind, name, sql in objects:
        if not scalar(db, "SELECT count(*) FROM sqlite_master WHERE type = ? AND name = ?", (kind, name)):
            db.execute(sql)  # else it came with a virtual table


def switch_journal(db: Connection, path: str, schema: Schema, deadline: float) -> str:
    """Give a file its journal; return the file system that is the reason, if this is the first time."""
    journal, network = wanted_journal(path)
    before = patiently(scalar, deadline, db, "PRAGMA journal_mode")
    if before == journal and not network:
        return ""
    is_new = patiently(is_empty, deadline, db, schema)  # another program's file is left as it is
    is_wal = journal == "wal"
    try:
        patiently(scalar, deadline if is_wal else 0.0, db, f"PRAGMA journal_mode = {journal}")
    except sqlite3.OperationalError as error:
        if is_wal or not is_busy(error):
            raise
        return ""  # others are using it, and one of the next inserts will switch it
    return network if is_new or before != journal else ""


def is_empty(db: Connection, schema: Schema) -> bool:
    """Tell whether nothing is in the file; raise Failure if something is that rows made for *schema* do not fit."""
    if not scalar(db, "SELECT count(*) FROM sqlite_master"):
        return True
    check_columns(db, schema)
    return False


def check_columns(db: Connection, schema: Schema) -> None:
    """Raise Failure if rows made for *schema* do not fit the table that the file has."""
    found = columns_of(db, schema.table)
    if not found:
        raise Failure(f"has no table {schema.table}; is it another program's file? (migrate would add the table)")
    check_case(found, schema.by_name, schema)
    path = scalar(db, "SELECT file FROM pragma_database_list WHERE name = 'main'")
    fix = " ".join([script("dbadmin"), "migrate", *map(for_shell, [path, *schema.flags()])])
    lacking = ", ".join(name for name in schema.by_name if name not in found)
    if lacking:
        raise Failure(f"has no column {lacking}; add it with: {fix}")
    for name, column in found.items():
        wanted = schema.by_name.get(name)
        if not wanted and column.needed and not column.nullable:
            raise Failure(f"needs column {name}, which {schema.path} lacks; add it there, or drop it with:"
                          f" {fix} --drop {for_shell(name)}")
        if wanted and wanted.affinity not in RULES[column.affinity].keeps:
            raise other_type(column, wanted, schema, f"change the file with: {fix}")


def other_type(column: Column, wanted: Column, schema: Schema, fix: str) -> Failure:
    return Failure(f"column {column.name} is {column.type or 'of no type'}, but {wanted.type or 'of no type'} in"
                   f" {schema.path}; write there what it is, or {fix}")


def check_case(names: Iterable[str], wanted: Iterable[str], schema: Schema) -> None:
    """Raise Failure if one of the *names* in a file is *wanted* in other upper or lower case by the schema."""
    folded = {name.encode().lower(): name for name in wanted}  # bytes, as SQLite folds ASCII only
    for name in names:
        meant = folded.get(name.encode().lower(), name)
        if meant != name:
            raise Failure(f"{name} is {meant} in {schema.path}; for SQLite these are the same, so write {name} there")


# ------------------------------------------------------------------------------------------- inserting


class Record:
    """One record as a row: `given` is what came, `names` the columns and `row` their values."""

    __slots__ = ("given", "names", "number", "row")

    def __init__(self, number: int, given: Mapping[str, Any], names: tuple[str, ...], row: list[Any]) -> None:
        self.number, self.given, self.names, self.row = number, given, names, row

    def values(self) -> dict[str, Any]:
        return dict(zip(self.names, self.row))


def fitted(schema: Schema, incoming: Iterable[Mapping[str, Any]]) -> Iterator[Record]:
    """Yield *incoming* records as rows; raise RecordRefused for one that does not fit the table."""
    plans: dict[tuple[Any, ...], tuple[tuple[str, ...], list[tuple[int, Any]]]] = {}
    for number, given in enumerate(incoming, 1):
        shape = (*given, *map(type, given.values()))
        try:
            plan = plans.get(shape)
            if plan is None:
                plan = plans[shape] = tuple(given), conversions(schema, given)
            row = list(given.values())
            for index, convert in plan[1]:
                row[index] = convert(row[index])
        except RecordRefused as refusal:
            refusal.number = number
            raise
        except CONVERSION_ERRORS as error:
            raise refused(schema, Record(number, given, (), []), error) from None
        yield Record(number, given, plan[0], row)


def conversions(schema: Schema, record: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """Return which values of records of this shape are converted, by their places, and how."""
    check_names(schema, record)
    found = []
    for index, (name, value) in enumerate(record.items()):
        fit(schema.by_name[name], value)
        convert = converter(schema.by_name[name], type(value))
        if convert:
            found.append((index, convert))
    return found


def refused(schema: Schema, record: Record, error: Exception) -> RecordRefused:
    """Return what is wrong with a record, by what SQLite or a conversion said of it."""
    refusal = RecordRefused(str(error))
    if isinstance(error, sqlite3.IntegrityError) and "UNIQUE" in str(error):
        refusal = RecordRefused(f"{error}: such a row is there already",
                                hint=" (--on-conflict skip or replace says what to do with it)")
    else:
        try:
            for name, value in record.given.items():
                fit(schema.by_name[name], value)
        except RecordRefused as unfit:
            refusal = unfit
    refusal.number = record.number
    return refusal


def check_names(schema: Schema, names: Collection[str]) -> None:
    """Raise RecordRefused unless *names* are columns that may be given and all that must be."""
    for name in names:
        if name not in schema.by_name:
            raise RecordRefused(no_column(schema, name), hint=f"; see {schema.path}")
        if schema.by_name[name].generated:
            raise RecordRefused(f"column {name} is generated by SQLite; leave it out")
    missing = ", ".join(column.name for column in schema.columns if column.needed and column.name not in names)
    if missing:
        raise RecordRefused(f"column {missing} missing, and {basename(schema.path)} gives no default")


def no_column(schema: Schema, name: str) -> str:
    return f"{shown(name)} is no column of {schema.table}{nearest(str(name), schema.by_name)}"


def closest(name: str, names: Iterable[str], likeness: float = 0.6) -> str:
    """Return which of the *names* is like *name*, 1 for the same, or nothing."""
    import difflib

    folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), folded, 1, likeness)
    return folded[close[0]] if close else ""


def nearest(name: str, names: Iterable[str]) -> str:
    meant = closest(name, names)
    return f"; did you mean {shown(meant)}?" if meant else ""


# How SQLite says that a value does not fit.
STORE_ERRORS = (UnicodeEncodeError, OverflowError, sqlite3.IntegrityError, sqlite3.InterfaceError,
                sqlite3.ProgrammingError)
CONFLICT_RULES = ("fail", "skip", "replace")


@contextlib.contextmanager
def naming(schema: Schema, taken: Sequence[Record]) -> Iterator[None]:
    """Raise what SQLite, or this program, has against the record *taken* last as a RecordRefused with its number."""
    try:
        yield
    except RecordRefused as refusal:
        refusal.number = refusal.number or taken[-1].number
        raise
    except STORE_ERRORS as error:
        raise refused(schema, taken[-1], error) from None


class Insertion:
    """Inserts records into the table of a file, in the transaction that is open."""

    def __init__(self, db: Connection, schema: Schema, on_conflict: str) -> None:
        if on_conflict not in CONFLICT_RULES:
            raise ValueError(f"on_conflict is {on_conflict!r}; it takes fail, skip or replace")
        self.db, self.schema, self.on_conflict = db, schema, on_conflict
        self.verb = f"INSERT{conflict_clause(db, schema.table, on_conflict)} INTO {quote(schema.table)}"
        kinds = [kind for (kind,) in db.execute("SELECT type FROM sqlite_master WHERE tbl_name = ? COLLATE NOCASE",
                                              [schema.table])]
        self.has_triggers, self.is_view = "trigger" in kinds, "view" in kinds
        self.has_rowid = not self.is_view and has_rowid(db, schema.table)

    def insert(self, records: Iterable[Record]) -> Receipt | None:
        """Insert all; return the receipt, None if all rows were there before.

        One by one until a row can be the receipt; and to the end if there are triggers, since one may drop a row.
        """
        receipt = None
        for names, group in itertools.groupby(records, lambda record: record.names):
            if self.has_triggers or not receipt or not receipt["row"]:
                for record in group:
                    with naming(self.schema, [record]):
                        row_receipt = self.insert_one(record)
                    if row_receipt and not (receipt and receipt["row"]):
                        receipt = row_receipt
                    if row_receipt and not self.has_triggers:
                        break
            self.insert_many(names, group)  # noqa: B031  the rest of it
        return receipt

    def insert_many(self, names: tuple[str, ...], records: Iterable[Record]) -> None:
        """Insert records that name the same columns."""
        taken: collections.deque[Record] = collections.deque(maxlen=1)  # by SQLite: the one that an error is about

        def rows() -> Iterator[list[Any]]:
            for record in records:
                taken.append(record)
                yield record.row

        with naming(self.schema, taken):
            self.db.executemany(self.statement(names), rows())

    def insert_one(self, record: Record) -> Receipt | None:
        """Insert one row, and see that it is there; return its receipt, None if it was there before."""
        db, values, made = self.db, record.values(), ""
        for column in self.schema.key:
            if column.default is not None and column.name not in values:
                values[column.name], another = two_defaults(db, column.default)
                made = "key" if values[column.name] != another or made == "key" else "row"
        key = {column.name: values.get(column.name) for column in self.schema.key}
        if None in key.values():
            key = {}
        was_there = bool(key) and self.on_conflict != "fail" and holds(db, self.schema.table, key)
        before = db.total_changes
        cursor = db.execute(self.statement(values), list(values.values()))
        if was_there or (self.on_conflict == "skip" and not cursor.rowcount and not self.has_triggers):
            return None
        if self.has_triggers and not self.came(cursor, key, before):
            raise RecordRefused("no row came of it, since a trigger of the file drops it")
        # Another may have a key that was not made at random, but hardly with equal values.
        return {"table": self.schema.table, "row": {} if not key or not made else key if made == "key" else values}

    def came(self, cursor: Cursor, key: Mapping[str, Any], before: int) -> bool:
        """Tell whether a row came of what *cursor* inserted, where *before* were the changes until then."""
        table = self.schema.table
        if self.is_view:
            return self.db.total_changes > before
        if cursor.rowcount and self.has_rowid:  # a trigger may have changed the key
            return holds(self.db, table, {"_rowid_": cursor.lastrowid})
        return bool(key) and holds(self.db, table, key)

    def statement(self, names: Collection[str]) -> str:
        """Return the SQL that inserts a row with these columns."""
        if not names:
            return f"{self.verb} DEFAULT VALUES"
        places = ", ".join("?" * len(names))
        sql = f"{self.verb} ({', '.join(map(quote, names))}) VALUES ({places})"
        return sql + SKIP if self.on_conflict == "skip" else sql


SKIP = " ON CONFLICT DO NOTHING"  # OR IGNORE would also drop rows that break a NOT NULL or CHECK constraint


def conflict_clause(db: Connection, table: str, on_conflict: str) -> str:
    """Return what stands after INSERT so that no constraint of the table drops or replaces rows by itself."""
    if on_conflict == "replace":
        return " OR REPLACE"
    sql = scalar(db, "SELECT coalesce(max(sql), '') FROM sqlite_master WHERE type = 'table'"
                 " AND name = ? COLLATE NOCASE", [table])
    words = " ".join(normalized_tokens(sql)).upper() if "CONFLICT" in sql.upper() else ""
    has_rule = "ON CONFLICT IGNORE" in words or "ON CONFLICT REPLACE" in words
    return " OR ABORT" if has_rule else ""  # only where it is needed, as it overrules also what triggers say


def has_rowid(db: Connection, table: str) -> bool:
    try:
        db.execute(f"SELECT _rowid_ FROM {quote(table)} LIMIT 0")
    except sqlite3.OperationalError:  # WITHOUT ROWID
        return False
    return True


def two_defaults(db: Connection, default: str) -> Sequence[Any]:
    """Return two values of a column's default: they differ if it makes unique ones."""
    try:
        values: Sequence[Any] = db.execute(f"SELECT {default}, {default}").fetchone()
        return values
    except sqlite3.OperationalError:  # a bare word is text
        return default, default


def holds(db: Connection, table: str, values: Mapping[str, Any]) -> bool:
    """Tell whether a row with these *values* is there."""
    where = " AND ".join(f"{quote(name)} IS ?" for name in values)
    return bool(scalar(db, f"SELECT EXISTS (SELECT 1 FROM {quote(table)} WHERE {where})", list(values.values())))


def insert_records(db: Connection, schema: Schema, records: Iterable[Record], on_conflict: str,
                   receipts: Collection[Receipt] = ()) -> Receipt | None:
    """Insert *records*, in the transaction that is open; return the receipt, None if all rows were there before.

    The receipt has what tells later whether the transaction happened, which is whole or not at all: a `row`, by a
    key that was made here, or nothing if keys came with the records, which tell for themselves. *receipts* are those
    of earlier attempts: what they tell to be stored is not stored again. Raises RecordRefused or CannotTell.
    """
    if any(holds(db, schema.table, receipt["row"]) for receipt in receipts if receipt["row"]):
        return None
    if any(not receipt["row"] for receipt in receipts):
        records = not_stored(db, schema, records)
    return Insertion(db, schema, on_conflict).insert(records)


def not_stored(db: Connection, schema: Schema, records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records that are not there by key with equal values; raise CannotTell for one without a key."""
    for record in records:
        values = record.values()
        if not schema.key or any(values.get(column.name) is None for column in schema.key):
            raise CannotTell("may be stored already, but its rows have no key that would tell")
        if not holds(db, schema.table, values):
            yield record


def store(path: str, schema: Schema, incoming: Iterable[Mapping[str, Any]], on_conflict: str, timeout: float) -> None:
    """Insert records into the file at *path*, all or none. Raises Failure, or CommitFailed."""
    rows = fitted(schema, incoming)
    receipt = None
    for first in rows:  # before the file is touched: the producer may be slow, or the record bad
        try:
            with writing(path, schema, timeout) as db:
                receipt = insert_records(db, schema, itertools.chain([first], rows), on_conflict)
        except CommitFailed as failure:
            failure.receipts = [receipt] if receipt else []
            raise


def insert(database: str, incoming: Iterable[Mapping[str, Any]], schema: Schema | None = None,
           on_conflict: str = "fail", timeout: float = LOCK_TIMEOUT_S) -> int:
    """Insert records, whose keys are columns, into the file *database*, all or none; return how many.

    *on_conflict* says what to do with a key that is there: fail, skip or replace; *timeout* is in
    seconds. Raises Failure. Unlike the command, it keeps nothing aside: the caller has the records.
    """
    count = 0

    def counted() -> Iterator[Mapping[str, Any]]:
        nonlocal count
        for record in incoming:
            count += 1
            yield record

    store(realpath(database), schema or read_schema(), counted(), on_conflict, timeout)
    return count


# --------------------------------------------------------------------------------------- nothing lost


class Kept:
    """What became of input that could not be stored: the *path* of the file that holds it, or why there is none."""

    def __init__(self, path: str = "", note: str = "") -> None:
        self.path, self.note = path, note or f"the input is kept in {path}"


class Spool:
    """Bytes that are held until their records are rows: a little in memory, more of it in a file.

    `places` are paths at which it can be kept, best first; the file has the rights *mode*.
    """

    def __init__(self, places: Iterable[str], mode: int) -> None:
        self.places, self.mode = iter(places), mode
        self.copy: Any = io.BytesIO()
        self.is_everywhere_full = False  # what follows stays in memory
        self.temporary = self.final = ""  # the path of the copy, when it is a file, and what it becomes when it is kept
        self.start = self.size = self.done = 0

    def add(self, data: bytes) -> None:
        try:
            write_all(self.copy, data)
        except OSError:
            self.move()
            self.add(data)
            return
        self.size += len(data)
        if self.size > SPOOL_BYTES and not self.temporary and not self.is_everywhere_full:
            self.move()

    def chunks(self) -> Iterator[bytes]:
        """Yield what is held, from the start."""
        self.copy.seek(self.start)
        self.done = 0
        for data in pieces(self.copy):
            SIGNALS.check()
            yield data
            self.done += len(data)

    def move(self) -> None:
        """Copy what is held to a file at the next place, or back into memory when none is left."""
        old, old_temporary = self.copy, self.temporary
        while True:
            self.final = next(self.places, "")
            self.temporary, self.copy = "", io.BytesIO()
            self.is_everywhere_full = not self.final
            try:
                if self.final:
                    in_kept = dirname(self.final).endswith(KEPT)
                    self.temporary, self.copy = new_temporary(self.final, self.mode, make_folder=in_kept)
                copy_bytes(old, self.start, self.copy, self.size)
                break
            except OSError:
                self.discard()
        self.start = 0
        old.close()
        if old_temporary:
            remove(old_temporary)

    def discard(self) -> None:
        """Forget the copy: it is stored, or is elsewhere. That it can't be removed is no reason to fail now."""
        with contextlib.suppress(OSError):
            if self.temporary:
                with self.copy:
                    remove(self.temporary)

    def keep(self, receipts: Collection[Receipt] = ()) -> Kept:
        """Bring what is held to a safe place, with the *receipts* of COMMITs that failed beside it."""
        while True:
            if not self.temporary:
                self.move()
            if not self.temporary:
                try:
                    sys.stderr.flush()
                    write_all(sys.stderr.buffer, self.copy.getvalue().rstrip(b"\n") + b"\n")
                    sys.stderr.buffer.flush()
                except (OSError, AttributeError):  # it is closed
                    return Kept(note="the input could not be kept anywhere")
                return Kept(note="the input could not be kept in any file and stands above")
            try:
                os.fsync(self.copy.fileno())
                if receipts:
                    write_receipts(self.final, receipts, self.mode)
                publish(self.temporary, self.final)
                break
            except OSError:
                self.move()
        self.temporary = ""
        with contextlib.suppress(OSError):  # it is there; a second copy of it would be stored twice
            sync_folder(self.final)
        return Kept(self.final)


class StandardInput(Spool):
    """What comes on standard input. A regular file needs no copy, and is read where it is."""

    def __init__(self, stream: TextIO | None, places: Iterable[str], mode: int = 0o666) -> None:
        super().__init__(places, mode)
        self.ended = True
        self.is_file = False
        if not stream:
            return
        try:
            self.descriptor = stream.fileno()
        except OSError:  # it is in memory
            self.add(stream.buffer.read())
            return
        status = os.fstat(self.descriptor)
        # One without a name, as bash makes for <<<, would vanish.
        self.ended = self.is_file = stat.S_ISREG(status.st_mode) and status.st_nlink > 0
        if self.is_file:
            self.copy = io.FileIO(self.descriptor, closefd=False)
            self.start = self.copy.tell()
            self.size = status.st_size - self.start

    def arriving(self) -> Iterator[bytes]:
        """Yield what comes in, each piece once it is held; a signal ends the wait but loses nothing."""
        while not self.ended:
            with SIGNALS:
                select.select([self.descriptor], [], [])
            PROGRESS.show(f"{self.size >> 20:,} MiB read")
            with contextlib.suppress(BlockingIOError):  # somebody else was faster
                yield self.take()

    def take(self) -> bytes:
        """Read once from the pipe, and hold what came."""
        data = os.read(self.descriptor, CHUNK_BYTES)
        self.ended = not data  # a terminal would let one type on
        self.add(data)
        return data

    def read(self, skip_text: bool = False) -> None:
        """Read to the end. With *skip_text*, show the lines that are no JSON objects as they come."""
        arriving = self.arriving()
        if skip_text:
            try:
                for _ in records(self.chunks() if self.is_file else arriving, True, pass_on):
                    pass
            except Failure as failure:  # a bad record is reported when it is its turn to be stored
                if failure.status != REFUSED:
                    raise
        for _ in arriving:
            pass

    def keep(self, receipts: Collection[Receipt] = ()) -> Kept:
        """Bring what is held, and what still comes, to a safe place."""
        try:
            self.read()
        except (Failure, OSError):  # a signal ends that
            self.drain()
        if not self.size:
            return Kept(note="there was no input")
        if self.is_file and not receipts:  # with one, running it again might store it twice
            return Kept(note="standard input is a file, so nothing is lost: run this again")
        return super().keep(receipts)

    def drain(self) -> None:
        """Take what waits in the pipe, without waiting for more: a few times what a pipe holds."""
        with contextlib.suppress(OSError):
            for _ in range(16):
                if self.ended or not select.select([self.descriptor], [], [], 0)[0]:
                    break
                self.take()


def write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def pieces(file: Any) -> Iterator[bytes]:
    """Yield the bytes of *file* from where it is."""
    while data := file.read(CHUNK_BYTES):
        yield data


def copy_bytes(source: Any, start: int, target: Any, size: int) -> None:
    source.seek(start)
    while data := source.read(min(CHUNK_BYTES, size)):  # less than it was, if another program has shortened a file
        write_all(target, data)
        size -= len(data)


def file_mode(path: str) -> int:
    """Return the rights of files made for the database at *path*: no more than its own but for their owner.

    The umask takes from them.
    """
    try:
        return os.stat(path).st_mode & 0o666 | 0o600
    except OSError:  # it does not exist yet
        return 0o666


def random_name() -> str:
    return os.urandom(8).hex()


def new_temporary(path: str, mode: int = 0o666, make_folder: bool = False) -> tuple[str, io.FileIO]:
    """Create the temporary file that is to become *path*, with the rights *mode*; return its path, and it, open.

    Nobody can guess its name, and put a link in its place.
    """
    folder, name = os.path.split(path)
    temporary = join(folder, f".{name}.{random_name()}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return temporary, io.FileIO(os.open(temporary, flags, mode), "r+")
    except FileNotFoundError as error:
        if not make_folder:
            error.filename = folder
            raise
    with contextlib.suppress(FileExistsError):  # another process was faster
        os.mkdir(folder, mode | (mode & 0o444) >> 2)  # who may read may look in
        sync_folder(folder)
    return temporary, io.FileIO(os.open(temporary, flags, mode), "r+")


def publish(temporary: str, path: str) -> None:
    """Give a temporary file its name, which is random too; never replace another."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(temporary, path)


def unlink(path: str) -> None:
    """Remove a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove(path: str) -> None:
    """Remove a kept file, if it is there, and its folder, if that was made to keep input and is empty now."""
    unlink(path)
    if dirname(path).endswith(KEPT):
        with contextlib.suppress(OSError):
            os.rmdir(dirname(path))


def sync_folder(path: str) -> None:
    """Make the name of the file or folder at *path* durable."""
    folder = os.open(dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system whose folders can't be flushed
            raise
    finally:
        os.close(folder)


KEPT = "-kept"  # how the name of the folder for kept input ends
SKIP_TEXT_SUFFIX = ".text.json"  # how the name of a kept file ends that came with --skip-text


def kept_places(path: str, skip_text: bool = False) -> Iterator[str]:
    """Yield where input for the database at *path* can be kept: beside it, here, or with temporary files."""
    now = time.time()
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06}Z"
    name += f"-{os.uname().nodename}-{os.getpid()}-{random_name()}{SKIP_TEXT_SUFFIX if skip_text else '.json'}"
    for folder, prefix in kept_folders(path):
        yield join(folder, prefix + name)


def kept_folders(path: str) -> Iterator[tuple[str, str]]:
    """Yield the folders that kept input for the database at *path* is in, and how the names of its files begin."""
    prefix = "dbtool-kept-"
    if path:
        yield path + KEPT, ""
        # The remainder by a prime: a checksum that needs no module, as there may be no more file to open one with.
        prefix += f"{int.from_bytes(os.fsencode(path), 'big') % 4_294_967_291:08x}-"
    with contextlib.suppress(OSError):  # it is gone
        yield os.getcwd(), prefix
    with contextlib.suppress(OSError, ImportError):  # no folder takes temporary files, or no more files can be opened
        import tempfile

        yield tempfile.gettempdir(), prefix
    if path:
        yield dirname(path), prefix


def kept_files(path: str) -> tuple[list[str], list[Failure]]:
    """Return the files kept for the database at *path*, in each folder the oldest first, and why some can't be found.

    Of some, only the receipt may be left.
    """
    found, failures = [], []
    for folder, prefix in sorted(dict(kept_folders(path)).items()):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if prefix:  # some hide what is in the folder for temporary files
                continue
            failures.append(Failure(f"{folder}: {error.strerror}; so nobody knows whether input is kept there"))
            continue
        names = [name.removesuffix(RECEIPT) for name in names if name.startswith(prefix) and not name.startswith(".")]
        found += sorted({join(folder, name) for name in names if name.endswith(".json")})
        if not prefix:  # what else is in the folder for kept input is nothing to store; but that is said
            failures += [Failure(f"{join(folder, name)}: {not_kept_by_user()}") for name in sorted(names)
                         if not name.endswith(".json") and not isfile(join(folder, name))]
    return found, failures


def open_kept(path: str) -> io.FileIO:
    """Open a file that was kept; raise Failure if it is not a regular file of this user, who made it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, or a socket
            raise not_kept_by_user() from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise not_kept_by_user()
    return io.FileIO(descriptor, "r")


def not_kept_by_user() -> Failure:
    return Failure("is not a regular file of yours, so it was passed over; look at it, and move it away")


RECEIPT = ".receipt"  # what the name of a receipt adds to that of the kept file


def write_receipts(path: str, receipts: Collection[Receipt], mode: int) -> None:
    """Write beside the kept file at *path*, before COMMIT, what tells later whether it is stored."""
    if not receipts:
        remove(path + RECEIPT)
        return
    temporary, file = new_temporary(path + RECEIPT, mode)
    try:
        with file:
            write_all(file, json.dumps(list(receipts), default=blob_as_json).encode())
            os.fsync(file.fileno())
        os.replace(temporary, path + RECEIPT)
        sync_folder(path)
    except OSError:
        remove(temporary)
        raise


def read_receipts(path: str, schema: Schema) -> list[Receipt]:
    """Return the receipts of the kept file at *path*; raise Failure if they can't be used."""
    try:
        with open_kept(path + RECEIPT) as file:
            receipts = json.loads(file.readall(), object_hook=lambda value: value if "$hex" not in value else
                                  json_or_blob(value))
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, UnicodeDecodeError):  # torn: it is written whole before COMMIT, which had not begun
        return []
    except (ValueError, RecursionError):
        receipts = None
    if isinstance(receipts, list) and receipts and all(is_receipt(receipt, schema) for receipt in receipts):
        return receipts
    raise Failure(f"its receipt, {basename(path)}{RECEIPT}, does not say which row of {schema.table} would tell whether"
                  " it is stored; look, and delete one of the two files")


def is_receipt(receipt: Any, schema: Schema) -> bool:
    return (isinstance(receipt, dict) and receipt.keys() == {"table", "row"} and receipt["table"] == schema.table
            and isinstance(receipt["row"], dict) and all(
                name in schema.by_name and (value is None or isinstance(value, (int, float, str, bytes)))
                for name, value in receipt["row"].items()))


# ----------------------------------------------------------------------------------------------- query

HARMLESS_PRAGMAS = frozenset((
    "application_id", "collation_list", "compile_options", "data_version", "database_list", "encoding",
    "foreign_key_check", "foreign_key_list", "freelist_count", "function_list", "index_info", "index_list",
    "index_xinfo", "integrity_check", "journal_mode", "module_list", "page_count", "page_size", "pragma_list",
    "quick_check", "schema_version", "table_info", "table_list", "table_xinfo", "user_version"))
TAKE_AN_ARGUMENT = ("check", "info", "list")  # how the names end of those that change nothing by it


def authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    """Admit what reads and deny all else; a callback for sqlite3_set_authorizer."""
    if action == sqlite3.SQLITE_PRAGMA:
        name = str(first).lower()
        admitted = name in HARMLESS_PRAGMAS and (not second or name.endswith(TAKE_AN_ARGUMENT))
    elif action == sqlite3.SQLITE_FUNCTION:
        admitted = str(second).lower() not in UNSAFE_FUNCTIONS
    elif action == sqlite3.SQLITE_UPDATE:
        admitted = first == "sqlite_master"  # how json_each and its like are declared; SQLite guards it itself
    else:
        admitted = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if admitted else sqlite3.SQLITE_DENY


class Numbers:
    """What aggregates have in common: they take the numbers that are not NULL."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.percent = 50.0

    def step(self, value: float | None, percent: float = 50.0) -> None:
        self.percent = percent
        if value is not None:
            self.values.append(value + 0.0)


class Percentile(Numbers):
    """The value below which a percentage (0 to 100) of the values lie, interpolated linearly; by default the median."""

    def finalize(self) -> float | None:
        if not 0 <= self.percent <= 100:
            raise ValueError
        place, fraction = divmod((len(self.values) - 1) * self.percent / 100, 1)
        around = sorted(self.values)[int(place):int(place) + 2]
        if not around:
            return None
        low, high = around[0], around[-1]
        if not fraction or low == high:
            return low
        return low * (1 - fraction) + high * fraction


class Stddev(Numbers):
    """The standard deviation of a sample, divided by n - 1; NULL for fewer than two, or for infinite, values."""

    def finalize(self) -> float | None:
        import statistics

        values = self.values
        return statistics.stdev(values) if len(values) > 1 and not any(value - value for value in values) else None


IMMUTABLE = "?immutable=1"  # how the URI of a file ends that is read as one that does not change


def uri_to_read(path: str) -> str:
    """Return the URI that opens the file at *path* without changing it; raise Failure if there is none.

    SQLite needs to create files beside one in WAL mode even to read it. Where it can't, and no
    writer is at work, the file can be read as one that does not change, if in the end it has not.
    """
    if not isfile(path):
        raise Failure("is a folder; name a file in it" if isdir(path) else "there is no such file")
    with open(path, "rb") as file:
        is_wal = file.read(19)[18:] == b"\2"
    may_write = os.access(path, os.W_OK) and os.access(dirname(path), os.W_OK)
    return file_uri(path) + (IMMUTABLE if is_wal and not may_write and not wal_size(path) else "?mode=ro")


def wal_size(path: str) -> int:
    try:
        return os.path.getsize(path + "-wal")
    except OSError:
        return 0


@contextlib.contextmanager
def reading(path: str, timeout: float = LOCK_TIMEOUT_S, guarded: bool = True) -> Iterator[Connection]:
    """Give a connection to the file at *path* that cannot write and leaves no files behind.

    Unless *guarded*, it may create other files, and its user waits for locks. Raises Failure.
    """
    uri = uri_to_read(path)
    before, had_wal = stamp(path), wal_size(path)
    try:
        with contextlib.closing(connect(uri)) as db:
            if guarded:
                begin_to_read(db, timeout)
                db.execute("PRAGMA query_only = ON")
                db.set_authorizer(authorize)
            yield db
            check_unchanged(path, uri, before)
    except DATABASE_ERRORS as error:
        SIGNALS.check()
        raise as_failure(error, path) from None
    finally:
        PROGRESS.clear()
        if exists(path + "-wal") and not had_wal and not uri.endswith(IMMUTABLE):
            remove_wal(path)


def begin_to_read(db: Connection, timeout: float) -> None:
    """Begin a transaction in which the file stays as it is now. With a rollback journal, it keeps the lock it needs."""
    db.execute("BEGIN")
    patiently(scalar, time.monotonic() + timeout, db, "SELECT count(*) FROM sqlite_master")


def stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def check_unchanged(path: str, uri: str, before: tuple[int, int]) -> None:
    """Raise Failure if the file was read as one that does not change, and has changed since its stamp *before*."""
    if uri.endswith(IMMUTABLE) and stamp(path) != before:
        raise Failure("changed while it was read; run this again", TRY_AGAIN)


def remove_wal(path: str) -> None:
    """Let SQLite remove the empty -wal and -shm files that a read-only connection had to make and may not remove."""
    try:
        with contextlib.closing(connect(file_uri(path) + "?mode=rw")) as db:
            scalar(db, "SELECT count(*) FROM sqlite_master")
    except DATABASE_ERRORS:
        pass  # a writer is at work, and will remove them; or the file has been renamed


@contextlib.contextmanager
def asking(db: Connection, sql: str, parameters: Mapping[str, Any] | Sequence[Any]) -> Iterator[Cursor]:
    """Give a cursor with the rows that answer a query; raise Failure if *sql* is not one query that works."""
    aggregates: Any = (("median", 1, Percentile), ("percentile", 2, Percentile), ("stddev", 1, Stddev))
    for aggregate in aggregates:
        db.create_aggregate(*aggregate)
    db.text_factory = str
    if sys.version_info >= (3, 11):
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_BYTES)  # one value of 1 GB is 20 GB, and no signal is heard
    try:
        with contextlib.closing(db.cursor()) as cursor:  # or the connection lives on, with its files
            cursor.execute(sql, parameters)
            if cursor.description is None:
                raise Failure("the SQL asks for nothing; write a SELECT")
            yield cursor
    except (*DATABASE_ERRORS, ValueError, OverflowError) as error:
        SIGNALS.check()
        failure = as_failure(error, "")
        db.text_factory = lenient_text
        raise failure if failure.status == TRY_AGAIN else Failure(why_unanswered(db, str(error))) from None


def why_unanswered(db: Connection, said: str) -> str:
    if "authoriz" in said or "prohibited" in said:
        return f"query only reads, and this SQL would do more ({said})"
    if "no such column" in said or "no such table" in said:
        names: list[str] = []
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
            with contextlib.suppress(sqlite3.OperationalError):  # a view of what is no longer there
                names += [name, *columns_of(db, name)]
        is_text = "; or, if it is text, write it in 'single quotes'" if "column" in said else ""
        return said + (nearest(said.rpartition(": ")[2].rpartition(".")[2], names) or is_text)
    if "no such function" in said:
        functions = {row[0] for row in db.execute("PRAGMA function_list")}
        return said + nearest(said.rpartition(": ")[2], functions)
    if "binding" in said.lower():
        return f"{said} (--param NAME=VALUE gives :NAME a value)"
    if "decode" in said:
        return f"{said}; it is not UTF-8: SELECT CAST(… AS BLOB) shows its bytes"
    if "too big" in said:
        return f"{said}: no value may have more than {VALUE_BYTES:,} bytes"
    if "finalize" in said or "step" in said:
        return "median, stddev and percentile take numbers, and percentile's second is from 0 to 100"
    return said


def query(database: str, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = (),
          timeout: float = LOCK_TIMEOUT_S) -> list[dict[str, Any]]:
    """Return the rows that answer one SQL question, as dictionaries; nothing can be written. Raises Failure."""
    with reading(realpath(database), timeout) as db, asking(db, sql, parameters) as cursor:
        names = distinct_names(names_of(cursor))
        return [dict(zip(names, row)) for row in cursor]


# ---------------------------------------------------------------------------------------------- output


def names_of(cursor: Cursor) -> list[str]:
    return [column[0] for column in cursor.description]


def distinct_names(names: Iterable[str]) -> list[str]:
    """Return *names*, with a number after each that stands there a second time."""
    found: list[str] = []
    for name in names:
        key, again = name, 0
        while key in found:
            again += 1
            key = f"{name}:{again}"
        found.append(key)
    return found


def batches_of(cursor: Cursor) -> Iterator[Batch]:
    count = 0
    PROGRESS.measure = lambda: (f"{count:,} rows", 0.0)
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        yield rows
        count += len(rows)
        PROGRESS.tick()


def printable(value: Any, null: str) -> Any:
    if value is None:
        return null
    return value.hex() if isinstance(value, bytes) else value


def delimited(delimiter: str, names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    """Yield the rows as the csv module prints them, with newlines between, most of them without its help.

    It looks at every character; formatting many rows with one `%` and counting separators tells as
    well whether any value needs quotes.
    """
    if header:
        yield quoted_rows([names], delimiter)
    line = delimiter.join(["%s"] * len(names)) + "\n"
    for rows in batches:
        values = tuple(itertools.chain.from_iterable(rows))
        text = line * len(rows) % values
        if "None" in text:
            text = line * len(rows) % tuple([null if value is None else value for value in values])
        is_plain = (len(names) > 1 and text.count(delimiter) == len(rows) * (len(names) - 1)
                    and text.count("\n") == len(rows) and not any(mark in text for mark in ('"', "\r", "b'")))
        yield text if is_plain else quoted_rows([[printable(value, null) for value in row] for row in rows], delimiter)


def quoted_rows(rows: Iterable[Iterable[Any]], delimiter: str) -> str:
    import csv

    class Lines:
        @staticmethod
        def write(line: str) -> str:
            return line[:-2] + "\n"

    # Before Python 3.13, csv quotes a lone carriage return only if it is part of the line's end.
    return "".join(map(csv.writer(Lines, delimiter=delimiter, lineterminator="\r\n").writerow, rows))


def json_objects(names: list[str], batches: Iterable[Batch]) -> Iterator[list[str]]:
    """Yield the rows, many at once, as JSON objects that insert reads; a BLOB is {"$hex": "…"}."""
    encode = json.JSONEncoder(ensure_ascii=False, default=blob_as_json).encode
    names = distinct_names(names)
    for rows in batches:
        yield [encode(dict(zip(names, row))) for row in rows]


def as_jsonl(names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    for objects in json_objects(names, batches):
        yield "\n".join([*objects, ""])


def as_json(names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    gap = "["
    for objects in json_objects(names, batches):
        yield gap + ",\n ".join(objects)
        gap = ",\n "
    yield "[]\n" if gap == "[" else "]\n"


def cell(value: Any, null: str) -> str:
    """Return a value as one line of text for people."""
    text = str(printable(value, null))
    return text if text.isprintable() else repr(text)[1:-1]


def number_columns(rows: Batch) -> list[bool]:
    return [any(isinstance(value, (int, float)) for value in column) for column in zip(*rows)]


def as_table(names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    """Yield lines for people: columns as wide as their first values, numbers to the right."""
    from unicodedata import combining, east_asian_width

    def width(text: str) -> int:
        return sum(1 + (east_asian_width(char) in "FW") for char in text if not combining(char))

    def aligned(text: str, size: int, is_number: bool) -> str:
        blank = " " * (size - width(text))
        return blank + text if is_number else text + blank

    heading = [[cell(name, null) for name in names]] if header else []
    widths: list[int] = []
    for rows in batches:
        lines = [[cell(value, null) for value in row] for row in rows]
        if not widths:
            numeric = number_columns(rows)
            widths = [max(map(width, column)) for column in zip(*heading, *lines)]
            rule = [["-" * size for size in widths]] if header else []
            lines = [*heading, *rule, *lines]
        for line in lines:
            yield "  ".join(map(aligned, line, widths, numeric)).rstrip() + "\n"
    if not widths and header:
        yield "  ".join(heading[0]) + "\n"


def as_markdown(names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    """Yield a table as GitHub and Pandoc read it, for an issue or a draft; numbers to the right."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def escaped(value: Any) -> str:
        text = str(printable(value, null)).replace("\\", "\\\\").replace("|", "\\|")
        return "<br>".join(text.splitlines())

    for rows in itertools.chain(batches, [()]):
        if header:
            marks = [":" if is_number else "-" for is_number in number_columns(rows) or [False] * len(names)]
            yield line(map(escaped, names)) + line(f"--{mark}" for mark in marks)
        header = False
        yield "".join([line(map(escaped, row)) for row in rows])


# How query prints: a new format is one line here, and one function.
FORMATS: dict[str, Callable[[list[str], Iterable[Batch], str, bool], Iterator[str]]] = {
    "csv": functools.partial(delimited, ","), "tsv": functools.partial(delimited, "\t"),
    "json": as_json, "jsonl": as_jsonl, "table": as_table, "markdown": as_markdown}


def write_out(texts: Iterable[str | bytes], target: str = "", like: str = "") -> None:
    """Write *texts* as UTF-8 to standard output, or to the file *target*, which appears when it is whole.

    It gets the rights of the file *like*, if one is named.
    """
    out: Any = None
    temporary = ""
    try:
        if not target:
            if sys.stdout is None:
                raise Failure("standard output is closed")
            out = sys.stdout.buffer
        elif exists(target) and not isfile(target):
            with SIGNALS:  # it may be a pipe that nobody reads yet
                out = open(target, "wb")
        else:
            temporary, out = new_temporary(realpath(target), file_mode(like) if like else 0o666)
        for text in texts:
            with SIGNALS:  # the reader may be slow
                write_all(out, text.encode(errors="surrogateescape") if isinstance(text, str) else text)
        with SIGNALS:
            out.flush()
        if temporary:
            if like:
                os.chmod(temporary, os.stat(like).st_mode)
            os.fsync(out.fileno())
            os.replace(temporary, realpath(target))
    except (OSError, Failure) as error:
        if out and not temporary:  # what is still in the buffer would fail or wait again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, OSError):
            error.filename = target or "standard output"
        raise
    finally:
        if temporary:
            out.close()
            unlink(temporary)


def is_database(path: str) -> bool:
    if not isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def output_path(target: str) -> str:
    """Return where *target* is; raise Failure if it can only be a folder, or is what SQLite keeps beside a database."""
    path = realpath(target)
    if target.endswith("/"):
        raise Failure(f"{target} is a folder; name a file in it")
    for suffix in ("-wal", "-shm", "-journal"):
        if path.endswith(suffix) and is_database(path.removesuffix(suffix)):
            raise Failure(f"{target} belongs to the database {path.removesuffix(suffix)}; name another file")
    return path


# ---------------------------------------------------------------------------------------- command line


class Options:
    """A command line: `words` are what are no flags, and `flags` have every value given."""

    def __init__(self, words: list[str], flags: dict[str, list[str]]) -> None:
        self.words, self.flags = words, flags
        self.name, self.others = (words or [""])[0], words[1:]
        self.path = realpath(self.name)  # always a plain file, whatever SQLite makes of the name
        self.conflict = self.last("--on-conflict", "fail")
        self.skip_text = "--skip-text" in flags
        self.timeout = self.seconds(self.last("--timeout", str(LOCK_TIMEOUT_S)))

    def last(self, flag: str, default: str = "") -> str:
        return self.flags.get(flag, [default])[-1]

    def schema(self) -> Schema:
        return read_schema(self.last("--schema"), self.last("--table"))

    def seconds(self, text: str) -> float:
        try:
            if finite(text) >= 0:
                return finite(text)
        except ValueError:
            pass
        raise Failure(f"--timeout takes seconds, not {shown(text)}", USAGE)

    def pairs(self, flag: str) -> dict[str, str]:
        """Return the values NAME=VALUE of *flag*, split."""
        return dict(text.split("=", 1) for text in self.flags.get(flag, []))

    def as_named(self, text: str) -> str:
        """Return *text* with the path of the database as the user wrote it, where that names the same place."""
        return text.replace(self.path, self.name) if abspath(self.name) == self.path else text


class Command:
    """What a word on the command line stands for: a function, whose docstring --help shows, the words that it takes,
    and its flags."""

    def __init__(self, function: Callable[[Options], int | None], words: str, flags: str) -> None:
        self.function, self.words, self.flags = function, words, ["--help", *flags.split()]


class Program:
    """A script with commands. `flags` says of each what it takes and does, by its name or by command and name."""

    def __init__(self, name: str, manual: str, commands: dict[str, Command], flags: dict[str, tuple[str, str]],
                 elsewhere: Mapping[str, str]) -> None:
        self.name, self.manual, self.commands, self.flags = name, manual, commands, flags
        self.elsewhere = elsewhere  # commands of other scripts

    def run(self, arguments: Sequence[str], if_misused: Callable[[Sequence[str]], None] | None = None) -> int:
        """Run a command line; report what goes wrong, and return the exit status.

        *if_misused* is called, in the end, with a command line that is wrong.
        """
        global program_name
        program_name = self.name
        PROGRESS.begin()
        where = f"{arguments[0]}: " if arguments and arguments[0] in self.commands else ""
        options: Options | None = None
        try:
            if arguments[:1] in (["-h"], ["--help"]):
                write_out([self.manual])
            elif arguments[:1] == ["--version"]:
                write_out([f"{self.name} {__version__}\n"])
            else:
                command, options = self.parse(arguments)
                where = f"{options.name}: " if options.name else where
                if "--help" not in options.flags:
                    return command.function(options) or 0
                write_out([self.command_help(arguments[0], options)])
        except BrokenPipeError:  # `query … | head`: the rest is not wanted
            pass
        except (Failure, OSError, MemoryError) as error:
            failure = as_failure(error, "")
            report(f"{where}{failure}")
            if if_misused and not options:
                if_misused(arguments)
            return failure.status
        return 0

    def flags_of(self, name: str) -> dict[str, tuple[str, str]]:
        """Return what each flag of a command takes and does."""
        return {flag: self.flags.get(f"{name} {flag}") or self.flags[flag] for flag in self.commands[name].flags}

    def parse(self, arguments: Sequence[str]) -> tuple[Command, Options]:
        """Return the command and what stands after it; raise Failure with status USAGE if they are wrong."""
        name = arguments[0] if arguments else ""
        if name not in self.commands:
            if name in self.elsewhere:
                other = self.elsewhere[name]
                line = " ".join([script(other), *map(for_shell, arguments)])
                raise Failure(f"{name} is a command of {other}.py; run: {line}", USAGE)
            raise Failure(f"{f'unknown command {name}' if name else 'no command'}{nearest(name, self.commands)};"
                          f" there are {', '.join(self.commands)} (see --help)", USAGE)
        known, takes_columns = self.flags_of(name), name == "insert_manual"
        takes_sql = "SQL" in self.commands[name].words
        words: list[str] = []
        flags: dict[str, list[str]] = {}
        left = iter(arguments[1:])
        for word in left:
            if word == "--":
                words += left
            elif word == "-" or word[:1] != "-" or (takes_sql and " " in word.partition("=")[0]):
                words.append(word)  # SQL may begin with a comment
            else:
                flag, value = self.flag(word, left, known, takes_columns)
                flags.setdefault(flag, []).append(value)
        if "--help" not in flags:
            self.check_words(name, words)
        return self.commands[name], Options(words, flags)

    def flag(self, word: str, left: Iterator[str], known: Mapping[str, tuple[str, str]],
             takes_columns: bool) -> tuple[str, str]:
        """Return a flag and its value, which stands in the same word or in the next."""
        flag, equals, value = word.partition("=")
        flag = "--help" if flag == "-h" else flag
        if flag not in known and not (takes_columns and flag[:2] == "--"):
            raise Failure(f"unknown flag {flag}{nearest(flag, known)}", USAGE)
        takes, _ = known.get(flag, ("VALUE", ""))
        given = value if equals else next(left, None) if takes else ""
        if given is None or (equals and not takes):
            raise Failure(f"{flag} takes {f'a value: {takes}' if takes else 'no value'}", USAGE)
        if ("|" in takes and given not in takes.split("|")) or ("=" in takes and "=" not in given[1:]):
            raise Failure(f"{flag} takes {takes}, not {shown(given)}", USAGE)
        return flag, given

    def check_words(self, name: str, words: list[str]) -> None:
        usage = self.commands[name].words
        if words[:1] == [""]:
            raise Failure("the DATABASE has no name", USAGE)
        needed = usage.count(" ") + 1
        if (len(words) < needed and usage[0] != "[") or (len(words) > needed and usage[-1] != "."):
            hint = f"see: {script(self.name)} {name} --help"
            if name == "insert" and words:
                hint = f"it reads standard input: < {for_shell(words[-1])}"
            raise Failure(f"takes {usage}, got {' '.join(map(shown, words)) or 'nothing'}; {hint}", USAGE)

    def command_help(self, name: str, options: Options) -> str:
        command = self.commands[name]
        rows = [(f"{flag} {takes}", does) for flag, (takes, does) in self.flags_of(name).items()]
        if name == "insert_manual":
            rows += column_flags(options.schema(), command.flags)
        width = max(len(left) for left, _ in rows if len(left) <= 40)
        lines = [f"  {left:{width}}  {right}".rstrip() for left, right in rows]
        usage = f"usage: {self.name}.py {name} {command.words} [FLAG]..."
        return "\n".join([usage, "", command.function.__doc__ or "", "", *lines, ""])


def column_flags(schema: Schema, known: Collection[str]) -> list[tuple[str, str]]:
    """Return the flags of insert_manual that are columns, and what they are."""
    said, rows = descriptions(schema), []
    for column in schema.columns:
        if not column.generated:
            flag = f"--column.{column.name}" if f"--{column.name}" in known else f"--{column.name}"
            kind = f"{column.type or 'anything'}{', needed' if column.needed else ''}"
            rows.append((f"{shown(flag) if ' ' in flag else flag} {kind}", said.get(column.name, "")))
    return rows


# What a flag takes and does; for one that differs between commands, after the command's name.
FLAGS = {
    "--help": ("", "print this"),
    "--schema": ("FILE", "what defines the columns (default: DBTOOL_SCHEMA, else schema.sql beside this script)"),
    "--table": ("NAME", "which table of the schema (default: DBTOOL_TABLE, else its only one)"),
    "--timeout": ("SECONDS", "how long to wait for a lock (default: 60)"),
    "--on-conflict": ("|".join(CONFLICT_RULES), "what to do if a row with the key is there (default: fail)"),
    "--skip-text": ("", "pass lines that are no JSON objects on to standard error"),
    "--param": ("NAME=VALUE", "the value of :NAME: a number if Python prints it that way, else text; may be repeated"),
    "--format": ("|".join(FORMATS), "how to print (default: csv)"),
    "--output": ("FILE", "write to FILE, which appears only when it is whole"),
    "--null": ("TEXT", "how to print NULL (default: nothing)"),
    "--no-header": ("", "leave out the line with the columns' names"),
    "schema --format": ("|".join(FORMATS), "how to print (default: table)"),
    "insert_manual --null": ("COLUMN", "give COLUMN the value NULL; may be repeated"),
}


# ------------------------------------------------------------------------------------------- commands


def insert_command(options: Options) -> None:
    """Store the JSON objects on standard input as rows, all of them or none."""
    source = StandardInput(sys.stdin, kept_places(options.path, options.skip_text), file_mode(options.path))
    try:
        source.read(options.skip_text)
        incoming = records(source.chunks(), options.skip_text)
        PROGRESS.measure = lambda: ("storing", source.done / (source.size or 1))
        store(options.path, options.schema(), incoming, options.conflict, options.timeout)
    except BaseException as error:
        kept = source.keep(error.receipts if isinstance(error, CommitFailed) else ())
        if not isinstance(error, (Failure, OSError, MemoryError)):
            report(kept.note)
            raise  # a bug
        failure = as_failure(error, options.path)
        said = f"{failure}; {kept.note}" if source.size else str(failure)
        if kept.path:
            said += f"; when that is fixed, run: {retry_line(options, kept.path)}"
            said += " --skip-text" if isinstance(error, TextRefused) else ""
        raise Failure(options.as_named(said), failure.status) from None
    source.discard()


def retry_line(options: Options, kept: str) -> str:
    """Return the command that stores what an insert kept in the file *kept*."""
    # Away from the database, retry looks in the folder for temporary files, which may be another one by then.
    where = "" if dirname(kept) == options.path + KEPT else f"TMPDIR={for_shell(dirname(kept))} "
    given = []
    for flag, variable in (("--schema", "DBTOOL_SCHEMA"), ("--table", "DBTOOL_TABLE"), ("--on-conflict", "")):
        if value := options.last(flag) or os.environ.get(variable):
            given += [flag, value]
    words = [*given, "--", options.name] if options.name.startswith("-") else [options.name, *given]
    return " ".join([f"{where}{script()} retry", *map(for_shell, words)])


def insert_manual_command(options: Options) -> None:
    """Store one row, each column given as a flag."""
    schema, known = options.schema(), COMMANDS["insert_manual"].flags
    record: dict[str, Any] = {}
    given = [(flag[2:], text) for flag, texts in options.flags.items() if flag not in known for text in texts]
    for flag, text in [*given, *((name, None) for name in options.flags.get("--null", []))]:
        column = flag_column(schema, flag)
        if column.name in record:
            raise Failure(f"column {column.name} is given twice", USAGE)
        record[column.name] = fit(column, None) if text is None else fit_text(column, text)
    try:
        check_names(schema, record)
    except RecordRefused as refusal:
        raise Failure(str(refusal), USAGE) from None
    store(options.path, schema, [record], options.conflict, options.timeout)


def flag_column(schema: Schema, flag: str) -> Column:
    """Return the column that a flag names: itself, or with hyphens for underscores, or after `column.`."""
    hyphened = {name.replace("_", "-"): column for name, column in schema.by_name.items()}
    for name in (flag, flag.removeprefix("column.")):
        column = schema.by_name.get(name) or hyphened.get(name.replace("_", "-"))
        if column:
            return column
    raise Failure(no_column(schema, flag), USAGE, f"; see {schema.path}")


def query_command(options: Options) -> None:
    """Print the answer to an SQL question as CSV; - reads the SQL from standard input."""
    sql, output = options.words[1], options.last("--output")
    if output and is_database(output_path(output)):
        raise Failure(f"{output} is a database; name another file for the output")
    PROGRESS.measure = lambda: ("no row yet", 0.0)
    if not output and not is_file(sys.stdout):
        PROGRESS.next = float("inf")  # the rows may go to the same terminal
    if sql == "-":
        if sys.stdin is None:
            raise Failure("standard input, which should hold the SQL, is closed")
        with SIGNALS:
            sql = sys.stdin.buffer.read().decode(errors="replace")
    parameters = {name: number_or_text(value) for name, value in options.pairs("--param").items()}
    formatted = FORMATS[options.last("--format", "csv")]
    with reading(options.path, options.timeout) as db, asking(db, sql, parameters) as cursor:
        write_out(formatted(names_of(cursor), batches_of(cursor), options.last("--null"),
                            "--no-header" not in options.flags), output)


def is_file(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # it is in memory
        return False


def number_or_text(text: str) -> int | float | str:
    """Return a number if Python prints that number as *text*, else *text*."""
    for kind in (int, finite):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            pass
    return text


def retry_command(options: Options) -> int:
    """Store what insert had to keep aside; leave what still can't be stored, and say why."""
    schema = options.schema()
    files, failures = kept_files(options.path)
    if not files and not failures and not exists(options.path):
        raise Failure("there is no such file, and nothing is kept for it")
    for failure in failures:
        report(f"{options.name}: {options.as_named(str(failure))}")
    status = REFUSED if failures else 0
    for path in files:
        SIGNALS.check()
        try:
            retry_one(options, schema, path)
        except (Failure, OSError) as error:
            failure = as_failure(error, options.path)
            status = max(status, failure.status)
            report(f"{options.name}: {options.as_named(path)}: {failure}")
            if status >= TRY_AGAIN:  # the other files would fare no better
                break
    return status


def retry_one(options: Options, schema: Schema, path: str) -> None:
    """Store one kept file exactly once, whatever becomes of this process or of another that retries it too."""
    try:
        with open_kept(path) as file:
            skip_text = options.skip_text or path.endswith(SKIP_TEXT_SUFFIX)
            rows = fitted(schema, records(pieces(file), skip_text))
            first = [*itertools.islice(rows, 1)]  # before the lock is taken, since the record may be bad
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            receipt, receipts = None, []
            try:
                with writing(options.path, schema, options.timeout) as db:
                    receipts = read_receipts(path, schema)
                    if exists(path):
                        receipt = insert_records(db, schema, itertools.chain(first, rows), options.conflict, receipts)
                        if receipt:
                            write_receipts(path, [*receipts, receipt], mode)
            except Failure as failure:
                if receipt and not isinstance(failure, CommitFailed):  # it did not happen, which leaves no doubt
                    write_receipts(path, receipts, mode)
                raise
    except CannotTell as doubt:
        sql, kept = for_shell(f"SELECT * FROM {quote(schema.table)}"), for_shell(options.as_named(path))
        raise Failure(f"{doubt}; look: {script()} query {for_shell(options.name)} {sql} --format table; if they are"
                      f" there, run: rm {kept} {kept}{RECEIPT}; if not: rm {kept}{RECEIPT} and retry again") from None
    except FileNotFoundError:  # another retry has stored it, or one that was stopped between the two removals
        if is_arriving(path):
            return
    remove(path)
    remove(path + RECEIPT)
    with contextlib.suppress(OSError):
        for name in os.listdir(dirname(path)):  # what is left of a receipt that was being written
            if name.startswith(f".{basename(path)}{RECEIPT}."):
                remove(join(dirname(path), name))


def is_arriving(path: str) -> bool:
    """Tell whether an insert is keeping its input at *path*: its receipt is there first."""
    folder, name = os.path.split(path)
    with contextlib.suppress(FileNotFoundError):  # the other retry has removed the folder, too
        return any(other == name or other.startswith(f".{name}.") for other in os.listdir(folder))
    return False


def schema_command(options: Options) -> None:
    """Print the columns: type, whether needed, default, description; with a DATABASE also what differs there."""
    schema = options.schema()
    said = descriptions(schema)
    names = ["column", "type", "needed", "default", "description"]
    rows = [[column.name, column.type, "generated" if column.generated else "yes" if column.needed else "no",
             " ".join((column.default or "").split()), said.get(column.name, "")] for column in schema.columns]
    if options.name:
        names.append("file")
        with reading(options.path, options.timeout) as db:
            found = columns_of(db, schema.table)
        for row, column in zip(rows, schema.columns):
            there = found.pop(column.name).in_words() if column.name in found else "missing"
            row.append("same" if there == column.in_words() else there)
        for name, column in found.items():
            rows.append([name, "", "", "", "", f"only there: {column.in_words()}"])
    write_out(FORMATS[options.last("--format", "table")](names, [rows], "", True))


COMMANDS = {
    "insert": Command(insert_command, "DATABASE", "--schema --table --timeout --on-conflict --skip-text"),
    "insert_manual": Command(insert_manual_command, "DATABASE", "--schema --table --timeout --null --on-conflict"),
    "query": Command(query_command, "DATABASE SQL|-", "--timeout --param --format --output --null --no-header"),
    "retry": Command(retry_command, "DATABASE", "--schema --table --timeout --skip-text --on-conflict"),
    "schema": Command(schema_command, "[DATABASE]", "--schema --table --timeout --format"),
}
ELSEWHERE = dict.fromkeys(("merge", "snapshot", "migrate"), "dbadmin")
PROGRAM = Program("dbtool", __doc__ or "", COMMANDS, FLAGS, ELSEWHERE)


def keep_unread(arguments: Sequence[str]) -> None:
    """Keep what insert would have read, had its command line been right."""
    if "insert" not in arguments and closest((arguments or [""])[0], COMMANDS) != "insert":
        return
    source = StandardInput(sys.stdin, kept_places(""))
    if sys.stdin and not source.is_file and not sys.stdin.isatty():
        kept = source.keep()
        if source.size:
            again = f"; run: {script()} insert DATABASE < {for_shell(kept.path)}" if kept.path else ""
            report(kept.note + again)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv*, by default that of this process; return the exit status."""
    return PROGRAM.run(list(sys.argv[1:] if argv is None else argv), if_misused=keep_unread)


if __name__ == "__main__":
    # All is written and closed. Taking Python down would cost a tenth of an insert's time, and a signal
    # that came meanwhile would give an exit status that is not true.
    os._exit(main())

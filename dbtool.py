#!/usr/bin/env python3
"""dbtool: keep the results of many runs in one SQLite file, and ask it questions.

    python3 mlp.py | python3 dbtool.py insert results.db
    python3 dbtool.py query results.db "SELECT layers, min(rmse_global) FROM results GROUP BY layers"

Commands (each has its own --help):

    insert         store the JSON objects on standard input as rows
    insert_manual  store one row, each column given as a flag
    query          print the answer to an SQL question as CSV
    retry          store what insert had to keep aside
    merge          add the rows of other files that this one does not have
    snapshot       make a consistent copy while others write
    migrate        bring a file to the columns of schema.sql
    schema         print the columns, and how a file differs

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
import stat
import sys
import time
from os.path import abspath, basename, dirname, exists, isdir, isfile, join, realpath

TYPE_CHECKING = False  # what `typing` calls it; importing typing would cost a tenth of an insert's time
if TYPE_CHECKING:
    import signal
    import sqlite3
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from operator import itemgetter
    from sqlite3 import Connection, Cursor
    from types import FrameType
    from typing import Any, Optional, TextIO, TypeVar

    Result = TypeVar("Result")
    Converter = Optional[Callable[[Any], Any]]
    Plan = tuple[tuple[str, ...], list[tuple[int, Callable[[Any], Any]]]]  # keys, and the places of values to convert
    Made = tuple[str, str, str]  # of a CREATE statement: type, name, SQL
    Batch = Sequence[Sequence[Any]]  # some rows
    Claim = list[dict[str, Any]]  # rows that show whether a transaction happened
else:
    # The C halves: `signal` adds enums, and `sqlite3` dates, that nothing here needs; they would double the imports.
    import _signal as signal

    if __name__ == "__main__":  # until there is a handler
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

    import _sqlite3 as sqlite3
    from _operator import itemgetter

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

    claim: Any = None  # set when COMMIT itself failed: the rows that show whether it did happen

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.status = status


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
            self.open = False
            raise Failure(f"stopped by {STOPPING[self.caught]}", SIGNALLED + self.caught)

    def pending(self) -> int:
        """Tell SQLite whether to stop; a callback for sqlite3_progress_handler."""
        for _ in range(2):  # PyPy runs signal handlers only where a loop goes round
            pass
        PROGRESS.tick()
        return self.caught

    def __enter__(self) -> None:
        self.open = True
        self.check()

    def __exit__(self, *_: object) -> None:
        self.open = False


SIGNALS = Signals()
if __name__ == "__main__":
    SIGNALS.install()  # now: without a handler, a signal would end the program with the input still in the pipe
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def report(message: str) -> None:
    PROGRESS.clear()
    if message:
        complain(f"dbtool: {' '.join(message.splitlines())}\n")


def complain(text: str) -> None:
    """Write to standard error, if there is any: a message that can't be shown must not stop the work."""
    try:
        if sys.stderr:
            sys.stderr.write(text)
            sys.stderr.flush()
    except OSError:
        pass


class Progress:
    """A line on a terminal that tells how far long work has got. Elsewhere, and in the first second, nothing."""

    # What SQLite's work shows: a text, and the share that is done.
    measure: Callable[[], tuple[str, float]] | None = None
    shown = False
    start, next = 0.0, float("inf")

    def begin(self) -> None:
        """Count from now. What only imports this module has its terminal to itself."""
        self.start = time.monotonic()
        self.next = self.start + 1.0 if sys.stderr and sys.stderr.isatty() else float("inf")

    def show(self, text: str, share: float = 0.0) -> None:
        """Show *text* and, if the *share* that is done is known, percent and time left."""
        now = time.monotonic()
        if now >= self.next:
            self.next, self.shown = now + 0.2, True
            share = min(share, 0.99)
            seconds = int((now - self.start) * (1 / share - 1 if share else 1))
            ending = f"{share:.0%}, {seconds // 60}:{seconds % 60:02} left" if share else f"{seconds} s"
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
    """The results table of a schema.sql: its name, columns, and every CREATE statement of the file."""

    def __init__(self, path: str, table: str, by_name: dict[str, Column], made: list[Made]) -> None:
        self.path, self.table, self.by_name = path, table, by_name
        self.made = made  # (type, name, CREATE statement) in the file's order
        self.columns = list(by_name.values())
        self.key = [column for column in self.columns if column.key]


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


def for_shell(word: str) -> str:
    """Quote a word for the shell: as shlex does, which could not be imported if no more files can be opened."""
    is_plain = word.isascii() and all(char.isalnum() or char in "@%+=:,./_-" for char in word)
    return word if is_plain else "'" + word.replace("'", "'\\''") + "'"


def columns_of(db: Connection, table: str) -> dict[str, Column]:
    """Return the columns of *table* by their names, none if there is no such table."""
    rows = db.execute(f"PRAGMA main.table_xinfo({quote(table)})").fetchall()
    indexes = db.execute(f"PRAGMA main.index_list({quote(table)})").fetchall()
    # An INTEGER PRIMARY KEY needs no index of its own, as it is the rowid.
    rowid_alias = "pk" not in [index[3] for index in indexes]
    return {row[1]: Column(row, rowid_alias) for row in rows}


MADE = ("SELECT type, name, sql FROM sqlite_master"
        " WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid")


def read_schema(path: str | None = None, table: str | None = None) -> Schema:
    """Read the columns from an SQL file by running it in memory.

    *path* defaults to DBTOOL_SCHEMA, else to schema.sql beside this script; *table* to DBTOOL_TABLE,
    else to the file's only table. Raises Failure.
    """
    path = path or os.environ.get("DBTOOL_SCHEMA") or join(dirname(realpath(__file__)), "schema.sql")
    db = sqlite3.connect(":memory:")
    try:
        with SIGNALS, open(path, encoding="utf-8") as file:
            db.executescript(file.read())
        made = db.execute(MADE).fetchall()
        tables = [name for kind, name, _ in made if kind == "table"]
        if not tables:
            raise Failure(f"{path}: has no CREATE TABLE")
        table = table or os.environ.get("DBTOOL_TABLE") or (tables[0] if len(tables) == 1 else "")
        if table not in tables:
            raise Failure(f"{path}: has tables {', '.join(tables)}{f', and no {table}' if table else ''}; name one of"
                          " them with --table")
        return Schema(path, table, columns_of(db, table), made)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; name the schema with --schema FILE or DBTOOL_SCHEMA") from None
    except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError) as error:
        raise Failure(f"{path}: {error}") from None
    finally:
        db.close()


def tokens(sql: str) -> list[str]:
    """Return the words, names, texts, marks and comments of SQL, and a newline where there is one between them."""
    import re

    return re.findall(r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*\]|\w+|\n|\S""", sql, re.S)


def unquoted(token: str) -> str:
    return token[1:-1].replace('""', '"') if token[0] in '"`[' else token


def essence(sql: str) -> list[str]:
    """Return what SQL says without comments, white space and the quotes of names."""
    return [unquoted(token) for token in tokens(sql) if not token.startswith(("--", "/*", "\n"))]


def descriptions(schema: Schema) -> dict[str, str]:
    """Return what the comments in schema.sql say of each column: the `--` that ends its definition."""
    (sql,) = (sql for kind, name, sql in schema.made if kind == "table" and name == schema.table)
    found: dict[str, str] = {}
    depth, column, before = 0, "", "\n"
    is_name = False  # whether the next word is a column's name
    for token in tokens(sql):
        if token in "(,)":
            depth += {"(": 1, ")": -1, ",": 0}[token]
            is_name = depth == 1 and token != ")"
        elif token.startswith("--"):
            if before != "\n":
                found.setdefault(column, token[2:].strip())
        elif is_name and not token.startswith(("\n", "/*")):
            column, is_name = unquoted(token), False
        before = token
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


def json_text(value: Any) -> str:
    """Return compact JSON text that SQLite's JSON functions can read: NaN and Infinity become null."""
    import json

    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    text = encode(value)
    if "NaN" in text or "Infinity" in text:
        text = encode(json.loads(text, parse_constant=lambda name: None))
    return text


def structure(value: Any) -> str | bytes:
    """Return an object or array as JSON text, and {"$hex": "…"}, which query prints for a BLOB, as that BLOB."""
    if type(value) is dict and list(value) == ["$hex"] and type(value["$hex"]) is str:
        return bytes.fromhex(value["$hex"])
    return json_text(value)


# What becomes of a JSON value of each type in a column of each affinity: None stores it as it is, a
# function converts it or raises ValueError, and a type that is missing is refused.
ANYTHING: dict[type, Converter] = {
    int: None, float: no_nan, bool: int, str: None, dict: structure, list: structure, bytes: None}
FITS: dict[str, dict[type, Converter]] = {
    "INTEGER": {int: None, float: whole, bool: int},
    "REAL": {int: exact, float: no_nan},
    "TEXT": {str: None, dict: structure, list: structure, bytes: None},
    "NUMERIC": ANYTHING,
    "BLOB": ANYTHING,
}
# NaN is how Python prints a run that diverged; SQLite has NULL for it, and makes that of it by itself.
FITS_NULLABLE: dict[Converter, Converter] = {no_nan: None, whole: whole_or_nan}
WANTED = {"INTEGER": "a 64-bit integer", "REAL": "a number that a 64-bit float holds", "TEXT": "a string",
          "NUMERIC": "a 64-bit integer or float, text, an object or an array",
          "BLOB": "a 64-bit integer or float, text, an object or an array"}


UNFIT = (ValueError, OverflowError, RecursionError, TypeError)  # how a conversion says that a value does not fit


def converter(column: Column, kind: type) -> Converter:
    """Return how a value of type *kind* is stored in *column*, as in FITS; raise ValueError if it is refused."""
    fits = FITS[column.affinity]
    if kind is type(None) and column.nullable:
        return None
    for base in (bool,) if kind is bool else kind.__mro__:  # NumPy's float64, for one, is a float
        if base in fits:
            convert = fits[base]
            return FITS_NULLABLE.get(convert, convert) if column.nullable else convert
    raise ValueError


def fit(column: Column, value: Any) -> Any:
    """Return *value*, as it came from JSON, as SQLite should store it in *column*; raise Misfit if it does not fit."""
    try:
        convert = converter(column, type(value))
        stored = convert(value) if convert else value
        if isinstance(stored, int) and not -(1 << 63) <= stored < 1 << 63:
            raise ValueError
        if isinstance(stored, str):
            stored.encode()  # half of a surrogate pair is no text
        return stored
    except UNFIT as error:
        wanted = WANTED[column.affinity] + (" or null" if column.nullable else "")
        why = (", which has half of a surrogate pair, or a byte that is not UTF-8"
               if isinstance(error, UnicodeEncodeError) else
               ", which SQLite makes NULL" if isinstance(value, float) and value != value else "")
        raise Misfit(f"column {column.name}: expected {wanted}, got {shown(value)}{why}") from None


def fit_text(column: Column, text: str) -> Any:
    """Return *text*, typed by a person, as SQLite should store it in *column*; raise Misfit if it does not fit."""
    import json

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
    import json

    try:
        text = json.dumps(value, default=repr)
    except (ValueError, RecursionError, TypeError):
        return f"one that can't be shown ({type(value).__name__})"
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
    try:
        from _json import make_scanner
    except ImportError:
        import json

        decoder: Any = json.JSONDecoder(parse_float=finite, object_pairs_hook=distinct)
        return decoder.scan_once
    settings = {"strict": True, "parse_float": finite, "parse_int": int, "parse_constant": float,
                "object_hook": None, "object_pairs_hook": distinct}
    return make_scanner(type("Settings", (), settings))  # type: ignore[arg-type]


SCAN = scanner()
WHITESPACE = " \t\r\n"
LOOK_AHEAD = 256  # characters within which an array shows that it is one, and not a line of text
TAIL = 16  # an error this close to the end of the text may only mean that more is to come
# What may come next: at the top level, after "[", after an element, after ",".
TOP, FIRST, NEXT, ELEMENT = "{[", "{]", ",]", "{"


class Text:
    """JSON text that comes in pieces: what is unread of it, and where that stands in the whole."""

    def __init__(self, chunks: Iterable[bytes], skip_text: bool) -> None:
        self.incoming, self.skip_text = iter(chunks), skip_text
        # A byte that is not UTF-8 becomes half of a surrogate pair, which no record may hold, but a line of text may.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape" if skip_text else "strict")
        self.text, self.position, self.line, self.count = "", 0, 1, 0
        self.broken, self.ended, self.starts_line = "", False, True

    def more(self) -> bool:
        """Add as much text as is unread, so that a long record is scanned only a few times; False if it has ended."""
        if self.ended:
            return False
        start = self.text.rfind("\n", 0, self.position) + 1 if self.starts_line else self.position  # with its indent
        self.line += self.text.count("\n", 0, start)
        parts = [self.text[start:]]
        wanted = len(parts[0])
        while wanted >= 0 and not self.ended:
            chunk = next(self.incoming, None)
            self.ended = chunk is None
            try:
                parts.append(self.decoder.decode(chunk or b"", self.ended))
            except UnicodeDecodeError as error:
                parts.append(error.object[:error.start].decode())
                self.broken, self.ended = f"byte 0x{error.object[error.start]:02x} is not UTF-8", True
            wanted -= len(parts[-1])
        self.text, self.position = "".join(parts), self.position - start
        if self.skip_text:
            self.text = self.text.replace("\r\n", "\n").replace("\r", "\n")
        return True

    def next(self) -> str:
        """Go on to the next character that is no white space; return it, or nothing at the end."""
        while True:
            while self.position < len(self.text):
                char = self.text[self.position]
                if char not in WHITESPACE:
                    return char
                self.starts_line = self.starts_line or char == "\n"
                self.position += 1
            if not self.more():
                return ""

    def record(self) -> dict[str, Any]:
        """Read the object that begins here."""
        record: dict[str, Any]
        while True:
            try:
                record, self.position = SCAN(self.text, self.position)
                self.count += 1
                return record
            except SystemError:  # before Python 3.12, the C half raises no error until this is imported
                __import__("json.decoder")
            except (ValueError, StopIteration, RecursionError) as error:
                self.extend(*what_is_wrong(error, self.text, self.position))

    def extend(self, why: str, at: int) -> None:
        """Read on, if the object may just not have ended yet; otherwise raise *why* it does not parse *at* a place."""
        is_endless = why.startswith("unterminated string")
        is_near_end = is_endless or at >= len(self.text) - TAIL
        if is_near_end and self.more():
            return
        if is_near_end and self.broken:
            raise self.malformed(self.broken, len(self.text)) from None
        if is_endless or at >= len(self.text.rstrip()):
            why = "it ends in the middle; was the program before the pipe cut off?"
        raise self.malformed(f"not valid JSON: {why}", at) from None

    def begins_record(self) -> bool:
        """Tell whether an object, or an array of objects, begins here, and not a line of text."""
        if self.text[self.position] != "[":
            return self.text[self.position] in "{\ufeff"
        while True:
            ahead = self.text[self.position:self.position + LOOK_AHEAD]
            start = "".join(ahead.split())[:3]
            if len(start) == 3 or len(ahead) == LOOK_AHEAD or not self.more():
                return start in ('[{"', "[{}")

    def rest_of_line(self) -> str:
        while (end := self.text.find("\n", self.position)) < 0 and self.more():
            pass
        start = self.text.rfind("\n", 0, self.position) + 1
        self.position = len(self.text) if end < 0 else end
        return self.text[start:self.position] + "\n"

    def unexpected(self, char: str) -> Failure:
        if char == "\ufeff" and not self.count:
            return self.malformed("begins with a byte order mark; write UTF-8 without one")
        hint = "; insert --skip-text passes over lines of text" if char.isalpha() and not self.skip_text else ""
        return self.malformed(f"expected a JSON object, got {shown(self.text[self.position:self.position + 20])}{hint}")

    def malformed(self, why: str, at: int | None = None) -> Failure:
        line = self.line + self.text.count("\n", 0, self.position if at is None else at)
        return Failure(f"record {self.count + 1} (line {line}): {why}")


def records(chunks: Iterable[bytes], skip_text: bool = False,
            echo: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in *chunks* of UTF-8: one, many one after another, or an array.

    Memory is bounded by the longest record. With *skip_text*, lines that do not begin like an object,
    or an array of them, go to *echo*. Raises Failure, which names the record's number and line.
    """
    text = Text(chunks, skip_text)
    allowed, is_empty, skipped = TOP, True, False
    while char := text.next():
        if skip_text and text.starts_line and allowed is TOP and not text.begins_record():
            line, skipped = text.rest_of_line(), True
            if echo:
                echo(line)
            continue
        if char not in allowed:
            raise text.unexpected(char)
        if char == "{":
            yield text.record()
            allowed = TOP if allowed is TOP else NEXT
        else:
            text.position += 1
            allowed = {"[": FIRST, ",": ELEMENT, "]": TOP}[char]
        is_empty = text.starts_line = False
    if text.broken:
        raise text.malformed(text.broken)
    if is_empty:
        raise Failure("no JSON object on standard input, only text" if skipped else
                      "no JSON on standard input: did the program before the pipe fail?")
    if allowed is not TOP:
        raise text.malformed("not valid JSON: the array does not end; was the program before the pipe cut off?")


def what_is_wrong(error: Any, text: str, position: int) -> tuple[str, int]:
    """Return why the JSON in *text* at *position* does not parse, and where."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply", position
    if isinstance(error, StopIteration):
        why, at = "expecting value", error.value
    elif hasattr(error, "pos"):  # a JSONDecodeError
        why, at = error.msg.lower(), error.pos
    else:  # of this program, or Python's own limit on the digits of an integer
        said = str(error)
        return said if said.startswith("the ") else "an integer of thousands of digits", position
    return f"{why} near {shown(text[at:at + 20])}", at


# -------------------------------------------------------------------------------------------- database

# What SQLite says, the exit status, and what to tell the user.
MEANINGS: dict[str, tuple[int, str]] = {
    "database or disk is full": (TRY_AGAIN, "the disk is full; mend that and try again"),
    "disk I/O error": (TRY_AGAIN, "disk I/O error; mend that and try again"),
    "attempt to write a readonly database": (
        REFUSED, "may not be written, not even to roll back what a writer left unfinished; mend its permissions or"
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
        import errno

        status = TRY_AGAIN if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else REFUSED
        return Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), status)
    if isinstance(error, MemoryError):
        return Failure("there is not enough memory for that", TRY_AGAIN)
    said = str(error)
    if is_busy(error):
        return Failure("locked by another process; try again, or wait longer with --timeout", TRY_AGAIN)
    if "unable to open" in said or "Could not open" in said:  # the latter is PyPy's
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
    import errno

    try:
        part, file = new_part(path)
        file.close()
        os.unlink(part)
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


def scalar(db: Connection, sql: str, parameters: Sequence[Any] = ()) -> Any:
    """Return the first value of the first row."""
    return db.execute(sql, parameters).fetchall()[0][0]  # all of them: PyPy would leave the statement open


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


def begin_to_write(db: Connection, path: str, schema: Schema | None, deadline: float) -> None:
    """Begin a transaction that holds the write lock on the results file at *path*, made if it is empty.

    Without a *schema*, the file is taken as it is.
    """
    network = switch_journal(db, path, schema, deadline) if schema else ""
    patiently(db.execute, deadline, "PRAGMA synchronous = FULL")
    patiently(db.execute, deadline, "BEGIN IMMEDIATE")
    if schema and is_empty(db, schema):
        make(db, schema.made)
    if network:
        report(f"{path}: is on {network}, a network file system, so it has a DELETE journal instead of WAL;"
               " let only one host write to it at a time (DBTOOL_JOURNAL=wal|delete overrides)")


def make(db: Connection, wanted: Iterable[Made]) -> None:
    for kind, name, sql in wanted:
        if not scalar(db, "SELECT count(*) FROM sqlite_master WHERE type = ? AND name = ?", (kind, name)):
            db.execute(sql)  # else it came with a virtual table


def switch_journal(db: Connection, path: str, schema: Schema, deadline: float) -> str:
    """Give a file its journal; return the file system that is the reason, if this is the first time."""
    journal, network = wanted_journal(path)
    before = patiently(scalar, deadline, db, "PRAGMA journal_mode")
    if before == journal and not network:
        return ""
    is_new = patiently(is_empty, deadline, db, schema)  # another program's file is left as it is
    try:
        is_wal = journal == "wal"
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
    check_columns(columns_of(db, schema.table), schema)
    return False


def check_columns(found: Mapping[str, Column], schema: Schema) -> None:
    """Raise Failure if rows made for *schema* do not fit a table with the columns *found*."""
    if not found:
        raise Failure(f"has no table {schema.table}; is it another program's file? (migrate would add the table)")
    check_case(found, schema.by_name, schema)
    mend = f"python3 dbtool.py migrate DATABASE --schema {for_shell(schema.path)}"
    lacking = ", ".join(name for name in schema.by_name if name not in found)
    if lacking:
        raise Failure(f"has no column {lacking}; add it with: {mend}")
    check_types(found, schema, f"change the file with: {mend}")
    for name, column in found.items():
        if name not in schema.by_name and column.needed and not column.nullable:
            raise Failure(f"needs column {name}, which {schema.path} lacks;"
                          " add it there, or drop it with:"
                          f" python3 dbtool.py migrate DATABASE --drop {for_shell(name)}")


# By a column's affinity: those whose values it stores as they are, or as an equal number.
NUMBERS = ("INTEGER", "REAL", "NUMERIC")
KEEPS: dict[str, Collection[str]] = {"INTEGER": NUMBERS, "NUMERIC": NUMBERS, "REAL": ["REAL"], "TEXT": ["TEXT"],
                                     "BLOB": FITS}


def check_types(found: Mapping[str, Column], schema: Schema, mend: str, is_source: bool = False) -> None:
    """Raise Failure if a column *found* would change the values that the schema's takes.

    Of a source to merge, it is the other way round, and its numbers are as the schema there let them be.
    """
    for name, column in found.items():
        wanted = schema.by_name.get(name, column)
        into, taken = (wanted, column) if is_source else (column, wanted)
        keeps = [into.affinity] if is_source and into.affinity == "INTEGER" else KEEPS[into.affinity]
        if taken.affinity not in keeps:
            raise Failure(f"column {name} is {column.type or 'of no type'}, but {wanted.type or 'of no type'} in"
                          f" {schema.path}; write there what it is, or {mend}")


def check_case(names: Iterable[str], wanted: Iterable[str], schema: Schema) -> None:
    """Raise Failure if one of the *names* in a file is *wanted* in other upper or lower case by the schema."""
    folded = {name.encode().lower(): name for name in wanted}  # bytes, as SQLite folds ASCII only
    for name in names:
        meant = folded.get(name.encode().lower(), name)
        if meant != name:
            raise Failure(f"{name} is {meant} in {schema.path}; for SQLite these are the same, so write {name} there")


def writing(path: str, schema: Schema | None, action: Callable[[Connection], Result], timeout: float) -> Result:
    """Return action(db), with a connection to the file at *path* in one transaction, which is then committed.

    Raises Failure; if COMMIT failed, its `claim` is what *action* returned: it may come to light all the same.
    """
    deadline = time.monotonic() + timeout
    claim: Any = None
    try:
        db = sqlite3.connect(file_uri(path) + "?mode=rwc", uri=True, timeout=0, isolation_level=None)
        try:
            db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
            begin_to_write(db, path, schema, deadline)
            result = claim = action(db)
            db.set_progress_handler(None, 0)  # from here on, a signal comes too late
            patiently(db.execute, deadline, "COMMIT")
            return result
        finally:
            PROGRESS.clear()
            db.close()  # without COMMIT, this rolls back
    except sqlite3.Error as error:
        if claim is None:  # it was not COMMIT that failed
            SIGNALS.check()
        failure = as_failure(error, path)
        failure.claim = claim
        raise failure from None


def conflict_clause(db: Connection, table: str, on_conflict: str) -> str:
    """Return what stands after INSERT so that no constraint of the table drops or replaces rows by itself."""
    if on_conflict == "replace":
        return " OR REPLACE"
    sql = scalar(db, "SELECT coalesce(max(sql), '') FROM sqlite_master WHERE type = 'table'"
                 " AND name = ? COLLATE NOCASE", [table])
    # Only where it is needed, as OR ABORT overrules also what triggers say.
    words = " ".join(essence(sql)).upper() if "CONFLICT" in sql.upper() else ""
    return " OR ABORT" * ("ON CONFLICT IGNORE" in words or "ON CONFLICT REPLACE" in words)


def check_names(schema: Schema, names: Collection[str]) -> None:
    """Raise Misfit unless *names* are columns that may be given and all that must be."""
    for name in names:
        if name not in schema.by_name:
            raise Misfit(no_column(schema, name))
        if schema.by_name[name].generated:
            raise Misfit(f"column {name} is generated by SQLite; leave it out")
    missing = ", ".join(column.name for column in schema.columns if column.needed and column.name not in names)
    if missing:
        raise Misfit(f"column {missing} missing, and {basename(schema.path)} gives no default")


def no_column(schema: Schema, name: str) -> str:
    return f"{shown(name)} is no column of {schema.table}{nearest(str(name), schema.by_name)}"


def nearest(name: str, names: Iterable[str]) -> str:
    import difflib

    folded = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), folded, 1)
    return f"; did you mean {shown(folded[close[0]])}?" if close else ""


# How SQLite says that a value does not fit.
UNSTORED = (UnicodeEncodeError, OverflowError, sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)


class Rows:
    """Records made ready for the table: `pairs` yields (names, row), and `number` says which record that is."""

    def __init__(self, schema: Schema, incoming: Iterable[Mapping[str, Any]], on_conflict: str) -> None:
        if on_conflict not in ("fail", "skip", "replace"):
            raise ValueError(f"on_conflict is {on_conflict!r}; it takes fail, skip or replace")
        self.schema, self.incoming, self.on_conflict = schema, incoming, on_conflict
        self.number = 0
        self.record: Mapping[str, Any] = {}
        self.row: list[Any] = []
        self.clause = ""  # of INSERT, as the table needs it
        self.pairs = self.ready()

    def ready(self) -> Iterator[tuple[tuple[str, ...], Sequence[Any]]]:
        plans: dict[tuple[Any, ...], Plan] = {}
        for record in self.incoming:
            self.number += 1
            self.record = record
            shape = (*record, *map(type, record.values()))
            try:
                plan = plans.get(shape)
                if plan is None:
                    plan = plans[shape] = self.plan(record)
                self.row = row = list(record.values())
                for index, convert in plan[1]:
                    row[index] = convert(row[index])
                yield plan[0], row
            except (Misfit, *UNFIT) as error:
                raise self.refusal(error) from None

    def plan(self, record: Mapping[str, Any]) -> Plan:
        """Return how records of this shape become rows: their keys, and the values to convert, and how."""
        check_names(self.schema, record)
        conversions = []
        for index, (name, value) in enumerate(record.items()):
            fit(self.schema.by_name[name], value)
            convert = converter(self.schema.by_name[name], type(value))
            if convert:
                conversions.append((index, convert))
        return tuple(record), conversions

    def refusal(self, error: Exception) -> Misfit:
        """Return what is wrong with the record, by what SQLite or a conversion said of it."""
        why = str(error)
        if "UNIQUE" in why and isinstance(error, sqlite3.IntegrityError):
            why += ": such a row is there already (--on-conflict skip or replace says what to do with it)"
        elif not isinstance(error, Misfit):
            try:
                for name, value in self.record.items():
                    fit(self.schema.by_name[name], value)
            except Misfit as misfit:
                why = str(misfit)
        return Misfit(f"record {self.number}: {why}")

    def insert(self, db: Connection, first: Any) -> Claim:
        """Insert *first* and all pairs that follow; return the claim, empty if all rows were there before."""
        self.clause = conflict_clause(db, self.schema.table, self.on_conflict)
        claim: dict[str, Any] = {}
        try:
            for _, row in itertools.chain([first], self.pairs):
                claim = self.insert_claimed(db, dict(zip(self.record, row)))
                if claim:
                    break
            for names, group in itertools.groupby(self.pairs, itemgetter(0)):
                db.executemany(self.statement(names), map(itemgetter(1), group))
        except UNSTORED as error:
            raise self.refusal(error) from None
        return self.completed(db, claim) if claim else []

    def statement(self, names: Iterable[str]) -> str:
        """Return the SQL that inserts a row with these columns."""
        columns = list(map(quote, names))
        into = f"INSERT{self.clause} INTO {quote(self.schema.table)}"
        if not columns:
            return f"{into} DEFAULT VALUES"
        # OR IGNORE would also drop rows that break a NOT NULL or CHECK constraint: DO NOTHING does not.
        return (f"{into} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
                f"{' ON CONFLICT DO NOTHING' * (self.on_conflict == 'skip')}")

    def completed(self, db: Connection, claim: dict[str, Any]) -> Claim:
        """Return the whole claim, given the part of it that the first new row is.

        As a transaction happens whole or not at all, the claim tells later whether it happened. A key
        that was made here does so by itself; otherwise the values of the last row belong to it too,
        as others may bring one such row, but hardly both.
        """
        key = {column.name for column in self.schema.key}
        if "_rowid_" in claim:
            last = self.as_stored(db, scalar(db, "SELECT last_insert_rowid()"))
        elif claim.keys() > key <= self.record.keys():
            last = dict(zip(self.record, self.row))
        else:
            return [claim]
        return [claim, last] if last != claim and holds(db, self.schema, [last]) else [claim]

    def insert_claimed(self, db: Connection, row: dict[str, Any]) -> dict[str, Any]:
        """Insert one row; return by what it is known again, or nothing if a row with its key was there before."""
        schema, is_made = self.schema, False
        for column in schema.key:
            if column.default is not None and column.name not in row:
                row[column.name], another = two_defaults(db, column.default)
                is_made = is_made or row[column.name] != another
        key = {column.name: row[column.name] for column in schema.key if row.get(column.name) is not None}
        known = key and self.on_conflict == "replace" and holds(db, schema, [key])
        cursor = db.execute(self.statement(row), list(row.values()))
        if known or not cursor.rowcount:
            return {}
        if not key or len(key) < len(schema.key):
            return self.as_stored(db, cursor.lastrowid)
        return key if is_made else row

    def as_stored(self, db: Connection, rowid: int | None) -> dict[str, Any]:
        """Return the row with that rowid, as defaults and triggers have made it, and the rowid."""
        names = list(self.schema.by_name)
        sql = f"SELECT {', '.join(map(quote, names))} FROM {quote(self.schema.table)} WHERE _rowid_ = ?"
        (row,) = db.execute(sql, (rowid,)).fetchall() or [()]  # none if a trigger has removed it
        return {**dict(zip(names, row)), "_rowid_": rowid}


def two_defaults(db: Connection, default: str) -> Sequence[Any]:
    """Return two values of a column's default: they differ if it makes unique ones."""
    try:
        values: Sequence[Any] = db.execute(f"SELECT {default}, {default}").fetchall()[0]
        return values
    except sqlite3.OperationalError:  # a bare word is text
        return default, default


def holds(db: Connection, schema: Schema, claim: Claim) -> bool:
    """Tell whether all rows of the *claim* are there."""
    for row in claim:
        known = {quote(name): row[name] for name in row if name in schema.by_name or name == "_rowid_"}
        where = " IS ? AND ".join(known)
        if not scalar(db, f"SELECT count(*) FROM {quote(schema.table)} WHERE {where} IS ?", list(known.values())):
            return False
    return True


def store(path: str, rows: Rows, timeout: float, is_stored: Callable[[Connection], bool] | None = None,
          before_commit: Callable[[Claim], object] | None = None) -> int:
    """Insert *rows* into the file at *path*, all or none; return how many came.

    Within the transaction, *is_stored* may tell that nothing is left to do, and *before_commit*
    learns the claim. Raises Failure, which carries the claim if COMMIT failed: what was written
    may come to light all the same.
    """
    first = next(rows.pairs, None)  # before the file is touched: the producer may be slow, or the record bad

    def insert_once(db: Connection) -> Claim:
        claim = [] if is_stored and is_stored(db) else rows.insert(db, first)
        if claim and before_commit:
            before_commit(claim)
        return claim

    if first:
        writing(path, rows.schema, insert_once, timeout)
    return rows.number


def insert(database: str, incoming: Iterable[Mapping[str, Any]], schema: Schema | None = None,
           on_conflict: str = "fail", timeout: float = LOCK_TIMEOUT_S) -> int:
    """Insert records, whose keys are columns, into the file *database*, all or none; return how many.

    *on_conflict* says what to do with a key that is there: fail, skip or replace; *timeout* is in
    seconds. Raises Failure. Unlike the command, it keeps nothing aside: the caller has the records.
    """
    return store(realpath(database), Rows(schema or read_schema(), incoming, on_conflict), timeout)


# --------------------------------------------------------------------------------------- nothing lost


class Input:
    """Standard input, held until its records are rows: a little in memory, more of it in a file.

    A regular file needs no copy, and is read where it is. `places` are paths at which the input can
    be kept, best first. Without a *stream*, it holds what add() is given.
    """

    def __init__(self, stream: TextIO | None, places: Iterator[str]) -> None:
        self.places = places
        self.copy: Any = io.BytesIO()
        self.part = self.final = ""  # the path of the copy, when it is a file, and what it becomes when it is kept
        self.start = self.size = self.done = 0
        self.ended, self.is_file = True, False
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
                self.is_readable(None)
            try:
                data = self.take()
            except BlockingIOError:  # somebody else was faster
                continue
            yield data

    def is_readable(self, seconds: float | None) -> bool:
        """Wait until something can be read, or the *seconds* are over."""
        try:
            import select
        except ImportError:  # no more files can be opened: reading itself waits, and keeps signals waiting
            return seconds is None
        return bool(select.select([self.descriptor], [], [], seconds)[0])

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
                for _ in records(self.chunks() if self.is_file else arriving, True, complain):
                    pass
            except Failure as failure:  # a bad record is reported when it is its turn to be stored
                if failure.status != REFUSED:
                    raise
        for _ in arriving:
            pass

    def chunks(self) -> Iterator[bytes]:
        """Yield what is held, from the start."""
        self.copy.seek(self.start)
        self.done = 0
        for data in pieces(self.copy):
            SIGNALS.check()
            yield data
            self.done += len(data)

    def drain(self) -> None:
        """Take what waits in the pipe, without waiting for more: a few times what a pipe holds."""
        try:
            for _ in range(16):
                if self.ended or not self.is_readable(0):
                    break
                self.take()
        except OSError:
            pass

    def add(self, data: bytes) -> None:
        try:
            write_all(self.copy, data)
        except OSError:
            self.move()
            self.add(data)
            return
        self.size += len(data)
        if self.size > SPOOL_BYTES and not self.part:
            self.move()

    def move(self) -> None:
        """Copy what is held to a file at the next place, or back into memory when none is left."""
        old, old_part = self.copy, self.part
        for path in itertools.chain(self.places, [""]):
            self.final, self.part, self.copy = path, "", io.BytesIO()
            try:
                if path:
                    self.part, self.copy = new_part(path)
                copy_bytes(old, self.start, self.copy, self.size)
                break
            except OSError:
                self.discard()
        self.start = 0
        old.close()
        if old_part:
            remove(old_part)

    def discard(self) -> None:
        """Forget the copy: it is stored, or is elsewhere. That it can't be removed is no reason to fail now."""
        if self.part:
            try:
                with self.copy:
                    remove(self.part)
            except OSError:
                pass

    def keep(self, claim: Claim | None = None) -> str:
        """Bring what is held, and what still comes, to a safe place; return where that is, as a message says it."""
        try:
            self.read()
        except (Failure, OSError):  # a signal ends that
            self.drain()
        if not self.size:
            return ""
        if self.is_file and not claim:  # with one, running it again might store it twice
            return "standard input is a file, so nothing is lost: run this again"
        while True:
            if not self.part:
                self.move()
            if not self.part:
                sys.stderr.flush()
                write_all(sys.stderr.buffer, self.copy.getvalue().rstrip(b"\n") + b"\n")
                sys.stderr.buffer.flush()
                return "the input could not be kept in any file and stands above"
            try:
                os.fsync(self.copy.fileno())
                if claim:
                    write_claim(self.final, claim)
                os.rename(self.part, self.final)
                self.part = ""
            except OSError:
                self.move()
                continue
            try:
                sync_folder(self.final)
            except OSError:  # it is there; a second copy of it would be stored twice
                pass
            return f"the input is kept in {self.final}"


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


TEXT_TOO = ".text.json"  # how the name of a kept file ends that came with --skip-text


def kept_places(path: str, skip_text: bool = False) -> Iterator[str]:
    """Yield where input for the database at *path* can be kept: beside it, here, or with temporary files."""
    now = time.time()
    name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06}Z"
    name += f"-{os.uname().nodename}-{os.getpid()}{TEXT_TOO if skip_text else '.json'}"
    if path:
        yield join(path + "-kept", name)
    for folder in spare_folders():
        yield join(folder, spare_prefix(path) + name)


def spare_folders() -> Iterator[str]:
    try:
        yield os.getcwd()
    except OSError:  # it is gone
        pass
    try:
        import tempfile

        yield tempfile.gettempdir()
    except (OSError, ImportError):  # no folder takes temporary files, or no file can be opened to import that module
        pass


def spare_prefix(path: str) -> str:
    """Return how names of files begin that are kept for the database at *path* away from it."""
    # The remainder by a prime: a checksum that needs no module, as there may be no more file to open one with.
    return f"dbtool-kept-{int.from_bytes(os.fsencode(path), 'big') % 4_294_967_291:08x}-"


def kept_files(path: str) -> list[str]:
    """Return the files kept for *path*, in each folder the oldest first; of some, only the claim is left."""
    from glob import escape, glob

    starts = [join(path + "-kept", "")]
    for folder in (dirname(path), *spare_folders()):
        starts.append(join(folder, spare_prefix(path)))
    return sorted({name.removesuffix(".claim") for start in starts for ending in ("", ".claim")
                   for name in glob(f"{escape(start)}*.json{ending}")})


def new_part(path: str) -> tuple[str, io.FileIO]:
    """Create the temporary file that is to become *path*; return its path, and it, open for writing."""
    folder, name = os.path.split(path)
    part = join(folder, f".{name}.{os.getpid()}.part")
    for attempt in range(100):
        try:
            return part, io.FileIO(part, "w+")
        except FileNotFoundError as error:
            if attempt == 99 or not folder.endswith("-kept"):
                error.filename = folder
                raise
        try:
            os.mkdir(folder)  # a retry may remove it at once
        except FileExistsError:  # another process was faster
            pass
    raise AssertionError


def remove(path: str) -> None:
    """Remove a file, if it is there, and its folder, if that was made to keep input and is empty now."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    if dirname(path).endswith("-kept"):
        try:
            os.rmdir(dirname(path))
        except OSError:
            pass


def sync_folder(path: str) -> None:
    """Make the name of the file at *path* durable."""
    folder = os.open(dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def hexed(blob: bytes) -> dict[str, str]:
    """Return a BLOB as what structure() makes one of; for the json module."""
    return {"$hex": blob.hex()}


def write_claim(path: str, claim: Claim) -> None:
    """Write beside the kept file at *path* which rows show that it is stored."""
    import json

    with open(path + ".claim", "wb", buffering=0) as file:
        write_all(file, json.dumps(claim, default=hexed).encode())
        os.fsync(file.fileno())
    sync_folder(path)


def read_claim(path: str) -> Claim | None:
    import json

    try:
        with open(path + ".claim", encoding="utf-8") as file:
            claim = json.load(file)
    except (FileNotFoundError, ValueError):  # it is written whole before COMMIT
        return None
    return [{name: structure(value) if type(value) is dict else value for name, value in row.items()} for row in claim]


# --------------------------------------------------------------------------------------------- output

HARMLESS_PRAGMAS = frozenset((
    "application_id", "collation_list", "compile_options", "data_version", "database_list", "encoding",
    "foreign_key_check", "foreign_key_list", "freelist_count", "function_list", "index_info", "index_list",
    "index_xinfo", "integrity_check", "journal_mode", "module_list", "page_count", "page_size", "pragma_list",
    "quick_check", "schema_version", "table_info", "table_list", "table_xinfo", "user_version"))
TAKE_AN_ARGUMENT = ("check", "info", "list")  # how the names end of those that change nothing by it

SQLITE_FUNCTION, SQLITE_RECURSIVE = 31, 33  # action codes of sqlite3.h that PyPy's sqlite3 does not name


def authorize(action: int, first: Any, second: Any, *_: object) -> int:
    """Admit what reads and deny all else; a callback for sqlite3_set_authorizer."""
    if action == sqlite3.SQLITE_PRAGMA:
        name = c_text(first)
        admitted = name in HARMLESS_PRAGMAS and (not second or name.endswith(TAKE_AN_ARGUMENT))
    elif action == SQLITE_FUNCTION:
        admitted = c_text(second) not in ("fts3_tokenizer", "load_extension")
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
        place, part = divmod((len(self.values) - 1) * self.percent / 100, 1)
        around = sorted(self.values)[int(place):int(place) + 2]
        if not around:
            return None
        low, high = around[0], around[-1]
        if not part or low == high:
            return low
        between = (high - low) * part
        return low + between if between - between == 0 else low * (1 - part) + high * part  # beyond the largest float


class Stddev(Numbers):
    """The standard deviation of a sample, divided by n - 1; NULL for fewer than two, or for infinite, values."""

    def finalize(self) -> float | None:
        import statistics

        values = self.values
        return statistics.stdev(values) if len(values) > 1 and not any(value - value for value in values) else None


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


def batches(cursor: Cursor) -> Iterator[Batch]:
    count = 0
    PROGRESS.measure = lambda: (f"{count:,} rows", 0.0)
    while rows := cursor.fetchmany(ROWS_AT_ONCE):
        yield rows
        count += len(rows)
        PROGRESS.tick()


def printable(value: Any, null: str) -> Any:
    return null if value is None else value.hex() if isinstance(value, bytes) else value


def delimited(names: list[str], batches: Iterable[Batch], delimiter: str, null: str, header: bool) -> Iterator[str]:
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


def json_rows(names: list[str], batches: Iterable[Batch], before: str, between: str, after: str) -> Iterator[str]:
    """Yield the rows, many at once, as JSON objects that insert reads; a BLOB is {"$hex": "…"}."""
    import json

    encode = json.JSONEncoder(ensure_ascii=False, default=hexed).encode
    names = distinct_names(names)
    gap = before
    for rows in batches:
        yield gap + between.join([encode(dict(zip(names, row))) for row in rows])
        gap = between
    if gap == before:
        yield before
    if gap:
        yield after


def table(names: list[str], batches: Iterable[Batch], null: str, header: bool) -> Iterator[str]:
    """Yield lines for people: columns as wide as their first values, numbers to the right."""
    from unicodedata import combining, east_asian_width

    def width(text: str) -> int:
        return sum(1 + (east_asian_width(char) in "FW") for char in text if not combining(char))

    def cell(value: Any) -> str:
        text = str(printable(value, null))
        return text if text.isprintable() else repr(text)[1:-1]

    def aligned(text: str, size: int, is_number: bool) -> str:
        blank = " " * (size - width(text))
        return blank + text if is_number else text + blank

    names = list(map(cell, names))
    heading = [names] if header else []
    widths: list[int] = []
    for rows in batches:
        lines = [list(map(cell, row)) for row in rows]
        if not widths:
            numeric = [any(isinstance(value, (int, float)) for value in column) for column in zip(*rows)]
            widths = [max(map(width, column)) for column in zip(*heading, *lines)]
            lines = heading + [["-" * size for size in widths]] * header + lines
        for line in lines:
            yield "  ".join(map(aligned, line, widths, numeric)).rstrip() + "\n"
    if not widths and header:
        yield "  ".join(names) + "\n"


def formatted(names: list[str], batches: Iterable[Batch], style: str, null: str = "",
              header: bool = True) -> Iterator[str]:
    """Return the rows as text in the *style* csv, tsv, json, jsonl or table."""
    if style == "table":
        return table(names, batches, null, header)
    if style == "json":
        return json_rows(names, batches, "[", ",\n ", "]\n")
    if style == "jsonl":
        return json_rows(names, batches, "", "\n", "\n")
    return delimited(names, batches, "\t" if style == "tsv" else ",", null, header)


def write_out(texts: Iterable[str | bytes], target: str = "", like: str = "") -> None:
    """Write *texts* as UTF-8 to standard output, or to the file *target*, which appears when it is whole.

    It gets the rights of the file *like*, if one is named.
    """
    out: Any = None
    part = ""
    try:
        if not target:
            if sys.stdout is None:
                raise Failure("standard output is closed")
            out = sys.stdout.buffer
        elif exists(target) and not isfile(target):
            with SIGNALS:  # it may be a pipe that nobody reads yet
                out = open(target, "wb")
        else:
            part, out = new_part(realpath(target))
            if like:
                os.chmod(part, os.stat(like).st_mode)
        for text in texts:
            with SIGNALS:  # the reader may be slow
                write_all(out, text.encode(errors="surrogateescape") if isinstance(text, str) else text)
        out.flush()
        if part:
            os.fsync(out.fileno())
            os.replace(part, realpath(target))
    except (OSError, Failure) as error:
        if out and not part:  # what is still in the buffer would fail or wait again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, OSError):
            error.filename = target or "standard output"
        raise
    finally:
        if part:
            out.close()
            remove(part)


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
    for ending in ("-wal", "-shm", "-journal"):
        if path.endswith(ending) and is_database(path.removesuffix(ending)):
            raise Failure(f"{target} belongs to the database {path.removesuffix(ending)}; name another file")
    return path


# -------------------------------------------------------------------------------------------- reading

FROZEN = "?immutable=1"  # how the URI of a file ends that is read as one that does not change


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
    return file_uri(path) + (FROZEN if is_wal and not may_write and not wal_size(path) else "?mode=ro")


def file_uri(path: str) -> str:
    """Return the URI of a file; a byte of its name that is not UTF-8 is half a surrogate pair in *path* (PEP 383)."""
    return "file://" + "".join(f"%{ord(char) & 255:02x}" if char in "%?#" or "\udc80" <= char <= "\udcff" else char
                               for char in path)


def wal_size(path: str) -> int:
    return os.path.getsize(path + "-wal") if exists(path + "-wal") else 0


def reading(path: str, action: Callable[[Connection], Result], timeout: float = LOCK_TIMEOUT_S,
            guarded: bool = True) -> Result:
    """Return action(db), with a connection to the file at *path* that cannot write and leaves no files behind.

    Unless *guarded*, the connection may create other files, and *action* waits for locks itself. Raises Failure.
    """
    uri = uri_to_read(path)
    before, had_wal = stamp(path), wal_size(path)
    try:
        db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
        try:
            db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
            if guarded:
                begin_to_read(db, timeout)
                db.execute("PRAGMA query_only = ON")
                db.set_authorizer(authorize)
            result = action(db)
            check_unchanged(path, uri, before)
            return result
        finally:
            PROGRESS.clear()
            db.close()
            if exists(path + "-wal") and not had_wal and not uri.endswith(FROZEN):
                remove_wal(path)
    except sqlite3.Error as error:
        SIGNALS.check()
        raise as_failure(error, path) from None


def begin_to_read(db: Connection, timeout: float) -> None:
    """Begin a transaction in which the file stays as it is now. With a rollback journal, it keeps the lock it needs."""
    db.execute("BEGIN")
    patiently(scalar, time.monotonic() + timeout, db, "SELECT count(*) FROM sqlite_master")


def stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def check_unchanged(path: str, uri: str, before: tuple[int, int]) -> None:
    """Raise Failure if the file was read as one that does not change, and has changed since its stamp *before*."""
    if uri.endswith(FROZEN) and stamp(path) != before:
        raise Failure("changed while it was read; run this again", TRY_AGAIN)


def remove_wal(path: str) -> None:
    """Let SQLite remove the empty -wal and -shm files that a read-only connection had to make and may not remove."""
    db = sqlite3.connect(path, timeout=0)
    try:
        scalar(db, "SELECT count(*) FROM sqlite_master")
    except sqlite3.Error:
        pass  # a writer is at work, and will remove them
    finally:
        db.close()


def ask(db: Connection, sql: str, parameters: Mapping[str, Any] | Sequence[Any],
        take: Callable[[Cursor], Result]) -> Result:
    """Run a query and return take(cursor); raise Failure if *sql* is not one query that works."""
    aggregates: Any = (("median", 1, Percentile), ("percentile", 2, Percentile), ("stddev", 1, Stddev))
    for aggregate in aggregates:
        db.create_aggregate(*aggregate)
    cursor = db.cursor()
    try:
        cursor.execute(sql, parameters)
        if cursor.description is None:
            raise Failure("the SQL asks for nothing; write a SELECT")
        return take(cursor)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        SIGNALS.check()
        failure = as_failure(error, "")
        raise failure if failure.status == TRY_AGAIN else Failure(why_unanswered(db, str(error))) from None
    finally:
        cursor.close()  # or the connection lives on, with its files


def why_unanswered(db: Connection, said: str) -> str:
    if "authoriz" in said or "prohibited" in said:
        return f"query only reads, and this SQL would do more ({said})"
    if "no such column" in said or "no such table" in said:
        names: list[str] = []
        for name, in db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall():
            try:
                names += [name, *columns_of(db, name)]
            except sqlite3.OperationalError:  # a view of what is no longer there
                pass
        is_text = "; or, if it is text, write it in 'single quotes'" if "column" in said else ""
        return said + (nearest(said.rpartition(": ")[2].rpartition(".")[2], names) or is_text)
    if "binding" in said.lower():
        return f"{said} (--param NAME=VALUE gives :NAME a value)"
    if "decode" in said:
        return f"{said}; it is not UTF-8: SELECT CAST(… AS BLOB) shows its bytes"
    if "finalize" in said or "step" in said:
        return "median, stddev and percentile take numbers, and percentile's second is from 0 to 100"
    return said


def query(database: str, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = (),
          timeout: float = LOCK_TIMEOUT_S) -> list[dict[str, Any]]:
    """Return the rows that answer one SQL question, as dictionaries; nothing can be written. Raises Failure."""

    def all_rows(cursor: Cursor) -> list[dict[str, Any]]:
        names = distinct_names(names_of(cursor))
        return [dict(zip(names, row)) for row in cursor]

    return reading(realpath(database), lambda db: ask(db, sql, parameters, all_rows), timeout)


# ---------------------------------------------------------------------------------------- whole files


def merge(path: str, source: str, schema: Schema, timeout: float = LOCK_TIMEOUT_S) -> tuple[int, int, int]:
    """Add the rows of the file at *source* to the one at *path*, by primary key, in one transaction.

    Return how many were added, how many were known, and how many of those have other values there.
    Raises Failure.
    """
    path, source = realpath(path), realpath(source)
    if not schema.key or schema.key[0].rowid:
        raise Failure(f"the key of {schema.table} is a number that every file counts for itself, so the same one"
                      " means different rows; merge needs a primary key that is unique everywhere")
    table, keys = quote(schema.table), [quote(column.name) for column in schema.key]
    key, is_null = ", ".join(keys), f" IS NULL OR {table}.".join(keys)

    def read(db: Connection) -> tuple[int, int, int]:
        if exists(path) and os.path.samefile(path, source):
            raise Failure("is the very file to merge into")
        made = [column.name for column in schema.columns if column.generated]
        columns = columns_of(db, schema.table)
        names = [name for name, column in columns.items() if not column.generated and name not in made]
        if not names:
            raise Failure(f"has no table {schema.table}")
        for column in schema.key:
            if column.name not in names:
                raise Failure(f"has no column {column.name}, by which rows are told apart")
        if scalar(db, f"SELECT count(*) FROM {table} WHERE {table}.{is_null} IS NULL"):
            raise Failure(f"has rows without the key {key}, by which rows are told apart")
        check_names(schema, names)
        check_types(columns, schema, "migrate a copy of it first", is_source=True)
        return writing(path, schema, lambda db: add_rows(db, names), timeout)

    def add_rows(db: Connection, names: list[str]) -> tuple[int, int, int]:
        uri, before = uri_to_read(source), stamp(source)
        quoted = list(map(quote, names))
        columns, theirs, ours = ", ".join(quoted), ", s.".join(quoted), ", o.".join(quoted)
        db.execute("COMMIT")  # a new file has its table now
        deadline = time.monotonic() + timeout
        patiently(db.execute, deadline, "ATTACH ? AS source", (uri,))
        patiently(db.execute, deadline, "BEGIN IMMEDIATE")
        total = patiently(scalar, deadline, db, f"SELECT count(*) FROM source.{table}")
        # WHERE true: without it, SQLite would take ON CONFLICT for the ON of a join.
        clause = conflict_clause(db, schema.table, "fail")
        added = db.execute(f"INSERT{clause} INTO main.{table} ({columns}) SELECT {columns} FROM source.{table}"
                           f" WHERE true ON CONFLICT ({key}) DO NOTHING").rowcount
        different = added < total and scalar(
            db, f"SELECT count(*) FROM source.{table} AS s JOIN main.{table} AS o USING ({key})"
                f" WHERE (s.{theirs}) IS NOT (o.{ours})")
        check_unchanged(source, uri, before)
        return added, total - added, int(different)

    return reading(source, read, timeout)


def snapshot(path: str, target: str, timeout: float = LOCK_TIMEOUT_S) -> None:
    """Copy the file at *path* to *target*: a path, compressed if it ends in .gz or .xz, or - for standard output.

    What is at *target* is replaced. Raises Failure, or OSError.
    """
    import tempfile

    to_stdout = target == "-"
    path, target = realpath(path), target if to_stdout else output_path(target)
    if not to_stdout and exists(target):
        if exists(path) and os.path.samefile(path, target):
            raise Failure("is the very file to copy")
        if not isfile(target):
            raise Failure(f"{target} is a folder or device; name a file, or - for standard output")
    if exists(target + "-wal") or exists(target + "-journal"):
        raise Failure(f"{target} is in use as a database; name another file")
    compressed = target.endswith((".gz", ".xz"))
    part, file = new_part(join(tempfile.gettempdir(), "dbtool.db") if to_stdout else
                          target + ".copy" if compressed else target)

    def copy(db: Connection) -> None:
        size = os.path.getsize(path)
        PROGRESS.measure = lambda: ("copying", os.path.getsize(part) / size)
        patiently(scalar, time.monotonic() + timeout, db, "SELECT count(*) FROM sqlite_master")  # says what is damaged
        patiently(db.execute, time.monotonic() + timeout, "VACUUM INTO ?", (file_uri(part),))

    try:
        with file:
            os.fchmod(file.fileno(), 0o600)  # until it has the rights of what it copies
            reading(path, copy, timeout, guarded=False)
            if to_stdout or compressed:
                write_out(packed(file, target), "" if to_stdout else target, like=path)
            else:
                os.chmod(part, os.stat(path).st_mode)
                os.fsync(file.fileno())
                os.replace(part, target)
            if not to_stdout:
                sync_folder(target)
    finally:
        PROGRESS.clear()
        remove(part)


def packed(file: io.FileIO, target: str) -> Iterator[bytes]:
    """Yield the bytes of *file*, compressed if the name of the *target* says so."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if target.endswith(".gz"):
        import zlib

        press: Any = zlib.compressobj(6, zlib.DEFLATED, 31)
    elif target.endswith(".xz"):
        import lzma

        press = lzma.LZMACompressor(preset=2)  # the default takes 5 times as long, for 5 % less
    else:
        yield from pieces(file)
        return
    for data in pieces(file):
        yield press.compress(data)
        PROGRESS.show("compressing", file.tell() / size)
    yield press.flush()


def migrate(path: str, schema: Schema, drop: Collection[str] = (), fill: Mapping[str, str] | None = None,
            timeout: float = LOCK_TIMEOUT_S, dry_run: bool = False) -> list[str]:
    """Bring the file at *path* to *schema* in one transaction; return what was done, or with *dry_run* what would be.

    *drop* names the columns to drop; *fill* says, as text, what rows get in a new column, or
    instead of NULL. Raises Failure.
    """
    path = realpath(path)
    if not isfile(path):
        raise Failure("there is no such file")
    values = {}
    for name, text in (fill or {}).items():
        if name not in schema.by_name:
            raise Failure(f"--fill {no_column(schema, name)}", USAGE)
        if schema.by_name[name].generated:
            raise Failure(f"--fill {name}: is generated by SQLite", USAGE)
        values[name] = fit_text(schema.by_name[name], text)

    def take_steps(db: Connection) -> list[str]:
        steps, own = plan_migration(db, schema, drop, values)
        if steps:
            size = os.path.getsize(path)
            PROGRESS.measure = lambda: ("rewriting", wal_size(path) / size)
            try:
                rebuild(db, schema, values, own)
            except sqlite3.IntegrityError as error:
                raise Failure(f"{error}; nothing was changed (--fill COLUMN=VALUE gives what is NULL a value)"
                              ) from None
        return steps

    if dry_run:
        return reading(path, lambda db: plan_migration(db, schema, drop, values)[0], timeout)
    return writing(path, None, take_steps, timeout)


def plan_migration(db: Connection, schema: Schema, drop: Collection[str],
                   fill: Collection[str]) -> tuple[list[str], list[Made]]:
    """Return the steps, in words, that bring the table in *db* to *schema*, and what only the file has and keeps."""
    old, new = columns_of(db, schema.table), schema.by_name
    made = {name: (kind, name, sql) for kind, name, sql in db.execute(MADE)}
    wanted = [name for _, name, _ in schema.made]
    check_case(old, new, schema)
    check_case(made, wanted, schema)
    kept = [name for name in made if name not in wanted]
    gone = [name for name in old if name not in new or new[name].generated > old[name].generated]
    check_dropped(schema, gone, drop)
    indexes = [name for name in kept if any(row[2] in gone for row in db.execute(f"PRAGMA index_info({quote(name)})"))]
    empty = [name for name, column in new.items()
             if name not in old and name not in fill and column.needed and not column.nullable]
    if empty and old and scalar(db, f"SELECT EXISTS (SELECT 1 FROM {quote(schema.table)})"):
        raise Failure(f"column {', '.join(empty)} is new, NOT NULL and without a default; say what the old rows get:"
                      f" {' '.join(f'--fill {name}=VALUE' for name in empty)}")
    steps = []
    for name, column in new.items() if old else ():
        if name not in old:
            steps.append(f"add column {name} {column.type}".rstrip())
        elif old[name].type.upper() != column.type.upper():
            check_values(db, schema.table, old[name], column)
            steps.append(f"retype column {name} from {old[name].type or 'none'} to {column.type or 'none'}")
    for name in (name for name in fill if name in old):
        count = scalar(db, f"SELECT count(*) FROM {quote(schema.table)} WHERE {quote(name)} IS NULL")
        steps += [f"fill column {name}: {count:,} rows"] if count else []
    steps += [f"drop column {name}" for name in gone] + [f"drop index {name}" for name in indexes]
    for kind, name, sql in schema.made:
        if name not in made:
            steps.append(f"create {kind} {name}")
        elif essence(sql) != essence(made[name][2]):
            if name == schema.table:
                count = scalar(db, f"SELECT count(*) FROM {quote(name)}")
                steps.append(f"rewrite table {name}: {count:,} rows")
            elif kind != "table":
                steps.append(f"replace {kind} {name}")
    return steps, [made[name] for name in kept if name not in indexes]


def check_dropped(schema: Schema, gone: list[str], drop: Collection[str]) -> None:
    """Raise Failure unless the columns to *drop* are those that are *gone* from the schema."""
    for name in drop:
        if name not in gone:
            raise Failure(f"--drop {name}: is no column that only the file has{nearest(name, gone)}", USAGE)
    kept = [name for name in gone if name not in drop]
    if kept:
        raise Failure(f"{schema.path} has no place for column {', '.join(kept)}; add it there, or drop it for good"
                      f" with: --drop {' --drop '.join(kept)}")


def check_values(db: Connection, table: str, old: Column, new: Column) -> None:
    """Raise Failure if a value would not be the same in the new type of its column, as a round trip tells."""
    if new.affinity in (old.affinity, "BLOB") or new.generated:
        return
    value = f"+{quote(new.name)}"  # a plus, so that comparing does not convert
    there = f"+CAST({value} AS {new.affinity})"
    # A NUMERIC column takes any text, but makes a number of what reads as one, as this comparison does.
    converted = f"CAST({value} AS NUMERIC) = {value}" if new.affinity == "NUMERIC" else "1"
    ((example, count),) = db.execute(
        f"SELECT {value}, count(*) FROM {quote(table)} WHERE {there} IS NOT {value}"
        f" AND +CAST({there} AS {old.affinity}) IS NOT {value}"
        f" AND +CAST(CAST({there} AS INTEGER) AS TEXT) IS NOT {value} AND {converted}"
    ).fetchall()
    if count:
        raise Failure(f"column {new.name}: {count} values do not fit {new.type} without a change, such as"
                      f" {shown(example)}; mend them first, or keep the type")


def rebuild(db: Connection, schema: Schema, fill: Mapping[str, Any], own: list[Made]) -> None:
    """Make the table anew from schema.sql, copy the rows, and make again all that hangs on it.

    As sqlite.org/lang_altertable.html advises for any change: the file then holds the very text of
    schema.sql. What is *own* to the file is made first.
    """
    table, before = schema.table, schema.table + " before migrate"
    old = columns_of(db, table)
    unusable_before = unusable(db)
    db.execute("PRAGMA legacy_alter_table = ON")  # so that renaming changes no other SQL
    for kind, name, _ in db.execute(MADE).fetchall():
        if kind != "table":
            db.execute(f"DROP {kind} IF EXISTS {quote(name)}")
    if old:
        db.execute(f"ALTER TABLE {quote(table)} RENAME TO {quote(before)}")
    make(db, [made for made in schema.made if made[0] == "table"])
    if old:
        copy_rows(db, schema, before, old, fill)
        db.execute(f"DROP TABLE {quote(before)}")
    for wanted in ("view", "index", "trigger"):  # a trigger may belong to a view
        for kind, name, sql in (*own, *schema.made):
            if kind == wanted and (why := why_not(db, sql)):
                raise broken(f"{kind} {name}", why)
    for what, why in unusable(db):
        if (what, why) not in unusable_before:
            raise broken(what, why)


def broken(what: str, why: str) -> Failure:
    return Failure(f"{what} would not work any more: {why}; change or drop it first")


def why_not(db: Connection, sql: str) -> str:
    """Run SQL; return what SQLite says against it, if it does not work."""
    try:
        db.execute(sql).fetchall()
    except sqlite3.OperationalError as error:
        SIGNALS.check()
        return str(error)
    return ""


def unusable(db: Connection) -> list[tuple[str, str]]:
    """Return which views, and the triggers of which tables and views, do not compile, and why."""
    select = "SELECT DISTINCT tbl_name FROM sqlite_master WHERE type = ?"
    found = [(f"view {name}", why) for name, in db.execute(select, ["view"]).fetchall()
             if (why := why_not(db, f"SELECT * FROM {quote(name)} LIMIT 0"))]
    for name, in db.execute(select, ["trigger"]).fetchall():
        if not why_not(db, f"PRAGMA table_xinfo({quote(name)})"):  # else it is one of those views
            values = ", ".join(f"{quote(column.name)} = NULL" for column in columns_of(db, name).values()
                               if not column.generated)
            changes = [f"INSERT INTO {quote(name)} DEFAULT VALUES", f"DELETE FROM {quote(name)}"]
            changes += [f"UPDATE {quote(name)} SET {values}"] if values else []
            found += [(f"a trigger of {name}", why) for change in changes
                      if (why := why_not(db, f"EXPLAIN {change}")) and "because it is a view" not in why]
    return found


def copy_rows(db: Connection, schema: Schema, before: str, old: dict[str, Column], fill: Mapping[str, Any]) -> None:
    """Copy the rows of the table *before*, whose columns are *old*; without a key, they keep their numbers."""
    has_key = schema.key or any(column.key for column in old.values())
    sources = {} if has_key else {"_rowid_": "_rowid_"}
    values = []
    for name, column in schema.by_name.items():
        quoted = quote(name)
        if name in fill:
            sources[quoted] = f"coalesce({quoted}, ?)" if name in old else "?"
            values.append(fill[name])
        elif name in old and not column.generated:
            sources[quoted] = quoted
    if not sources:  # no column is left: the rows get a default, so that there are as many as before
        first = next(column for column in schema.columns if not column.generated)
        sources[quote(first.name)] = f"({first.default or 'NULL'})"
    # OR ABORT: a constraint of the new table may say to pass over or replace rows instead.
    db.execute(f"INSERT OR ABORT INTO {quote(schema.table)} ({', '.join(sources)}) SELECT"
               f" {', '.join(sources.values())} FROM {quote(before)}", values)
    if scalar(db, "SELECT count(*) FROM sqlite_master WHERE name = 'sqlite_sequence'"):
        highest = scalar(db, "SELECT max(seq) FROM sqlite_sequence WHERE name IN (?, ?)", (schema.table, before))
        db.execute("DELETE FROM sqlite_sequence WHERE name IN (?, ?)", (schema.table, before))
        if highest is not None:  # the next number stays
            db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (schema.table, highest))


# ------------------------------------------------------------------------------------------- commands


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


def retry_line(name: str, flags: Mapping[str, list[str]], kept: str) -> str:
    """Return the command that stores what an insert into the file *name*, with *flags*, kept in the file *kept*."""
    # Away from the database, retry looks in the folder for temporary files, which may be another one by then.
    where = "" if dirname(kept) == realpath(name) + "-kept" else f"TMPDIR={for_shell(dirname(kept))} "
    given = []
    for flag in ("--schema", "--table", "--on-conflict"):
        if value := flags.get(flag, [""])[-1]:
            given += [flag, value]
    words = [*given, "--", name] if name.startswith("-") else [name, *given]
    return " ".join([f"{where}python3 dbtool.py retry", *map(for_shell, words)])


def insert_command(options: Options) -> None:
    """Store the JSON objects on standard input as rows, all of them or none."""
    source = Input(sys.stdin, kept_places(options.path, options.skip_text))
    try:
        source.read(options.skip_text)
        rows = Rows(options.schema(), records(source.chunks(), options.skip_text), options.conflict)
        PROGRESS.measure = lambda: (f"{rows.number:,} rows", source.done / (source.size or 1))
        store(options.path, rows, options.timeout)
    except BaseException as error:
        where = source.keep(getattr(error, "claim", None))
        if not isinstance(error, (Failure, OSError, MemoryError)):
            report(where)
            raise  # a bug
        failure = as_failure(error, options.path)
        if where.startswith("the input is kept"):
            again = retry_line(options.name, options.flags, source.final)
            where = f"{options.as_named(where)}; when that is mended, run: {again}"
        raise Failure(f"{failure}; {where}" if where else str(failure), failure.status) from None
    source.discard()


def insert_manual_command(options: Options) -> None:
    """Store one row, each column given as a flag."""
    schema, own = options.schema(), flags_of("insert_manual")
    record: dict[str, Any] = {}
    given = [(flag[2:], text) for flag, texts in options.flags.items() if flag not in own for text in texts]
    for flag, text in [*given, *((name, None) for name in options.flags.get("--null", []))]:
        column = flag_column(schema, flag)
        if column.name in record:
            raise Failure(f"column {column.name} is given twice", USAGE)
        record[column.name] = fit(column, None) if text is None else fit_text(column, text)
    store(options.path, Rows(schema, [record], options.conflict), options.timeout)


def flag_column(schema: Schema, flag: str) -> Column:
    """Return the column that a flag names: itself, or with hyphens for underscores, or after `column.`."""
    hyphened = {name.replace("_", "-"): column for name, column in schema.by_name.items()}
    for name in (flag, flag.removeprefix("column.")):
        column = schema.by_name.get(name) or hyphened.get(name.replace("_", "-"))
        if column:
            return column
    raise Failure(no_column(schema, flag), USAGE)


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

    def print_rows(cursor: Cursor) -> None:
        texts = formatted(names_of(cursor), batches(cursor), options.last("--format", "csv"), options.last("--null"),
                          "--no-header" not in options.flags)
        write_out(texts, output)

    reading(options.path, lambda db: ask(db, sql, parameters, print_rows), options.timeout)


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
    status = 0
    files = kept_files(options.path)
    if not files and not exists(options.path):
        raise Failure("there is no such file, and nothing is kept for it")
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

    def is_stored(db: Connection) -> bool:
        claim = read_claim(path)  # first: it goes after the file
        return not exists(path) or (claim is not None and holds(db, schema, claim))

    try:
        with open(path, "rb") as file:
            skip_text = options.skip_text or path.endswith(TEXT_TOO)
            rows = Rows(schema, records(pieces(file), skip_text), options.conflict)
            store(options.path, rows, options.timeout, is_stored, lambda claim: write_claim(path, claim))
    except FileNotFoundError:  # another retry has stored it, or one that was stopped between the two removals
        if is_arriving(path):
            return
    remove(path)
    remove(path + ".claim")


def is_arriving(path: str) -> bool:
    """Tell whether an insert is keeping its input at *path*: its claim is there first."""
    from glob import escape, glob

    return bool(glob(escape(join(dirname(path), f".{basename(path)}.")) + "*.part")) or exists(path)


def merge_command(options: Options) -> None:
    """Add the rows of other files that this one does not have; print for each how many, and how many are known."""
    schema, count = options.schema(), len(options.others)
    for number, name in enumerate(options.others):
        PROGRESS.measure = lambda number=number: (f"file {number + 1} of {count}", number / count)
        try:
            added, known, different = merge(options.path, name, schema, options.timeout)
        except (Failure, OSError) as error:
            failure = as_failure(error, name)
            raise Failure(f"{name}: {failure}", failure.status) from None
        write_out([f"{name}: {added} added, {known} known\n"])
        if different:
            report(f"{options.name}: {name}: {different} known rows have other values there; they were not taken over")


def snapshot_command(options: Options) -> None:
    """Make a consistent copy while others write; TARGET may end in .gz or .xz; - is standard output."""
    snapshot(options.path, options.words[1], options.timeout)


def migrate_command(options: Options) -> None:
    """Bring a file to the columns of schema.sql; print what that takes."""
    steps = migrate(options.path, options.schema(), options.flags.get("--drop", []), options.pairs("--fill"),
                    options.timeout, "--dry-run" in options.flags)
    write_out([f"{step}\n" for step in steps])


def schema_command(options: Options) -> None:
    """Print the columns: type, whether needed, default, description; with a DATABASE also what differs there."""
    schema = options.schema()
    said = descriptions(schema)
    names = ["column", "type", "needed", "default", "description"]
    rows = [[column.name, column.type, "generated" if column.generated else "yes" if column.needed else "no",
             " ".join((column.default or "").split()), said.get(column.name, "")] for column in schema.columns]
    if options.name:
        names.append("file")
        found = reading(options.path, lambda db: columns_of(db, schema.table), options.timeout)
        for row, column in zip(rows, schema.columns):
            there = found.pop(column.name).in_words() if column.name in found else "missing"
            row.append("same" if there == column.in_words() else there)
        for name, column in found.items():
            rows.append([name, "", "", "", "", f"only there: {column.in_words()}"])
    write_out(formatted(names, [rows], options.last("--format", "table")))


# ---------------------------------------------------------------------------------------- command line

# flag, or command and flag: (what it takes, what it does)
FLAGS = {
    "--help": ("", "print this"),
    "--schema": ("FILE", "what defines the columns (default: DBTOOL_SCHEMA, else schema.sql beside this script)"),
    "--table": ("NAME", "which table of the schema (default: DBTOOL_TABLE, else its only one)"),
    "--timeout": ("SECONDS", "how long to wait for a lock (default: 60)"),
    "--on-conflict": ("fail|skip|replace", "what to do if a row with the key is there (default: fail)"),
    "--skip-text": ("", "pass lines that are no JSON objects on to standard error"),
    "--param": ("NAME=VALUE", "the value of :NAME: a number if Python prints it that way, else text; may be repeated"),
    "--format": ("csv|tsv|json|jsonl|table", "how to print (default: csv)"),
    "--output": ("FILE", "write to FILE, which appears only when it is whole"),
    "--null": ("TEXT", "how to print NULL (default: nothing)"),
    "--no-header": ("", "leave out the line with the columns' names"),
    "--dry-run": ("", "print what would be done, and do nothing"),
    "--drop": ("COLUMN", "drop COLUMN, which the schema no longer has; may be repeated"),
    "--fill": ("COLUMN=VALUE", "what rows get in a new column, or instead of NULL; may be repeated"),
    "schema --format": ("table|csv|tsv|json|jsonl", "how to print (default: table)"),
    "insert_manual --null": ("COLUMN", "give COLUMN the value NULL; may be repeated"),
}
# name: (function, whose docstring --help shows, and which may return a status; words; flags besides the first four)
COMMANDS: dict[str, tuple[Callable[[Options], int | None], str, str]] = {
    "insert": (insert_command, "DATABASE", "--on-conflict --skip-text"),
    "insert_manual": (insert_manual_command, "DATABASE", "--null --on-conflict"),
    "query": (query_command, "DATABASE SQL|-", "--param --format --output --null --no-header"),
    "retry": (retry_command, "DATABASE", "--skip-text --on-conflict"),
    "merge": (merge_command, "DATABASE OTHER...", ""),
    "snapshot": (snapshot_command, "DATABASE TARGET|-", ""),
    "migrate": (migrate_command, "DATABASE", "--dry-run --drop --fill"),
    "schema": (schema_command, "[DATABASE]", "--format"),
}


def flags_of(command: str) -> dict[str, tuple[str, str]]:
    """Return what each flag of *command* takes and does."""
    flags = ["--help", "--schema", "--table", "--timeout", *COMMANDS[command][2].split()]
    return {flag: FLAGS.get(f"{command} {flag}") or FLAGS[flag] for flag in flags}


def command_help(command: str, options: Options) -> str:
    function, words, _ = COMMANDS[command]
    flags = flags_of(command)
    rows = [(f"{flag} {takes}", does) for flag, (takes, does) in flags.items()]
    if command == "insert_manual":
        schema = options.schema()
        said = descriptions(schema)
        for column in schema.columns:
            if not column.generated:
                flag = f"--{'column.' * (f'--{column.name}' in flags)}{column.name}"
                kind = f"{column.type or 'anything'}{', needed' * column.needed}"
                rows.append((f"{shown(flag) if ' ' in flag else flag} {kind}", said.get(column.name, "")))
    width = max(len(left) for left, _ in rows if len(left) <= 40)
    lines = [f"  {left:{width}}  {right}".rstrip() for left, right in rows]
    return "\n".join([f"usage: dbtool.py {command} {words} [FLAG]...", "", function.__doc__ or "", "", *lines, ""])


def parse(command: str, arguments: list[str]) -> Options:
    """Return what the words after *command* say; raise Failure with status 2 if they are wrong."""
    known = flags_of(command)
    flags: dict[str, list[str]] = {}
    words: list[str] = []
    value: str | None
    left = iter(arguments)
    for word in left:
        flag, equals, value = word.partition("=")
        if word == "--":
            words += left
        elif word == "-" or word[:1] != "-" or (command == "query" and " " in flag):
            words.append(word)
        else:
            flag = "--help" if flag == "-h" else flag
            if flag not in known and not (command == "insert_manual" and flag[:2] == "--"):
                raise Failure(f"unknown flag {flag}{nearest(flag, known)}", USAGE)
            takes, _ = known.get(flag, ("VALUE", ""))
            if takes and not equals:
                value = next(left, None)
            if value is None or (equals and not takes):
                raise Failure(f"{flag} takes {f'a value: {takes}' if takes else 'no value'}", USAGE)
            if ("|" in takes and value not in takes.split("|")) or ("=" in takes and "=" not in value[1:]):
                raise Failure(f"{flag} takes {takes}, not {shown(value)}", USAGE)
            flags.setdefault(flag, []).append(value)
    if "--help" not in flags:
        check_words(command, words)
    return Options(words, flags)


def check_words(command: str, words: list[str]) -> None:
    usage = COMMANDS[command][1]
    if words[:1] == [""]:
        raise Failure("the DATABASE has no name", USAGE)
    needed = usage.count(" ") + 1
    if (len(words) < needed and usage[0] != "[") or (len(words) > needed and usage[-1] != "."):
        hint = (f"it reads standard input: < {words[-1]}" if command == "insert" and words else
                f"see: python3 dbtool.py {command} --help")
        raise Failure(f"takes {usage}, got {' '.join(map(shown, words)) or 'nothing'}; {hint}", USAGE)


def keep_unread(arguments: list[str]) -> str:
    """Keep what insert would have read, had its command line been right; return where that is."""
    words: list[str] = []
    doubtful: list[str] = []  # may belong to a misspelt flag
    flags: dict[str, list[str]] = {}
    left = iter(arguments[1:] if arguments[0][:1] != "-" else arguments)
    place = words  # for the next word
    for word in left:
        flag, equals, value = word.partition("=")
        takes = FLAGS.get(flag, ("", ""))[0]
        if word == "--":
            words += left
        elif flag in FLAGS:
            value = value if equals or not takes else next(left, "")
            if "|" not in takes or value in takes.split("|"):
                flags[flag] = [value]
        elif word[:1] == "-":
            place = words if equals else doubtful
        elif word and word not in COMMANDS:
            place.append(word)
            place = words
    name = [*words, *doubtful, ""][0]
    try:
        path = realpath(name) if name else ""
    except OSError:  # the working directory is gone
        name = path = ""
    source = Input(sys.stdin, kept_places(path, "--skip-text" in flags))
    where = "" if source.is_file or not sys.stdin or sys.stdin.isatty() else source.keep()
    if not where.startswith("the input is kept"):
        return where
    again = retry_line(name, flags, source.final) if name else "python3 dbtool.py insert DATABASE < THAT-FILE"
    return f"{where}; run: {again}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv*, by default that of this process; return the exit status."""
    PROGRESS.begin()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, where = (arguments or [""])[0], ""
    options: Options | None = None
    try:
        if command in ("-h", "--help"):
            write_out([__doc__ or ""])
        elif command == "--version":
            write_out([f"dbtool {__version__}\n"])
        elif command not in COMMANDS:
            raise Failure(f"{f'unknown command {command}' if command else 'no command'}{nearest(command, COMMANDS)};"
                          f" there are {', '.join(COMMANDS)} (see --help)", USAGE)
        else:
            where = f"{command}: "
            options = parse(command, arguments[1:])
            where = f"{options.name or command}: "
            if "--help" in options.flags:
                write_out([command_help(command, options)])
            else:
                return COMMANDS[command][0](options) or 0
    except BrokenPipeError:  # `query … | head`: the rest is not wanted
        pass
    except (Failure, OSError, MemoryError) as error:
        failure = as_failure(error, "")
        report(f"{where}{failure}")
        if not options and ("insert" in arguments or '"insert"' in nearest(command, COMMANDS)):
            report(keep_unread(arguments))
        return failure.status
    return 0


if __name__ == "__main__":
    # All is written and closed. Taking Python down would cost a tenth of an insert's time, and a signal
    # that came meanwhile would give an exit status that is not true.
    os._exit(main())

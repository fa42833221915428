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

TYPE_CHECKING = False  # what `typing` calls it; importing typing would cost a tenth of an insert's time
if TYPE_CHECKING:
    import signal
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from operator import itemgetter
    from types import FrameType
    from typing import Any, BinaryIO, TypeVar

    Result = TypeVar("Result")
else:
    # The C halves: `signal` adds enums, and `sqlite3` dates, that nothing here needs; they would double the imports.
    import _signal as signal
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
        self.check()
        self.open = True
        if self.caught:  # between the two
            self.open = False
            self.check()

    def __exit__(self, *_: object) -> None:
        self.open = False


SIGNALS = Signals()


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

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.next = self.start + 1.0 if sys.stderr and sys.stderr.isatty() else float("inf")
        self.shown = False

    def show(self, text: str, share: float = 0.0) -> None:
        """Show *text* and, if the *share* that is done is known, percent and time left."""
        now = time.monotonic()
        if now >= self.next:
            self.next, self.shown = now + 0.2, True
            left = int((now - self.start) * (1 / share - 1)) if share else 0
            ending = f", {share:.0%}, {left // 60}:{left % 60:02} left" if share else f", {int(now - self.start)} s"
            complain(f"\r\x1b[K{text}{ending}")

    def clear(self) -> None:
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


    def same_as(self, other: Column) -> bool:
        return self.in_words() == other.in_words()

    def in_words(self) -> str:
        default = "" if self.default is None else f" DEFAULT {' '.join(self.default.split())}"
        return f"{self.type}{'' if self.nullable else ' NOT NULL'}{default}".strip() or "any type"


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
    rows = db.execute(f"PRAGMA main.table_xinfo({quote(table)})").fetchall()
    indexes = db.execute(f"PRAGMA main.index_list({quote(table)})").fetchall()
    # An INTEGER PRIMARY KEY needs no index of its own, as it is the rowid.
    rowid_alias = not any(index[3] == "pk" for index in indexes)
    return [Column(row, rowid_alias) for row in rows]


MADE = ("SELECT type, name, sql FROM sqlite_master"
        " WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY rowid")


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
        made = db.execute(MADE).fetchall()
        tables = [name for kind, name, _ in made if kind == "table"]
        if table is None and len(tables) != 1:
            raise Failure(f"{path}: has tables {', '.join(tables)}; name one with --table" if tables else
                          f"{path}: has no CREATE TABLE")
        if table is not None and table not in tables:
            raise Failure(f"{path}: no table {table}; it has {', '.join(tables) or 'none'}")
        table = table or tables[0]
        return Schema(path, table, columns_of(db, table), made)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; name the schema with --schema FILE or DBTOOL_SCHEMA") from None
    except UnicodeDecodeError:
        raise Failure(f"{path}: is not SQL text in UTF-8") from None
    except (sqlite3.Error, sqlite3.Warning) as error:
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
        elif skip_text and char != "\ufeff" and (start := line_start(text, position)) is not None:
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
        return Failure(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), status)
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
    elif "readonly" in text and os.path.exists(path + "-journal"):
        text = "has a transaction that a writer left unfinished; the next writer rolls it back, such as dbtool.py retry"
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


# Where several hosts may see one file. WAL needs memory that all its users share, which hosts don't:
# sqlite.org/wal.html. A rollback journal needs only locks.
NETWORK = frozenset((
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse.ceph", "fuse.ceph-fuse", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs"))


def file_system(path: str, mountinfo: str) -> str:
    """Return the type of the file system that holds *path*, by the text of /proc/self/mountinfo (proc(5)), or ''."""
    found, kind = "", ""
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        point = fields.split(" ")[4]
        for code, char in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
            point = point.replace("\\" + code, char)
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(found):  # of two at one place, the later one hides the other
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


def connect_to_write(path: str, schema: Schema, deadline: float) -> sqlite3.Connection:
    """Open or create the results file at *path* and begin a transaction that holds the write lock."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None)
    db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)

    def one(sql: str) -> Any:
        return patiently(lambda: db.execute(sql).fetchone(), deadline)[0]

    try:
        journal, network = wanted_journal(path)
        is_new = not one("SELECT count(*) FROM sqlite_master")
        if one("PRAGMA journal_mode") != journal:
            if not is_new:
                check_columns(columns_of(db, schema.table), schema)  # another program's file is left as it is
            if journal == "wal":
                one("PRAGMA journal_mode = WAL")
            else:
                try:
                    db.execute("PRAGMA journal_mode = DELETE").fetchone()
                    is_new = True
                except sqlite3.OperationalError as error:
                    if not is_busy(error):
                        raise  # else others are using it, and one of the next inserts will switch it
        db.execute("PRAGMA synchronous = FULL")
        patiently(lambda: db.execute("BEGIN IMMEDIATE"), deadline)
        if one("SELECT count(*) FROM sqlite_master"):
            check_columns(columns_of(db, schema.table), schema)
        else:
            for _, _, sql in schema.made:
                db.execute(sql)
        if network and is_new:
            report(f"{path}: is on {network}, a network file system, so it has a DELETE journal instead of WAL;"
                   " let only one host write to it at a time (DBTOOL_JOURNAL=wal|delete overrides)")
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
        values = list(record.values())
        for index, convert in self.conversions:
            values[index] = convert(values[index])
        return values


def insert_statement(table: str, names: Iterable[str], on_conflict: str) -> str:
    # OR IGNORE would also drop rows that break a NOT NULL or CHECK constraint: DO NOTHING does not.
    quoted = [quote(name) for name in names]
    if not quoted:
        return f"INSERT INTO {quote(table)} DEFAULT VALUES"
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

    def refusal(self, error: Exception) -> Misfit:
        return Misfit(f"record {self.number}: {why_refused(self.schema, self.record, error)}")

    def insert(self, db: sqlite3.Connection, first: tuple[str, Sequence[Any]]) -> dict[str, Any]:
        """Insert *first* and all pairs that follow; return the claim.

        The claim is the first row that was not there before, with its key: given, worked out from
        the column's default, or the rowid. As a transaction happens whole or not at all, the claim
        tells later whether it happened. If all rows were there, it is empty: doing it again is harmless.
        """
        claim: dict[str, Any] = {}
        try:
            for _, row in itertools.chain([first], self.pairs):
                claim = self.insert_claimed(db, dict(zip(self.record, row)))
                if claim:
                    break
            for sql, group in itertools.groupby(self.pairs, itemgetter(0)):
                db.executemany(sql, map(itemgetter(1), group))
        except (ValueError, OverflowError, sqlite3.IntegrityError, sqlite3.InterfaceError,
                sqlite3.ProgrammingError) as error:
            raise self.refusal(error) from None
        return claim

    def insert_claimed(self, db: sqlite3.Connection, row: dict[str, Any]) -> dict[str, Any]:
        """Insert one row; return it with its key, or nothing if a row with that key was there before."""
        schema = self.schema
        for column in schema.key:
            if column.name not in row and column.default is not None:
                row[column.name] = db.execute(f"SELECT {column.default}").fetchone()[0]
        key = {column.name: row[column.name] for column in schema.key if column.name in row}
        known = self.on_conflict != "fail" and bool(key) and holds(db, schema, key)
        cursor = db.execute(insert_statement(schema.table, row, self.on_conflict), list(row.values()))
        if known or cursor.rowcount == 0:
            return {}
        return row if schema.key and len(key) == len(schema.key) else {**row, "_rowid_": cursor.lastrowid}


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


def store(path: str, rows: Rows, timeout: float, is_stored: Callable[[sqlite3.Connection], bool] = lambda db: False,
          before_commit: Callable[[dict[str, Any]], object] = lambda claim: None) -> int:
    """Insert *rows* into the file at *path*, all or none; return how many came.

    Within the transaction, *is_stored* may tell that nothing is left to do, and *before_commit*
    learns the claim. Raises sqlite3.Error, or Failure, which carries the claim if COMMIT failed:
    what was written may come to light all the same.
    """
    deadline = time.monotonic() + timeout
    first = next(rows.pairs, None)  # before the file is touched: the producer may be slow, or the record bad
    if first is None:
        return 0
    db = connect_to_write(path, rows.schema, deadline)
    try:
        if is_stored(db):
            return 0
        claim = rows.insert(db, first)
        if claim:
            before_commit(claim)
        commit(db, path, deadline, claim)
        return rows.number
    except sqlite3.OperationalError:
        SIGNALS.check()
        raise
    finally:
        db.close()  # without COMMIT, this rolls back


def commit(db: sqlite3.Connection, path: str, deadline: float, claim: dict[str, Any] | None = None) -> None:
    db.set_progress_handler(None, 0)  # from here on, a signal comes too late
    try:
        patiently(lambda: db.execute("COMMIT"), deadline)
    except sqlite3.Error as error:
        failure = as_failure(error, path)
        raise Failure(str(failure), failure.status, claim) from None


def insert(database: str, incoming: Iterable[Mapping[str, Any]], schema: Schema | None = None,
           on_conflict: str = "fail", timeout: float = LOCK_TIMEOUT_S) -> int:
    """Insert records, whose keys are columns, into the file *database*, all or none; return how many.

    *on_conflict* says what to do with a key that is there: fail, skip or replace; *timeout* is in
    seconds. Raises Failure. Unlike the command, it keeps nothing aside: the caller has the records.
    """
    path = os.path.realpath(database)
    try:
        return store(path, Rows(schema or read_schema(), incoming, on_conflict), timeout)
    except sqlite3.Error as error:
        raise as_failure(error, path) from None


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
        self.part = self.final = ""  # the path of the copy, when it is a file, and what it becomes when it is kept
        self.start, self.size = 0, 0
        self.is_file = self.ended = False
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
        if self.stream is None or self.is_file or self.ended:
            return
        try:
            descriptor = self.stream.fileno()
        except OSError:
            data = self.stream.read()
            self.ended = True
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
                self.ended = True  # a terminal would let one type on
                return
            self.add(data)
            yield data

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
        copy: Any
        for path in self.places:
            part, copy = "", None
            try:
                part, copy = new_part(path)
                copy_bytes(old, self.start, copy, self.size)
                break
            except OSError:
                if copy:
                    copy.close()
                    remove(part)
                remove_kept_folder(path)
        else:
            path, part, copy = "", "", io.BytesIO()
            copy_bytes(old, self.start, copy, self.size)
        self.final, self.part, self.copy, self.start = path, part, copy, 0
        old.close()
        if old_part:
            remove(old_part)
            remove_kept_folder(old_part)

    def discard(self) -> None:
        """Forget the copy: it is stored, or is elsewhere."""
        if self.part:
            self.copy.close()
            remove(self.part)
            remove_kept_folder(self.part)
            self.part = ""

    def keep(self, claim: dict[str, Any] | None = None) -> str:
        """Bring what is held to a safe place; return where that is, as a message says it, or nothing."""
        if self.is_file and not claim:  # with one, running it again might store it twice
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
                os.fsync(self.copy.fileno())
                if claim:
                    write_claim(self.final, claim)
                os.rename(self.part, self.final)
                self.part = ""
                sync_folder(self.final)
                return f"the input is kept in {self.final}"
            except OSError:
                self.move()


def write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def copy_bytes(source: Any, start: int, target: Any, size: int) -> None:
    source.seek(start)
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
    part = os.path.join(folder, f".{name}.{os.getpid()}.part")
    for _ in range(100):
        if folder.endswith("-kept") and not os.path.isdir(folder):
            try:
                os.mkdir(folder)
            except FileExistsError:  # another process was faster
                pass
        try:
            return part, io.FileIO(part, "w+")
        except FileNotFoundError:
            if not folder.endswith("-kept"):
                break  # else a retry may have removed the folder just now
    raise FileNotFoundError(2, "No such file or directory", folder)


def remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


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

    text = json.dumps(claim, default=lambda blob: {"$hex": blob.hex()})
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
            claim = dict(json.load(file))
            return {name: structure(value) if isinstance(value, dict) else value for name, value in claim.items()}
    except FileNotFoundError:
        return None


def kept_files(path: str) -> list[str]:
    """Return the files kept for the database at *path*, oldest first."""
    found = []
    spare = dict.fromkeys([*spare_folders(), os.path.dirname(path)])
    for folder, prefix in [(path + "-kept", ""), *((folder, spare_prefix(path)) for folder in spare)]:
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
    if place == low or values[low] == values[low + 1]:
        return values[low]
    return values[low] + (values[low + 1] - values[low]) * (place - low)


def stddev(values: list[float]) -> float | None:
    """Return the standard deviation of a sample, divided by n - 1; None for fewer than two, or for infinite, values."""
    import statistics

    return statistics.stdev(values) if len(values) > 1 and not any(value - value for value in values) else None


def batches(cursor: sqlite3.Cursor) -> Iterator[list[tuple[Any, ...]]]:
    count = 0
    for rows in iter(lambda: cursor.fetchmany(ROWS_AT_ONCE), []):
        yield rows
        count += len(rows)
        PROGRESS.show(f"{count:,} rows")


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


def write_out(texts: Iterable[str | bytes], target: str = "") -> None:
    """Write *texts* as UTF-8 to standard output, or to the file *target*, which appears when it is whole."""
    if not target and sys.stdout is None:
        raise Failure("standard output is closed")
    path = os.path.realpath(target)
    device = os.path.exists(target) and not os.path.isfile(target)
    part, out = "", sys.stdout.buffer if not target else None
    try:
        if out is None and device:
            out = open(target, "wb")
        elif out is None:
            part, out = new_part(path)
        for text in texts:
            with SIGNALS:  # the reader may be slow
                write_all(out, text.encode(errors="surrogateescape") if isinstance(text, str) else text)
        out.flush()
        if part:
            out.close()
            os.replace(part, path)
            part = ""
    except (OSError, Failure) as error:
        if out and not part:  # what is still in the buffer would fail or wait again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, (Failure, BrokenPipeError)):
            raise
        failure = as_failure(OSError(error.errno, error.strerror), path)
        raise Failure(f"{target or 'standard output'}: {failure}", failure.status) from None
    finally:
        if part:
            os.unlink(part)


def refuse_database(path: str, target: str) -> None:
    """Raise Failure if writing *target* would destroy a database: this one, its parts, or another."""
    final = os.path.realpath(target)
    if target and os.path.isfile(final):
        with open(final, "rb") as file:
            if file.read(16) == b"SQLite format 3\0" or final.startswith((path + "-wal", path + "-shm")):
                raise Failure(f"{target} is a database; name another file for the output")


# -------------------------------------------------------------------------------------------- reading


def uri_to_read(path: str) -> tuple[str, Callable[[], None], Callable[[], None]]:
    """Return the URI that opens the file at *path* without changing it, and two functions to call later.

    The first raises Failure if what was read can't be relied on; the second tidies up, once it is closed.
    """
    if not os.path.isfile(path):
        raise Failure("is a folder; name a file in it" if os.path.isdir(path) else "there is no such file")
    had_wal = bool(os.path.exists(path + "-wal") and os.path.getsize(path + "-wal"))
    # SQLite needs to create files beside one in WAL mode even to read it. Where it can't, and no
    # writer is at work, the file can be read as one that does not change, if in the end it has not.
    with open(path, "rb") as file:
        is_wal = file.read(19)[18:] == b"\2"
    frozen = is_wal and not had_wal and not (os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK))
    before = os.stat(path)

    def check() -> None:
        after = os.stat(path)
        if frozen and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise Failure("changed while it was read; run this again", TRY_AGAIN)

    def tidy() -> None:
        if not frozen and not had_wal and os.path.exists(path + "-wal"):
            remove_wal(path)

    return file_uri(path) + ("?immutable=1" if frozen else "?mode=ro"), check, tidy


def file_uri(path: str) -> str:
    """Return the URI of a file; a byte of its name that is not UTF-8 is half a surrogate pair in *path* (PEP 383)."""
    return "file://" + "".join(f"%{ord(char) & 255:02x}" if char in "%?#" or "\udc80" <= char <= "\udcff" else char
                               for char in path)


def reading(path: str, action: Callable[[sqlite3.Connection], Result], timeout: float = LOCK_TIMEOUT_S,
            guarded: bool = True) -> Result:
    """Return action(db), with a connection to the file at *path* that cannot write and leaves no files behind.

    Unless *guarded*, the connection may create other files.
    """
    uri, check, tidy = uri_to_read(path)
    db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None)
    try:
        patiently(lambda: db.execute("SELECT count(*) FROM sqlite_master").fetchone(), time.monotonic() + timeout)
        db.set_progress_handler(SIGNALS.pending, STEPS_BETWEEN_CHECKS)
        if guarded:
            db.execute("PRAGMA query_only = ON")
            db.set_authorizer(authorize)
        result = action(db)
        check()
        return result
    except sqlite3.Error:
        SIGNALS.check()
        raise
    finally:
        db.close()
        tidy()


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
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        SIGNALS.check()
        raise unanswered(db, error) from None
    if cursor.description is None:
        raise Failure("the SQL asks for nothing; write a SELECT")


def query(database: str, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = (),
          timeout: float = LOCK_TIMEOUT_S) -> list[dict[str, Any]]:
    """Return the rows that answer one SQL question, as dictionaries; nothing can be written. Raises Failure."""

    def answer(db: sqlite3.Connection) -> list[dict[str, Any]]:
        cursor = db.cursor()
        try:
            ask(cursor, sql, parameters)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row)) for row in cursor]
        finally:
            cursor.close()

    path = os.path.realpath(database)
    try:
        return reading(path, answer, timeout)
    except sqlite3.Error as error:
        raise as_failure(error, path) from None


def unanswered(db: sqlite3.Connection, error: Exception) -> Failure:
    """Return why a query failed: the machine's fault, or the question's."""
    failure = as_failure(error, "")
    return failure if failure.status == TRY_AGAIN else Failure(why_unanswered(db, str(error)))


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


# ---------------------------------------------------------------------------------------- whole files


def merge(path: str, source: str, schema: Schema, timeout: float = LOCK_TIMEOUT_S,
          watch: Callable[[], object] = lambda: None) -> tuple[int, int, int]:
    """Add the rows of the file at *source* to the one at *path*, by primary key, in one transaction.

    Return how many were added, how many were known, and how many of those have other values there.
    """
    if not schema.key or any(column.rowid for column in schema.key):
        raise Failure(f"the key of {schema.table} is a number that every file counts for itself, so the same one"
                      " means different rows; merge needs a primary key that is unique everywhere")
    deadline = time.monotonic() + timeout
    table, key = quote(schema.table), [quote(column.name) for column in schema.key]

    def readable(db: sqlite3.Connection) -> set[str]:
        found = {column.name for column in columns_of(db, schema.table)}
        if not found:
            raise Failure(f"has no table {schema.table}")
        lacking = [column.name for column in schema.key if column.name not in found]
        is_null = " OR ".join(f"{name} IS NULL" for name in key)
        if lacking or db.execute(f"SELECT 1 FROM {table} WHERE {is_null} LIMIT 1").fetchone():
            raise Failure(f"has rows without the key {', '.join(lacking or key)}, by which rows are told apart")
        return found

    found = reading(source, readable, timeout)
    if os.path.exists(path) and os.path.samefile(path, source):
        raise Failure("is the very file to merge into")
    names = [column.name for column in schema.columns if column.name in found and not column.generated]
    check_names(schema, [*names, *(found - {column.name for column in schema.columns})])
    columns = ", ".join(map(quote, names))
    uri, check, tidy = uri_to_read(source)
    db = connect_to_write(path, schema, deadline)
    db.execute("COMMIT")  # a new file has its table now
    db.close()
    db = sqlite3.connect(file_uri(path) + "?mode=rw", uri=True, timeout=0, isolation_level=None)
    try:

        def watched() -> int:
            watch()
            return SIGNALS.pending()

        db.set_progress_handler(watched, STEPS_BETWEEN_CHECKS)
        db.execute("PRAGMA synchronous = FULL")
        patiently(lambda: db.execute("ATTACH ? AS source", (uri,)), deadline)
        patiently(lambda: db.execute("BEGIN IMMEDIATE"), deadline)
        (total,) = patiently(lambda: db.execute(f"SELECT count(*) FROM source.{table}").fetchone(), deadline)
        # WHERE true: without it, SQLite would take ON CONFLICT for the ON of a join.
        added = db.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM source.{table} WHERE true"
                           f" ON CONFLICT ({', '.join(key)}) DO NOTHING").rowcount
        different = 0
        if added < total:
            (different,) = db.execute(
                f"SELECT count(*) FROM source.{table} AS s JOIN main.{table} AS m USING ({', '.join(key)}) WHERE"
                f" ({', '.join('s.' + quote(n) for n in names)}) IS NOT ({', '.join('m.' + quote(n) for n in names)})"
            ).fetchone()
        check()
        commit(db, path, deadline)
        return added, total - added, different
    except sqlite3.OperationalError:
        SIGNALS.check()
        raise
    finally:
        db.close()
        tidy()


def snapshot(path: str, target: str, timeout: float = LOCK_TIMEOUT_S) -> None:
    """Copy the file at *path* to *target*: a path, compressed if it ends in .gz or .xz, or - for standard output."""
    import shutil
    import tempfile

    if os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target):
        raise Failure("is the very file to copy")
    if target != "-" and os.path.exists(target) and not os.path.isfile(target):
        raise Failure(f"{target} is a folder or device; name a file, or - for standard output")
    if target != "-" and any(os.path.exists(target + ending) for ending in ("-wal", "-journal")):
        raise Failure(f"{target} is in use as a database; name another file")
    final = os.path.join(tempfile.gettempdir(), f"dbtool-{os.getpid()}.db") if target == "-" else target
    compressed = final.endswith((".gz", ".xz"))
    part, file = new_part(final + ".copy" if compressed else final)
    packed = ""
    size = os.path.getsize(path) if os.path.exists(path) else 0

    def copy(db: sqlite3.Connection) -> None:
        def watched() -> int:
            PROGRESS.show("copying", min(0.99, os.path.getsize(part) / size))
            return SIGNALS.pending()

        db.set_progress_handler(watched, STEPS_BETWEEN_CHECKS)
        db.execute("VACUUM INTO ?", (file_uri(part),))

    try:
        os.fchmod(file.fileno(), 0o600)  # until it has the rights of what it copies
        file.close()
        reading(path, copy, timeout, guarded=False)
        if target == "-":
            with open(part, "rb") as whole:
                write_out(iter(lambda: whole.read(CHUNK_BYTES), b""))
            return
        if compressed:
            packed, out = new_part(final)
            with out, open(part, "rb") as whole:
                done, size = 0, os.path.getsize(part)
                with compressor(final)(out) as pressed:
                    for data in iter(lambda: whole.read(CHUNK_BYTES), b""):
                        SIGNALS.check()
                        pressed.write(data)
                        done += len(data)
                        PROGRESS.show("compressing", done / size)
        ready = packed or part
        with open(ready, "rb") as whole:
            os.fsync(whole.fileno())
        shutil.copymode(path, ready)
        os.replace(ready, final)
        sync_folder(final)
    finally:
        PROGRESS.clear()
        for left in filter(None, (part, packed)):
            remove(left)


def compressor(target: str) -> Callable[[Any], Any]:
    """Return what wraps a binary file to compress what is written to it, by the name of the *target*."""
    if target.endswith(".gz"):
        import gzip

        return lambda file: gzip.GzipFile("", "wb", 6, file, mtime=0)
    import lzma

    return lambda file: lzma.LZMAFile(file, "wb", preset=2)  # the default takes 5 times as long, for 5 % less


class Migration:
    """What brings the table in the open file *db* to the *schema*: `steps`, in words, and how to take them.

    The table is made anew from schema.sql and the rows are copied, as sqlite.org/lang_altertable.html
    advises for any change: the file then holds the very text of schema.sql.
    """

    def __init__(self, db: sqlite3.Connection, schema: Schema, drop: Iterable[str], fill: Mapping[str, str]) -> None:
        self.db, self.schema = db, schema
        self.old = {column.name: column for column in columns_of(db, schema.table)}
        self.new = {column.name: column for column in schema.columns}
        self.made = {name: (kind, sql) for kind, name, sql in db.execute(MADE)}
        self.wanted = {name: (kind, sql) for kind, name, sql in schema.made}
        for names, others in ((self.old, self.new), (self.made, self.wanted)):
            folded = {name.lower(): name for name in others}
            for name in names:
                if folded.get(name.lower(), name) != name:
                    raise Failure(f"{name} is {folded[name.lower()]} in {schema.path}; for SQLite these are the same,"
                                  f" so write {name} there")
        self.fill: dict[str, Any] = {}
        for name, text in fill.items():
            if name not in self.new:
                raise Failure(f"--fill {name}: is no column of {schema.path}{nearest(name, self.new)}", USAGE)
            self.fill[name] = fit_text(self.new[name], text)
        self.gone = [name for name in self.old if name not in self.new
                     or (self.new[name].generated and not self.old[name].generated)]
        self.check_dropped(set(drop))
        self.dropped = [name for name, (kind, _) in self.made.items() if kind == "index" and name not in self.wanted
                        and any(row[2] in self.gone for row in db.execute(f"PRAGMA index_info({quote(name)})"))]
        self.steps = [*self.table_steps(), *self.other_steps()]

    def check_dropped(self, drop: set[str]) -> None:
        for name in drop:
            if name not in self.gone:
                raise Failure(f"--drop {name}: {self.schema.path} has that column" if name in self.new else
                              f"--drop {name}: the file has no such column{nearest(name, self.gone)}", USAGE)
        kept = [name for name in self.gone if name not in drop]
        if kept:
            raise Failure(f"column {', '.join(kept)} is {'generated' if kept[0] in self.new else 'not'} in"
                          f" {self.schema.path}; add it there, or drop it for good"
                          f" with: {' '.join('--drop ' + name for name in kept)}")

    def table_steps(self) -> Iterator[str]:
        table = self.schema.table
        if not self.old:
            yield f"create table {table}"
            return
        filled = bool(self.db.execute(f"SELECT 1 FROM {quote(table)} LIMIT 1").fetchone())
        for name, column in self.new.items():
            if name not in self.old:
                if column.needed and not column.nullable and filled and name not in self.fill:
                    raise Failure(f"column {name} is new, NOT NULL and without a default; say what the old rows"
                                  f" get: --fill {name}=VALUE")
                yield f"add column {name} {column.type}".rstrip()
            elif self.old[name].type.upper() != column.type.upper():
                yield f"retype column {name} from {self.old[name].type or 'none'} to {column.type or 'none'}"
        yield from (f"drop column {name}" for name in self.gone)
        yield from (f"drop index {name}" for name in self.dropped)
        if essence(self.made[table][1]) != essence(self.wanted[table][1]):
            (count,) = self.db.execute(f"SELECT count(*) FROM {quote(table)}").fetchone()
            yield f"rewrite table {table}: {count:,} rows"

    def other_steps(self) -> Iterator[str]:
        for name, (kind, sql) in self.wanted.items():
            if name != self.schema.table and name not in self.made:
                yield f"create {kind} {name}"
            elif kind != "table" and essence(self.made[name][1]) != essence(sql):
                yield f"replace {kind} {name}"

    def take(self) -> None:
        """Take the steps in the transaction that is open, with legacy_alter_table on, so that no other SQL changes."""
        db, table = self.db, quote(self.schema.table)
        for name, (kind, _) in self.made.items():
            if kind != "table":
                db.execute(f"DROP {kind} IF EXISTS {quote(name)}")
        old = quote(self.schema.table + " before migrate")
        if self.old:
            db.execute(f"ALTER TABLE {table} RENAME TO {old}")
        others = {name for name, (kind, _) in self.made.items() if kind == "table" and name != self.schema.table}
        for kind, name, sql in self.schema.made:
            if kind == "table" and name not in others:
                db.execute(sql)
        if self.old:
            names = [name for name, column in self.new.items()
                     if not column.generated and (name in self.old or name in self.fill)]
            taken = [(f"coalesce({quote(name)}, ?)" if name in self.fill else quote(name)) if name in self.old else "?"
                     for name in names]
            if not names:  # no column is left: the rows get a default, so that there are as many as before
                column = next(column for column in self.schema.columns if not column.generated)
                names, taken = [column.name], [f"({column.default or 'NULL'})"]
            self.check_values(old)
            if has_rowid(db, old) and has_rowid(db, table) and not any(c.rowid for c in self.schema.columns):
                names, taken = ["_rowid_", *names], ["_rowid_", *taken]
            # OR ABORT: a constraint of the new table may say to pass over or replace rows instead.
            db.execute(f"INSERT OR ABORT INTO {table} ({', '.join(map(quote, names))}) SELECT {', '.join(taken)}"
                       f" FROM {old}", [self.fill[name] for name in names if name in self.fill])
            if db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sqlite_sequence'").fetchone()[0]:
                numbered = "(SELECT max(seq) FROM sqlite_sequence WHERE name IN (?, ?))"
                both = (self.schema.table, self.schema.table + " before migrate")
                db.execute(f"UPDATE sqlite_sequence SET seq = {numbered} WHERE name = ?", (*both, both[0]))
            db.execute(f"DROP TABLE {old}")
        self.make_others()

    def make_others(self) -> None:
        """Make the indexes, views and triggers again: first those that only the file has."""
        own = {name: made for name, made in self.made.items() if name not in self.wanted and name not in self.dropped}
        for name, (kind, sql) in {**own, **self.wanted}.items():
            if kind != "table":
                try:
                    self.db.execute(sql)
                except sqlite3.OperationalError as error:
                    raise Failure(f"{kind} {name} can't be made again: {error}") from None
        for name, (kind, _) in {**own, **self.wanted}.items():
            if kind == "view":
                try:
                    self.db.execute(f"SELECT * FROM {quote(name)} LIMIT 0").fetchall()
                except sqlite3.OperationalError as error:
                    raise Failure(f"view {name} would not work any more: {error}; change or drop it first") from None

    def check_values(self, old: str) -> None:
        """Raise Failure if a value would not be the same in the new type of its column, as a round trip tells."""
        for name, column in self.new.items():
            was = self.old[name].affinity if name in self.old else column.affinity
            if was == column.affinity or column.generated or column.affinity not in ("INTEGER", "REAL", "TEXT"):
                continue
            value = quote(name)
            there = f"CAST({value} AS {column.affinity})"
            same = f"CAST({there} AS {was}) IS {value}" if "TEXT" in (was, column.affinity) else f"{there} IS {value}"
            if was == "TEXT":
                same += f" OR CAST(CAST({value} AS INTEGER) AS TEXT) IS {value}"
            row = self.db.execute(f"SELECT {value}, count(*) FROM {old}"
                                  f" WHERE {value} IS NOT NULL AND NOT ({same})").fetchone()
            if row[1]:
                raise Failure(f"column {name}: {row[1]} values do not fit {column.type} without a change, such as"
                              f" {shown(row[0])}; mend them first, or keep the type")


def has_rowid(db: sqlite3.Connection, table: str) -> bool:
    try:
        db.execute(f"SELECT _rowid_ FROM {table} LIMIT 0").fetchall()
        return True
    except sqlite3.OperationalError:  # it is WITHOUT ROWID
        return False


def migrate(path: str, schema: Schema, drop: Iterable[str] = (), fill: Mapping[str, str] | None = None,
            timeout: float = LOCK_TIMEOUT_S) -> list[str]:
    """Bring the file at *path* to *schema* in one transaction; return what was done."""
    deadline = time.monotonic() + timeout
    db = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        size = os.path.getsize(path)

        def watched() -> int:
            grown = os.path.getsize(path + "-wal") if os.path.exists(path + "-wal") else 0
            PROGRESS.show("rewriting", min(0.99, grown / size))
            return SIGNALS.pending()

        db.set_progress_handler(watched, STEPS_BETWEEN_CHECKS)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA legacy_alter_table = ON")
        patiently(lambda: db.execute("BEGIN IMMEDIATE"), deadline)
        migration = Migration(db, schema, drop, fill or {})
        if migration.steps:
            migration.take()
            commit(db, path, deadline)
        return migration.steps
    except sqlite3.OperationalError:
        SIGNALS.check()
        raise
    except sqlite3.IntegrityError as error:
        hint = "; --fill COLUMN=VALUE replaces NULL" if "NOT NULL" in str(error) else ""
        raise Failure(f"{error}; nothing was changed{hint}") from None
    finally:
        PROGRESS.clear()
        db.close()


def essence(sql: str) -> str:
    """Return SQL without comments, white space and the quotes of names, to tell whether two texts say the same."""
    import re

    tokens = re.findall(r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^]]*\]|\w+|\S""", sql, re.S)
    return " ".join(token[1:-1] if token[0] in '"`[' else token for token in tokens if token[:2] not in ("--", "/*"))


# ------------------------------------------------------------------------------------------- commands


class Options:
    """The words of a command line: `words` by the names in its usage, `flags` with every value given."""

    def __init__(self, words: dict[str, str], flags: dict[str, list[str]], columns: list[tuple[str, str]],
                 others: list[str]) -> None:
        self.words, self.flags, self.columns, self.others = words, flags, columns, others
        self.name = words.get("DATABASE", "")
        self.path = os.path.realpath(self.name)  # always a plain file, whatever SQLite makes of the name

    def last(self, flag: str, default: str) -> str:
        return self.flags.get(flag, [default])[-1]

    def as_named(self, text: str) -> str:
        """Return *text* with the path of the database as the user wrote it, where that names the same place."""
        return text.replace(self.path, self.name) if os.path.abspath(self.name) == self.path else text

    def retry_line(self) -> str:
        """Return the command that stores what this one kept."""
        import shlex

        words = ["dbtool.py", "retry", self.name]
        for flag in ("--schema", "--table", "--skip-text"):
            words += [flag, *self.flags[flag][-1:]] if flag in self.flags else []
        return " ".join(shlex.quote(word) for word in words if word)

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


def insert_command(options: Options) -> None:
    """Store the JSON objects on standard input as rows, all of them or none."""
    source = Input(sys.stdin.buffer if sys.stdin else None, kept_places(options.path))

    def watched() -> Iterator[bytes]:
        done = 0
        for data in source.chunks():
            yield data
            done += len(data)
            PROGRESS.show(f"{rows.number:,} rows", done / source.size)

    try:
        skip_text = "--skip-text" in options.flags
        source.read(skip_text)
        rows = Rows(options.schema(), records(watched(), skip_text), options.conflict)
        store(options.path, rows, options.timeout)
        PROGRESS.clear()
        source.discard()
    except BaseException as error:
        try:
            if not isinstance(error, Failure) or error.status < SIGNALLED:
                source.read()  # what is still to come
        except Failure:
            pass  # a signal ends that
        where = source.keep(getattr(error, "claim", None))
        if not isinstance(error, (Failure, sqlite3.Error, OSError)):
            report(where)
            raise  # a bug, or no memory left
        failure = as_failure(error, options.path)
        if where.startswith("the input is kept"):
            where = f"{options.as_named(where)}; when that is mended, run: {options.retry_line()}"
        raise Failure(f"{failure}; {where}" if where else str(failure), failure.status) from None


def insert_manual_command(options: Options) -> None:
    """Store one row, each column given as a flag."""
    schema = options.schema()
    record: dict[str, Any] = {}
    for flag, text in [*options.columns, *((name, None) for name in options.flags.get("--null", []))]:
        column = flag_column(schema, flag)
        if column.name in record:
            raise Failure(f"column {column.name} is given twice", USAGE)
        record[column.name] = fit(column, None) if text is None else fit_text(column, text)
    store(options.path, Rows(schema, [record], options.conflict), options.timeout)


def flag_column(schema: Schema, flag: str) -> Column:
    """Return the column that a flag names: itself, or with hyphens for underscores."""
    name = flag[len("column."):] if flag.startswith("column.") and flag not in schema.by_name else flag
    alike = [column for column in schema.columns if column.name.replace("_", "-") == name.replace("_", "-")]
    if name in schema.by_name:
        return schema.by_name[name]
    if len(alike) == 1:
        return alike[0]
    raise Failure(f"{shown(name)} is no column of {schema.table}{nearest(name, schema.by_name)}", USAGE)


def query_command(options: Options) -> None:
    """Print the answer to an SQL question."""
    sql = options.words["SQL"]
    refuse_database(options.path, options.last("--output", ""))
    if "--output" not in options.flags:
        PROGRESS.next = float("inf")  # the rows themselves show that it goes on
    if sql == "-":
        if sys.stdin is None:
            raise Failure("standard input, which should hold the SQL, is closed")
        with SIGNALS:
            sql = sys.stdin.buffer.read().decode(errors="replace")
    parameters = {name: number_or_text(value) for name, value in options.pairs("--param")}

    def answer(db: sqlite3.Connection) -> None:
        cursor = db.cursor()
        try:
            ask(cursor, sql, parameters)
            write_out(formatted(cursor, options.last("--format", "csv"), options.last("--null", ""),
                                "--no-header" not in options.flags), options.last("--output", ""))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            SIGNALS.check()
            raise unanswered(db, error) from None
        finally:
            PROGRESS.clear()
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


def retry_command(options: Options) -> None:
    """Store what insert had to keep; leave what still can't be stored, and say why."""
    schema = options.schema()
    status = 0
    files = kept_files(options.path)
    if not files and not os.path.exists(options.path):
        raise Failure("there is no such file, and nothing is kept for it")
    for path in files:
        SIGNALS.check()
        try:
            retry_one(options, schema, path)
        except (Failure, sqlite3.Error, OSError) as error:
            failure = as_failure(error, options.path)
            status = max(status, failure.status)
            report(f"{options.name}: {options.as_named(path)}: {failure}")
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
            rows = Rows(schema, records(chunks, "--skip-text" in options.flags), options.conflict)
            store(options.path, rows, options.timeout, is_stored, lambda claim: write_claim(path, claim))
    except FileNotFoundError:
        pass  # another retry has stored it, or one that was stopped between the two removals
    for done in (path, path + ".claim.part", path + ".claim"):
        remove(done)


def merge_command(options: Options) -> None:
    """Add the rows of other files; print for each how many were added and how many known."""
    import functools

    schema, count = options.schema(), len(options.others)
    for number, name in enumerate(options.others):
        try:
            line, share = f"file {number + 1} of {count}", number / count
            added, known, different = merge(options.path, os.path.realpath(name), schema, options.timeout,
                                            functools.partial(PROGRESS.show, line, share))
        except (Failure, sqlite3.Error, OSError) as error:
            failure = as_failure(error, os.path.realpath(name))
            raise Failure(f"{name}: {failure}", failure.status) from None
        PROGRESS.clear()
        write_out([f"{name}: {added} added, {known} known\n"])
        if different:
            report(f"{options.name}: {name}: {different} known rows have other values there; they were not taken over")


def snapshot_command(options: Options) -> None:
    """Make a consistent, compact copy while others write."""
    target = options.words["TARGET"]
    snapshot(options.path, target if target == "-" else os.path.realpath(target), options.timeout)


def migrate_command(options: Options) -> None:
    """Bring a file to schema.sql; print what that takes."""
    schema, drop, fill = options.schema(), options.flags.get("--drop", []), dict(options.pairs("--fill"))
    if not os.path.isfile(options.path):
        raise Failure("there is no such file")
    if "--dry-run" in options.flags:
        steps = reading(options.path, lambda db: Migration(db, schema, drop, fill).steps, options.timeout)
    else:
        steps = migrate(options.path, schema, drop, fill, options.timeout)
    write_out([f"{step}\n" for step in steps])


def schema_command(options: Options) -> None:
    """Print the columns: type, whether needed, default, description; with a DATABASE also what differs there."""
    wanted = options.schema()
    said = descriptions(wanted)
    names = ["column", "type", "needed", "default", "description"]
    rows = [[column.name, column.type, "generated" if column.generated else "yes" if column.needed else "no",
             " ".join((column.default or "").split()), said.get(column.name, "")] for column in wanted.columns]
    if options.name:
        names.append("file")
        found = {c.name: c for c in reading(options.path, lambda db: columns_of(db, wanted.table), options.timeout)}
        for row, column in zip(rows, wanted.columns):
            other = found.pop(column.name, None)
            row.append("missing" if other is None else "same" if other.same_as(column) else other.in_words())
        rows += [[name, None, None, None, None, f"only there: {column.in_words()}"] for name, column in found.items()]
    db = sqlite3.connect(":memory:")
    quoted = ", ".join(map(quote, names))
    db.execute(f"CREATE TABLE columns ({quoted})")
    db.executemany(f"INSERT INTO columns VALUES ({', '.join('?' * len(names))})", rows)
    write_out(formatted(db.execute(f"SELECT {quoted} FROM columns"), options.last("--format", "table")))


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
    "--dry-run": ("", "print what would be done, and do nothing"),
    "--drop": ("COLUMN", "drop COLUMN, which the schema no longer has; may be repeated"),
    "--fill": ("COLUMN=VALUE", "what old rows get in a new column, or for NULL in one; may be repeated"),
    "schema --format": ("table|csv|tsv|json|jsonl", "how to print (default: table)"),
    "insert_manual --null": ("COLUMN", "give COLUMN the value NULL; may be repeated"),
}
# name: (function, words, flags besides --schema, --table and --timeout, what it does)
COMMANDS: dict[str, tuple[Callable[[Options], None], str, str, str]] = {
    "insert": (insert_command, "DATABASE", "--on-conflict --skip-text",
               "store the JSON objects on standard input as rows"),
    "insert_manual": (insert_manual_command, "DATABASE --COLUMN VALUE ...", "--null --on-conflict",
                      "store one row, each column given as a flag"),
    "query": (query_command, "DATABASE SQL|-", "--param --format --output --null --no-header",
              "print the answer to an SQL question as CSV; - reads the SQL from standard input"),
    "retry": (retry_command, "DATABASE", "--skip-text --on-conflict", "store what insert had to keep aside"),
    "merge": (merge_command, "DATABASE OTHER ...", "", "add the rows of other files that this one does not have"),
    "snapshot": (snapshot_command, "DATABASE TARGET|-", "",
                 "make a consistent copy while others write; TARGET may end in .gz or .xz; - is standard output"),
    "migrate": (migrate_command, "DATABASE", "--dry-run --drop --fill", "bring a file to the columns of schema.sql"),
    "schema": (schema_command, "[DATABASE]", "--format", "print the columns; with a DATABASE also how it differs"),
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
                flag = f"--{'column.' * taken}{column.name}"
                rows.append((f"{shown(flag) if ' ' in flag else flag} {kind}", said.get(column.name, "")))
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
    usage = COMMANDS[command][1]
    names = [name for name in usage.split()[:2] if name[0] != "-"]
    if "--help" in flags:
        return Options({}, flags, [], [])
    if words[:1] == [""]:
        raise Failure("the DATABASE has no name", USAGE)
    least, most = len(names) - (names[-1][0] == "["), len(names) + (usage.endswith("OTHER ...")) * len(words)
    if not least <= len(words) <= most:
        raise Failure(f"takes {' '.join(names)}, got {' '.join(map(shown, words)) or 'nothing'};"
                      f" see: dbtool.py {command} --help", USAGE)
    named = dict(zip((name.strip("[]").partition("|")[0] for name in names), words))
    options = Options(named, flags, columns, words[1:])
    _ = options.timeout, options.pairs("--param"), options.pairs("--fill")  # a wrong one ends here, with nothing read
    return options


def keep_unread(arguments: list[str]) -> None:
    """Keep what insert would have read, had its command line been right."""
    name = next((word for word in arguments[1:] if word[:1] not in ("", "-") and word not in COMMANDS), "")
    if sys.stdin and not sys.stdin.isatty():
        source = Input(sys.stdin.buffer, kept_places(os.path.realpath(name) if name else ""))
        try:
            source.read()
        except Failure:
            pass  # a signal ends that
        if source.size and not source.is_file:
            report(source.keep() + (f"; run: dbtool.py retry {name}" if name else ""))


def main(argv: Sequence[str] | None = None) -> int:
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
            where = f"{options.name}: " if options.name else where
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
        meant = "insert" in arguments or nearest(command, COMMANDS) == nearest("insert", COMMANDS)
        if options is None and meant:
            keep_unread(arguments)
        return failure.status


if __name__ == "__main__":
    SIGNALS.install()
    # All is written and closed. Taking Python down would cost a tenth of an insert's time, and a signal
    # that came meanwhile would give an exit status that is not true.
    os._exit(main())

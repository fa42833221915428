#!/usr/bin/env python3
"""dbadmin: what one does to a whole results file now and then.

    python3 dbadmin.py snapshot results.db backup.db.gz
    python3 dbadmin.py merge results.db node1.db node2.db

Commands (each has its own --help):

    merge          add the rows of other files that this one does not have
    snapshot       make a consistent copy while others write
    migrate        bring a file to the columns of schema.sql

dbtool.py, which must be beside this script, stores results and answers questions.

Exit status: 0 done; 1 refused or failed, or files that disagree; 2 wrong usage; 75 try again later (locked,
disk full, I/O error); 128+N stopped by signal N. Messages go to standard error, one line each.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from os.path import exists, isfile, join, realpath

try:
    import dbtool
except ImportError as missing:
    is_lost = missing.name == "dbtool"
    raise SystemExit("dbadmin: dbtool.py is missing; copy it to the folder of dbadmin.py" if is_lost else
                     f"dbadmin: {missing}: this Python can't be used") from None

import sqlite3

from dbtool import PROGRESS, Column, Command, Failure, Options, Schema, as_failure, columns_of, quote, scalar, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    import io
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from sqlite3 import Connection
    from typing import Any

if __name__ == "__main__":
    dbtool.SIGNALS.install()

# ----------------------------------------------------------------------------------------------- merge


def merge(path: str, source: str, schema: Schema, timeout: float = dbtool.LOCK_TIMEOUT_S) -> tuple[int, int, int]:
    """Add the rows of the file at *source* to the one at *path*, by primary key, in one transaction.

    *timeout* is in seconds. Return how many were added, how many were known, and how many of those have
    other values there. Raises Failure.
    """
    path, source = realpath(path), realpath(source)
    if not schema.key or schema.key[0].rowid:
        what = "is a number that every file counts for itself" if schema.key else "is missing"
        raise Failure(f"the key of {schema.table} {what}, so that nothing tells whether rows of two files are the"
                      " same; merge needs one that is unique everywhere, such as the id of the shipped schema.sql")
    with dbtool.reading(source, timeout) as db:
        if exists(path) and os.path.samefile(path, source):
            raise Failure("is the very file to merge into")
        names = names_to_merge(db, schema)
        with dbtool.writing(path, schema, timeout) as target:
            return add_rows(target, source, names, schema, timeout)


def names_to_merge(db: Connection, schema: Schema) -> list[str]:
    """Return the columns that the rows of a source bring; raise Failure if they don't fit *schema*."""
    columns = columns_of(db, schema.table)
    generated = [column.name for column in schema.columns if column.generated]
    names = [name for name, column in columns.items() if not column.generated and name not in generated]
    if not names:
        raise Failure(f"has no table {schema.table}")
    for column in schema.key:
        if column.name not in names:
            raise Failure(f"has no column {column.name}, by which rows are told apart")
    keys = [quote(column.name) for column in schema.key]
    is_null = " OR ".join(f"{key} IS NULL" for key in keys)
    if scalar(db, f"SELECT count(*) FROM {quote(schema.table)} WHERE {is_null}"):
        raise Failure(f"has rows without the key {', '.join(keys)}, by which rows are told apart")
    dbtool.check_names(schema, names)
    for name in names:
        source, target = columns[name], schema.by_name[name]
        # The numbers of a source are as they are: those with a fraction don't fit INTEGER.
        keeps = ("INTEGER",) if target.affinity == "INTEGER" else dbtool.RULES[target.affinity].keeps
        if source.affinity not in keeps:
            raise dbtool.other_type(source, target, schema, "migrate a copy of it first")
    return names


def add_rows(db: Connection, source: str, names: Sequence[str], schema: Schema, timeout: float) -> tuple[int, int, int]:
    """Add rows to the file that *db* has open for writing; return what merge does."""
    uri, before = dbtool.uri_to_read(source), dbtool.stamp(source)
    table, quoted = quote(schema.table), [quote(name) for name in names]
    columns, key = ", ".join(quoted), ", ".join(quote(column.name) for column in schema.key)
    db.execute("COMMIT")  # a new file has its table now
    deadline = time.monotonic() + timeout
    dbtool.patiently(db.execute, deadline, "ATTACH ? AS source", (uri,))
    dbtool.patiently(db.execute, deadline, "BEGIN IMMEDIATE")
    total = dbtool.patiently(scalar, deadline, db, f"SELECT count(*) FROM source.{table}")
    # WHERE true: without it, SQLite would take ON CONFLICT for the ON of a join.
    clause = dbtool.conflict_clause(db, schema.table, "fail")
    added = db.execute(f"INSERT{clause} INTO main.{table} ({columns}) SELECT {columns} FROM source.{table}"
                       f" WHERE true ON CONFLICT ({key}) DO NOTHING").rowcount
    different = 0
    if added < total:
        theirs, ours = (", ".join(f"{side}.{name}" for name in quoted) for side in "so")
        there, different = db.execute(
            f"SELECT count(*), sum(({theirs}) IS NOT ({ours})) FROM source.{table} AS s JOIN main.{table} AS o"
            f" USING ({key})").fetchone()
        if there < total:
            raise Failure(f"{total - there:,} rows are not there after merging: a trigger of the file drops them")
    dbtool.check_unchanged(source, uri, before)
    return added, total - added, different


# -------------------------------------------------------------------------------------------- snapshot


def snapshot(path: str, target: str, timeout: float = dbtool.LOCK_TIMEOUT_S) -> None:
    """Copy the file at *path* to *target*: a path, compressed if it ends in .gz or .xz, or - for standard output.

    What is at *target* is replaced. *timeout* is in seconds. Raises Failure, or OSError.
    """
    import tempfile

    to_stdout = target == "-"
    path, target = realpath(path), target if to_stdout else dbtool.output_path(target)
    if not to_stdout:
        check_target(path, target)
    is_compressed = target.endswith((".gz", ".xz"))
    copy = join(tempfile.gettempdir(), "dbtool.db") if to_stdout else target + ".copy" if is_compressed else target
    temporary, file = dbtool.new_temporary(copy, 0o600)  # until it has the rights of what it copies
    try:
        with file:
            copy_into(path, temporary, timeout)
            if to_stdout or is_compressed:
                dbtool.write_out(packed(file, target), "" if to_stdout else target, like=path)
            else:
                os.chmod(temporary, os.stat(path).st_mode)
                os.fsync(file.fileno())
                os.replace(temporary, target)
            if not to_stdout:
                dbtool.sync_folder(target)
    finally:
        PROGRESS.clear()
        dbtool.unlink(temporary)


def check_target(path: str, target: str) -> None:
    if exists(target):
        if exists(path) and os.path.samefile(path, target):
            raise Failure("is the very file to copy")
        if not isfile(target):
            raise Failure(f"{target} is a folder or device; name a file, or - for standard output")
    if exists(target + "-wal") or exists(target + "-journal"):
        raise Failure(f"{target} is in use as a database; name another file")


def copy_into(path: str, temporary: str, timeout: float) -> None:
    """Copy the database at *path* into the empty file *temporary*."""
    with dbtool.reading(path, timeout, guarded=False) as db:
        size = os.path.getsize(path)
        PROGRESS.measure = lambda: ("copying", os.path.getsize(temporary) / size)
        deadline = time.monotonic() + timeout
        dbtool.patiently(scalar, deadline, db, "SELECT count(*) FROM sqlite_master")  # says what is damaged
        dbtool.patiently(db.execute, time.monotonic() + timeout, "VACUUM INTO ?", (dbtool.file_uri(temporary),))


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
        yield from dbtool.pieces(file)
        return
    for data in dbtool.pieces(file):
        yield press.compress(data)
        PROGRESS.show("compressing", file.tell() / size)
    yield press.flush()


# --------------------------------------------------------------------------------------------- migrate


def migrate(path: str, schema: Schema, drop: Collection[str] = (), fill: Mapping[str, str] | None = None,
            timeout: float = dbtool.LOCK_TIMEOUT_S, dry_run: bool = False) -> list[str]:
    """Bring the file at *path* to *schema* in one transaction; return what was done, or with *dry_run* what would be.

    *drop* names the columns to drop; *fill* says, as text, what rows get in a new column, or
    instead of NULL; *timeout* is in seconds. Raises Failure.
    """
    path = realpath(path)
    if not isfile(path):
        raise Failure("there is no such file")
    values = fill_values(schema, fill or {})
    if dry_run:
        with dbtool.reading(path, timeout) as db:
            return Migration(db, schema, drop, values).steps()
    with dbtool.writing(path, None, timeout) as db:
        migration = Migration(db, schema, drop, values)
        steps = migration.steps()
        if steps:
            size = os.path.getsize(path)
            PROGRESS.measure = lambda: ("rewriting", dbtool.wal_size(path) / size)
            try:
                migration.rebuild()
            except sqlite3.IntegrityError as error:
                raise Failure(f"{error}; nothing was changed (--fill COLUMN=VALUE gives what is NULL a value)"
                              ) from None
        return steps


def fill_values(schema: Schema, fill: Mapping[str, str]) -> dict[str, Any]:
    """Return what rows get in which column; raise Failure if they can't."""
    values = {}
    for name, text in fill.items():
        if name not in schema.by_name:
            raise Failure(f"--fill {dbtool.no_column(schema, name)}; see {schema.path}", dbtool.USAGE)
        if schema.by_name[name].generated:
            raise Failure(f"--fill {name}: is generated by SQLite", dbtool.USAGE)
        values[name] = dbtool.fit_text(schema.by_name[name], text)
    return values


class Migration:
    """What it takes to bring the file that *db* has open to *schema*: checked, told in steps, and done.

    Raises Failure if something would be lost or changed that the user did not name.
    """

    def __init__(self, db: Connection, schema: Schema, drop: Collection[str], fill: Mapping[str, Any]) -> None:
        self.db, self.schema, self.fill = db, schema, fill
        self.old, self.new = columns_of(db, schema.table), schema.by_name
        self.objects = {name: (kind, name, sql) for kind, name, sql in db.execute(dbtool.SELECT_OBJECTS)}
        wanted = [name for _, name, _ in schema.objects]
        dbtool.check_case(self.old, self.new, schema)
        dbtool.check_case(self.objects, wanted, schema)
        self.dropped = [name for name in self.old
                        if name not in self.new or self.new[name].generated > self.old[name].generated]
        self.check_dropped(drop)
        self.check_filled()
        file_only = [name for name in self.objects if name not in wanted]
        self.lost_indexes = [name for name in file_only if self.indexes_dropped_column(name)]
        self.file_only = [self.objects[name] for name in file_only if name not in self.lost_indexes]

    def indexes_dropped_column(self, name: str) -> bool:
        return any(row[2] in self.dropped for row in self.db.execute(f"PRAGMA index_info({quote(name)})"))

    def check_dropped(self, drop: Collection[str]) -> None:
        for name in drop:
            if name not in self.dropped:
                raise Failure(f"--drop {name}: is no column that only the file has{dbtool.nearest(name, self.dropped)}",
                              dbtool.USAGE)
        kept = [name for name in self.dropped if name not in drop]
        if kept:
            raise Failure(f"{self.schema.path} has no place for column {', '.join(kept)}; add it there, or drop it for"
                          f" good with: --drop {' --drop '.join(kept)}")

    def check_filled(self) -> None:
        empty = [name for name, column in self.new.items()
                 if name not in self.old and name not in self.fill and column.needed and not column.nullable]
        if empty and self.old and scalar(self.db, f"SELECT EXISTS (SELECT 1 FROM {quote(self.schema.table)})"):
            raise Failure(f"column {', '.join(empty)} is new, NOT NULL and without a default; say what the old rows"
                          f" get: {' '.join(f'--fill {name}=VALUE' for name in empty)}")

    def steps(self) -> list[str]:
        """Return in words what is to be done; nothing if the file is as the schema says."""
        steps = []
        if self.old:
            for name, column in self.new.items():
                steps += self.column_steps(name, column)
        table = quote(self.schema.table)
        for name in self.fill:
            is_null = f"SELECT count(*) FROM {table} WHERE {quote(name)} IS NULL"
            if name in self.old and (count := scalar(self.db, is_null)):
                steps.append(f"fill column {name}: {count:,} rows")
        steps += [f"drop column {name}" for name in self.dropped]
        steps += [f"drop index {name}" for name in self.lost_indexes]
        for kind, name, sql in self.schema.objects:
            steps += self.object_steps(kind, name, sql)
        return steps

    def column_steps(self, name: str, column: Column) -> list[str]:
        if name not in self.old:
            return [f"add column {name} {column.type}".rstrip()]
        if self.old[name].type.upper() == column.type.upper():
            return []
        check_values(self.db, self.schema.table, self.old[name], column)
        return [f"retype column {name} from {self.old[name].type or 'none'} to {column.type or 'none'}"]

    def object_steps(self, kind: str, name: str, sql: str) -> list[str]:
        if name not in self.objects:
            return [f"create {kind} {name}"]
        if dbtool.normalized_tokens(sql) == dbtool.normalized_tokens(self.objects[name][2]):
            return []
        if name == self.schema.table:
            count = scalar(self.db, f"SELECT count(*) FROM {quote(name)}")
            return [f"rewrite table {name}: {count:,} rows"]
        return [] if kind == "table" else [f"replace {kind} {name}"]

    def rebuild(self) -> None:
        """Make the table anew from schema.sql, copy the rows, and make again all that hangs on it.

        As sqlite.org/lang_altertable.html advises for any change: the file then holds the very text of
        schema.sql. What only the file has is made first.
        """
        db, table = self.db, self.schema.table
        before = table + " before migrate"
        unusable_before = unusable(db)
        db.execute("PRAGMA legacy_alter_table = ON")  # so that renaming changes no other SQL
        for kind, name, _ in self.objects.values():
            if kind != "table":
                db.execute(f"DROP {kind} IF EXISTS {quote(name)}")
        if self.old:
            db.execute(f"ALTER TABLE {quote(table)} RENAME TO {quote(before)}")
        dbtool.create_objects(db, [item for item in self.schema.objects if item[0] == "table"])
        if self.old:
            self.copy_rows(before)
            db.execute(f"DROP TABLE {quote(before)}")
        for wanted in ("view", "index", "trigger"):  # a trigger may belong to a view
            for kind, name, sql in (*self.file_only, *self.schema.objects):
                if kind == wanted and (why := why_not(db, sql)):
                    raise broken(f"{kind} {name}", why)
        for what, why in unusable(db):
            if (what, why) not in unusable_before:
                raise broken(what, why)

    def copy_rows(self, before: str) -> None:
        """Copy the rows of the table that is called *before* now; without a key, they keep their numbers."""
        db, schema = self.db, self.schema
        has_key = schema.key or any(column.key for column in self.old.values())
        sources = {} if has_key else {"_rowid_": "_rowid_"}
        values = []
        for name, column in self.new.items():
            quoted = quote(name)
            if name in self.fill:
                sources[quoted] = f"coalesce({quoted}, ?)" if name in self.old else "?"
                values.append(self.fill[name])
            elif name in self.old and not column.generated:
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
                      f" {shown(example)}; fix them first, or keep the type")


def broken(what: str, why: str) -> Failure:
    return Failure(f"{what} would not work any more: {why}; change or drop it first")


def why_not(db: Connection, sql: str) -> str:
    """Run SQL; return what SQLite says against it, if it does not work."""
    try:
        db.execute(sql).fetchall()
    except sqlite3.OperationalError as error:
        dbtool.SIGNALS.check()
        return str(error)
    return ""


def unusable(db: Connection) -> list[tuple[str, str]]:
    """Return which views, and the triggers of which tables and views, do not compile, and why."""
    select = "SELECT DISTINCT tbl_name FROM sqlite_master WHERE type = ?"
    found = [(f"view {name}", why) for (name,) in db.execute(select, ["view"]).fetchall()
             if (why := why_not(db, f"SELECT * FROM {quote(name)} LIMIT 0"))]
    for (name,) in db.execute(select, ["trigger"]).fetchall():
        if not why_not(db, f"PRAGMA table_xinfo({quote(name)})"):  # else it is one of those views
            found += [(f"a trigger of {name}", why) for change in changes_of(db, name)
                      if (why := why_not(db, f"EXPLAIN {change}")) and "because it is a view" not in why]
    return found


def changes_of(db: Connection, table: str) -> list[str]:
    """Return statements that need all triggers of a table to compile."""
    columns = [column for column in columns_of(db, table).values() if not column.generated]
    values = ", ".join(f"{quote(column.name)} = NULL" for column in columns)
    changes = [f"INSERT INTO {quote(table)} DEFAULT VALUES", f"DELETE FROM {quote(table)}"]
    return [*changes, f"UPDATE {quote(table)} SET {values}"] if values else changes


# ------------------------------------------------------------------------------------------- commands


def merge_command(options: Options) -> int:
    """Add the rows of other files that this one does not have; print for each how many, and how many are known."""
    schema, count, status = options.schema(), len(options.others), 0
    for number, name in enumerate(options.others):
        PROGRESS.measure = lambda number=number: (f"file {number + 1} of {count}", number / count)
        try:
            added, known, different = merge(options.path, name, schema, options.timeout)
        except (Failure, OSError) as error:
            failure = as_failure(error, name)
            raise Failure(f"{name}: {failure}", failure.status) from None
        with contextlib.suppress(BrokenPipeError):  # the rest is to be merged all the same
            dbtool.write_out([f"{name}: {added} added, {known} known\n"])
        if different:
            dbtool.report(f"{options.name}: {name}: {different} known rows have other values there; they were not taken"
                          " over")
            status = dbtool.REFUSED
    return status


def snapshot_command(options: Options) -> None:
    """Make a consistent copy while others write; TARGET may end in .gz or .xz; - is standard output."""
    snapshot(options.path, options.words[1], options.timeout)


def migrate_command(options: Options) -> None:
    """Bring a file to the columns of schema.sql; print what that takes."""
    steps = migrate(options.path, options.schema(), options.flags.get("--drop", []), options.pairs("--fill"),
                    options.timeout, "--dry-run" in options.flags)
    dbtool.write_out([f"{step}\n" for step in steps])


COMMANDS = {
    "merge": Command(merge_command, "DATABASE OTHER...", "--schema --table --timeout"),
    "snapshot": Command(snapshot_command, "DATABASE TARGET|-", "--timeout"),
    "migrate": Command(migrate_command, "DATABASE", "--schema --table --timeout --dry-run --drop --fill"),
}
FLAGS = {
    **dbtool.FLAGS,
    "--dry-run": ("", "print what would be done, and do nothing"),
    "--drop": ("COLUMN", "drop COLUMN, which the schema no longer has; may be repeated"),
    "--fill": ("COLUMN=VALUE", "what rows get in a new column, or instead of NULL; may be repeated"),
}
PROGRAM = dbtool.Program("dbadmin", __doc__ or "", COMMANDS, FLAGS, dict.fromkeys(dbtool.COMMANDS, "dbtool"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv*, by default that of this process; return the exit status."""
    return PROGRAM.run(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    os._exit(main())  # a signal that came while Python is taken down would give an exit status that is not true

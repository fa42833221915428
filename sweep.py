#!/usr/bin/env python3
"""sweep: run the parameter combinations whose results a file still lacks, a fixed number at a time.

    python3 sweep.py results.db -p layers=5,10,20 -p epochs=1..9..2 --samples 3 -- python3 mlp.py --seed {sample}

wants every combination of 3 layers and 5 epochs three times: 45 runs. Those that are rows of results.db
already are not run again, so the same line goes on after any interruption. Each run is the command with
its parameters appended (--layers 5 --epochs 1), or put where {layers} and {epochs} stand; it prints
one JSON object, as for `dbtool.py insert --skip-text`, which becomes a row.

Any launcher may stand before the command: with `-- srun -Q -N1 -n1 -c1 --exact python3 mlp.py` the runs
are Slurm steps on all nodes of the allocation, and only this process writes.

SIGINT, SIGTERM, SIGHUP or SIGUSR1 stop it: nothing new starts, the running jobs have some seconds to
finish, then they are ended; a second signal ends them at once. What finished is stored.

Exit status: 0 all wanted results are there; 1 some runs failed; 2 wrong usage; 75 stopped with work left,
or the file is in use by another sweep: run it again.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while dbtool loads

try:
    import dbtool
except ImportError as missing:
    is_lost = missing.name == "dbtool"
    raise SystemExit("sweep: dbtool.py is missing; copy it to the folder of sweep.py" if is_lost else
                     f"sweep: {missing}: this Python can't be used") from None

if __name__ == "__main__":  # now, as the other modules take a while
    dbtool.SIGNALS.install((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))

import argparse
import bisect
import collections
import contextlib
import decimal
import errno
import fcntl
import functools
import importlib.machinery
import itertools
import json
import math
import os
import re
import resource
import shlex
import sqlite3
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

from dbtool import Column, Failure, NoRecord, RecordRefused, Schema, quote, shown

GRACE_S = 10.0  # how long running jobs may go on after a signal, unless --grace says otherwise
KILL_GRACE_S = 5.0  # how long a job that was told to end may take
BURST_S = 0.02  # the pause between two transactions: results that come meanwhile share the next one
STORE_TRY_S = 1.0  # how long one try to store waits for a lock
LAST_TRIES_S = 60.0  # how long results that can't be stored are tried again once all jobs have ended
LINE_EVERY_S = 60.0  # a progress line, where standard error is no terminal
TICK_S = 0.2
PIPE_BYTES = 1 << 16  # what a pipe holds on Linux: pipe(7)
MOST = 10_000_000  # values of a range, samples of a combination, runs of a sweep
FAILURES_NAMED = 10
LEAST_HOPE = 10  # so many runs, or one for each slot, must fail at first before a sweep is taken for hopeless
QUICK_FAILURE_S = 10.0  # a run that fails sooner may be the fault of the machine it ran on
FIRST_REST_S, LONGEST_REST_S = 0.5, 60.0  # how long its slot then rests
LOG_AFTER_S = 1.0  # a job that has run so long has a log that can be looked at
LOG_BYTES_HELD = 1 << 20  # as has one that printed more than that
LOG_BYTES_WAITING = 1 << 26  # beyond this, what a slow disk does not take is left out of the logs
LOG_LEAVES_BYTES = 1 << 24  # so much room on the disk is left to results
LOGS_END_S = 5.0  # how long the end of a sweep waits for the last of its logs
TAIL_BYTES = 4096  # of standard error, in which its last line is looked for
LAST_WORDS = 100  # characters of a failed job's last line on standard error that its reason has
LAUNCHERS = ("srun: ", "slurmstepd: ")  # what they say of a job that failed stands after the job's own last words
NO_RESULT = "it printed no JSON object"
NO_OBJECT = "holds no JSON object; write one for each combination of parameters"
STOPPED = "ended, since the sweep was stopped"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm can send the last before its limit
FAILURES = "sweep_failures"  # the table of runs whose last attempt failed
FAILURE_COLUMNS = ("parameters", "sample", "kind", "reason", "last_line", "attempts", "started", "seconds", "host",
                   "command", "log")
CREATE_FAILURES = f"""CREATE TABLE IF NOT EXISTS {FAILURES} (
    parameters TEXT NOT NULL,    -- as JSON
    sample INTEGER NOT NULL,
    kind TEXT NOT NULL,          -- exit, signal, timeout, no_result, refused, contradiction or not_started
    reason TEXT NOT NULL,
    last_line TEXT NOT NULL,     -- on standard error
    attempts INTEGER NOT NULL,
    started TEXT NOT NULL,       -- the last attempt: UTC, ISO 8601
    seconds REAL NOT NULL,
    host TEXT NOT NULL,
    command TEXT NOT NULL,
    log TEXT NOT NULL,           -- path of the file with what it printed
    PRIMARY KEY (parameters, sample)
) WITHOUT ROWID"""
SLOT = "SWEEP_SLOT"  # an environment variable by which a job knows its slot
TOKEN = "DBTOOL_SWEEP"  # an environment variable by which a sweep knows the processes that descend from it


def say(message: str) -> None:
    dbtool.complain(f"sweep: {dbtool.one_line(message)}\n")


# ------------------------------------------------------------------------------------------------ plan


class Axis(NamedTuple):
    """Values for some columns at once, each with the number of samples wanted, or None for the default."""

    columns: list[Column]
    rows: dict[tuple[Any, ...], int | None]


class Run(NamedTuple):
    """One run that is wanted: its parameters, and its number among those with the same parameters, from 1."""

    names: tuple[str, ...]  # shared by all runs of a plan
    values: tuple[Any, ...]
    sample: int

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(zip(self.names, self.values))

    @property
    def key(self) -> tuple[str, int]:
        """By what the run is known in the table of failures."""
        return json.dumps(self.parameters, default=dbtool.blob_as_json, sort_keys=True), self.sample

    def __str__(self) -> str:
        pairs = [f"{name}={as_word(value)}" for name, value in self.parameters.items()]
        return shlex.join([*pairs, f"sample={self.sample}"])


def names_of(axes: Sequence[Axis]) -> list[str]:
    return [column.name for axis in axes for column in axis.columns]


def axis_of_flag(schema: Schema, flag: str, database: str) -> Axis:
    """Return the axis that `-p COLUMN=VALUES` says."""
    name, equals, values = flag.partition("=")
    if not name or not equals:
        raise Failure(f"-p takes COLUMN=VALUES, not {shown(flag)}", dbtool.USAGE)
    name = name.replace("-", "_") if name not in schema.by_name else name
    try:
        texts = list(expanded(values))
        column = settable(schema, name, "-p", database, texts)
        return Axis([column], {(dbtool.fit_text(column, text),): None for text in texts})
    except RecordRefused as refusal:
        raise Failure(f"-p {flag}: {refusal}", dbtool.USAGE) from None


def settable(schema: Schema, name: str, where: str, database: str, values: Sequence[Any] = ()) -> Column:
    """Return the column that a parameter sets; raise Failure, which says how to get one for such *values*."""
    column = schema.by_name.get(name)
    if column is None:
        line = f"{as_sql(name)} {type_of(values)} DEFAULT NULL,"
        line = f"'{line}'" if '"' in line else f'"{line}"'
        migrate = ""
        if os.path.exists(database):
            words = [dbtool.script("dbadmin"), "migrate", *map(dbtool.for_shell, [database, *schema.flags()])]
            migrate = f", and run: {' '.join(words)}"
        raise Failure(f"{where}: {dbtool.no_column(schema, name)}; to make it one, add above the last column in"
                      f" {schema.path} the line {line}{migrate}", dbtool.USAGE)
    if column.generated:
        raise Failure(f"{where}: column {name} is generated by SQLite", dbtool.USAGE)
    return column


def as_sql(name: str) -> str:
    """Return a column's name as SQL has it: in quotes, if it is a word of SQL or has other characters."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(":memory:")) as db:
        if name.isidentifier():
            db.execute(f"CREATE TABLE any_name ({name} TEXT)")
            return name
    return quote(name)


def type_of(values: Sequence[Any]) -> str:
    """Return the type of a column that takes all *values*, which may be numbers as text."""
    texts = [str(value) for value in values]
    for pattern, name in (("[+-]?[0-9]+", "INTEGER"), ("[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?", "REAL")):
        if texts and all(re.fullmatch(pattern, text, re.I) for text in texts):
            return name
    return "TEXT"


def expanded(values: str) -> Iterator[str]:
    """Yield the texts that VALUES means, separated by commas.

    START..END and START..END..STEP are ranges that include their end; in START..END*FACTOR each is FACTOR times the one
    before.
    """
    for item in values.split(","):
        if not item:
            raise RecordRefused("an empty value; give such a one with --params")
        *texts, last = item.split("..")
        end, star, factor = last.partition("*")
        texts += [end, factor] if star else [end]
        try:
            numbers = [decimal.Decimal(text) for text in texts]
        except decimal.InvalidOperation:
            numbers = []
        if len(numbers) not in ((3,) if star else (2, 3)) or not all(number.is_finite() for number in numbers):
            yield item
        elif star:
            yield from geometric(item, *numbers)
        else:
            yield from arithmetic(item, *numbers)


def arithmetic(item: str, start: decimal.Decimal, end: decimal.Decimal,
               step: decimal.Decimal | None = None) -> Iterator[str]:
    by = decimal.Decimal(1) if step is None else step
    try:
        steps = (end - start) / by if end.adjusted() < 400 else decimal.Decimal(MOST)
    except decimal.DecimalException:
        steps = decimal.Decimal(-1)
    if step is None and steps != int(steps):
        raise RecordRefused(f"the range {item} needs a step: START..END..STEP")
    if steps < 0:
        raise RecordRefused(f"the range {item} never reaches its end; write START..END..STEP")
    if steps >= MOST:
        raise RecordRefused(f"the range {item} has more than {MOST:,} values")
    yield from (f"{start + i * by:f}" for i in range(int(steps) + 1))


def geometric(item: str, start: decimal.Decimal, end: decimal.Decimal, factor: decimal.Decimal) -> Iterator[str]:
    if any(abs(number.adjusted()) >= 400 for number in (start, end, factor)):
        raise RecordRefused(f"the range {item} goes beyond all numbers that a 64-bit float holds")
    if start * end <= 0 or factor <= 0 or factor == 1 or (end - start) * start * (factor - 1) < 0:
        raise RecordRefused(f"the range {item} never reaches its end; write START..END*FACTOR")
    value = start
    for _ in range(MOST):
        if abs(value) > abs(end) if factor > 1 else abs(value) < abs(end):
            return
        yield f"{value:f}"
        value *= factor
    raise RecordRefused(f"the range {item} has more than {MOST:,} values")


class ParamsRefused(Failure):
    """What is wrong with a record of --params."""


def axis_of_records(schema: Schema, records: Iterator[Mapping[str, Any]], default: int = 1, database: str = "") -> Axis:
    """Return the axis that a list of JSON objects says; all of them have the same keys.

    Those that don't say how many samples are wanted get the *default*.
    """
    rows: dict[tuple[Any, ...], int | None] = {}
    columns: list[Column] = []
    for number, record in enumerate(records, 1):
        where = f"--params: record {number}"
        parameters = dict(record)
        samples = default if "samples" in schema.by_name else parameters.pop("samples", default)
        if type(samples) is not int or not 1 <= samples <= MOST:
            raise ParamsRefused(f"{where}: samples takes an integer from 1 to {MOST:,}, not {shown(samples)}")
        if number == 1:
            columns = [settable(schema, name, where, database, [value]) for name, value in parameters.items()]
        if set(parameters) != {column.name for column in columns}:
            for name in parameters:
                settable(schema, name, where, database, [parameters[name]])
            keys = f"the keys {', '.join(parameters)}" if parameters else "no keys"
            raise ParamsRefused(f"{where}: has {keys}, but the first has"
                          f" {', '.join(column.name for column in columns) or 'none'}")
        try:
            key = tuple(typed(column, parameters[column.name]) for column in columns)
        except RecordRefused as refusal:
            raise ParamsRefused(f"{where}: {refusal}") from None
        rows[key] = max(samples, rows.get(key) or 0)
    if not rows:
        raise NoRecord(NO_OBJECT)
    return Axis(columns, rows)


def typed(column: Column, value: Any) -> Any:
    """Return a parameter as it is stored in *column*: "10" is 10 where the column holds numbers, and NaN is NULL."""
    stored = dbtool.fit_text(column, value) if isinstance(value, str) else dbtool.fit(column, value)
    return None if stored != stored else stored


# Of a plan: how many runs are wanted, stored and missing, and how many of those failed when they were last tried.
SUMS = """coalesce(sum("#samples"), 0), coalesce(sum(min(coalesce("#rows", 0), "#samples")), 0),
    coalesce(sum(max("#samples" - coalesce("#rows", 0), 0)), 0), coalesce(sum("#failures"), 0)
    FROM plan.wanted LEFT JOIN plan.stored USING ("#id") LEFT JOIN plan.failed USING ("#id")"""


class Plan:
    """The wanted combinations and how many rows each has, as tables beside those of the results file.

    Names that begin with # are told apart from those of parameters.
    """

    def __init__(self, db: sqlite3.Connection, schema: Schema, axes: Sequence[Axis], samples: int, where: str) -> None:
        self.db = db
        self.names = tuple(names_of(axes))
        self.sample = "#sample" if "sample" in map(str.lower, self.names) else "sample"
        db.set_progress_handler(dbtool.SIGNALS.pending, dbtool.STEPS_BETWEEN_CHECKS)
        if sys.version_info >= (3, 12):  # else a misspelt name in double quotes is a string
            db.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)  # novm
        db.execute("PRAGMA temp_store = MEMORY")
        db.text_factory = str
        dbtool.begin_to_read(db, dbtool.LOCK_TIMEOUT_S)
        db.execute("ATTACH ':memory:' AS plan")
        self.want(axes, samples, where)
        db.execute("""CREATE TABLE plan.stored
            ("#id" INTEGER PRIMARY KEY, "#rows" INTEGER, "#unnumbered" INTEGER, "#numbers" TEXT)""")
        db.execute("""CREATE TABLE plan.failed ("#id" INTEGER PRIMARY KEY, "#failures" INTEGER)""")
        self.failed: dict[Run, int] = {}  # of runs that are missing: how many attempts
        self.resolved: list[tuple[str, int]] = []  # of runs that failed, and have a row all the same
        self.is_new = not dbtool.scalar(db, "SELECT count(*) FROM main.sqlite_master")
        if not self.is_new:
            dbtool.check_columns(db, schema)
            self.count(schema)
            self.find_failures()

    def want(self, axes: Sequence[Axis], samples: int, where: str) -> None:
        """Cross the axes. Of each, the column that # and its number name holds the samples."""
        tables, wanted = [], ['"#id" INTEGER PRIMARY KEY', '"#samples" INTEGER']
        for number, axis in enumerate(axes):
            declared = [f"{quote(column.name)} {column.affinity}" for column in axis.columns]
            wanted += declared
            tables.append(f"plan.axis{number}")
            columns = ", ".join([f'"#{number}" INTEGER', *declared])
            self.db.execute(f"CREATE TABLE {tables[-1]} ({columns})")
            self.db.executemany(f"INSERT INTO {tables[-1]} VALUES (?{', ?' * len(declared)})",
                                ((count, *values) for values, count in axis.rows.items()))
        self.db.execute(f"CREATE TABLE plan.wanted ({', '.join(wanted)})")
        counts = ", ".join(["NULL", *(f'"#{number}"' for number in range(len(axes))), str(samples)])
        self.ask("--where", self.names, f"""INSERT INTO plan.wanted
            SELECT {', '.join(["NULL", f"coalesce({counts})", *map(quote, self.names)])}
            {'FROM ' + ' CROSS JOIN '.join(tables) if tables else ''} WHERE ({where or 1}\n) LIMIT {MOST + 1}""")
        if dbtool.scalar(self.db, 'SELECT max("#id") FROM plan.wanted') == MOST + 1:
            raise Failure(f"the grid has more than {MOST:,} combinations")

    def count(self, schema: Schema) -> None:
        """Find the rows of each wanted combination, and which samples they say they are."""
        same = [f"wanted.{quote(name)} IS results.{quote(name)}" for name in self.names]
        if same:
            self.db.execute(f"CREATE INDEX plan.combination ON wanted ({', '.join(map(quote, self.names))})")
        number = "NULL"
        if "metadata" in schema.by_name:
            number = "CASE WHEN json_valid(results.metadata) THEN json_extract(results.metadata, '$.sample') END"
        # CROSS JOIN: one pass over the results, with a look into the index for each row.
        self.db.execute(f"""INSERT INTO plan.stored
            SELECT wanted."#id", count(*), count(*) - count({number}), group_concat({number})
            FROM main.{quote(schema.table)} AS results CROSS JOIN plan.wanted
            WHERE {' AND '.join(same) or '1'} GROUP BY 1""")

    def find_failures(self) -> None:
        """Find what an earlier sweep of this grid noted of runs that failed."""
        columns = dbtool.columns_of(self.db, FAILURES)
        if not columns:
            return
        if tuple(columns) != FAILURE_COLUMNS:
            raise Failure(f"has a table {FAILURES} that is not a sweep's, which notes there what failed; rename it")
        is_it = " AND ".join(f"wanted.{quote(name)} IS ?" for name in self.names) or "1"
        noted = self.db.execute(f"SELECT parameters, sample, attempts FROM {FAILURES}").fetchall()
        for key, sample, attempts in noted:
            parameters = json.loads(key, object_hook=lambda value: dbtool.json_or_blob(value) if "$hex" in value else
                                    value)
            if parameters.keys() != set(self.names):
                continue  # of another grid
            found = self.db.execute(f"""SELECT coalesce("#rows", 0), "#numbers", wanted.*
                FROM plan.wanted LEFT JOIN plan.stored USING ("#id") WHERE {is_it}""",
                                    [parameters[name] for name in self.names]).fetchall()
            for rows, numbers, number, wanted, *values in found:
                if sample in missing_numbers(wanted, rows, numbers):
                    self.failed[Run(self.names, tuple(values), sample)] = attempts
                    self.db.execute("""INSERT INTO plan.failed VALUES (?, 1)
                        ON CONFLICT ("#id") DO UPDATE SET "#failures" = "#failures" + 1""", [number])
                elif sample <= wanted:
                    self.resolved.append((key, sample))

    def ask(self, flag: str, names: Sequence[str], sql: str) -> sqlite3.Cursor:
        """Run SQL that has the user's own in it; raise Failure, which names the *flag* that it came from."""
        try:
            return self.db.execute(sql)
        except (sqlite3.Error, sqlite3.Warning) as error:
            dbtool.SIGNALS.check()
            raise Failure(f"{flag}: {error}; it takes SQL over {', '.join(names)}", dbtool.USAGE) from None

    def missing(self, order: str) -> list[Run]:
        """Return the runs whose rows are missing; by default every combination once before any twice."""
        ((_, _, left, _),) = self.db.execute(f"SELECT {SUMS}")
        if left > MOST:
            raise Failure(f"{left:,} runs are missing; at most {MOST:,} make a sweep")
        combinations = self.db.execute("""SELECT coalesce("#rows", 0), "#numbers", wanted.*
            FROM plan.wanted LEFT JOIN plan.stored USING ("#id")
            WHERE coalesce("#rows", 0) < "#samples" ORDER BY "#id" """)
        runs = [Run(self.names, tuple(values), number) for rows, numbers, _, wanted, *values in combinations
                for number in missing_numbers(wanted, rows, numbers)]
        runs.sort(key=lambda run: run.sample)
        return self.in_order(runs, order) if order else runs

    def chosen(self, order: str, failed: str) -> list[Run]:
        """Return the missing runs that --failed admits, those that failed before last."""
        runs = self.missing(order)
        if not self.failed:
            return [] if failed == "only" else runs
        again = [run for run in runs if run in self.failed]
        fresh = [run for run in runs if run not in self.failed]
        return {"run": [*fresh, *again], "forget": runs, "skip": fresh, "only": again}[failed]

    def combinations(self) -> int:
        return int(dbtool.scalar(self.db, "SELECT count(*) FROM plan.wanted"))

    def most_samples(self) -> int:
        return int(dbtool.scalar(self.db, 'SELECT coalesce(max("#samples"), 0) FROM plan.wanted'))

    def unnumbered(self) -> int:
        """Return how many rows, of combinations that lack some, do not say which sample they are."""
        return int(dbtool.scalar(self.db, """SELECT coalesce(sum("#unnumbered"), 0)
            FROM plan.wanted JOIN plan.stored USING ("#id") WHERE "#rows" < "#samples" """))

    def in_order(self, runs: list[Run], order: str) -> list[Run]:
        """Return *runs* in the *order* that SQL says, else as they are."""
        names = [self.sample, *self.names]
        self.db.execute(f"CREATE TABLE plan.missing ({', '.join(map(quote, names))})")
        self.db.executemany(f"INSERT INTO plan.missing VALUES ({', '.join('?' * len(names))})",
                            ([run.sample, *run.values] for run in runs))
        found = self.ask("--order", names, f"SELECT rowid FROM plan.missing ORDER BY {order}\n, rowid").fetchall()
        return [runs[rowid - 1] for rowid, in found]

    def counts(self) -> list[tuple[Any, ...]]:
        """Return (parameter, value, wanted, stored, missing, failed) for all runs together, and for each value."""
        found = self.db.execute(f"SELECT 'all', NULL, {SUMS}").fetchall()
        for name in self.names:
            found += self.db.execute(f'SELECT ?, {quote(name)}, {SUMS} GROUP BY 2 ORDER BY 2', [name]).fetchall()
        return found


def missing_numbers(wanted: int, rows: int, numbers: str | None) -> list[int]:
    """Return which of the samples 1 to *wanted* are missing where *rows* are there.

    Rows that say which sample they are, in *numbers*, are taken at their word; the others count as the first ones.
    """
    if not numbers:
        return list(range(rows + 1, wanted + 1))
    digits = len(str(MOST))
    said = {int(number) for number in numbers.split(",") if number.isdecimal() and len(number) <= digits}
    known = said & set(range(1, wanted + 1))
    if len(known) > rows:  # one of them is a text with commas
        known = set()
    free = [number for number in range(1, wanted + 1) if number not in known]
    return free[rows - len(known):]


@contextlib.contextmanager
def planning(path: str, schema: Schema, axes: Sequence[Axis], samples: int, where: str) -> Iterator[Plan]:
    """Give a plan, in a connection that can't change the results file at *path*."""
    try:
        with contextlib.ExitStack() as stack:
            if os.path.exists(path):
                db = stack.enter_context(dbtool.reading(path, guarded=False))
            else:
                db = stack.enter_context(contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)))
            yield Plan(db, schema, axes, samples, where)
            dbtool.SIGNALS.check()
    except sqlite3.Error as error:
        dbtool.SIGNALS.check()
        raise dbtool.as_failure(error, path) from None


# --------------------------------------------------------------------------------------------- command


class Slot:
    """A place for one job at a time.

    It rests after a run that failed soon: a broken machine would eat all that is wanted.
    """

    def __init__(self, number: int, gpu: str = "") -> None:
        self.number, self.gpu = number, gpu or str(number)
        self.rest_s = self.lived_s = 0.0
        self.rested_at = -math.inf  # time.monotonic

    def __lt__(self, other: Slot) -> bool:
        return self.number < other.number

    def failed(self, seconds: float) -> None:
        if seconds < QUICK_FAILURE_S:
            self.rest_s = min(max(2 * self.rest_s, FIRST_REST_S), LONGEST_REST_S)
            self.lived_s, self.rested_at = seconds, time.monotonic() + self.rest_s

    def succeeded(self) -> None:
        self.rest_s, self.rested_at = 0.0, -math.inf

    def must_rest(self, oldest_s: float) -> bool:
        """Tell whether it rests while other slots have a run that lives for *oldest_s* already.

        Where all runs fail alike, nothing is gained by resting.
        """
        return time.monotonic() < self.rested_at and oldest_s > self.lived_s


def make_slots(jobs: int) -> list[Slot]:
    """Return a slot for each job, with its GPU of those that the environment gives."""
    gpus = [gpu.strip() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    return [Slot(number, gpus[number % len(gpus)] if gpus else "") for number in range(jobs)]



PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


APPENDED = "--{name} {value}"  # what is added to the command for each parameter, if none has a place in it
OF_A_JOB = ("sample", "slot", "gpu")  # what may stand in braces besides parameters


class Command:
    """What a run executes: words with {column}, {sample} and the like in them, or a Python function.

    Parameters without a place are appended, as the words of *append* say.
    """

    def __init__(self, words: Sequence[str], call: str, names: Sequence[str], append: str | None) -> None:
        self.words, self.call, self.names = list(words), call, names
        self.braced = {name for word in words for name in PLACEHOLDER.findall(word)}
        self.placed = self.braced & set(names)  # the parameters that have a place
        takes_more = append is not None or not self.placed
        self.appended = [name for name in names if name not in self.placed] if takes_more else []
        try:
            self.append = shlex.split(APPENDED if append is None else append)
        except ValueError as error:
            raise Failure(f"--append {append}: {error}", dbtool.USAGE) from None

    def check(self, schema: Schema, axes: Sequence[Axis]) -> None:
        """Raise Failure if no run could succeed, or a parameter would reach none."""
        import shutil

        if self.call:
            self.check_call()
            return
        program = self.words[0]
        if not PLACEHOLDER.search(program) and not shutil.which(program):
            raise Failure(f"{program}: {why_no_program(program)}", dbtool.USAGE)
        for name in sorted(self.braced - {*self.names, *OF_A_JOB}):
            if name in schema.by_name:
                raise Failure(f"COMMAND has {{{name}}}, but no -p or --params gives {name}", dbtool.USAGE)
            meant = dbtool.nearest(name, [*self.names, *OF_A_JOB])
            if meant and len(name) > 3:  # other words in braces are the job's own affair
                raise Failure(f"COMMAND has {{{name}}}, which is no parameter{meant}", dbtool.USAGE)
        for axis in axes:
            names = names_of([axis])
            if len(axis.rows) > 1 and not {*self.placed, *self.appended} & set(names):
                raise Failure(f"{', '.join(names)} varies, but COMMAND has no {{{names[0]}}}, so that no job would know"
                              f" it; to append what has no place, give --append {shlex.quote(APPENDED)}", dbtool.USAGE)
        if self.appended and not any("{value}" in word for word in self.append):
            raise Failure(f"--append has no {{value}}, so that no job would know it; such as {shlex.quote(APPENDED)}",
                          dbtool.USAGE)

    def check_call(self) -> None:
        module, colon, function = self.call.partition(":")
        if not colon or not function:
            raise Failure(f"--call takes MODULE:FUNCTION, not {shown(self.call)}", dbtool.USAGE)
        if not find_module(module.partition(".")[0]):
            raise Failure(f"--call: there is no module {module} here", dbtool.USAGE)

    def knows_sample(self) -> bool:
        """Tell whether a job is told which sample it is, as far as one can see."""
        return takes_sample(self.call) if self.call else "sample" in self.braced

    def for_run(self, run: Run, slot: Slot) -> list[str]:
        """Return the program and its arguments for one run."""
        if self.call:
            return [sys.executable, os.path.realpath(__file__), "--call-once", os.getcwd(), self.call,
                    json.dumps(run.parameters, default=bytes.hex), str(run.sample)]
        values = {"sample": run.sample, "slot": slot.number, "gpu": slot.gpu, **run.parameters}
        words = [filled(word, values) for word in self.words]
        for name in self.appended:
            if run.parameters[name] is not None:
                given = {"name": name, "name-": name.replace("_", "-"), "value": run.parameters[name]}
                words += [filled(word, given) for word in self.append]
        return words


def filled(word: str, values: Mapping[str, Any]) -> str:
    """Return *word* with the value of each {name} that is known."""
    return PLACEHOLDER.sub(lambda match: as_word(values[match[1]]) if match[1] in values else match[0], word)


def find_module(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return where a module is, without importing the packages that it is in."""
    spec, places = None, [os.getcwd(), *sys.path]
    for item in name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(item, places)
        if not spec:
            return None
        places = list(spec.submodule_search_locations or ())
    return spec


def takes_sample(call: str) -> bool:
    """Tell whether the function of --call takes the sample, as far as its source tells without importing it."""
    import ast

    module, _, function = call.partition(":")
    spec = find_module(module)
    try:
        with open(spec.origin if spec and spec.origin else "", "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, ValueError, SyntaxError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == function:
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            return "sample" in [argument.arg for argument in given]
    return True


def why_no_program(word: str) -> str:
    if os.path.isfile(word):
        does = "it may not be executed; run chmod +x" if "/" in word else f"write ./{word}"
        return f"{does}, or put its interpreter before it"
    if "=" in word:
        return "there is no such program; to set a variable, put env before it"
    return "there is no such program" + "; give its words without quotes around them all" * (" " in word)


def as_word(value: Any) -> str:
    """Return a parameter as a command's argument: 10.0 as 10, which programs take for an integer or a float."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer() and 0 < abs(value) < 1e15:
        return str(int(value))
    return value.hex() if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """Return *text* with an escape for each byte that is not UTF-8, which Python holds as half a surrogate pair."""
    return text.encode(errors="backslashreplace").decode()


def call_once(folder: str, target: str, parameters: str, sample: str) -> int:
    """Call a Python function in this process, for a run of --call; print the dict that it returns as JSON.

    What the function itself prints goes to standard error.
    """
    import inspect

    for number in STOPPING:  # the sweep's own handlers only take note
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.path.insert(0, folder)
    sys.argv[:] = [target]  # whatever reads a command line finds no arguments
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments = json.loads(parameters)
    if "sample" in inspect.signature(function).parameters:
        arguments.setdefault("sample", int(sample))
    returned = function(**arguments)
    if not isinstance(returned, dict):
        raise SystemExit(f"{target} returned {shown(returned)}; a dict is wanted")
    with result:
        json.dump(returned, result, default=lambda value: value.item())  # NumPy's numbers have that
    return 0


# ------------------------------------------------------------------------------------------------- run


class RunFailed(Failure):
    """Why a job gave no result; `kind` is one of those that the table of failures has."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(printable(reason))
        self.kind = kind


class Logs:
    """Writes the logs in a thread of its own, so that no slow or full disk holds up a job or costs a result.

    `trouble` says what the first log was that could not be written, and why.
    """

    def __init__(self, folder: str, mode: int) -> None:
        import queue
        import threading

        self.folder, self.mode = folder, mode
        self.has_older = os.path.isdir(folder)  # it may hold logs of an earlier sweep
        self.queue: Any = queue.SimpleQueue()  # of (path, what to append, or None to remove it), and None at the end
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.given = self.taken = 0  # bytes; each is counted by one thread only
        self.trouble = ""

    def append(self, path: str, data: bytes) -> None:
        if self.given - self.taken + len(data) > LOG_BYTES_WAITING:
            self.trouble = self.trouble or f"{path}: the disk is too slow for what is printed; some is left out"
            return
        self.given += len(data)
        self.queue.put((path, data))

    def remove(self, path: str) -> None:
        self.queue.put((path, None))

    def work(self) -> None:
        while item := self.queue.get():
            path, data = item
            try:
                if data is None:
                    os.unlink(path)
                else:
                    self.write(path, data)
            except OSError as error:
                if data is not None:
                    self.trouble = self.trouble or f"{path}: {error.strerror}"
            self.taken += len(data or b"")

    def write(self, path: str, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, self.mode)
        except FileNotFoundError:
            os.makedirs(self.folder, self.mode | (self.mode & 0o444) >> 2, exist_ok=True)
            descriptor = os.open(path, flags, self.mode)
        with open(descriptor, "wb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EEXIST, "is no regular file")
            room = os.fstatvfs(descriptor)
            if room.f_bavail * room.f_frsize < LOG_LEAVES_BYTES + len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            dbtool.write_all(file, data)

    def close(self) -> None:
        """Wait some seconds for what is still to be written, and remove the folder if it is empty then."""
        self.queue.put(None)
        self.thread.join(LOGS_END_S)
        if self.thread.is_alive():
            self.trouble = self.trouble or f"{self.folder}: the disk is too slow; the last logs are not whole"


class Log:
    """What a job prints, in the order in which it comes: held until the job has run for a second, or failed."""

    def __init__(self, logs: Logs, path: Callable[[], str], head: Callable[[], str]) -> None:
        self.logs, self.find_path, self.head = logs, path, head  # most logs are never written
        self.held: list[bytes] = []
        self.size = 0
        self.is_shown, self.ends_line = False, True

    @property
    def path(self) -> str:
        return self.find_path()

    def add(self, data: bytes) -> None:
        self.held.append(data)
        self.ends_line = data.endswith(b"\n") if data else self.ends_line
        self.size += len(data)
        if self.is_shown or self.size > LOG_BYTES_HELD:
            self.show()

    def show(self) -> None:
        """Bring what is held to the file, and from now on all that comes."""
        if not self.is_shown:
            self.held.insert(0, self.head().encode(errors="backslashreplace"))
        self.is_shown = True
        if self.held:
            self.logs.append(self.path, b"".join(self.held))
            self.held = []

    def end(self, text: str) -> None:
        """Add some last lines, and see that all of it reaches the file."""
        self.add(("" if self.ends_line else "\n").encode() + text.encode(errors="backslashreplace"))
        self.show()

    def remove(self, had_failed: bool) -> None:
        """Remove the file, also that of an earlier attempt, if there can be one."""
        self.held = []
        if self.is_shown or had_failed or self.logs.has_older:
            self.logs.remove(self.path)


class Job:
    """One run as a process of its own, the leader of its process group, and what it has printed."""

    def __init__(self, run: Run, words: list[str], slot: Slot, log: Log) -> None:
        self.run, self.words, self.slot, self.log = run, words, slot, log
        self.printed: dict[int, dbtool.Spool | None] = {}  # by pipe: standard output, and None for standard error
        self.tail = b""  # of standard error
        self.started, self.began = time.time(), time.monotonic()
        self.deadline = self.kill_at = math.inf  # time.monotonic
        self.seconds = 0.0
        self.status = 0
        self.why_ended = ""  # why the sweep ended it, if it did
        self.records: list[dict[str, Any]] = []
        self.failure: dict[str, Any] | None = None  # its row of the table of failures
        self.had_failed = False  # whether there is such a row of the same run

    def start(self, folder: str | None) -> None:
        """Start the process; raises OSError or ValueError.

        It writes into pipes: a file would lose a result on a full disk.
        """
        import subprocess

        ends: list[int] = []
        try:
            for spool in (output_spool(), None):
                reader, writer = os.pipe()
                self.printed[reader] = spool
                ends.append(writer)
            if folder:
                os.makedirs(folder, exist_ok=True)
            os.environ[SLOT] = str(self.slot.number)  # inherited: a copy of the environment takes a tenth of the start
            self.process = subprocess.Popen(
                self.words, stdin=subprocess.DEVNULL, stdout=ends[0], stderr=ends[1], cwd=folder, close_fds=False,
                start_new_session=True)
        finally:
            for writer in ends:
                os.close(writer)

    def read(self, pipe: int) -> bool:
        """Read once from one of the pipes; return whether there may be more."""
        try:
            data = os.read(pipe, PIPE_BYTES)
        except BlockingIOError:
            return False
        spool = self.printed[pipe]
        if spool:
            spool.add(data)
        else:
            self.tail = (self.tail + data)[-TAIL_BYTES:]
        self.log.add(data)
        return bool(data)

    def signal(self, number: int, why: str) -> None:
        """Send a signal to the whole group, and say in the end that this was *why* the job ended."""
        self.why_ended = self.why_ended or why
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def end(self, why: str) -> None:
        """End the group, with some time to clean up."""
        self.signal(signal.SIGTERM, why)
        self.kill_at = min(self.kill_at, time.monotonic() + KILL_GRACE_S)

    def ended(self, status: int) -> None:
        """Take note that the process has ended. What it left running in its group ends too, as in a Slurm step."""
        self.signal(signal.SIGKILL, self.why_ended)
        self.seconds = time.time() - self.started
        self.status = self.process.returncode = os.waitstatus_to_exitcode(status)
        for pipe in self.printed:
            os.set_blocking(pipe, False)
            for _ in range(16):  # all that a pipe can hold; a process that left the group might go on for ever
                if not self.read(pipe):
                    break

    def close(self) -> None:
        for pipe, spool in self.printed.items():
            os.close(pipe)
            if spool:
                spool.discard()
        self.printed = {}

    def output(self) -> Iterator[bytes]:
        """Yield what it printed on standard output."""
        for spool in self.printed.values():
            if spool:
                yield from spool.chunks()

    def last_line(self) -> str:
        """Return the last line on standard error, which often says it all."""
        lines = [line.strip() for line in self.tail.decode(errors="replace").split("\n")]
        own = [line for line in lines if line and not line.startswith(LAUNCHERS)]
        return own[-1] if own else ""

    def take_result(self, schema: Schema, surroundings: Mapping[str, Any]) -> None:
        """Take the records that the job printed, and complete them; raise RunFailed if it failed."""
        if self.why_ended and (self.status or self.why_ended != STOPPED):
            raise RunFailed("timeout", self.why_ended)
        if self.status:
            kind, how = ("exit", "exit status") if self.status > 0 else ("signal", "killed by signal")
            last = self.last_line()
            last = f" ({last if len(last) <= LAST_WORDS else last[:LAST_WORDS - 1] + '…'})" if last else ""
            raise RunFailed(kind, f"{how} {abs(self.status)}{last}")
        try:
            found = list(dbtool.records(self.output(), skip_text=True))
        except NoRecord:
            raise RunFailed("no_result", NO_RESULT) from None
        except Failure as failure:
            raise RunFailed("refused", f"its output: {failure}") from None
        except OSError as error:
            raise RunFailed("no_result", f"its output can't be read: {error.strerror}") from None
        self.records = found
        try:
            self.records = [self.complete(record, schema, surroundings) for record in found]
            for _ in dbtool.fitted(schema, self.records):
                pass
        except RecordRefused as refusal:
            raise self.refused(refusal) from None

    def refused(self, refusal: RecordRefused) -> RunFailed:
        """Return what insert says of a record, without what only makes sense there."""
        is_one_of_many = refusal.number and len(self.records) > 1
        return RunFailed("refused", f"record {refusal.number}: {refusal.why}" if is_one_of_many else refusal.why)

    def complete(self, record: dict[str, Any], schema: Schema, surroundings: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in what the job left out; raise RunFailed if it says that it ran with other parameters."""
        for name, wanted in self.run.parameters.items():
            record.setdefault(name, wanted)
        if "metadata" in schema.by_name and "metadata" not in self.run.parameters:
            own = as_object(record.get("metadata"))
            if own is not None:
                record["metadata"] = {**self.origin(), **surroundings, **own}
        for name, wanted in self.run.parameters.items():
            said = typed(schema.by_name[name], record[name])
            if said != wanted:
                wanted, said = ("null" if value is None else as_word(value) for value in (wanted, said))
                raise RunFailed("contradiction", f"it was to run with {name} {wanted}, but its result says {said};"
                                                 " is the parameter passed on, and printed as given?")
            record[name] = wanted
        return record

    def origin(self) -> dict[str, Any]:
        """Return where a result comes from, for its metadata."""
        return {"command": printable(shlex.join(self.words)), "sample": self.run.sample,
                "started": timestamp(self.started), "seconds": round(self.seconds, 3), "host": os.uname().nodename,
                "slot": self.slot.number}

    def note_failure(self, failure: RunFailed, attempts: int) -> None:
        """Make the row of the table of failures, and end the log with the reason."""
        key, sample = self.run.key
        self.failure = {
            "parameters": key, "sample": sample, "kind": failure.kind, "reason": failure.why,
            "last_line": self.last_line(), "attempts": attempts, "started": timestamp(self.started),
            "seconds": round(self.seconds, 3), "host": os.uname().nodename,
            "command": printable(shlex.join(self.words)), "log": printable(self.log.path)}
        results = "".join(f"result: {line}" for line in as_lines(self.records))
        self.log.end(f"{results}seconds: {self.seconds:.3f}\nreason: {failure.why}\n")


def output_spool() -> dbtool.Spool:
    """Return a place for what a job prints: a little in memory, more of it in a temporary file, if there is room."""
    import tempfile

    places = []
    with contextlib.suppress(OSError):  # no folder takes temporary files
        places = [os.path.join(tempfile.gettempdir(), "sweep-output")]
    return dbtool.Spool(places, 0o600)


def timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def as_object(metadata: Any) -> dict[str, Any] | None:
    """Return what a job printed as metadata as an object that takes more keys; None if it is none."""
    if metadata is None:
        return {}
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError):
            return None
    return metadata if isinstance(metadata, dict) and "$hex" not in metadata else None


def surroundings() -> dict[str, Any]:
    """Return what is the same for all runs of a sweep: the Slurm job, and the commit of the checkout it started in."""
    import subprocess

    found: dict[str, Any] = {}
    if os.environ.get("SLURM_JOB_ID"):
        found["slurm_job"] = os.environ["SLURM_JOB_ID"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # there is no git, or no checkout
        git = ["git", "--no-optional-locks"]
        said = [subprocess.run([*git, *words], capture_output=True, timeout=10, check=True).stdout
                for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])]
        found.update(git_commit=said[0].decode().strip(), git_dirty=bool(said[1]))
    return found


class Pool:
    """The running jobs, and one wait for all that can happen to them."""

    def __init__(self, timeout: float) -> None:
        import selectors

        self.timeout = timeout
        os.environ[TOKEN] = f"{os.uname().nodename}-{os.getpid()}-{time.time_ns()}"
        self.guard = Guard(os.environ[TOKEN])
        self.running: dict[int, Job] = {}  # by process id, in the order of their start
        self.selector = selectors.DefaultSelector()
        self.woken, self.waker = os.pipe()
        for end in (self.woken, self.waker):
            os.set_blocking(end, False)
        self.is_readable = selectors.EVENT_READ
        self.selector.register(self.woken, self.is_readable)

    def start(self, job: Job, folder: str | None) -> None:
        job.start(folder)
        self.running[job.process.pid] = job
        self.guard.watch(job.process.pid)
        job.deadline = time.monotonic() + self.timeout
        for pipe in job.printed:
            self.selector.register(pipe, self.is_readable, job)

    def wake(self) -> None:
        """End a wait from another thread."""
        with contextlib.suppress(OSError):  # it is full; or it fails, and the wait ends by itself soon
            os.write(self.waker, b".")

    def wait(self, seconds: float) -> Iterator[Job]:
        """Wait until something happens; yield the jobs that have ended."""
        for key, _ in self.selector.select(seconds):
            if key.fd == self.woken:
                with contextlib.suppress(OSError):
                    os.read(self.woken, PIPE_BYTES)
            elif not key.data.read(key.fd):
                self.selector.unregister(key.fd)
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            job = self.running.pop(pid, None)
            if job:
                for pipe in job.printed:
                    with contextlib.suppress(KeyError):
                        self.selector.unregister(pipe)
                job.ended(status)
                self.guard.forget(pid)
                yield job
        self.watch_clock()  # after those that have ended by themselves

    def watch_clock(self) -> None:
        """Show the logs of jobs that have run for some time, and end those that are late."""
        now = time.monotonic()
        for job in self.running.values():
            if job.began + min(LOG_AFTER_S, self.timeout) > now:
                break  # the others started later
            if not job.log.is_shown and job.began + LOG_AFTER_S <= now:
                job.log.show()
            if job.deadline <= now and not job.why_ended:
                job.end(f"timed out after {self.timeout:g} s")
        for job in self.running.values():
            if job.kill_at <= now:
                job.signal(signal.SIGKILL, "")

    def end(self, why: str) -> None:
        for job in self.running.values():
            if not job.why_ended:  # being told twice could disturb it while it cleans up
                job.end(why)

    def kill(self, why: str) -> None:
        for job in self.running.values():
            job.signal(signal.SIGKILL, why)

    def close(self) -> None:
        """End what still runs, if an error in this program brought us here, and let the guard go."""
        self.kill("")
        while self.running:
            for job in self.wait(TICK_S):
                job.close()
        self.guard.close()
        for name in (TOKEN, SLOT):
            os.environ.pop(name, None)
        self.selector.close()
        os.close(self.woken)
        os.close(self.waker)


class Guard:
    """A process that ends the jobs if the sweep itself is killed and can't.

    It reads from a pipe which groups run. When the pipe ends, it ends those that are left, and other
    processes that descend from the sweep, as far as /proc tells.
    """

    def __init__(self, token: str) -> None:
        reader, self.writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self.writer)
                os.setsid()
                for number in STOPPING:
                    signal.signal(number, signal.SIG_IGN)
                # Hold nothing open: neither the lock, nor what a reader of the sweep's output waits for the end of.
                nowhere = os.open(os.devnull, os.O_RDWR)
                for descriptor, file in enumerate((reader, nowhere, nowhere)):
                    os.dup2(file, descriptor)
                os.closerange(3, 1 << 16)
                self.stand_by(0, token)
            finally:
                os._exit(0)
        os.close(reader)

    @staticmethod
    def stand_by(reader: int, token: str) -> None:
        groups: set[int] = set()
        with open(reader) as lines:
            for line in lines:
                (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + KILL_GRACE_S
            left = groups | {-pid for pid in descendants(token)}
            for group in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(-group, number)
            while time.monotonic() < end and any(map(alive, left)):
                time.sleep(TICK_S)

    def watch(self, group: int) -> None:
        self.tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self.tell(f"-{group}\n")

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # somebody killed it; the jobs are no worse off
            os.write(self.writer, line.encode())

    def close(self) -> None:
        os.close(self.writer)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def alive(group: int) -> bool:
    """Tell whether any process of a group, or the process of a negative number, is there."""
    try:
        os.kill(-group, 0)
    except OSError:
        return False
    return True


def descendants(token: str) -> Iterator[int]:
    """Yield the processes of this user that have the *token* in their environment, where there is a /proc."""
    wanted = f"{TOKEN}={token}".encode()
    for pid in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    yield int(pid)
        except OSError:  # another user's, or gone
            pass


class Results:
    """The results file, as the place where results and failures of runs are stored."""

    def __init__(self, path: str, schema: Schema) -> None:
        self.path, self.schema = path, schema

    def store(self, jobs: Sequence[Job], receipts: list[dbtool.Receipt]) -> None:
        """Store what came of some jobs in one transaction, unless one of the *receipts* tells that it is there.

        Raises Failure; if COMMIT failed, its receipt is added.
        """
        receipt = None
        told = [earlier for earlier in receipts if earlier["row"]]
        records = [record for job in jobs if not job.failure for record in job.records]
        try:
            with dbtool.writing(self.path, self.schema, STORE_TRY_S) as db:
                if records:
                    rows = dbtool.fitted(self.schema, records)
                    if len(told) < len(receipts):  # equal rows must tell; if they are another's, the next plan says so
                        rows = (row for row in rows if not dbtool.holds(db, self.schema.table, row.values()))
                    receipt = dbtool.insert_records(db, self.schema, rows, "fail", told)
                note(db, [job.failure for job in jobs if job.failure])
                forget(db, [job.run.key for job in jobs if job.had_failed and not job.failure])
        except dbtool.CommitFailed:
            if receipt:
                receipts.append(receipt)
            raise


def note(db: sqlite3.Connection, failures: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the table of failures, which is made with the first."""
    if failures:
        db.execute(CREATE_FAILURES)
        places = ", ".join(f":{name}" for name in FAILURE_COLUMNS)
        db.executemany(f"INSERT OR REPLACE INTO {FAILURES} VALUES ({places})", failures)


def forget(db: sqlite3.Connection, keys: Sequence[tuple[str, int]]) -> None:
    """Remove rows of the table of failures."""
    if keys:
        db.execute(CREATE_FAILURES)
        db.executemany(f"DELETE FROM {FAILURES} WHERE parameters = ? AND sample = ?", keys)


class Writer:
    """Stores what came of jobs, in a thread of its own; those that wait together share a transaction.

    `outcomes` holds (job, why it was refused or None), `kept` why results could not be stored and where
    they are, and `trouble` what stands in the way now.
    """

    def __init__(self, results: Results, wake: Callable[[], None]) -> None:
        import threading

        self.thread = threading.Thread(target=self.run, daemon=True)
        self.results, self.wake = results, wake
        self.waiting: list[Job] = []
        self.change = threading.Condition()
        self.closing = False
        self.give_up = threading.Event()
        self.outcomes: collections.deque[tuple[Job, Failure | None]] = collections.deque()
        self.trouble: Failure | None = None
        self.kept: list[tuple[Failure, dbtool.Kept]] = []
        self.crash: BaseException | None = None

    def put(self, job: Job) -> None:
        with self.change:
            self.waiting.append(job)
            self.change.notify()

    def close(self) -> None:
        with self.change:
            self.closing = True
            self.change.notify()
        self.thread.join()

    def run(self) -> None:
        while True:
            with self.change:
                while not self.waiting and not self.closing:
                    self.change.wait()
                batch, self.waiting = self.waiting, []
            if not batch:
                return
            try:
                self.store(batch)
            except BaseException as error:  # a bug; the main thread shows it
                self.crash = error
                self.keep(batch, [], Failure("an error in the program"))
            self.wake()
            if self.crash:
                return
            time.sleep(BURST_S)

    def store(self, batch: list[Job]) -> None:
        """Store what came of all jobs of a batch; if one is refused, each by itself."""
        receipts: list[dbtool.Receipt] = []  # of COMMITs that failed: one may have happened all the same
        outcome: Failure | None
        while True:
            try:
                self.results.store(batch, receipts)
                outcome = self.trouble = None
            except RecordRefused as refusal:
                outcome = refusal
                if len(batch) > 1:
                    for job in batch:
                        self.store([job])
                    return
            except Failure as trouble:
                outcome = self.trouble = trouble
                self.wake()
                if trouble.status == dbtool.TRY_AGAIN and not self.give_up.wait(STORE_TRY_S):
                    continue
                self.keep(batch, receipts, trouble)
            self.outcomes += [(job, outcome) for job in batch]
            return

    def keep(self, batch: list[Job], receipts: list[dbtool.Receipt], why: Failure) -> None:
        """Put results aside where `dbtool.py retry`, or the next sweep, finds them."""
        records = [record for job in batch if not job.failure for record in job.records]
        if records:
            path = self.results.path
            spool = dbtool.Spool(dbtool.kept_places(path), dbtool.file_mode(path))
            spool.add("".join(as_lines(records)).encode())
            self.kept.append((why, spool.keep(receipts)))


def as_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return *records* as JSON Lines that insert reads."""
    return [json.dumps(record, default=dbtool.blob_as_json) + "\n" for record in records]


LOCK = "-sweep.lock"  # what the name of a lock adds to that of the results file


class Lock:
    """The file beside the results file that says which sweep is at work there."""

    def __init__(self, path: str) -> None:
        self.path = path + LOCK
        while True:
            self.file = self.opened()
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                raise Failure(f"another sweep is at work on it: {self.file.read().strip() or 'it has just begun'}; wait"
                              " until it ends", dbtool.TRY_AGAIN) from None
            except OSError as error:
                say(f"{self.path}: can't be locked ({error.strerror}); see to it that no other sweep uses this file")
            with contextlib.suppress(FileNotFoundError):  # the one that held it may have removed it just now
                if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                    break
            self.file.close()
        with contextlib.suppress(OSError):  # on a full disk, it locks all the same
            self.file.truncate(0)
            holder = f"process {os.getpid()} on {os.uname().nodename}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            os.write(self.file.fileno(), holder.encode())  # past the buffer, which would fail again when it is closed

    def opened(self) -> TextIO:
        """Open the file; raise Failure if something else is in its place."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, dbtool.file_mode(self.path.removesuffix(LOCK)))
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise self.no_file() from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self.no_file()
        return os.fdopen(descriptor, "a+", encoding="utf-8")

    def no_file(self) -> Failure:
        return Failure(f"{self.path} is no regular file, as the lock of a sweep is; look at it, and move it away")

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                os.unlink(self.path)
        self.file.close()


class Sweep:
    """All runs of one call: what is done, what failed, and when to stop."""

    def __init__(self, path: str, schema: Schema, runs: list[Run], failed: Mapping[Run, int],
                 command: Command, options: argparse.Namespace) -> None:
        self.path, self.name, self.schema, self.command, self.options = path, options.database, schema, command, options
        limit = options.limit or len(runs)
        self.beyond_limit = len(runs[limit:])
        self.total = len(runs) - self.beyond_limit
        self.waiting = collections.deque(runs[:limit])
        self.failed_before = failed  # attempts in earlier sweeps
        self.attempts: collections.Counter[Run] = collections.Counter()  # that failed
        self.to_retry: dict[Run, tuple[str, str]] = {}  # why the last attempt failed, and its log
        self.free = make_slots(min(options.jobs, self.total))  # by their numbers
        self.logs = Logs(os.path.abspath(options.logs) if options.logs else path + "-sweep", dbtool.file_mode(path))
        self.stored = self.writing = self.unfinished = 0
        self.failures: list[tuple[Run, str, str]] = []
        self.said: set[str] = set()  # kinds of reasons
        self.pioneers: dict[Run, bool] = {}  # the runs that were started first: whether the first attempt failed
        self.enough_pioneers = max(LEAST_HOPE, options.jobs)
        self.signals: list[int] = []  # those that came
        self.stop_reason = ""
        self.stop_at = math.inf  # time.monotonic
        self.idle_since = math.inf

    def go(self) -> int:
        """Run all; return the exit status."""
        limit_descriptors(len(self.free))
        self.check_writable()
        self.surroundings = surroundings() if "metadata" in self.schema.by_name else {}
        self.pool = Pool(self.options.timeout or math.inf)
        self.writer = Writer(Results(self.path, self.schema), self.pool.wake)
        self.progress = Progress(self)
        some = f", {self.total:,} of them to run" if self.beyond_limit else ""
        missing = self.total + self.beyond_limit
        say(f"{self.name}: {missing:,} {'run' if missing == 1 else 'runs'} missing{some}; {len(self.free):,} at once")
        try:
            with self.handling_signals():
                self.writer.thread.start()
                self.logs.thread.start()
                try:
                    self.loop()
                finally:
                    self.writer.give_up.set()  # if an error brought us here, what can't be stored is kept
                    self.writer.close()
        finally:
            self.pool.close()
            self.logs.close()
            self.progress.clear()
        return self.summary()

    def check_writable(self) -> None:
        """Raise Failure if results could not be stored, before hours are spent on them. A lock may go away."""
        nothing = f"DELETE FROM {quote(self.schema.table)} WHERE 0"
        try:
            with dbtool.writing(self.path, self.schema, 0.0) as db:
                db.execute(nothing)
        except Failure as failure:
            if failure.status != dbtool.TRY_AGAIN:
                raise

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        def stop(number: int, _frame: object) -> None:
            self.signals.append(number)

        numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in numbers}
        if dbtool.SIGNALS.caught:  # since the plan was made
            self.signals.append(dbtool.SIGNALS.caught)
            dbtool.SIGNALS.caught = 0
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it wakes the wait
        waker = signal.set_wakeup_fd(self.pool.waker, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(waker)
            for number, handler in before.items():
                signal.signal(number, handler)

    def loop(self) -> None:
        while True:
            self.heed()
            self.fill()
            if self.writer.crash:
                raise self.writer.crash
            if not self.pool.running and not self.writing and (self.stop_reason or not self.waiting):
                break
            for job in self.pool.wait(TICK_S):
                self.collect(job)
            while self.writer.outcomes:
                self.written(*self.writer.outcomes.popleft())
            self.progress.update()

    def fill(self) -> None:
        while self.waiting and not self.stop_reason and (slot := self.next_slot()):
            run = self.waiting.popleft()
            if len(self.pioneers) < self.enough_pioneers:
                self.pioneers.setdefault(run, False)
            words = self.command.for_run(run, slot)
            head = functools.partial(self.log_head, run, words, self.failed_attempts(run) + 1, time.time())
            job = Job(run, words, slot, Log(self.logs, functools.partial(self.log_path, run), head))
            folder = os.path.join(self.options.workdir, label(run, self.path)) if self.options.workdir else None
            try:
                self.pool.start(job, folder)
                self.free.remove(slot)
            except ValueError as error:  # a NUL in a word
                self.failed(job, RunFailed("not_started", f"can't be started: {error}"))
            except OSError as error:
                if self.pool.running and error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                    job.close()
                    self.waiting.appendleft(run)  # the machine is full: when another job has ended
                    return
                self.failed(job, RunFailed("not_started", f"can't be started: {error.strerror}: {error.filename}"))

    def next_slot(self) -> Slot | None:
        """Return the free slot with the lowest number that need not rest, if there is one."""
        oldest_s = time.monotonic() - next((job.began for job in self.pool.running.values()), math.inf)
        return next((slot for slot in self.free if not slot.must_rest(oldest_s)), None)

    def log_head(self, run: Run, words: list[str], attempt: int, started: float) -> str:
        return f"command: {shlex.join(words)}\nrun: {run}\nattempt: {attempt}\nstarted: {timestamp(started)}\n"

    def failed_attempts(self, run: Run) -> int:
        """Return how many attempts of a run have failed, also in earlier sweeps."""
        return self.failed_before.get(run, 0) + self.attempts[run]

    def collect(self, job: Job) -> None:
        """Take the result of a job that has ended."""
        bisect.insort(self.free, job.slot)
        try:
            job.take_result(self.schema, self.surroundings)
        except RunFailed as failure:
            job.slot.failed(job.seconds)
            self.failed(job, failure)
        else:
            job.slot.succeeded()
            self.hand_over(job)

    def hand_over(self, job: Job) -> None:
        """Let the writer store what came of a job."""
        job.had_failed = job.run in self.attempts or job.run in self.failed_before
        self.writing += 1
        self.writer.put(job)

    def written(self, job: Job, refusal: Failure | None) -> None:
        self.writing -= 1
        if job.failure:
            pass  # it is noted, or can't be, which costs no result
        elif isinstance(refusal, RecordRefused):
            self.failed(job, job.refused(refusal))
        elif refusal is None:
            self.stored += 1
            self.to_retry.pop(job.run, None)
            if not self.options.keep_logs:
                job.log.remove(job.had_failed)
            else:
                job.log.show()
            job.close()
            return
        if refusal and not isinstance(refusal, RecordRefused):
            job.close()
            self.stop(str(refusal))

    def failed(self, job: Job, failure: RunFailed) -> None:
        if self.signals and job.why_ended == STOPPED:
            self.unfinished += 1
            if job.run not in self.attempts and job.run not in self.failed_before:
                job.log.remove(had_failed=False)
            job.close()
            return
        run = job.run
        self.attempts[run] += 1
        job.note_failure(failure, self.failed_attempts(run))
        self.say_first(job, failure)
        if self.attempts[run] <= self.options.retries:
            self.to_retry[run] = failure.why, job.log.path
            self.waiting.append(run)
        else:
            self.to_retry.pop(run, None)
            self.failures.append((run, failure.why, job.log.path))
        job.close()
        self.hand_over(job)
        if run in self.pioneers:
            self.pioneers[run] = True
            if len(self.pioneers) == self.enough_pioneers and all(self.pioneers.values()):
                self.stop(f"failures of all the first {len(self.pioneers):,} runs")
        if len(self.failures) == self.options.max_failures:
            self.stop(f"{len(self.failures)} failures")

    def say_first(self, job: Job, failure: RunFailed) -> None:
        """Say at once why a run failed, if none has failed like that before."""
        kind = f"{failure.kind} {re.sub('[0-9]+', '#', failure.why)}"
        if kind not in self.said and len(self.said) < FAILURES_NAMED:
            self.said.add(kind)
            hint = ""
            if any("_" in name and f"--{name}" in job.last_line() for name in self.command.appended):
                hint = "; if its flags have hyphens, give --append '--{name-} {value}'"
            self.progress.say(f"{self.name}: {job.run}: {failure.why}; see {os.path.relpath(job.log.path)}{hint}")

    def stop(self, reason: str) -> None:
        """Start nothing new."""
        self.stop_reason = self.stop_reason or reason
        self.stop_at = min(self.stop_at, time.monotonic())

    def heed(self) -> None:
        """Do what signals ask for, and give up on a file that can't be written when all else is done."""
        now = time.monotonic()
        if self.signals and not self.stop_reason.startswith("SIG"):
            self.stop_reason, self.stop_at = dbtool.signal_name(self.signals[0]), now
            if self.pool.running:
                self.progress.say(f"{self.stop_reason}: waiting {self.options.grace:g} s for {len(self.pool.running)}"
                                  " running jobs; a second signal ends them now")
        if len(self.signals) > 1:
            self.pool.kill(STOPPED)
            self.writer.give_up.set()
        elif self.signals and now > self.stop_at + self.options.grace:
            self.pool.end(STOPPED)
        self.idle_since = math.inf if self.pool.running else min(now, self.idle_since)
        if now > self.idle_since + (GRACE_S if self.signals else LAST_TRIES_S):
            self.writer.give_up.set()

    def log_path(self, run: Run) -> str:
        return os.path.join(self.logs.folder, label(run, self.path if self.options.logs else "") + ".log")

    def summary(self) -> int:
        """Say what was done and what is left; return the exit status."""
        left = self.total - self.stored
        self.failures += [(run, *why) for run, why in self.to_retry.items()]
        done = f"{self.name}: {self.stored:,} of {self.total:,} runs stored, {len(self.failures):,} failed"
        if self.unfinished:
            done += f", {self.unfinished:,} ended unfinished"
        if self.stop_reason:
            done = f"stopped by {self.stop_reason}: {done}, {left:,} left"
        if self.beyond_limit:
            done += f"; {self.beyond_limit:,} more are missing, beyond --limit {self.options.limit}"
        if not self.options.logs:
            with contextlib.suppress(OSError):
                os.rmdir(self.logs.folder)  # if it is empty now
        if self.logs.trouble and not self.progress.is_log_missing:
            say(f"{self.name}: {self.logs.trouble}; so not all logs are there")
        for why, kept in self.writer.kept:
            say(f"{self.name}: {why}; {kept.note}")
        for run, reason, log in self.failures[:FAILURES_NAMED]:
            say(f"{self.name}: {run}: {reason}; see {os.path.relpath(log)}")
        more = len(self.failures) - FAILURES_NAMED
        if more > 0:
            say(f"{self.name}: and {more:,} more failed; see {os.path.relpath(self.logs.folder)}")
        say(done + (f"; to go on, run: {self.options.again}" if left or self.beyond_limit else ""))
        if left and (self.signals or any(why.status == dbtool.TRY_AGAIN for why, _ in self.writer.kept)):
            return dbtool.TRY_AGAIN
        return dbtool.REFUSED if left else 0


def label(run: Run, path: str) -> str:
    """Return a name for a run's files: readable, and distinct even where it is shortened or files share a folder."""
    text = "_".join([*(f"{name}-{as_word(value)}" for name, value in run.parameters.items()), f"sample-{run.sample}"])
    checksum = zlib.crc32(f"{path}{run}".encode(errors="surrogateescape"))
    return f"{re.sub('[^A-Za-z0-9_.=+-]+', '_', text)[:120]}_{checksum:08x}"


def limit_descriptors(jobs: int) -> None:
    """Make room for two pipes and two temporary files a job, within what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * jobs + 100
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise Failure(f"--jobs {jobs} needs {needed} open files; this system allows {hard}", dbtool.USAGE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# ---------------------------------------------------------------------------------------------- report


class Progress(dbtool.Progress):
    """One line with what is done: in place on a terminal, otherwise once a minute."""

    def __init__(self, sweep: Sweep) -> None:
        self.begin()
        dbtool.PROGRESS.next = math.inf  # from here on, this line speaks
        self.sweep = sweep
        self.is_terminal = self.next < math.inf
        self.next = min(self.next, self.start + LINE_EVERY_S)
        self.is_in_trouble = self.is_log_missing = False

    def update(self) -> None:
        if self.sweep.logs.trouble and not self.is_log_missing:
            self.is_log_missing = True
            self.say(f"{self.sweep.name}: {self.sweep.logs.trouble}; the jobs go on")
        trouble = self.sweep.writer.trouble
        if trouble and trouble.status == dbtool.TRY_AGAIN and not self.is_in_trouble:
            self.say(f"{self.sweep.name}: {trouble.why}; the jobs go on, and results wait in memory until it can be"
                     " written")
        self.is_in_trouble = trouble is not None
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + (TICK_S if self.is_terminal else LINE_EVERY_S)
        if self.is_terminal:
            self.shown = True
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            dbtool.complain(f"\r\x1b[K{self.line()[:width - 1]}")
        else:
            say(self.line())

    def line(self) -> str:
        sweep, seconds = self.sweep, time.monotonic() - self.start
        finished = sweep.stored + len(sweep.failures)
        rate = finished / seconds
        left = f", {clock((sweep.total - finished) / rate)} left" if rate else ""
        return (f"{sweep.stored:,} of {sweep.total:,} done, {len(sweep.pool.running):,} running,"
                f" {len(sweep.failures):,} failed, {rate:.3g} runs/s{left}{self.longest()}")

    def longest(self) -> str:
        """Name the job that has run longest, and for how long."""
        for job in self.sweep.pool.running.values():
            return f"; longest, {clock(time.monotonic() - job.began)}: {job.run}"
        return ""

    def say(self, message: str) -> None:
        self.clear()
        say(message)


def clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def shell_lines(runs: list[Run], command: Command, options: argparse.Namespace) -> Iterator[str]:
    """Return a line of shell for each run, which stores its result too."""
    for text in itertools.chain(command.words, *(map(str, run.values) for run in runs)):
        if "\n" in text or "\0" in text:
            raise Failure(f"--list: {shown(text)} has several lines or a NUL, which a line of shell can't hold")
    here = os.path.dirname(os.path.realpath(__file__))
    insert = [sys.executable, os.path.join(here, "dbtool.py"), "insert", os.path.realpath(options.database)]
    insert += ["--skip-text", *schema_flags(options)]
    (slot,) = make_slots(1)  # other engines have their own
    return (f"{shlex.join(command.for_run(run, slot))} | {shlex.join(insert)}\n" for run in runs)


def counted(plan: Plan, style: str) -> list[str]:
    """Return how many runs are wanted, stored and missing, and how many of those have failed, in one of the formats."""
    names = ["parameter", "value", "wanted", "stored", "missing", "failed"]
    return list(dbtool.FORMATS[style](names, [plan.counts()], "", True))


# ---------------------------------------------------------------------------------------- command line


SEE_HELP = "see: python3 sweep.py --help"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; {SEE_HELP}", dbtool.USAGE)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(joined(arguments))
        if unknown:
            raise Failure(f"unrecognized arguments: {' '.join(unknown)}{self.hint(unknown)}; {SEE_HELP}", dbtool.USAGE)
        return options

    def hint(self, unknown: list[str]) -> str:
        """Say what may have been meant by arguments that are not known."""
        flag, equals, value = unknown[0].partition("=")
        if flag[:2] != "--":
            return "; the command stands after --"
        meant = dbtool.closest(flag, [flag for action in self._actions for flag in action.option_strings], 0.75)
        if meant:
            return f"; did you mean {shown(meant)}?"
        values = value if equals else unknown[1] if len(unknown) > 1 else "VALUES"
        return f"; a parameter is given as -p {dbtool.for_shell(f'{flag[2:]}={values}')}"


def joined(arguments: Sequence[str]) -> list[str]:
    """Return *arguments* with the values that may begin with a hyphen joined to their flags: argparse refuses them."""
    result: list[str] = []
    for word in arguments:
        if result and result[-1] in ("--append", "--where", "--order"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def parser() -> Parser:
    result = Parser(prog="sweep.py", description=__doc__, allow_abbrev=False, add_help=False,
                    usage="sweep.py DATABASE [-p COLUMN=VALUES]... [FLAG]... (-- COMMAND... | --call MODULE:FUNCTION)",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("database", metavar="DATABASE", help="the results file; made from the schema if it is missing")
    add("-p", dest="axes", action="append", default=[], metavar="COLUMN=VALUES",
        help="values of a parameter: relu,linear or 25..400..25 (first, last, step or 1) or both; may be repeated")
    add("--params", metavar="FILE|-", help="JSON objects with parameters (and samples), crossed with any -p")
    add("--where", default="", metavar="SQL", help="only combinations for which this is true")
    add("--order", default="", metavar="SQL", help="which runs come first (default: each combination once, then twice)")
    add("--samples", type=positive, default=1, metavar="N", help="rows wanted of each combination (default: 1)")
    add("--jobs", type=positive, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else
        os.cpu_count() or 1, metavar="N", help="how many run at once (default: CPUs)")
    add("--timeout", type=seconds, metavar="SECONDS", help="end a job that takes longer; it has failed")
    add("--limit", type=positive, metavar="N", help="run at most N of the missing ones (default: all)")
    add("--failed", choices=("run", "skip", "only", "forget"), default="run",
        help="runs that failed before: run them last, skip them, run only them, or forget that they failed")
    add("--retries", type=natural, default=0, metavar="K",
        help="try a failed run again, in the end, up to K times (default: 0)")
    add("--max-failures", type=positive, metavar="N", help="start nothing more after N failed runs (default: go on)")
    add("--grace", type=seconds, default=GRACE_S, metavar="SECONDS",
        help=f"how long running jobs may go on after a signal (default: {GRACE_S:g})")
    add("--append", metavar="TEMPLATE", help="how parameters without a place in COMMAND are added to it, such as"
        " '--{name-} {value}' with hyphens, or '{name}={value}' (default: '--{name} {value}' if none has a place)")
    add("--logs", metavar="DIR", help="where the logs of running and failed jobs go (default: DATABASE-sweep)")
    add("--keep-logs", action="store_true", help="keep the logs of jobs that succeeded too")
    add("--workdir", metavar="DIR", help="run each job in a directory of its own in DIR; then give files as full paths")
    add = result.add_mutually_exclusive_group().add_argument
    add("--dry-run", action="store_true", help="print how many runs are wanted, stored and missing, by parameter")
    add("--list", action="store_true",
        help="print the missing runs as lines of shell for other engines, which know nothing of the other flags")
    add = result.add_argument
    add("--format", choices=dbtool.FORMATS, default="table", help="how --dry-run prints (default: table)")
    add("--call", default="", metavar="MODULE:FUNCTION", help="call a Python function, which returns the result")
    add("--schema", metavar="FILE", help="what defines the columns (default: as dbtool.py)")
    add("--table", metavar="NAME", help="which table of the schema (default: as dbtool.py)")
    add("--version", action="version", version=f"sweep {dbtool.__version__}")
    add("-h", "--help", action="help", help="show this")
    return result


def number_of(kind: Callable[[str], Any], least: float, most: float, meant: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
            if least <= value <= most:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"takes {meant}, not {shown(text)}")

    return convert


positive = number_of(int, 1, MOST, f"an integer from 1 to {MOST:,}")
natural = number_of(int, 0, MOST, f"an integer from 0 to {MOST:,}")
seconds = number_of(float, 0.001, 1e9, "a number of seconds")


def schema_flags(options: argparse.Namespace) -> list[str]:
    schema = options.schema or os.environ.get("DBTOOL_SCHEMA")
    table = options.table or os.environ.get("DBTOOL_TABLE")
    flags = ["--schema", os.path.realpath(schema)] if schema else []
    return [*flags, "--table", table] if table else flags


def line_to_go_on(program: str, arguments: list[str], options: argparse.Namespace) -> str:
    """Return the command that goes on with a sweep, also in a terminal with another environment."""
    given = [] if options.schema else schema_flags(options)[:2 if os.environ.get("DBTOOL_SCHEMA") else 0]
    if not options.table and os.environ.get("DBTOOL_TABLE"):
        given += ["--table", os.environ["DBTOOL_TABLE"]]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    words = ["python3", program, *arguments[:split], *given, *arguments[split:]]
    journal = os.environ.get("DBTOOL_JOURNAL")
    return (f"DBTOOL_JOURNAL={dbtool.for_shell(journal)} " if journal else "") + " ".join(map(dbtool.for_shell, words))


def chosen_axes(options: argparse.Namespace, schema: Schema) -> list[Axis]:
    """Return the axes that the command line names, and read the file of --params."""
    axes = [axis_of_flag(schema, flag, options.database) for flag in options.axes]
    if options.params:
        with contextlib.ExitStack() as stack:
            if options.params == "-" and not sys.stdin:
                raise Failure("--params -: standard input is closed")
            file = sys.stdin.buffer if options.params == "-" else stack.enter_context(open(options.params, "rb"))
            try:
                axes.append(axis_of_records(schema, dbtool.records(dbtool.pieces(file)), options.samples,
                                            options.database))
            except NoRecord:
                raise Failure(f"--params {options.params}: {NO_OBJECT}") from None
            except ParamsRefused:
                raise
            except Failure as failure:
                raise Failure(f"--params {options.params}: {failure.why}", failure.status) from None
    names = names_of(axes)
    for name in names:
        if names.count(name) > 1:
            raise Failure(f"column {name} is given twice", dbtool.USAGE)
    return axes


def run_missing(path: str, schema: Schema, command: Command, axes: Sequence[Axis],
                options: argparse.Namespace) -> int:
    """Store what was kept earlier, then run what the plan still lacks, as the one sweep at work; return the status."""
    name = options.database
    lock = Lock(path)
    try:
        if any(dbtool.kept_files(path)):
            status = dbtool.main(["retry", name, *schema_flags(options)])
            if status >= dbtool.TRY_AGAIN:
                return dbtool.TRY_AGAIN
            if status:
                say(f"{name}: the runs of what is still kept count as missing")
        with planning(path, schema, axes, options.samples, options.where) as plan:
            runs, combinations = plan.chosen(options.order, options.failed), plan.combinations()
            unnumbered, wanted = plan.unnumbered(), plan.most_samples()
        forget_failures(path, schema, plan, options)
        if not runs or not (command.words or command.call):
            say(f"{name}: {why_nothing(plan, combinations, options)}")
            return 0
        if unnumbered and command.knows_sample():
            say(f"{name}: rows there without metadata.sample, {unnumbered:,}, are taken for the first samples")
        if wanted > 1 and not command.knows_sample():
            say(f"{name}: {wanted:,} samples, but no job is told which one it is ({{sample}} in COMMAND, or an argument"
                " of that name): unless it makes a seed by itself, all of them are the same")
        if plan.is_new and "metadata" not in schema.by_name:
            say(f"{name}: {schema.path} has no column metadata, so no row will say which command, sample, host and"
                " commit it comes from, nor when it ran")
        failed = {} if options.failed == "forget" else plan.failed
        return Sweep(path, schema, runs, failed, command, options).go()
    finally:
        lock.release()


def forget_failures(path: str, schema: Schema, plan: Plan, options: argparse.Namespace) -> None:
    """Remove what an earlier sweep of this grid noted of runs that have a row by now, and with --failed forget all."""
    keys = [*plan.resolved, *(run.key for run in plan.failed if options.failed == "forget")]
    if keys:
        with dbtool.writing(path, schema, dbtool.LOCK_TIMEOUT_S) as db:
            forget(db, keys)


def why_nothing(plan: Plan, combinations: int, options: argparse.Namespace) -> str:
    """Say why there is nothing to run."""
    if options.failed == "forget":
        return f"forgot {len(plan.failed):,} failures"
    if not combinations:
        return "nothing is missing: no combination satisfies --where"
    if plan.failed:
        return f"nothing is missing but {len(plan.failed):,} runs that failed before, which --failed skip leaves out"
    return "nothing is missing that failed before" if options.failed == "only" else "nothing is missing"


def sweep(options: argparse.Namespace, words: list[str]) -> int:
    """Do what the command line says; return the exit status."""
    path, schema = os.path.realpath(options.database), dbtool.read_schema(options.schema, options.table)
    if FAILURES in [name.lower() for _, name, _ in schema.objects]:
        raise Failure(f"{schema.path} has a {FAILURES}, which is where a sweep notes what failed; call it otherwise")
    may_be_none = options.dry_run or (options.failed == "forget" and not words and not options.list)
    if not may_be_none and bool(words) == bool(options.call):
        raise Failure("give a command after --, or --call MODULE:FUNCTION" + ", not both" * bool(words), dbtool.USAGE)
    with dbtool.SIGNALS:
        axes = chosen_axes(options, schema)
    if options.workdir and words and "/" in words[0]:
        words = [os.path.abspath(words[0]), *words[1:]]
    command = Command(words, options.call, names_of(axes), options.append)
    if words or options.call:
        command.check(schema, axes)

    if options.dry_run or options.list:
        with planning(path, schema, axes, options.samples, options.where) as plan:
            lines = counted(plan, options.format) if options.dry_run else shell_lines(
                plan.chosen(options.order, options.failed)[:options.limit], command, options)
        dbtool.write_out(lines)
        return 0
    if not os.path.isdir(os.path.dirname(path)):
        raise Failure(f"there is no folder {os.path.dirname(path)}; make it first")
    return run_missing(path, schema, command, axes, options)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--call-once"]:
        raise SystemExit(call_once(*arguments[1:]))
    where = ""
    try:
        split = arguments.index("--") if "--" in arguments else len(arguments)
        options = parser().parse(arguments[:split])
        if not options.database:
            raise Failure("the DATABASE has no name", dbtool.USAGE)
        options.again = line_to_go_on(sys.argv[0] if argv is None else "sweep.py", arguments, options)
        if options.params == "-":
            options.again = f"… | {options.again}"
        where = f"{options.database}: "
        return sweep(options, arguments[split + 1:])
    except BrokenPipeError:
        return 0
    except (Failure, OSError) as error:
        failure = dbtool.as_failure(error, "")
        say(f"{where}{failure}")
        return dbtool.TRY_AGAIN if failure.status > dbtool.SIGNALLED else failure.status


if __name__ == "__main__":
    status = main()
    for number in STOPPING:  # the status is known; a signal that comes while Python ends must not change it
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(status)

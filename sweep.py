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
import collections
import contextlib
import decimal
import errno
import fcntl
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
LAST_WORDS = 100  # characters of a failed job's last line on standard error
LAUNCHERS = ("srun: ", "slurmstepd: ")  # what they say of a job that failed stands after the job's own last words
NO_RESULT = "it printed no JSON object"
NO_OBJECT = "holds no JSON object; write one for each combination of parameters"
STOPPED = "ended, since the sweep was stopped"
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm can send the last before its limit
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

    def __str__(self) -> str:
        pairs = [f"{name}={as_word(value)}" for name, value in self.parameters.items()]
        return shlex.join([*pairs, f"sample={self.sample}"])


def names_of(axes: Sequence[Axis]) -> list[str]:
    return [column.name for axis in axes for column in axis.columns]


def axis_of_flag(schema: Schema, flag: str) -> Axis:
    """Return the axis that `-p COLUMN=VALUES` says."""
    name, equals, values = flag.partition("=")
    if not name or not equals:
        raise Failure(f"-p takes COLUMN=VALUES, not {shown(flag)}", dbtool.USAGE)
    column = settable(schema, name.replace("-", "_") if name not in schema.by_name else name, "-p")
    try:
        return Axis([column], {(dbtool.fit_text(column, text),): None for text in expanded(values)})
    except RecordRefused as refusal:
        raise Failure(f"-p {flag}: {refusal}", dbtool.USAGE) from None


def settable(schema: Schema, name: str, where: str) -> Column:
    column = schema.by_name.get(name)
    if column is None:
        raise Failure(f"{where}: {dbtool.no_column(schema, name)}", dbtool.USAGE)
    if column.generated:
        raise Failure(f"{where}: column {name} is generated by SQLite", dbtool.USAGE)
    return column


def expanded(values: str) -> Iterator[str]:
    """Yield the texts that VALUES means: separated by commas, and START..END or START..END..STEP inclusive."""
    for item in values.split(","):
        if not item:
            raise RecordRefused("an empty value; give such a one with --params")
        try:
            numbers = [decimal.Decimal(text) for text in item.split("..")]
        except decimal.InvalidOperation:
            numbers = []
        if len(numbers) not in (2, 3) or not all(number.is_finite() for number in numbers):
            yield item
            continue
        start, end, step = (*numbers, decimal.Decimal(1))[:3]
        try:
            steps = (end - start) / step if end.adjusted() < 400 else decimal.Decimal(MOST)
        except decimal.DecimalException:
            steps = decimal.Decimal(-1)
        if len(numbers) == 2 and steps != int(steps):
            raise RecordRefused(f"the range {item} needs a step: START..END..STEP")
        if steps < 0:
            raise RecordRefused(f"the range {item} never reaches its end; write START..END..STEP")
        if steps >= MOST:
            raise RecordRefused(f"the range {item} has more than {MOST:,} values")
        yield from (f"{start + i * step:f}" for i in range(int(steps) + 1))


class ParamsRefused(Failure):
    """What is wrong with a record of --params."""


def axis_of_records(schema: Schema, records: Iterator[Mapping[str, Any]], default: int = 1) -> Axis:
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
            columns = [settable(schema, name, where) for name in parameters]
        if set(parameters) != {column.name for column in columns}:
            for name in parameters:
                settable(schema, name, where)
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


# Of a plan: how many runs are wanted, stored and missing.
SUMS = """coalesce(sum("#samples"), 0), coalesce(sum(min(coalesce("#rows", 0), "#samples")), 0),
    coalesce(sum(max("#samples" - coalesce("#rows", 0), 0)), 0) FROM plan.wanted LEFT JOIN plan.stored USING ("#id")"""


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
        if dbtool.scalar(db, "SELECT count(*) FROM main.sqlite_master"):
            dbtool.check_columns(dbtool.columns_of(db, schema.table), schema)
            self.count(schema)

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

    def ask(self, flag: str, names: Sequence[str], sql: str) -> sqlite3.Cursor:
        """Run SQL that has the user's own in it; raise Failure, which names the *flag* that it came from."""
        try:
            return self.db.execute(sql)
        except (sqlite3.Error, sqlite3.Warning) as error:
            dbtool.SIGNALS.check()
            raise Failure(f"{flag}: {error}; it takes SQL over {', '.join(names)}", dbtool.USAGE) from None

    def missing(self, order: str) -> list[Run]:
        """Return the runs whose rows are missing; by default every combination once before any twice."""
        ((*_, left),) = self.db.execute(f"SELECT {SUMS}")
        if left > MOST:
            raise Failure(f"{left:,} runs are missing; at most {MOST:,} make a sweep")
        combinations = self.db.execute("""SELECT coalesce("#rows", 0), "#numbers", wanted.*
            FROM plan.wanted LEFT JOIN plan.stored USING ("#id")
            WHERE coalesce("#rows", 0) < "#samples" ORDER BY "#id" """)
        runs = [Run(self.names, tuple(values), number) for rows, numbers, _, wanted, *values in combinations
                for number in missing_numbers(wanted, rows, numbers)]
        runs.sort(key=lambda run: run.sample)
        return self.in_order(runs, order) if order else runs

    def combinations(self) -> int:
        return int(dbtool.scalar(self.db, "SELECT count(*) FROM plan.wanted"))

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
        """Return (parameter, value, wanted, stored, missing) for all runs together, and for each value."""
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


PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


class Command:
    """What a run executes: words with {column} and {sample} in them, or a Python function."""

    def __init__(self, words: Sequence[str], call: str, names: Sequence[str]) -> None:
        self.words, self.call, self.names = list(words), call, names
        self.braced = {name for word in words for name in PLACEHOLDER.findall(word)}
        self.placed = self.braced & set(names)  # the parameters that have a place; without any, all are appended

    def check(self, schema: Schema, axes: Sequence[Axis]) -> None:
        """Raise Failure if no run could succeed, or a parameter would reach none."""
        import shutil

        if self.call:
            module, colon, function = self.call.partition(":")
            if not colon or not function:
                raise Failure(f"--call takes MODULE:FUNCTION, not {shown(self.call)}", dbtool.USAGE)
            if not importlib.machinery.PathFinder.find_spec(module.partition(".")[0], [os.getcwd(), *sys.path]):
                raise Failure(f"--call: there is no module {module} here", dbtool.USAGE)
            return
        program = self.words[0]
        if not PLACEHOLDER.search(program) and not shutil.which(program):
            raise Failure(f"{program}: {why_no_program(program)}", dbtool.USAGE)
        for name in sorted(self.braced - {*self.names, "sample"}):
            if name in schema.by_name:
                raise Failure(f"COMMAND has {{{name}}}, but no -p or --params gives {name}", dbtool.USAGE)
            meant = dbtool.nearest(name, [*self.names, "sample"])
            if meant and len(name) > 3:  # other words in braces are the job's own affair
                raise Failure(f"COMMAND has {{{name}}}, which is no parameter{meant}", dbtool.USAGE)
        for axis in axes if self.placed else ():
            names = names_of([axis])
            if len(axis.rows) > 1 and not self.placed & set(names):
                raise Failure(f"{', '.join(names)} varies, but COMMAND has no {{{names[0]}}}, so that no job would know"
                              " it", dbtool.USAGE)

    def for_run(self, run: Run) -> list[str]:
        """Return the program and its arguments for one run."""
        if self.call:
            return [sys.executable, os.path.realpath(__file__), "--call-once", os.getcwd(), self.call,
                    json.dumps(run.parameters, default=bytes.hex), str(run.sample)]
        values = {"sample": run.sample, **run.parameters}

        def value(match: re.Match[str]) -> str:
            return as_word(values[match[1]]) if match[1] in values else match[0]

        words = [PLACEHOLDER.sub(value, word) for word in self.words]
        if not self.placed:
            for name, given in run.parameters.items():
                words += [] if given is None else [f"--{name}", as_word(given)]
        return words


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


class Output(dbtool.Spool):
    """What a job has printed on one pipe: a little in memory, more of it in a temporary file, if there is room."""

    def __init__(self) -> None:
        import tempfile

        places = []
        with contextlib.suppress(OSError):  # no folder takes temporary files
            places = [os.path.join(tempfile.gettempdir(), "sweep-output")]
        super().__init__(places, 0o600)


class Job:
    """One run as a process of its own, the leader of its process group, and what it has printed."""

    def __init__(self, run: Run, words: list[str]) -> None:
        self.run, self.words = run, words
        self.printed: dict[int, Output] = {}  # by pipe: standard output, and standard error
        self.started = time.time()
        self.deadline = self.kill_at = math.inf  # time.monotonic
        self.seconds = 0.0
        self.status = 0
        self.why_ended = ""  # why the sweep ended it, if it did
        self.records: list[dict[str, Any]] = []

    def start(self, folder: str | None) -> None:
        """Start the process; raises OSError or ValueError.

        It writes into pipes: a file would lose a result on a full disk.
        """
        import subprocess

        ends: list[int] = []
        try:
            for _ in range(2):
                reader, writer = os.pipe()
                self.printed[reader] = Output()
                ends.append(writer)
            if folder:
                os.makedirs(folder, exist_ok=True)
            self.process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, stdout=ends[0], stderr=ends[1],
                                            cwd=folder, close_fds=False, start_new_session=True)
        finally:
            for writer in ends:
                os.close(writer)

    def read(self, pipe: int) -> bool:
        """Read once from one of the pipes; return whether there may be more."""
        try:
            data = os.read(pipe, PIPE_BYTES)
        except BlockingIOError:
            return False
        self.printed[pipe].add(data)
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
        for pipe, output in self.printed.items():
            os.close(pipe)
            output.discard()
        self.printed = {}

    def output(self, index: int) -> Iterator[bytes]:
        """Yield what it printed, 0 for standard output and 1 for standard error."""
        for output in list(self.printed.values())[index:index + 1]:
            yield from output.chunks()

    def last_words(self) -> str:
        """Return the last line on standard error, if there is one, which often says it all."""
        tail = b""
        for data in self.output(1):
            tail = (tail + data)[-4096:]
        lines = [line.strip() for line in tail.decode(errors="replace").split("\n")]
        own = [line for line in lines if line and not line.startswith(LAUNCHERS)]
        last = own[-1] if own else ""
        return f" ({last if len(last) <= LAST_WORDS else last[:LAST_WORDS - 1] + '…'})" if last else ""

    def take_result(self, schema: Schema) -> None:
        """Take the records that the job printed, and complete them; raise RecordRefused if it failed."""
        if self.why_ended and (self.status or self.why_ended != STOPPED):
            raise RecordRefused(self.why_ended)
        if self.status:
            how = f"exit status {self.status}" if self.status > 0 else f"killed by signal {-self.status}"
            raise RecordRefused(how + self.last_words())
        try:
            found = list(dbtool.records(self.output(0), skip_text=True))
        except NoRecord:
            raise RecordRefused(NO_RESULT) from None
        except Failure as failure:
            raise RecordRefused(f"its output: {failure}") from None
        except OSError as error:
            raise RecordRefused(f"its output can't be read: {error.strerror}") from None
        self.records = [self.complete(record, schema) for record in found]
        for _ in dbtool.fitted(schema, self.records):
            pass

    def why_refused(self, refusal: RecordRefused) -> str:
        """Return what insert says of a record, without what only makes sense there."""
        return f"record {refusal.number}: {refusal.why}" if refusal.number and len(self.records) > 1 else refusal.why

    def complete(self, record: dict[str, Any], schema: Schema) -> dict[str, Any]:
        """Fill in what the job left out; raise RecordRefused if it says that it ran with other parameters."""
        for name, wanted in self.run.parameters.items():
            said = typed(schema.by_name[name], record.setdefault(name, wanted))
            if said != wanted:
                wanted, said = ("null" if value is None else as_word(value) for value in (wanted, said))
                raise RecordRefused(f"it was to run with {name} {wanted}, but its result says {said};"
                              " is the parameter passed on, and printed as given?")
            record[name] = wanted
        if "metadata" in schema.by_name:
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))
            record.setdefault("metadata", {"command": printable(shlex.join(self.words)), "sample": self.run.sample,
                                           "started": started, "seconds": round(self.seconds, 3)})
        return record


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
        self.end_late_ones()  # after those that have ended by themselves

    def end_late_ones(self) -> None:
        now = time.monotonic()
        for job in self.running.values():
            if job.deadline > now:
                break  # the others started later
            if not job.why_ended:
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
        os.environ.pop(TOKEN, None)
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


class Writer:
    """Stores results as they come, in a thread of its own; those that wait together share a transaction.

    `outcomes` holds (job, why it was refused or None), `kept` why results could not be stored and where
    they are, and `trouble` what stands in the way now.
    """

    def __init__(self, path: str, schema: Schema, wake: Callable[[], None]) -> None:
        import threading

        self.thread = threading.Thread(target=self.run, daemon=True)
        self.path, self.schema, self.wake = path, schema, wake
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
                self.keep([record for job in batch for record in job.records], [], Failure("an error in the program"))
            self.wake()
            if self.crash:
                return
            time.sleep(BURST_S)

    def store(self, batch: list[Job]) -> None:
        """Store the results of all jobs of a batch; if one is refused, each by itself."""
        receipts: list[dbtool.Receipt] = []  # of COMMITs that failed: one may have happened all the same
        outcome: Failure | None
        while True:
            try:
                self.store_once([record for job in batch for record in job.records], receipts)
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
                self.keep([record for job in batch for record in job.records], receipts, trouble)
            self.outcomes += [(job, outcome) for job in batch]
            return

    def store_once(self, records: list[dict[str, Any]], receipts: list[dbtool.Receipt]) -> None:
        """Store *records* in one transaction, unless one of the *receipts* tells that they are; add its receipt if
        COMMIT fails."""
        receipt = None
        # Without a key, equal rows must tell; should they be another's, the next plan finds this run missing.
        receipts_here = [{**old, "told_by": "values"} if old["told_by"] == "nothing" else old for old in receipts]
        try:
            with dbtool.writing(self.path, self.schema, STORE_TRY_S) as db:
                receipt = dbtool.insert_records(db, self.schema, dbtool.fitted(self.schema, records), "fail",
                                                receipts_here)
        except dbtool.CommitFailed:
            if receipt:
                receipts.append(receipt)
            raise

    def keep(self, records: list[dict[str, Any]], receipts: list[dbtool.Receipt], why: Failure) -> None:
        """Put results aside where `dbtool.py retry`, or the next sweep, finds them."""
        spool = dbtool.Spool(dbtool.kept_places(self.path), dbtool.file_mode(self.path))
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

    def __init__(self, path: str, schema: Schema, runs: list[Run], command: Command,
                 options: argparse.Namespace) -> None:
        self.path, self.name, self.schema, self.command, self.options = path, options.database, schema, command, options
        self.total = len(runs)
        self.waiting = collections.deque(runs)
        self.attempts: collections.Counter[Run] = collections.Counter()  # that failed
        self.to_retry: dict[Run, tuple[str, str]] = {}  # why the last attempt failed, and its log
        self.logs = options.logs or path + "-sweep"
        self.stored = self.writing = self.unfinished = 0
        self.failures: list[tuple[Run, str, str]] = []
        self.signals: list[int] = []  # those that came
        self.stop_reason = ""
        self.stop_at = math.inf  # time.monotonic
        self.idle_since = math.inf

    def go(self) -> int:
        """Run all; return the exit status."""
        limit_descriptors(min(self.options.jobs, self.total))
        self.check_writable()
        self.pool = Pool(self.options.timeout or math.inf)
        self.writer = Writer(self.path, self.schema, self.pool.wake)
        self.progress = Progress(self)
        try:
            with self.handling_signals():
                self.writer.thread.start()
                try:
                    self.loop()
                finally:
                    self.writer.give_up.set()  # if an error brought us here, what can't be stored is kept
                    self.writer.close()
        finally:
            self.pool.close()
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
        while self.waiting and not self.stop_reason and len(self.pool.running) < self.options.jobs:
            run = self.waiting.popleft()
            job = Job(run, self.command.for_run(run))
            folder = os.path.join(self.options.workdir, label(run, self.path)) if self.options.workdir else None
            try:
                self.pool.start(job, folder)
            except ValueError as error:  # a NUL in a word
                self.failed(job, f"can't be started: {error}")
            except OSError as error:
                if self.pool.running and error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                    job.close()
                    self.waiting.appendleft(run)  # the machine is full: when another job has ended
                    return
                self.failed(job, f"can't be started: {error.strerror}: {error.filename}")

    def collect(self, job: Job) -> None:
        """Take the result of a job that has ended."""
        try:
            job.take_result(self.schema)
        except RecordRefused as refusal:
            self.failed(job, job.why_refused(refusal))
        else:
            self.writing += 1
            self.writer.put(job)

    def written(self, job: Job, refusal: Failure | None) -> None:
        self.writing -= 1
        if refusal is None:
            self.stored += 1
            with contextlib.suppress(OSError):
                os.unlink(self.log_path(job.run))  # of an earlier failure
            job.close()
        elif isinstance(refusal, RecordRefused):
            self.failed(job, job.why_refused(refusal))
        else:
            job.close()
            self.stop(str(refusal))

    def failed(self, job: Job, reason: str) -> None:
        if self.signals and job.why_ended == STOPPED:
            self.unfinished += 1
        else:
            self.attempts[job.run] += 1
            log = self.write_log(job, reason)
            if self.attempts[job.run] <= self.options.retries:
                self.to_retry[job.run] = reason, log
                self.waiting.appendleft(job.run)  # at once, so that a hopeless sweep is found to be one
            else:
                self.failures.append((job.run, reason, log))
                if len(self.failures) == self.options.max_failures:
                    self.stop(f"{len(self.failures)} failures")
        job.close()

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
        return os.path.join(self.logs, label(run, self.path if self.options.logs else "") + ".log")

    def write_log(self, job: Job, reason: str) -> str:
        """Write down a failed job: command, reason and all that it printed."""
        path = self.log_path(job.run)
        head = (f"command: {shlex.join(job.words)}\nrun: {job.run}\nattempt: {self.attempts[job.run]}\n"
                f"seconds: {job.seconds:.3f}\nreason: {reason}\n")
        head += "".join(f"result: {line}" for line in as_lines(job.records))
        try:
            os.makedirs(self.logs, exist_ok=True)
            with open(path, "wb") as file:
                file.write(head.encode(errors="backslashreplace"))
                for index, title in enumerate(("output", "error")):
                    file.write(f"--- standard {title}\n".encode())
                    data = b"\n"
                    for data in job.output(index):
                        file.write(data)
                    file.write(b"" if data.endswith(b"\n") else b"\n")
        except OSError as error:
            self.progress.say(f"{path}: {error.strerror}; so there is no log of {job.run}: {reason}")
        return path

    def summary(self) -> int:
        """Say what was done and what is left; return the exit status."""
        left = self.total - self.stored
        self.failures += [(run, *self.to_retry[run]) for run in self.waiting if run in self.to_retry]
        done = f"{self.name}: {self.stored:,} of {self.total:,} runs stored, {len(self.failures):,} failed"
        if self.unfinished:
            done += f", {self.unfinished:,} ended unfinished"
        if self.stop_reason:
            done = f"stopped by {self.stop_reason}: {done}, {left:,} left"
        if not self.options.logs:
            with contextlib.suppress(OSError):
                os.rmdir(self.logs)  # if it is empty now
        for why, kept in self.writer.kept:
            say(f"{self.name}: {why}; {kept.note}")
        for run, reason, log in self.failures[:FAILURES_NAMED]:
            say(f"{self.name}: {run}: {reason}; see {os.path.relpath(log)}")
        more = len(self.failures) - FAILURES_NAMED
        if more > 0:
            say(f"{self.name}: and {more:,} more failed; see {os.path.relpath(self.logs)}")
        say(done + (f"; to go on, run: {self.options.again}" if left else ""))
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
        self.is_in_trouble = False

    def update(self) -> None:
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
                f" {len(sweep.failures):,} failed, {rate:.3g} runs/s{left}")

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
    return (f"{shlex.join(command.for_run(run))} | {shlex.join(insert)}\n" for run in runs)


def counted(plan: Plan) -> list[str]:
    """Return how many runs are wanted, stored and missing, as a table."""
    names = ["parameter", "value", "wanted", "stored", "missing"]
    return list(dbtool.FORMATS["table"](names, [plan.counts()], "", True))


# ---------------------------------------------------------------------------------------- command line


SEE_HELP = "see: python3 sweep.py --help"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; {SEE_HELP}", dbtool.USAGE)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            meant = dbtool.nearest(unknown[0], flags) if unknown[0][:2] == "--" else ""
            raise Failure(f"unrecognized arguments: {' '.join(unknown)}{meant or '; the command stands after --'};"
                          f" {SEE_HELP}", dbtool.USAGE)
        return options


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
    add("--retries", type=natural, default=0, metavar="K", help="try a failed run again, up to K times (default: 0)")
    add("--max-failures", type=positive, metavar="N", help="start nothing more after N failed runs (default: go on)")
    add("--grace", type=seconds, default=GRACE_S, metavar="SECONDS",
        help=f"how long running jobs may go on after a signal (default: {GRACE_S:g})")
    add("--logs", metavar="DIR", help="where the logs of failed jobs go (default: DATABASE-sweep)")
    add("--workdir", metavar="DIR", help="run each job in a directory of its own in DIR; then give files as full paths")
    add = result.add_mutually_exclusive_group().add_argument
    add("--dry-run", action="store_true", help="print how many runs are wanted, stored and missing, by parameter")
    add("--list", action="store_true",
        help="print the missing runs as lines of shell for other engines, which know nothing of the other flags")
    add = result.add_argument
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


def chosen_axes(options: argparse.Namespace, schema: Schema) -> list[Axis]:
    """Return the axes that the command line names, and read the file of --params."""
    axes = [axis_of_flag(schema, flag) for flag in options.axes]
    if options.params:
        with contextlib.ExitStack() as stack:
            if options.params == "-" and not sys.stdin:
                raise Failure("--params -: standard input is closed")
            file = sys.stdin.buffer if options.params == "-" else stack.enter_context(open(options.params, "rb"))
            try:
                axes.append(axis_of_records(schema, dbtool.records(dbtool.pieces(file)), options.samples))
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
            runs, combinations, unnumbered = plan.missing(options.order), plan.combinations(), plan.unnumbered()
        if not runs:
            say(f"{name}: nothing is missing{'' if combinations else ': no combination satisfies --where'}")
            return 0
        if unnumbered and (options.call or "sample" in command.braced):
            say(f"{name}: rows there without metadata.sample, {unnumbered:,}, are taken for the first samples")
        return Sweep(path, schema, runs, command, options).go()
    finally:
        lock.release()


def sweep(options: argparse.Namespace, words: list[str]) -> int:
    """Do what the command line says; return the exit status."""
    path, schema = os.path.realpath(options.database), dbtool.read_schema(options.schema, options.table)
    if not options.dry_run and bool(words) == bool(options.call):
        raise Failure("give a command after --, or --call MODULE:FUNCTION" + ", not both" * bool(words), dbtool.USAGE)
    with dbtool.SIGNALS:
        axes = chosen_axes(options, schema)
    if options.workdir and words and "/" in words[0]:
        words = [os.path.abspath(words[0]), *words[1:]]
    command = Command(words, options.call, names_of(axes))
    if words or options.call:
        command.check(schema, axes)

    if options.dry_run or options.list:
        with planning(path, schema, axes, options.samples, options.where) as plan:
            lines = counted(plan) if options.dry_run else shell_lines(plan.missing(options.order), command, options)
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
        words = ["python3", sys.argv[0] if argv is None else "sweep.py", *arguments]
        options.again = " ".join(map(dbtool.for_shell, words))
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

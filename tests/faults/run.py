#!/usr/bin/env python3
"""Make each system call of a command fail, or end the process there, and see that nothing is lost.

    python3 tests/faults/run.py                        # a sample: of each call, one for each error
    python3 tests/faults/run.py --all                  # every call, every error: half an hour on 2 CPUs
    python3 tests/faults/run.py --all --scenario insert --syscall fdatasync --error EIO

strace lets the K-th call of a kind fail, once (EIO) or with all later ones (EIO+), or sends a signal
there (SIGKILL, SIGTERM). Which calls there are tells a run without faults; those before the script's
first line are Python's own and don't count. This must hold:

- Exit 0, and all is as after a run without faults. Or else all is as before, or as after, and a message
  says why, and names the file if the input is kept. No traceback, no hang, and a sound database.
- `again`, without faults, from what is kept or stands on standard error, then gives just what a run
  without faults gives, each row once, and nothing is kept any more.
- Input that was not acknowledged when SIGKILL came may be gone, but all of it, and what SIGTERM kept
  from being read is not lost. Where no key tells two equal rows apart, retry may refuse to guess, but
  then the kept file is still there.

An import that fails is judged alike (`--kind import`), but may show a traceback, as it is Python that
is broken then. It is an import's call if it opens, reads or maps a file of Python's or a library, or
asks for memory before the program has read or opened anything of its own.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
HANG_S = 60.0  # no command here takes a second, unless the machine is busy
LOCK_S = "0.2"  # how long a command waits for a lock

# ------------------------------------------------------------------------------------------- what fails

DISK = "EIO ENOSPC EDQUOT"
# By system call: how it may fail.
ERRORS = {
    "openat": f"{DISK} EACCES EMFILE", "read": "EIO", "pread64": "EIO", "mmap": "ENOMEM EACCES",
    **dict.fromkeys(("write", "pwrite64", "fsync", "fdatasync", "ftruncate"), DISK),
    **dict.fromkeys(("rename", "link", "mkdir"), f"{DISK} EACCES"),
    **dict.fromkeys(("unlink", "rmdir", "fcntl"), "EIO EACCES"),
    "exit_group": "",  # only killed there: all is done, but nobody knows
}
# What then goes on failing: not what nobody can do without, to read the input, to say what is wrong, memory, and not
# locks, for which SQLite itself would wait ten seconds.
LASTING = set(ERRORS) - {"read", "write", "mmap", "fcntl"}
# Where signals come: before calls that change what is on the disk. Between two of them it stays the same.
SIGNALLED = set(ERRORS) - {"read", "pread64", "fcntl", "mmap"}
IMPORT = re.compile(r"\.so\b|\.pyc?\b|/ld\.so\.|/lib/python3|/house[\">]")  # files of imports


class Fault(NamedTuple):
    syscall: str
    error: str  # a name of errno, with + if it lasts, or of a signal
    number: int  # which call of that kind, from 1
    kind: str  # call, import or signal

    def for_strace(self) -> str:
        what = f"signal={self.error}" if self.kind == "signal" else f"error={self.error.rstrip('+')}"
        return f"inject={self.syscall}:{what}:when={self.number}{'+' * self.error.endswith('+')}"


# ------------------------------------------------------------------------------------------ what is tried


class Scenario(NamedTuple):
    """A command, what there is before it, and `again`: what brings a failure of it to a good end."""

    name: str
    command: str
    stdin: bytes = b""
    before: Sequence[tuple[str, bytes]] = ()  # commands, and their standard input
    files: dict[str, bytes] = {}  # noqa: RUF012  never changed
    again: str = ""  # by default, the command itself
    settings: dict[str, str] = {}  # noqa: RUF012  of the environment
    keyless: bool = False  # nothing tells two equal rows apart


def results(*authors: str) -> bytes:
    record = json.loads((ROOT / "examples" / "result.json").read_text())
    return b"".join(json.dumps({**record, "author": author}).encode() + b"\n" for author in authors)


TWO = [("insert results.db", results("first", "second"))]
NEW, LONG = results("new"), results("new")[:-2] + b" " * 4_300_000 + b"}"  # the latter too long to wait in memory
KEPT, RETRY = "results.db-kept/20260101T000000.000000Z-host-1.json", "retry results.db"
DELETE = {"DBTOOL_JOURNAL": "delete"}  # here a COMMIT can fail after it has happened
LOSS = b'{"loss": 0.5}'
ONE = [("insert results.db", LOSS)]
RUNS, RUNS_SQL = {"DBTOOL_SCHEMA": "runs.sql"}, {"runs.sql": b"CREATE TABLE runs (run INTEGER PRIMARY KEY, loss REAL)"}
WIDE = (ROOT / "schema.sql").read_bytes().replace(b"    epochs", b"    host TEXT,\n    epochs")
QUERY = "query results.db 'SELECT author FROM results ORDER BY 1' --output authors.csv"
SCENARIOS = [
    Scenario("insert-new", "insert results.db", NEW, again=RETRY),
    Scenario("insert", "insert results.db", NEW, TWO, again=RETRY),
    Scenario("insert-several", "insert results.db", results("a", "b", "c"), TWO, again=RETRY),
    Scenario("insert-journal", "insert results.db", NEW, TWO, again=RETRY, settings=DELETE),
    Scenario("insert-long", "insert results.db", LONG, TWO, again=RETRY),
    Scenario("insert-refused", "insert results.db --schema none.sql", NEW, TWO, again=RETRY),
    Scenario("insert-refused-long", "insert results.db --schema none.sql", LONG, TWO, again=RETRY),
    Scenario("insert-keyless", "insert results.db", LOSS, ONE, RUNS_SQL, RETRY, RUNS, keyless=True),
    Scenario("insert-keyless-journal", "insert results.db", LOSS, ONE, RUNS_SQL, RETRY, {**RUNS, **DELETE}, True),
    Scenario("retry", RETRY, b"", TWO, {KEPT: NEW}),
    Scenario("retry-journal", RETRY, b"", TWO, {KEPT: NEW}, settings=DELETE),
    Scenario("retry-keyless", RETRY, b"", ONE, {KEPT: LOSS, **RUNS_SQL}, RETRY, RUNS, keyless=True),
    Scenario("merge", "merge results.db node.db", b"", [*TWO, ("insert node.db", results("node"))]),
    Scenario("snapshot", "snapshot results.db copy.db", b"", [*TWO, ("insert copy.db", results("old"))]),
    Scenario("migrate", "migrate results.db --schema wide.sql", b"", TWO, {"wide.sql": WIDE}),
    Scenario("query", QUERY, b"", TWO, {"authors.csv": b"author\nold\n"}),
]
SCRIPTS = {"merge": "dbadmin.py", "snapshot": "dbadmin.py", "migrate": "dbadmin.py", "delete": "dbadmin.py",
           "sweep": "sweep.py"}


def command_line(house: Path, line: str) -> list[str]:
    """Return what runs the command in *line* with the scripts in *house*."""
    command, *words = shlex.split(line)
    script = SCRIPTS.get(command, "dbtool.py")
    return [sys.executable, str(house / script),
            *(words if script == "sweep.py" else [command, *words, "--timeout", LOCK_S])]


class Done(NamedTuple):
    status: int | None  # None: it hung
    err: str
    trace: list[str]


def run(folder: Path, scenario: Scenario, line: str, stdin: bytes = b"", faults: Sequence[str] | None = None,
        temporary: Path | None = None) -> Done:
    """Run a command in *folder*; unless *faults* is None, under strace, with them as what is to fail."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DBTOOL_")}
    environment.pop("PYTHONUNBUFFERED", None)
    environment.update(scenario.settings, TMPDIR=str(temporary or folder / "tmp"), PYTHONHASHSEED="0",
                       PYTHONDONTWRITEBYTECODE="1")
    words = command_line(folder.parent / "house", line)
    trace, source = Path(f"{folder}.trace"), Path(f"{folder}.in")
    if faults is not None:
        fast = [] if ":signal=" in "".join(faults) else ["--seccomp-bpf"]  # with it, strace 6.1 sends no signals
        options = [word for option in (f"trace=?{',?'.join(ERRORS)}", *faults) for word in ("-e", option)]
        words = ["strace", *fast, "-f", "-y", "-qq", "-o", str(trace), *options, *words]
    source.write_bytes(stdin)
    with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as cat, subprocess.Popen(
            words, stdin=cat.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=environment,
            start_new_session=True) as process:
        try:
            err = process.communicate(timeout=HANG_S)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Done(None, "", [])
    return Done(process.returncode, err, [] if faults is None else trace.read_text(errors="replace").splitlines())


# --------------------------------------------------------------------------------- what is there after it


def look(folder: Path) -> dict[str, str]:
    """Return what the files in *folder* hold, of databases the rows; nothing of those without any, or kept aside."""
    state = {path.name: rows(path) if path.suffix == ".db" else path.read_text("latin-1") for path in folder.iterdir()
             if path.is_file() and not re.match(r"\.|dbtool-kept-|.*\.db-", path.name)}
    return {name: value for name, value in state.items() if value}


def rows(path: Path) -> str:
    """Return the rows of a database as text, without what changes from run to run, or what is wrong with it.

    It is a copy that is read, so that the next command finds what a killed writer left.
    """
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
        for name in (path.name, f"{path.name}-wal", f"{path.name}-journal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path.parent / name, folder)
        try:
            with contextlib.closing(sqlite3.connect(f"{folder}/{path.name}")) as db:
                if (found := db.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
                    return f"damaged: {found}"
                found = []
                for table, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    columns = db.execute(f'PRAGMA table_info("{table}")').fetchall()
                    names = ", ".join(f'"{name}"' for _, name, _, _, default, _ in columns
                                      if name != "metadata" and "(" not in (default or ""))
                    found += [f"{table} ({names}): {row}" for row in db.execute(f'SELECT {names} FROM "{table}"')]
                return "\n".join(sorted(found))
        except sqlite3.Error as error:
            return f"damaged: {error}"


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    return f"{dict(found.items() - wanted.items())}, not {dict(wanted.items() - found.items())}"


def kept(folder: Path, said: str) -> set[Path]:
    """Return the files with kept input: where a command looks for them, and those that a message names."""
    named = {folder / name for name in re.findall(r"[^\s;:]*kept[^\s;:]*\.json\b", said)}
    found = (folder.glob(pattern) for pattern in ("*-kept/*.json", "dbtool-kept-*.json", "tmp/dbtool-kept-*.json"))
    return {path for path in named.union(*found) if path.exists()}


# ------------------------------------------------------------------------------------------- one scenario


class Course:
    """A scenario without faults: the folder where it begins, what is there before it and after it, its calls."""

    def __init__(self, work: Path, scenario: Scenario) -> None:
        self.work, self.scenario, self.template = work, scenario, work / scenario.name
        self.again = scenario.again or scenario.command
        for name in scenario.files:
            (self.template / name).parent.mkdir(parents=True, exist_ok=True)
            (self.template / name).write_bytes(scenario.files[name])
        self.template.mkdir(exist_ok=True)
        for line, stdin in scenario.before:
            assert run(self.template, scenario, line, stdin).status == 0, line
        self.before = look(self.template)
        with self.copy() as folder:
            self.calls = run(folder, scenario, scenario.command, scenario.stdin, []).trace
            assert run(folder, scenario, self.again).status == 0, self.again
            self.after = look(folder)
        assert self.after != self.before

    @contextlib.contextmanager
    def copy(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.work) as folder:
            yield shutil.copytree(self.template, Path(folder), dirs_exist_ok=True)
        for ending in (".trace", ".in"):
            Path(f"{folder}{ending}").unlink(missing_ok=True)

    def faults(self) -> Iterator[Fault]:
        """Yield every fault. The first call that counts is the first that opens a file once the script is read."""
        script = f'"{command_line(self.work / "house", self.scenario.command)[1]}"'
        read = max(index for index, call in enumerate(self.calls) if "openat(" in call and script in call)
        first = next(index for index in range(read + 1, len(self.calls)) if "openat(" in self.calls[index])
        numbers: collections.Counter[str] = collections.Counter()
        seen = set()
        for index, call in enumerate(self.calls):
            counted = call.partition("(")[0]  # strace counts the calls of each thread by themselves
            numbers[counted] += 1
            syscall, number = counted.split()[1], numbers[counted]
            is_new = (syscall, number) not in seen
            seen.add((syscall, number))
            if index < first or not is_new or syscall not in ERRORS:
                continue
            kind = "import" if is_import(self.calls[:index + 1]) else "call"
            for error in ERRORS[syscall].split():
                for ending in ("", "+") if syscall in LASTING else ("",):
                    yield Fault(syscall, error + ending, number, kind)
            if syscall in SIGNALLED:
                yield Fault(syscall, "SIGKILL", number, "signal")
                if kind == "call" and syscall != "exit_group":  # once it is caught, and as long as it is
                    yield Fault(syscall, "SIGTERM", number, "signal")


def is_import(calls: Sequence[str]) -> bool:
    """Tell whether the last of the *calls* is an import's."""
    calls = [re.sub(r"AT_FDCWD<.*?>", "", call) for call in calls]
    return bool(IMPORT.search(calls[-1])) or ("mmap(" in calls[-1] and not any(
        re.search(r"/run-|read\(0<", call) for call in calls))


# ---------------------------------------------------------------------------------------------- one fault


class Verdict(NamedTuple):
    fault: Fault  # with its kind as it turned out
    call: str  # the line of strace; empty if the run did not come to it
    problems: list[str]


def judge(course: Course, fault: Fault) -> Verdict:
    """Run the scenario with a fault, and then what brings it to a good end; return what is wrong with that."""
    with course.copy() as folder:
        done = run(folder, course.scenario, course.scenario.command, course.scenario.stdin, [fault.for_strace()])
        if done.status is None:
            return Verdict(fault, "?", [f"hangs for {HANG_S:.0f} s"])
        hit = next((index for index, line in enumerate(done.trace)
                    if re.search(r"\(INJECTED\)$|killed by SIGKILL|--- SIGTERM", line)), None)
        if hit is not None and fault.kind == "signal":
            hit -= 1
        elif hit is not None:
            fault = fault._replace(kind="import" if is_import(done.trace[:hit + 1]) else "call")
        for name in re.findall(r'unlink\("([^"]*/\w{8})"\) += -1 .*INJECTED', "\n".join(done.trace)):
            Path(name).unlink(missing_ok=True)  # with these, tempfile tries a folder
        problems = list(problems_of(course, fault, folder, done))
    if problems:
        problems.append(f"exit {done.status}: {done.err.strip()[-300:]}")
    call = "" if hit is None else re.sub(r"^\d+ +|AT_FDCWD<.*?>, ", "", done.trace[hit]).replace(f"{folder}/", "")
    return Verdict(fault, call, problems)


def problems_of(course: Course, fault: Fault, folder: Path, done: Done) -> Iterator[str]:
    """Yield what is wrong with how a command ended, and with what comes of it."""
    stdin, status, err = course.scenario.stdin, done.status or 0, done.err
    killed = status == -signal.SIGKILL and fault.error == "SIGKILL"
    has_traceback = "Traceback" in err
    if status < 0 and not killed:
        yield f"dies of signal {-status}"
    if has_traceback and fault.kind != "import":
        yield "traceback"
    if status > 0 and not re.search(r"^\w+: ", err, re.M) and not has_traceback and fault.syscall != "write":
        yield "says nothing"
    state, files = look(folder), kept(folder, err)
    if status == 0 and state != course.after:
        yield f"exit 0, but not done: {difference(state, course.after)}"
    elif state not in (course.before, course.after):
        yield f"half done: {difference(state, course.before)}"
    for file in files if stdin and not killed else ():
        if fault.error == "SIGTERM" and stdin.startswith(file.read_bytes()):
            file.write_bytes(stdin)  # the program before the pipe still has the rest
        if file.read_bytes() != stdin:
            yield f"{file.name} does not hold the input"
        if file.name not in err and fault.syscall != "write":
            yield f"{file.name} is not named"
    if stdin and stdin.decode().strip() in err and not files and state != course.after:
        (folder / KEPT).parent.mkdir(exist_ok=True)
        (folder / KEPT).write_bytes(stdin)
    yield from problems_again(course, folder, files, killed and bool(stdin) and "kept in" not in err)


def problems_again(course: Course, folder: Path, files: set[Path], may_be_gone: bool) -> Iterator[str]:
    """Run what brings a fault to a good end; yield what is wrong with that."""
    away = {file.parent for file in files} - {folder, (folder / KEPT).parent}
    done = run(folder, course.scenario, course.again, temporary=min(away, default=None))
    state, left = look(folder), kept(folder, " ".join(map(str, files)))
    for file in left:
        if folder not in file.parents:  # but in the system's folder for temporary files
            file.unlink()
    if course.scenario.keyless and done.status == 1 and any(file.name in done.err for file in left):
        if state not in (course.before, course.after):
            yield f"kept, and yet {difference(state, course.after)}"
        return
    is_gone = may_be_gone and state == course.before
    if state != course.after and not is_gone:
        yield f"LOST OR DOUBLED: {difference(state, course.after)}"
    if done.status != 0 and not (is_gone and not state):  # without a database, there is nothing to retry
        yield f"again: exit {done.status}: {done.err.strip()[-300:]}"
    if done.status == 0 and left:
        yield f"still kept: {', '.join(file.name for file in left)}"


# -------------------------------------------------------------------------------------------- all of them


def build_house(work: Path) -> None:
    """Copy the scripts, so that they may be edited meanwhile, and compile what they import of each other."""
    (work / "house").mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "schema.sql"):
        shutil.copy(path, work / "house")
    subprocess.run([sys.executable, "-m", "compileall", "-q", work / "house"], check=True)


def sample(faults: Iterable[Fault], size: int, seed: int = 0) -> list[Fault]:
    """Return so many faults of each system call, error and kind."""
    groups = collections.defaultdict(list)
    for fault in faults:
        groups[fault.syscall, fault.error, fault.kind].append(fault)
    dice = random.Random(seed)
    return [fault for group in groups.values() for fault in dice.sample(group, min(size, len(group)))]


def try_faults(course: Course, faults: Iterable[Fault], jobs: int = 0) -> list[Verdict]:
    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        return list(pool.map(functools.partial(judge, course), faults))


def print_verdicts(name: str, verdicts: Iterable[Verdict]) -> collections.Counter[str]:
    """Print a line for each system call, error and kind, and what is wrong; return the totals."""
    totals: collections.Counter[str] = collections.Counter()
    groups = collections.defaultdict(list)
    for verdict in verdicts:
        groups[verdict.fault.syscall, verdict.fault.error, verdict.fault.kind].append(verdict)
    for key, group in groups.items():
        wrong = [verdict for verdict in group if verdict.problems]
        totals.update(faults=len(group), wrong=len(wrong), missed=sum(not verdict.call for verdict in group))
        print(f"{name:22} {key[0]:10} {key[1]:8} {key[2]:6} {len(group):4} faults, {len(wrong)} wrong")
        for verdict in wrong:
            print(f"    {verdict.fault.number}: {verdict.call}", *verdict.problems, sep="\n        ")
    sys.stdout.flush()
    return totals


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every call, not a sample")
    parser.add_argument("--sample", type=int, default=1, help="calls for each system call and error (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="which sample (default: 0)")
    parser.add_argument("--scenario", action="append", choices=[scenario.name for scenario in SCENARIOS])
    parser.add_argument("--syscall", action="append", choices=list(ERRORS))
    parser.add_argument("--error", action="append", help="such as EIO, EIO+ (all later calls too) or SIGKILL")
    parser.add_argument("--number", type=int, help="only this call of its kind")
    parser.add_argument("--kind", choices=["call", "import", "signal"])
    parser.add_argument("--kill", dest="error", action="append_const", const="SIGKILL", help="--error SIGKILL")
    parser.add_argument("--jobs", type=int, default=0, help="how many at once (default: the number of CPUs)")
    options = parser.parse_args(argv)
    memory = "/dev/shm"  # a flush to a slow disk takes longer than all else
    is_roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1e9
    totals: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory if is_roomy else None) as work:
        build_house(Path(work))
        for scenario in SCENARIOS:
            if scenario.name in (options.scenario or [scenario.name]):
                course = Course(Path(work), scenario)
                faults = [fault for fault in course.faults() if fault.syscall in (options.syscall or [fault.syscall])
                          and fault.error in (options.error or [fault.error])
                          and fault.kind in (options.kind or fault.kind)
                          and fault.number == (options.number or fault.number)]
                size = len(faults) if options.all else options.sample
                totals += print_verdicts(scenario.name,
                                         try_faults(course, sample(faults, size, options.seed), options.jobs))
    print(f"{totals['faults']} faults, {totals['wrong']} wrong, {totals['missed']} not reached")
    return 1 if totals["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What all tests share: the program in-process and as a real process, a results file, and a sample record."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dbadmin  # noqa: E402
import dbtool  # noqa: E402
import sweep  # noqa: E402

DBTOOL = str(ROOT / "dbtool.py")
DBADMIN = str(ROOT / "dbadmin.py")
SWEEP = str(ROOT / "sweep.py")
RECORD = json.loads((ROOT / "examples" / "result.json").read_text())
RUNS = "CREATE TABLE runs (n INTEGER NOT NULL, loss REAL, metadata TEXT NOT NULL DEFAULT '{}' CHECK (loss >= 0));"
GOOD = ["sh", "-c", 'echo "{\\"loss\\": 1}"', "sh"]  # a job that succeeds
STARTING_LINE = re.compile(r"^sweep: .*: [0-9,]+ runs? missing(, [0-9,]+ of them to run)?; [0-9,]+ at once\n", re.M)


def pytest_configure():
    """Put the tests' folders in memory where there is plenty: a thousand flushes to a slow disk take a minute."""
    shared = "/dev/shm"
    if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 4e9:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", shared)
    heed_signals()


def heed_signals() -> None:
    """Let programs that the tests start heed all signals, though the tests were started to ignore some.

    A script's background ignores SIGINT, and nohup SIGHUP. A handler that does nothing ignores it here,
    but is not inherited: what is executed gets the default action.
    """
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:  # those Python ignores, but not for others
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def need(found: object, what: str) -> None:
    """Skip a test on a machine that lacks *what*; in CI, which installs everything, fail."""
    if not found:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {what}")
        pytest.skip(f"needs {what}")


def need_program(name: str) -> str:
    path = shutil.which(name)
    need(path, name)
    return str(path)


class Result:
    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out.decode(), err.decode()


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    """Run each test in a folder of its own, with nothing of the user's environment."""
    for name in ("DBTOOL_SCHEMA", "DBTOOL_TABLE", "DBTOOL_JOURNAL", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def db_path(tmp_path):
    return tmp_path / "results.db"


@pytest.fixture
def call(monkeypatch, capfdbinary):
    """Call main() in this process: call(*arguments, stdin=bytes) -> Result."""

    def run(*arguments, stdin=b"", main=None):
        stdin = stdin if isinstance(stdin, bytes) else json.dumps(stdin).encode()
        file = tempfile.TemporaryFile()
        file.write(stdin)
        file.seek(0)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        capfdbinary.readouterr()
        main = main or (dbadmin.main if arguments[:1] and arguments[0] in dbadmin.COMMANDS else dbtool.main)
        status = main([str(argument) for argument in arguments])
        file.close()
        sys.stdout.flush()
        return Result(status, *capfdbinary.readouterr())

    return run


@pytest.fixture
def expect_success(call):
    """Call main(), see that it ends well and says nothing on standard error; return what it printed."""

    def run(*arguments, stdin=b""):
        result = call(*arguments, stdin=stdin)
        assert (result.status, result.err) == (0, ""), result.err
        return result.out

    return run


@pytest.fixture
def expect_failure(call):
    """Call main(), see that it fails with *status* and one line, and prints nothing; return that line."""

    def run(*arguments, stdin=b"", status=1):
        result = call(*arguments, stdin=stdin)
        assert (result.status, result.out) == (status, ""), result.err
        assert result.err.startswith(("dbtool: ", "dbadmin: ")) and result.err.count("\n") == 1, result.err
        return result.err

    return run


@pytest.fixture
def call_sweep(call):
    """Call sweep.main() in this process: call_sweep(*arguments, stdin=bytes) -> Result."""
    return functools.partial(call, main=sweep.main)


@pytest.fixture
def runs_schema(tmp_path, monkeypatch):
    """Let the results file of the test have the table of RUNS."""
    (tmp_path / "runs.sql").write_text(RUNS)
    monkeypatch.setenv("DBTOOL_SCHEMA", str(tmp_path / "runs.sql"))


@pytest.fixture
def quick_sweeps(monkeypatch):
    """Spare many small sweeps the pause after each transaction, which is half of their time."""
    monkeypatch.setattr("sweep.BURST_S", 0.001)


@pytest.fixture
def swept(call_sweep):
    """Run a sweep in this process that must end with *status*; return what it said after its starting line."""

    def run(*arguments, status=0, stdin=b""):
        result = call_sweep("r.db", *arguments, stdin=stdin)
        assert (result.status, result.out) == (status, ""), result.err
        return STARTING_LINE.sub("", result.err)

    return run


def shell(script):
    """Return a command that runs *script* with the value of n as $1 and the sample as $2."""
    return ["--", "sh", "-c", script, "sh", "{n}", "{sample}"]


def start(*arguments, **options):
    """Start sweep.py as a process, which heeds Ctrl-C even if the tests were started not to."""
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen([sys.executable, SWEEP, "r.db", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def stored(path="r.db"):
    """Return the values of n that are there, once for each row."""
    if not os.path.exists(path):
        return []
    # Not by dbtool.query: if a sweep ends meanwhile, only a connection that may write removes the -wal file.
    with contextlib.closing(sqlite3.connect(path)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchall():
            return []
        return [n for n, in db.execute("SELECT n FROM runs ORDER BY n")]


def failures(path="r.db"):
    """Return the rows of the table of failures; None if there is no such table."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'sweep_failures'").fetchall():
            return None
        return [dict(row) for row in db.execute("SELECT * FROM sweep_failures ORDER BY parameters, sample")]


@pytest.fixture
def rows(expect_success):
    """Return the answer to a query as lists of texts, without the header."""

    def ask(path, sql="SELECT * FROM results"):
        import csv

        return list(csv.reader(io.StringIO(expect_success("query", path, sql, "--no-header"), newline="")))

    return ask


def script_of(command) -> str:
    """Return the path of the script that has a command."""
    return DBADMIN if command in dbadmin.COMMANDS else DBTOOL


def process(*arguments, stdin=b"", **options):
    """Run a command as a real process; return the finished process, its output as bytes."""
    return subprocess.run([sys.executable, script_of(arguments[0]), *map(str, arguments)], input=stdin, capture_output=True,
                          timeout=120, check=False, **options)


def kept(path) -> list[Path]:
    """Return the files that insert kept beside the results file at *path*."""
    return sorted(Path(f"{path}-kept").glob("*.json"))


def wait_for(condition, seconds=20.0, pause=0.02) -> None:
    """Wait until *condition()* is true; fail after so many *seconds*."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(pause)


@contextlib.contextmanager
def small_disk(folder, size, *options):
    """A disk of so many megabytes, mounted with *options* at a new folder in *folder*."""
    need(os.geteuid() == 0, "root, to mount a full disk")
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}m", *options]), "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


PEAK = """import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"""


def peak_memory(*arguments, stdin=None) -> int:
    """Run dbtool.py, which must succeed; return its peak memory in KiB.

    A small process in between starts it, since Linux counts what the parent had at the fork.
    """
    done = subprocess.run([sys.executable, "-c", PEAK, sys.executable, script_of(arguments[0]), *map(str, arguments)], stdin=stdin,
                          stderr=subprocess.PIPE, check=True, text=True)
    status, peak = done.stderr.split()
    assert status == "0", done.stderr
    return int(peak)


def as_nobody(action):
    """Call *action* as a user without rights; return the exit status it returns and what it printed."""
    need(os.geteuid() == 0, "root, to become another user")
    import csv  # noqa: F401  what dbtool imports when it needs it: nobody may not read root's Python

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.setgid(65534)
        os.setuid(65534)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        status = 99
        try:
            status = action()
        except BaseException as error:
            print(repr(error))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with open(read) as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.fixture
def public(tmp_path_factory):
    """A folder that every user may read."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)

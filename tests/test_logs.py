"""What jobs print while they run, and where results come from: logs, the metadata of rows, the line of progress."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import GOOD, PEAK, ROOT, SWEEP, need, need_program, shell, small_disk, stored, wait_for

import dbtool
import sweep

pytestmark = pytest.mark.usefixtures("runs_schema", "quick_sweeps")
RESULT = 'echo "{\\"loss\\": 1}"'
HEAD = r"command: .*\nrun: n={n} sample=1\nattempt: {attempt}\nstarted: \d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n"
# Runs sweep.py as it is, but for how long the end of a sweep waits for its logs.
IMPATIENT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sweep; sweep.LOGS_END_S = 0.3; sys.exit(sweep.main())"


def log_of(n, folder="r.db-sweep"):
    """Return the path of the log of n's first sample, in the folder beside the results file or another."""
    path = "" if folder == "r.db-sweep" else os.path.realpath("r.db")
    return Path(folder, sweep.label(sweep.Run(("n",), (n,), 1), path) + ".log")


def metadata(path="r.db"):
    return [json.loads(row["metadata"]) for row in dbtool.query(path, "SELECT metadata FROM runs ORDER BY n")]


# ------------------------------------------------------------------------------------------------------ logs


@pytest.mark.parametrize("after_s", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_running_job_can_be_watched(swept, monkeypatch, after_s):
    """The job itself is the one that looks: it goes on when it has read in its log what it has printed."""
    if after_s != 1.0:
        monkeypatch.setattr("sweep.LOG_AFTER_S", after_s)
    watch = f'while ! grep -qx "$line" {log_of(1)} 2>/dev/null; do sleep 0.02; done'
    script = f'for line in "epoch 1" "epoch 2"; do echo "$line"; {watch}; done; line=oops; echo "$line" >&2; {watch}; {RESULT}'
    assert swept("-p", "n=1", "--timeout", "30", *shell(script)) == "sweep: r.db: 1 of 1 runs stored, 0 failed\n"
    assert metadata()[0]["seconds"] >= after_s  # it was not there sooner
    assert not os.path.exists("r.db-sweep")


def test_a_job_that_prints_much_can_be_watched_at_once(swept, monkeypatch):
    monkeypatch.setattr("sweep.LOG_AFTER_S", 60.0)
    script = f"head -c 3000000 /dev/zero | tr '\\0' x >&2; while [ ! -s {log_of(1)} ]; do sleep 0.02; done; {RESULT}"
    swept("-p", "n=1", "--timeout", "30", *shell(script))


def test_both_streams_are_there_each_in_its_order(swept):
    swept("-p", "n=1", *shell('for i in 1 2 3 4 5 6 7 8 9; do echo "out $i"; echo "err $i" >&2; done; exit 1'), status=1)
    log, end = re.fullmatch(f"{HEAD.format(n=1, attempt=1)}((?:out .\n|err .\n)*)(.*\n.*\n)", log_of(1).read_text()).groups()
    for stream in "out", "err":
        assert re.findall(f"^{stream} (.)$", log, re.M) == list("123456789")
    assert re.fullmatch(r"seconds: \d\.\d{3}\nreason: exit status 1 \(err 9\)\n", end)


@pytest.mark.parametrize("printed, end", [
    (r"printf half; exit 1", "half\nseconds: {s}\nreason: exit status 1\n"),
    (r"printf half >&2; exit 1", "half\nseconds: {s}\nreason: exit status 1 \\(half\\)\n"),
    ('echo "{\\"loss\\": \\"no\\"}"', '{{"loss": "no"}}\nresult: {{"loss": "no", "n": 1, "metadata": {{.*}}}}\nseconds: {s}\nreason: column loss: .*\n'),
    ('echo "{\\"loss\\": -1, \\"metadata\\": \\"x\\"}"', '.*\nresult: {{"loss": -1, "metadata": "x", "n": 1}}\nseconds: {s}\nreason: CHECK .*\n'),
], ids=["half", "half_of_the_other", "refused", "constraint"])
def test_the_log_of_a_failure_ends_with_the_reason_on_a_line_of_its_own(swept, printed, end):
    swept("-p", "n=1", *shell(printed), status=1)
    assert re.fullmatch(HEAD.format(n=1, attempt=1) + end.format(s=r"\d\.\d{3}"), log_of(1).read_text())


@pytest.mark.parametrize("flags, folder, names", [
    ([], "r.db-sweep", None), (["--logs", "logs"], "logs", []),
    (["--keep-logs"], "r.db-sweep", [1, 2]), (["--keep-logs", "--logs", "deep/logs"], "deep/logs", [1, 2])],
    ids=["default", "logs", "keep", "keep_in_logs"])
def test_a_log_goes_when_its_result_is_stored_unless_it_is_to_be_kept(swept, tmp_path, flags, folder, names):
    (tmp_path / "logs").mkdir()
    swept("-p", "n=1,2", *flags, *shell(f"echo chatter $1; {RESULT}"))
    assert (sorted(os.listdir(folder)) if os.path.exists(folder) else None) == (
        None if names is None else sorted(log_of(n, folder).name for n in names))
    for n in names or []:
        assert re.fullmatch(HEAD.format(n=n, attempt=1) + f"chatter {n}\n{{\"loss\": 1}}\n", log_of(n, folder).read_text())


def test_attempts_append_to_the_log_until_one_succeeds(swept):
    script = f'echo try; echo >> tries; [ $(wc -l < tries) -lt 4 ] && exit 1; {RESULT}'
    swept("-p", "n=1", "--retries", "1", *shell(script), status=1)
    swept("-p", "n=1", *shell(script), status=1)
    assert re.fullmatch("".join(HEAD.format(n=1, attempt=attempt) + r"try\nseconds: .*\nreason: exit status 1\n"
                                for attempt in (1, 2, 3)), log_of(1).read_text())
    swept("-p", "n=1", "--keep-logs", *shell(script))
    assert re.search(HEAD.format(n=1, attempt=4) + 'try\n{"loss": 1}\n$', log_of(1).read_text())
    assert stored() == [1]


def test_the_log_of_a_run_that_failed_goes_with_its_result(swept):
    swept("-p", "n=1,2", *shell("exit 1"), status=1)
    swept("-p", "n=1", *shell(RESULT))
    assert [path.name for path in Path("r.db-sweep").iterdir()] == [log_of(2).name]
    swept("-p", "n=1,2", *shell(RESULT))
    assert not os.path.exists("r.db-sweep")


def test_logs_have_no_more_rights_than_the_results_file(swept):
    os.umask(0o022)
    dbtool.insert("r.db", [{"n": 0, "loss": 0}])
    os.chmod("r.db", 0o640)
    swept("-p", "n=1", *shell("exit 1"), status=1)
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in ("r.db-sweep", log_of(1))] == [0o750, 0o640]


@contextlib.contextmanager
def nothing(folder):
    yield folder / "logs"


@contextlib.contextmanager
def a_file(folder):
    (folder / "logs").write_text("mine")
    yield folder / "logs"
    assert (folder / "logs").read_text() == "mine"


@contextlib.contextmanager
def under_a_file(folder):
    with a_file(folder) as path:
        yield path / "logs"


@contextlib.contextmanager
def full(folder):
    with small_disk(folder, 1) as disk:
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 10000)
        yield disk


@contextlib.contextmanager
def read_only(folder):
    with small_disk(folder, 1, "ro") as disk:
        yield disk


@contextlib.contextmanager
def planted(folder, plant):
    """Put something in the place of the second job's log."""
    (folder / "logs").mkdir()
    with contextlib.ExitStack() as stack:
        plant(log_of(2, folder / "logs"), stack)
        yield folder / "logs"


def pipe(folder):
    return planted(folder, lambda path, _: os.mkfifo(path))


def full_pipe(folder):
    """A pipe with a reader that does not read, full to the brim."""
    def plant(path, stack):
        os.mkfifo(path)
        for flags in os.O_RDONLY, os.O_WRONLY:
            descriptor = os.open(path, flags | os.O_NONBLOCK)
            stack.callback(os.close, descriptor)
        with contextlib.suppress(BlockingIOError):
            while os.write(descriptor, b"x" * 4096):
                pass

    return planted(folder, plant)


@contextlib.contextmanager
def link(folder):
    (folder / "mine").write_text("mine")
    with planted(folder, lambda path, _: path.symlink_to(folder / "mine")) as logs:
        yield logs
    assert (folder / "mine").read_text() == "mine"


def directory(folder):
    return planted(folder, lambda path, _: path.mkdir())


@pytest.mark.parametrize("place, reason", [
    (nothing, None), (a_file, "Not a directory"), (under_a_file, "Not a directory"), (full, "No space left on device"),
    (read_only, "Read-only file system"), (pipe, "No such device or address"), (full_pipe, "is no regular file"),
    (link, "Too many levels of symbolic links"), (directory, "Is a directory"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_log_that_cannot_be_written_is_said_once_and_costs_no_result(swept, tmp_path, place, reason):
    with place(tmp_path) as folder:
        said = swept("-p", "n=1..4", "--jobs", "2", "--logs", str(folder), "--keep-logs", *shell(f"echo chatter; {RESULT}"))
        *troubles, summary = said.splitlines()
        assert summary == "sweep: r.db: 4 of 4 runs stored, 0 failed" and len(troubles) == (reason is not None), said
        assert all(re.fullmatch(f"sweep: r.db: {folder}/n-\\d_sample-1_.*.log: {reason}; (the jobs go on|so not all logs are there)", line)
                   for line in troubles), said
    assert stored() == [1, 2, 3, 4]


@pytest.mark.parametrize("place", [a_file, full, read_only, full_pipe], ids=lambda value: value.__name__)
def test_a_failure_whose_log_cannot_be_written_is_noted_all_the_same(swept, tmp_path, place):
    with place(tmp_path) as folder:
        said = swept("-p", "n=2", "--logs", str(folder), *shell("echo why >&2; exit 1"), status=1)
        assert "exit status 1 (why); see logs" in said or "exit status 1 (why); see disk" in said
    assert dbtool.query("r.db", "SELECT reason FROM sweep_failures") == [{"reason": "exit status 1 (why)"}]


@pytest.fixture
def hanging(tmp_path):
    """A folder that hangs, as that of a server does which is away: what is to be opened there waits."""
    need(os.geteuid() == 0 and shutil.which("bindfs") and os.path.exists("/dev/fuse"), "bindfs and /dev/fuse")
    for name in "behind", "hanging":
        (tmp_path / name).mkdir()
    server = subprocess.Popen(["bindfs", "-f", tmp_path / "behind", tmp_path / "hanging"], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: os.path.ismount(tmp_path / "hanging") or server.poll() is not None)
    if server.poll() is not None:
        pytest.skip(f"no FUSE mount here: {server.stderr.read().strip()}")
    server.send_signal(signal.SIGSTOP)
    yield tmp_path / "hanging"
    server.send_signal(signal.SIGCONT)
    subprocess.run(["umount", "-l", tmp_path / "hanging"], check=True)
    server.communicate(timeout=20)


@pytest.mark.parametrize("first, trouble", [
    ("true", r"hanging: the disk is too slow; the last logs are not whole; so not all logs are there"),
    pytest.param("head -c 200000000 /dev/zero >&2", r"hanging/n-1_\S+: the disk is too slow for what is printed; some is left out; the jobs go on",
                 marks=pytest.mark.slow)], ids=["quiet", "200_megabytes"])
def test_a_folder_for_logs_that_hangs_holds_up_no_job_and_takes_no_memory(hanging, first, trouble):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, sys.executable, "-c", IMPATIENT, "r.db", "-p", "n=1..4", "--jobs", "2", "--keep-logs",
         "--logs", hanging, *shell(f"[ $1 = 1 ] && {first}; {RESULT}")], capture_output=True, text=True, check=True, timeout=50)
    *said, peak = done.stderr.splitlines()
    assert stored() == [1, 2, 3, 4]
    assert said[-1] == "sweep: r.db: 4 of 4 runs stored, 0 failed" and len(said) == 3, said
    assert re.fullmatch(f"sweep: r.db: .*/{trouble}", said[1])
    status, kilobytes = map(int, peak.split())
    assert status == 0 and kilobytes < 130 * 1024


@pytest.mark.slow
def test_a_job_that_prints_200_megabytes_takes_no_memory():
    done = subprocess.run([sys.executable, "-c", PEAK, sys.executable, SWEEP, "r.db", "-p", "n=1", "--keep-logs",
                           *shell(f"head -c 200000000 /dev/zero >&2; {RESULT}")], capture_output=True, text=True, check=True)
    *said, peak = done.stderr.splitlines()
    status, kilobytes = map(int, peak.split())
    assert status == 0 and kilobytes < 120 * 1024 and said[-1] == "sweep: r.db: 1 of 1 runs stored, 0 failed", done.stderr
    assert log_of(1).stat().st_size > 200000000 or "the disk is too slow for what is printed; some is left out" in said[1]


def test_what_waits_for_the_logs_is_counted_exactly(tmp_path):
    logs = sweep.Logs(str(tmp_path / "logs"), 0o600)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        logs.thread.start()
        for _ in range(3000):
            logs.append(str(tmp_path / "logs" / "a"), b"x" * 100)
        logs.close()
    finally:
        sys.setswitchinterval(interval)
    assert (logs.given, logs.taken, logs.trouble) == (300000, 300000, "")
    assert (tmp_path / "logs" / "a").stat().st_size == 300000


# ------------------------------------------------------------------------------------------------ provenance


OWN = {"command", "sample", "started", "seconds", "host", "slot"}


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Run git in a checkout that the test makes, with nothing of the user's settings."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    program = need_program("git")

    def run(*words):
        return subprocess.run([program, "-c", "user.name=A", "-c", "user.email=a@example.org", *words], capture_output=True,
                              text=True, check=True).stdout.strip()

    return run


@pytest.fixture(autouse=True)
def _outside(tmp_path, monkeypatch):
    """See that what the tests themselves run in, a checkout or a Slurm job, is not found."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in "SLURM_JOB_ID", "GIT_DIR", "GIT_WORK_TREE":
        monkeypatch.delenv(name, raising=False)


def test_a_row_says_where_it_comes_from(swept):
    swept("-p", "n=1", "--samples", "2", *shell(f"sleep 0.1; {RESULT}"))
    for sample, found in enumerate(sorted(metadata(), key=lambda item: item["sample"]), 1):
        assert set(found) == OWN
        assert found["sample"] == sample and found["host"] == os.uname().nodename and found["slot"] in (0, 1)
        assert found["command"] == shlex.join(["sh", "-c", f"sleep 0.1; {RESULT}", "sh", "1", str(sample)])
        assert 0.1 <= found["seconds"] < 10 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["started"])


@pytest.mark.parametrize("printed, wanted", [
    ({}, OWN),
    ({"metadata": None}, OWN),
    ({"metadata": {}}, OWN),
    ({"metadata": {"mine": [1, None], "host": "x"}}, {"mine": [1, None], "host": "x"}),
    ({"metadata": '{"mine": 1, "sample": 7}'}, {"mine": 1, "sample": 7}),
    ({"metadata": {"command": None, "seconds": "long"}}, {"command": None, "seconds": "long"}),
    ({"metadata": {"loss": float("nan"), "deep": {"a": "é\n\u2028"}}}, {"loss": None, "deep": {"a": "é\n\u2028"}}),
    ({"metadata": "{}"}, OWN),
    ({"metadata": "just text"}, "just text"),
    ({"metadata": "[1, 2]"}, "[1, 2]"),
    ({"metadata": "5"}, "5"),
    ({"metadata": ""}, ""),
    ({"metadata": "{" * 2000}, "{" * 2000),
    ({"metadata": [1, {"a": 2}]}, '[1,{"a":2}]'),
    ({"metadata": {"$hex": "00ff"}}, b"\0\xff"),
], ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) and "metadata" in value else "")
def test_what_the_job_says_of_itself_stays(swept, printed, wanted):
    swept("-p", "n=1", "--", "printf", "%s\n", json.dumps({"loss": 1, **printed}))
    [row] = dbtool.query("r.db", "SELECT metadata FROM runs")
    if not isinstance(wanted, (dict, set)):
        assert row["metadata"] == wanted
        return
    found = json.loads(row["metadata"])
    assert set(found) == OWN | set(wanted)
    assert all(found[name] == wanted[name] for name in wanted if isinstance(wanted, dict))


def test_metadata_that_is_a_parameter_is_that_and_nothing_more(swept):
    command = ["-p", "n=1", "-p", 'metadata={"a": 1}', "--", *GOOD]
    swept(*command)
    assert dbtool.query("r.db", "SELECT metadata FROM runs") == [{"metadata": '{"a": 1}'}]
    assert swept(*command) == "sweep: r.db: nothing is missing\n"


@pytest.mark.parametrize("change, dirty", [
    (lambda: None, False), (lambda: Path("new").touch(), False), (lambda: Path("train.py").write_text("2"), True),
    (lambda: os.unlink("train.py"), True), (lambda: Path(os.fsdecode(b"caf\xe9")).write_text("2"), True)],
    ids=["clean", "untracked", "changed", "removed", "not_utf8"])
def test_a_row_says_which_commit_it_comes_from(swept, git, change, dirty):
    git("init", "-q")
    Path("train.py").write_text("1")
    Path(os.fsdecode(b"caf\xe9")).write_text("1")
    git("config", "core.quotePath", "off")
    git("add", "train.py", os.fsdecode(b"caf\xe9"))
    git("commit", "-q", "-m", "one")
    change()
    os.mkdir("work")
    swept("-p", "n=1", "--workdir", "work", "--", *GOOD)
    [found] = metadata()
    assert set(found) == OWN | {"git_commit", "git_dirty"}
    assert found["git_commit"] == git("rev-parse", "HEAD") and found["git_dirty"] is dirty


def test_without_a_commit_a_row_names_none(swept, git):
    git("init", "-q")
    swept("-p", "n=1", "--", *GOOD)
    assert set(metadata()[0]) == OWN


def test_without_git_a_row_names_none(swept, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to(need_program("sh"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    swept("-p", "n=1", "--", *GOOD)
    assert set(metadata()[0]) == OWN


@pytest.mark.parametrize("job, wanted", [("1234_5", {"slurm_job": "1234_5"}), ("", {})])
def test_a_row_says_in_which_slurm_job_it_was_made(swept, monkeypatch, job, wanted):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    swept("-p", "n=1", "--", *GOOD)
    assert {name: value for name, value in metadata()[0].items() if name not in OWN} == wanted


def test_a_schema_without_metadata_is_told_once_what_it_goes_without(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER, loss REAL)")
    said = swept("-p", "n=1", "--", *GOOD).splitlines()
    assert len(said) == 2 and said[0] == (
        f"sweep: r.db: {tmp_path}/runs.sql has no column metadata, so no row will say which command, sample, host and commit"
        " it comes from, nor when it ran")
    for grid in "n=2", "n=1..3":
        assert swept("-p", grid, "--", *GOOD) == "sweep: r.db: 1 of 1 runs stored, 0 failed\n"


RECORD = {"author": "a", "algorithm": "m", "activation": "relu", "dataset": "d", "forecast_length": 1, "prediction_gap": 0,
          "training_window_length": 2, "sample_window_length": 3, "layers": "5", "rmse_global": 1.5}
ASK = "SELECT epochs, sample, started, seconds, host, slot, slurm_job, git_commit, git_dirty, command FROM runs ORDER BY epochs"


def test_the_view_runs_shows_it(swept, rows, monkeypatch, git):
    monkeypatch.delenv("DBTOOL_SCHEMA")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    swept("-p", "epochs=1", "--", "printf", "%s\n", json.dumps(RECORD))
    dbtool.insert("r.db", [{**RECORD, "epochs": 2, "metadata": "just text"}, {**RECORD, "epochs": 3, "metadata": "5"}])
    first, *others = rows("r.db", ASK)
    found = json.loads(rows("r.db", "SELECT metadata FROM results WHERE epochs = 1")[0][0])
    assert first == ["1", "1", found["started"], str(found["seconds"]), os.uname().nodename, "0", "77", git("rev-parse", "HEAD"), "0", found["command"]]
    assert others == [["2"] + [""] * 9, ["3"] + [""] * 9]


def test_migrate_adds_the_view_to_an_old_file(swept, expect_success, rows, tmp_path, monkeypatch):
    monkeypatch.delenv("DBTOOL_SCHEMA")
    text = (ROOT / "schema.sql").read_text()
    (tmp_path / "old.sql").write_text(text[:text.index("CREATE VIEW")])
    expect_success("insert", "r.db", "--schema", "old.sql", stdin={**RECORD, "epochs": 1, "metadata": {"sample": 4}})
    assert expect_success("migrate", "r.db", "--dry-run") == expect_success("migrate", "r.db") == "create view runs\n"
    assert rows("r.db", "SELECT epochs, sample, command FROM runs") == [["1", "4", ""]]
    assert expect_success("migrate", "r.db") == ""


# -------------------------------------------------------------------------------------------------- progress


@pytest.mark.slow
def test_the_line_of_progress_names_the_job_that_runs_longest():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    running = subprocess.Popen([sys.executable, SWEEP, "r.db", "-p", "n=1..4", "--jobs", "2",
                                *shell(f"[ $1 = 1 ] && sleep 1.6; [ $1 = 2 ] && sleep 3.6; {RESULT}")], stderr=follower)
    os.close(follower)
    text = b""
    with contextlib.suppress(OSError):
        while data := os.read(leader, 4096):
            text += data
    assert running.wait(timeout=20) == 0
    longest = [(run, second) for second, run in re.findall(r"; longest, 0:0(\d): n=(.) sample=1\r", text.decode())]
    assert longest[0][0] == "1" and longest[-1][0] == "2" and ("2", "3") in longest, longest
    assert text.decode().endswith("\r\x1b[Ksweep: r.db: 4 of 4 runs stored, 0 failed\r\n")

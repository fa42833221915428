"""Runs that failed: the table that tells why, trying them again, and when a sweep gives up or lets a slot rest."""

import contextlib
import json
import os
import re
import shlex
import sqlite3
import struct
import time
from pathlib import Path

import pytest
from conftest import GOOD, failures, shell, start, stored, wait_for

import dbtool
import sweep

pytestmark = pytest.mark.usefixtures("runs_schema", "quick_sweeps")
RESULT = 'echo "{\\"loss\\": 1}"'
FAILED_TWO_OF_FOUR = ["-p", "n=2,3", *shell("exit 1")]


@pytest.fixture
def listed(call_sweep):
    """Return the values of n in the order in which --list has them."""

    def run(*arguments):
        result = call_sweep("r.db", "--list", *arguments, "--", "echo", "{n}")
        assert (result.status, result.err) == (0, ""), result.err
        return [int(line.split()[1]) for line in result.out.splitlines()]

    return run


@pytest.fixture
def counts(call_sweep):
    """Return a row of what --dry-run counts, by default that for all runs."""

    def run(*arguments, row=0, stdin=b""):
        result = call_sweep("r.db", *arguments, "--dry-run", "--format", "json", stdin=stdin)
        assert (result.status, result.err) == (0, ""), result.err
        return json.loads(result.out)[row]

    return run


def tried():
    """Return the numbers that jobs wrote into a file when they began, in order."""
    return list(map(int, Path("tried").read_text().split())) if os.path.exists("tried") else []


# ----------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("command, kind, reason, last_line", [
    (shell('echo one >&2; echo "  why " >&2; echo >&2; exit 3'), "exit", "exit status 3 (why)", "why"),
    (shell("echo bye >&2; kill -SEGV $$"), "signal", "killed by signal 11 (bye)", "bye"),
    (["--timeout", "0.2", *shell("echo late >&2; exec sleep 9")], "timeout", "timed out after 0.2 s", "late"),
    (shell("echo 10% done"), "no_result", "it printed no JSON object", ""),
    (shell('echo "{\\"loss\\": 1"'), "refused", "its output: record 1 (line 2): not valid JSON: it ends in the middle; was the program before the pipe cut off?", ""),
    (shell('echo "{\\"loss\\": \\"high\\"}"'), "refused", 'column loss: expected a number that a 64-bit float holds or null, got "high"', ""),
    (shell('echo "{\\"lost\\": 1}"'), "refused", '"lost" is no column of runs; did you mean "loss"?', ""),
    (shell('echo "{\\"loss\\": -1}"'), "refused", "CHECK constraint failed: loss >= 0", ""),
    (shell('echo "{\\"loss\\": 1} {\\"loss\\": -1}"'), "refused", "record 2: CHECK constraint failed: loss >= 0", ""),
    (shell('echo "{\\"loss\\": 1, \\"n\\": 9}"'), "contradiction", "it was to run with n 1, but its result says 9; is the parameter passed on, and printed as given?", ""),
    (["--", "./{n}"], "not_started", "can't be started: No such file or directory: ./1", ""),
    (["--", "./\udcff{n}"], "not_started", "can't be started: No such file or directory: ./\\udcff1", ""),
], ids=["exit", "signal", "timeout", "no_result", "bad_json", "value", "column", "constraint", "second_record",
        "contradiction", "not_started", "not_utf8"])
def test_a_failure_is_a_row_that_tells_why(swept, monkeypatch, command, kind, reason, last_line):
    monkeypatch.setattr("sweep.LOG_AFTER_S", 20.0)  # no deadline waits for that
    before = time.time()
    said = swept("-p", "n=1", *command, status=1)
    [row] = failures()
    started = time.mktime(time.strptime(row.pop("started"), "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before - 1 <= started <= time.time()
    assert (kind == "timeout") * 0.2 <= row.pop("seconds") < 5
    log = Path(row.pop("log"))
    assert log.is_absolute() and reason in log.read_text() and os.path.relpath(log) in said
    words = [word.replace("{n}", "1").replace("{sample}", "1").replace("\udcff", "\\udcff")
             for word in command[command.index("--") + 1:]]
    assert row == {"parameters": '{"n": 1}', "sample": 1, "kind": kind, "reason": reason, "last_line": last_line,
                   "attempts": 1, "host": os.uname().nodename, "command": shlex.join(words)}
    assert stored() == [] and "stopped by" not in said


def test_the_last_line_is_whole_where_the_reason_has_its_beginning(swept):
    said = swept("-p", "n=1", *shell("head -c 300 /dev/zero | tr '\\0' x >&2; exit 1"), status=1)
    [row] = failures()
    assert row["last_line"] == "x" * 300 and row["reason"] == f"exit status 1 ({'x' * 99}…)" and row["reason"] in said


def test_attempts_are_counted_over_retries_and_sweeps(swept):
    for retries, attempts in (1, 2), (0, 3), (1, 5):
        swept("-p", "n=1", "--retries", str(retries), *shell("exit $1"), status=1)
        [row] = failures()
        assert row["attempts"] == attempts
    assert re.findall("^attempt: (.*)$", Path(row["log"]).read_text(), re.M) == list("12345")


def test_the_log_is_named_by_its_full_path(swept):
    swept("-p", "n=1", "--logs", "deep/logs", *shell("exit 3"), status=1)
    [row] = failures()
    assert os.path.dirname(row["log"]) == os.path.realpath("deep/logs") and "exit status 3" in Path(row["log"]).read_text()


def test_each_sample_has_a_row_of_its_own(swept):
    swept("-p", "n=1,2", "--samples", "2", *shell(f"[ $1$2 = 12 ] && {RESULT}; [ $1$2 != 22 ]"), status=1)
    assert [(row["parameters"], row["sample"], row["kind"]) for row in failures()] == [
        ('{"n": 1}', 1, "no_result"), ('{"n": 2}', 1, "no_result"), ('{"n": 2}', 2, "exit")]


def test_one_row_however_the_parameters_are_ordered(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER, m REAL, metadata TEXT)")
    swept("-p", "n=1", "-p", "m=2", "--", "false", status=1)
    swept("-p", "m=2.0", "-p", "n=1", "--", "false", status=1)
    assert [(row["parameters"], row["attempts"]) for row in failures()] == [('{"m": 2.0, "n": 1}', 2)]


@pytest.mark.parametrize("then", [
    lambda swept: swept("-p", "n=1,2", *shell(RESULT)),
    lambda swept: swept("-p", "n=2", *shell(RESULT)),
    lambda swept: swept("-p", "n=2", "--failed", "only", *shell(RESULT)),
    lambda swept: (dbtool.insert("r.db", [{"n": 2, "loss": 1}]), swept("-p", "n=2", *shell("exit 1"))),
    lambda swept: (dbtool.insert("r.db", [{"n": 2, "loss": 1}]), swept("-p", "n=1..3", *shell(RESULT))),
    lambda swept: swept("-p", "n=1..3", "--failed", "forget"),
    lambda swept: swept("-p", "n=1..3", "--failed", "forget", *shell(RESULT)),
], ids=["later_sweep", "smaller_grid", "only", "by_hand_and_nothing_to_run", "by_hand", "forgotten", "forgotten_and_run"])
def test_the_row_goes_when_the_run_has_its_result(swept, then):
    swept("-p", "n=1,2", *shell(f"[ $1 = 1 ] && {RESULT}"), status=1)
    assert len(failures()) == 1
    then(swept)
    assert failures() == []


def test_the_row_goes_when_a_retry_succeeds_in_the_end(swept):
    script = f'echo $1 >> tried; case $1 in 1|3) mkdir "again$1" && exit 1;; esac; {RESULT}'
    said = swept("-p", "n=1..4", "--jobs", "1", "--retries", "1", *shell(script))
    assert tried() == [1, 2, 3, 4, 1, 3] and stored() == [1, 2, 3, 4] and failures() == []
    assert said.splitlines()[1:] == ["sweep: r.db: 4 of 4 runs stored, 0 failed"] and not os.path.exists("r.db-sweep")


def test_other_grids_leave_a_row_in_peace(swept, counts, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER, m INTEGER, loss REAL)")
    swept("-p", "n=1,2", *shell("exit 1"), status=1)
    assert counts("-p", "n=1,2", "-p", "m=1")["failed"] == 0
    swept("-p", "n=1", "-p", "m=1", *shell("exit 1"), status=1)
    assert [row["parameters"] for row in failures()] == ['{"m": 1, "n": 1}', '{"n": 1}', '{"n": 2}']
    swept("-p", "n=1", "-p", "m=1", *shell(RESULT))
    swept("-p", "n=1,2", "-p", "m=1", "--failed", "forget")
    swept("-p", "n=2", "--samples", "2", "--where", "n > 5", *shell(RESULT))
    assert [row["parameters"] for row in failures()] == ['{"n": 1}', '{"n": 2}']
    swept("-p", "n=1", *shell("exit 1"))  # a row of the larger grid is a result of this one
    assert [row["parameters"] for row in failures()] == ['{"n": 2}']


def test_kill_9_keeps_the_rows_that_are_there(swept):
    running = start("-p", "n=1..9", "--jobs", "1", *shell(f"[ $1 = 4 ] && touch begun && sleep 30; [ $1 = 1 ] && {RESULT}"))
    wait_for(lambda: os.path.exists("begun") and len(failures() or []) == 2)
    running.kill()
    running.communicate(timeout=20)
    assert [row["parameters"] for row in failures()] == ['{"n": 2}', '{"n": 3}'] and stored() == [1]
    swept("-p", "n=1..9", "--", *GOOD)
    assert failures() == [] and stored() == list(range(1, 10))


def test_a_sweep_without_failures_makes_no_table_and_no_transaction_of_its_own(swept):
    swept("-p", "n=0", "--", *GOOD)
    with contextlib.closing(sqlite3.connect("r.db", isolation_level=None)) as db:  # so that the -wal file stays
        db.execute("BEGIN")
        db.execute("SELECT * FROM runs").fetchall()
        swept("-p", "n=0..3", "--jobs", "1", "--", *GOOD)
        assert 1 <= commits("r.db-wal") <= 3
        swept("-p", "n=0..3", "--jobs", "1", "--", *GOOD)
        assert commits("r.db-wal") <= 3
    assert failures() is None


def commits(path):
    """Count the transactions in a -wal file: sqlite.org/fileformat.html#the_write_ahead_log."""
    data = Path(path).read_bytes()
    page, = struct.unpack(">8xI", data[:12])
    return sum(any(data[at + 4:at + 8]) for at in range(32, len(data), 24 + page))


def test_the_table_survives_migrate_and_snapshot(swept, counts, expect_success, tmp_path):
    swept(*FAILED_TWO_OF_FOUR, status=1)
    before = failures()
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER NOT NULL, more TEXT, loss REAL, metadata TEXT)")
    assert "add column more TEXT" in expect_success("migrate", "r.db")
    expect_success("snapshot", "r.db", "copy.db")
    assert failures() == failures("copy.db") == before and len(before) == 2
    assert counts("-p", "n=1..4")["failed"] == 2
    assert expect_success("migrate", "r.db") == ""


@pytest.mark.parametrize("sql", [
    "CREATE TABLE sweep_failures (a)", "CREATE VIEW sweep_failures AS SELECT * FROM runs",
    "CREATE INDEX sweep_failures ON runs (n)", "CREATE TABLE Sweep_Failures (a)"], ids=["table", "view", "index", "case"])
@pytest.mark.parametrize("command", [["--dry-run"], ["--", "true"]], ids=lambda words: words[0])
def test_a_schema_with_a_table_of_that_name_is_refused(call_sweep, tmp_path, sql, command):
    (tmp_path / "runs.sql").write_text(f"CREATE TABLE runs (n INTEGER, loss REAL);\n{sql};")
    result = call_sweep("r.db", "-p", "n=1", "--table", "runs", *command)
    assert (result.status, result.out) == (1, "") and not os.path.exists("r.db")
    assert re.fullmatch("sweep: r.db: .*runs.sql has a sweep_failures, which is where a sweep notes what failed; call it"
                        " otherwise\n", result.err)


@pytest.mark.parametrize("sql", ["CREATE TABLE sweep_failures (a)", "CREATE VIEW sweep_failures AS SELECT * FROM runs"])
@pytest.mark.parametrize("command", [["--dry-run"], ["--list", "--", "true"], ["--", "true"]], ids=lambda words: words[0])
def test_a_foreign_table_of_that_name_is_refused(call_sweep, sql, command):
    dbtool.insert("r.db", [{"n": 2, "loss": 1}])
    with contextlib.closing(sqlite3.connect("r.db")) as db:
        db.execute(sql)
    result = call_sweep("r.db", "-p", "n=1", *command)
    assert (result.status, result.out) == (1, "")
    assert result.err == ("sweep: r.db: has a table sweep_failures that is not a sweep's, which notes there what failed;"
                          " rename it\n")


def test_failed_runs_are_found_again_whatever_their_parameters(swept, counts, tmp_path):
    (tmp_path / "runs.sql").write_text('CREATE TABLE runs (n INTEGER, x REAL, "a ""name""" TEXT, b BLOB, "any" NUMERIC, loss REAL)')
    records = [dict(zip(["n", "x", 'a "name"', "b", "any"], values)) for values in [
        [None, 0.1, None, {"$hex": "00ff27"}, 10.0],
        [(1 << 63) - 1, 5e-324, "it's \"so\" {n}; \\ $(x)", {"$hex": ""}, "10.5"],
        [0, -0.0, "", "text", "ten"],
        [-1, float("inf"), "a\nb", 1, None],
        [1, 10, "é \U0001f600 \u2028", 1.5, 0.5],
        [1, None, "$hex", None, {"$hex": "aa"}],
        [1, 1e300, {"$hex": "22"}, b"\xff".decode("latin1"), "1e3"],
    ]]
    stdin = json.dumps(records).encode()
    swept("--params", "-", "--", "false", stdin=stdin, status=1)
    assert len(failures()) == len(records)
    assert counts("--params", "-", stdin=stdin)["failed"] == len(records)
    for record in records:
        assert counts("--params", "-", stdin=json.dumps(record).encode())["failed"] == 1, record
    swept("--params", "-", "--failed", "only", "--", *GOOD, stdin=stdin)
    assert failures() == [] and counts("--params", "-", stdin=stdin)["stored"] == len(records)


# ------------------------------------------------------------------------------------------- --failed, --limit


@pytest.mark.parametrize("flags, wanted", [
    ([], [1, 4, 2, 3]), (["--failed", "skip"], [1, 4]), (["--failed", "only"], [2, 3]),
    (["--failed", "forget"], [1, 2, 3, 4]), (["--failed", "run", "--order", "-n"], [4, 1, 3, 2]), (["--limit", "3"], [1, 4, 2]),
    (["--limit", "1", "--failed", "only"], [2])],
    ids=lambda value: " ".join(map(str, value)))
def test_failed_says_what_becomes_of_runs_that_failed(swept, listed, flags, wanted):
    swept(*FAILED_TWO_OF_FOUR, status=1)
    assert listed("-p", "n=1..4", *flags) == wanted
    assert len(failures()) == 2  # a list changes nothing
    swept("-p", "n=1..4", "--jobs", "1", *flags, *shell(f"echo $1 >> tried; {RESULT}"))
    assert tried() == wanted and stored() == sorted(wanted)
    left = [] if "forget" in flags else [n for n in (2, 3) if n not in wanted]
    assert [json.loads(row["parameters"])["n"] for row in failures()] == left


def test_dry_run_counts_what_failed(swept, call_sweep):
    swept(*FAILED_TWO_OF_FOUR, status=1)
    result = call_sweep("r.db", "-p", "n=1..3", "--samples", "2", "--dry-run", "--format", "json")
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out) == [
        {"parameter": name, "value": value, "wanted": wanted, "stored": 0, "missing": wanted, "failed": failed}
        for name, value, wanted, failed in [("all", None, 6, 2), ("n", 1, 2, 0), ("n", 2, 2, 1), ("n", 3, 2, 1)]]
    dbtool.insert("r.db", [{"n": 2, "loss": 1}])
    assert json.loads(call_sweep("r.db", "-p", "n=1..3", "--dry-run", "--format", "json").out)[0] == {
        "parameter": "all", "value": None, "wanted": 3, "stored": 1, "missing": 2, "failed": 1}


@pytest.mark.parametrize("flags, said", [
    (["-p", "n=2,3", "--failed", "skip", "--", "true"], "nothing is missing but 2 runs that failed before, which --failed skip leaves out"),
    (["-p", "n=1,4", "--failed", "only", "--", "true"], "nothing is missing that failed before"),
    (["-p", "n=1..3", "--failed", "forget"], "forgot 2 failures"),
    (["-p", "n=7", "--failed", "forget"], "forgot 0 failures"),
], ids=["skip", "only", "forget", "forget_none"])
def test_failed_says_why_nothing_runs(swept, flags, said):
    swept(*FAILED_TWO_OF_FOUR, status=1)
    assert swept(*flags) == f"sweep: r.db: {said}\n"


def test_a_list_needs_a_command_even_if_failures_are_forgotten(call_sweep):
    result = call_sweep("r.db", "-p", "n=1", "--list", "--failed", "forget")
    assert (result.status, result.out) == (2, "") and "give a command after --" in result.err


def test_a_forgotten_failure_counts_its_attempts_from_one(swept):
    swept("-p", "n=1", *shell("exit 1"), status=1)
    swept("-p", "n=1", "--failed", "forget", *shell("exit 1"), status=1)
    assert [row["attempts"] for row in failures()] == [1]


def test_limit_runs_so_many_and_says_what_is_left(call_sweep):
    command = ["-p", "n=1..5", "--limit", "2", "--", *GOOD]
    result = call_sweep("r.db", *command)
    first, last = result.err.splitlines()
    assert result.status == 0 and first == "sweep: r.db: 5 runs missing, 2 of them to run; 2 at once"
    assert last.startswith("sweep: r.db: 2 of 2 runs stored, 0 failed; 3 more are missing, beyond --limit 2; to go on, run: ")
    assert stored() == [1, 2]
    assert [call_sweep("r.db", *command).err.count("beyond") for _ in range(2)] == [1, 0] and stored() == [1, 2, 3, 4, 5]
    assert call_sweep("r.db", *command).err == "sweep: r.db: nothing is missing\n"


def test_limit_with_a_failure_is_no_success(swept):
    said = swept("-p", "n=1..5", "--limit", "2", *shell(f"[ $1 = 1 ] && {RESULT}"), status=1)
    assert "1 of 2 runs stored, 1 failed; 3 more are missing, beyond --limit 2; to go on" in said


@pytest.mark.slow
def test_a_failure_does_not_slow_down_the_plan_of_many_runs(swept):
    swept("-p", "n=7", *shell("exit 1"), status=1)
    schema = dbtool.read_schema()
    axes = [sweep.axis_of_flag(schema, "n=1..200000", "r.db")]
    with sweep.planning(os.path.realpath("r.db"), schema, axes, 1, "") as plan:
        seconds = []
        for plan_runs in lambda: plan.missing(""), lambda: plan.chosen("", "run"):
            took = []
            for _ in range(3):
                began = time.perf_counter()
                runs = plan_runs()
                took.append(time.perf_counter() - began)
            seconds.append(min(took))
    assert len(runs) == 200_000 and runs[-1].values == (7,)
    assert seconds[1] < 2 * seconds[0], seconds


# ------------------------------------------------------------------------------------ what is said, and when


def test_the_first_failure_is_said_while_others_run():
    running = start("-p", "n=1,2", "--jobs", "2", *shell(f"[ $1 = 1 ] && echo oops >&2 && exit 3; while [ ! -e go ]; do sleep 0.05; done; {RESULT}"))
    assert "2 runs missing" in running.stderr.readline()
    said = running.stderr.readline()
    assert re.fullmatch(r"sweep: r.db: n=1 sample=1: exit status 3 \(oops\); see r.db-sweep/\S+\n", said)
    wait_for(lambda: failures() and os.path.exists(failures()[0]["log"]))
    wait_for(lambda: "reason: exit status 3 (oops)" in Path(failures()[0]["log"]).read_text())
    assert stored() == []
    Path("go").touch()
    _, rest = running.communicate(timeout=20)
    assert running.returncode == 1 and rest.startswith(said), rest


@pytest.mark.parametrize("script, at_once", [
    ("exit $1", 1), ("echo try $1 >&2; exit 1", 1), ("printf '%b' \"\\0$((140 + $1))\" >&2; exit 1", 4),
    ('[ $1 != 2 ] || exit 1', 2)], ids=["statuses", "numbers", "words", "kinds"])
def test_only_the_first_failure_of_each_kind_is_said_at_once(swept, script, at_once):
    said = swept("-p", "n=1..4", "--jobs", "1", *shell(script), status=1).splitlines()
    assert len(said) == at_once + 4 + 1 and len(set(said)) == 4 + 1, said


def test_no_more_than_ten_are_said_at_once(swept):
    said = swept("-p", "n=0..12", "--jobs", "1", "--", "sh", "-c", f'[ $1 = 0 ] && {RESULT} && exit; printf "%b" "\\\\0$((140 + $1))" >&2; exit 1', "sh", "{n}", status=1)
    assert len(said.splitlines()) == 10 + 10 + 2 and "and 2 more failed; see r.db-sweep\n" in said


# -------------------------------------------------------------------------------------------------- giving up


@pytest.mark.parametrize("flags, least", [
    (["--jobs", "1"], 10), (["--jobs", "1", "--retries", "3"], 10), (["--jobs", "4"], 10), (["--jobs", "12"], 12)],
    ids=["one", "retries", "four", "twelve"])
def test_a_hopeless_sweep_stops_by_itself(swept, flags, least):
    said = swept("-p", "n=1..40", *flags, *shell("echo $1 >> tried; exit 1"), status=1)
    assert f"sweep: stopped by failures of all the first {least} runs: r.db: 0 of 40 runs stored, " in said
    assert ", 40 left; to go on, run: python3 " in said
    jobs = int(flags[1])
    assert least <= len(tried()) < least + jobs and set(range(1, least + 1)) <= set(tried())
    assert len(failures()) == len(set(tried()))


@pytest.mark.parametrize("script", [
    f'if [ $1 = 1 ]; then {RESULT}; else exit 1; fi',
    f'if [ $1 = 9 ]; then {RESULT}; else exit 1; fi',
    f'if [ $1 = 1 ]; then while [ $(wc -l < tried) -lt 25 ]; do sleep 0.05; done; {RESULT}; else exit 1; fi',
], ids=["first_succeeds", "ninth_succeeds", "first_still_runs"])
def test_as_long_as_there_is_hope_it_goes_on(swept, monkeypatch, script):
    monkeypatch.setattr("sweep.LONGEST_REST_S", 0.0)
    said = swept("-p", "n=1..25", "--jobs", "2", *shell(f"echo $1 >> tried; {script}"), status=1)
    assert sorted(tried()) == list(range(1, 26)) and stored() in ([1], [9])
    assert "1 of 25 runs stored, 24 failed; to go on" in said and "stopped by" not in said


def test_the_last_of_the_first_runs_to_fail_takes_away_the_hope(swept, monkeypatch):
    monkeypatch.setattr("sweep.LONGEST_REST_S", 0.0)
    script = "echo $1 >> tried; if [ $1 = 1 ]; then while [ $(wc -l < tried) -lt 18 ]; do sleep 0.02; done; fi; exit 1"
    said = swept("-p", "n=1..1000", "--jobs", "2", *shell(script), status=1)
    assert "stopped by failures of all the first 10 runs" in said and 18 <= len(tried()) < 1000


def test_fewer_runs_than_ten_are_never_hopeless(swept):
    said = swept("-p", "n=1..9", *shell("exit 1"), status=1)
    assert "stopped by" not in said and "0 of 9 runs stored, 9 failed; to go on" in said


def test_max_failures_stops_sooner(swept):
    said = swept("-p", "n=1..40", "--jobs", "1", "--max-failures", "3", *shell("echo >> tried; exit 1"), status=1)
    assert "sweep: stopped by 3 failures: r.db: 0 of 40 runs stored, 3 failed, 40 left; to go on" in said
    assert Path("tried").read_text() == "\n" * 3 and len(failures()) == 3


def test_an_interrupted_retry_leaves_the_failure_as_it_was():
    command = ["-p", "n=1", *shell("mkdir tried || { touch again; sleep 30; }; echo why >&2; exit 1")]
    start(*command).communicate(timeout=20)
    before = failures()
    running = start(*command)
    wait_for(lambda: os.path.exists("again"))
    wait_for(lambda: running.poll() is not None or running.terminate(), pause=0.1)  # a second time ends the job at once
    assert running.returncode == 75 and "1 ended unfinished" in running.communicate()[1]
    assert failures() == before and "reason: exit status 1 (why)" in Path(before[0]["log"]).read_text()


# ------------------------------------------------------------------------------------------------------ slots


def test_no_two_running_jobs_share_a_slot(swept):
    script = 'echo "b {slot} $SWEEP_SLOT" >> events; sleep 0.0$(($1 * 7 % 10)); echo "e {slot} $SWEEP_SLOT" >> events; ' + RESULT
    swept("-p", "n=1..32", "--jobs", "4", *shell(script))
    busy, most = set(), 0
    for line in Path("events").read_text().splitlines():
        event, slot, from_environment = line.split()
        assert slot == from_environment and (slot in busy) == (event == "e"), line
        (busy.add if event == "b" else busy.remove)(slot)
        most = max(most, len(busy))
    slots = [row["slot"] for row in dbtool.query("r.db", "SELECT json_extract(metadata, '$.slot') AS slot FROM runs")]
    assert most == 4 and set(slots) == {0, 1, 2, 3}


@pytest.mark.parametrize("visible, wanted", [
    ("3,5", "0:3 1:5 2:3 3:5"), (" 7 ", "0:7 1:7 2:7 3:7"), ("GPU-8a,GPU-9b,2", "0:GPU-8a 1:GPU-9b 2:2 3:GPU-8a"),
    ("", "0:0 1:1 2:2 3:3"), (None, "0:0 1:1 2:2 3:3")], ids=str)
def test_a_slot_has_its_gpu(swept, monkeypatch, visible, wanted):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    script = f"echo {{slot}}:{{gpu}} >> used; while [ $(wc -l < used) -lt 4 ]; do sleep 0.02; done; {RESULT}"
    swept("-p", "n=1..4", "--jobs", "4", *shell(script))
    assert sorted(Path("used").read_text().split()) == wanted.split()


def test_a_slot_rests_after_a_quick_failure_while_others_live(swept, monkeypatch):
    """Slot 0 works until the others are done; slot 1 fails twice, succeeds, and has no rest then."""
    monkeypatch.setattr("sweep.FIRST_REST_S", 0.15)
    script = ('date +"$SWEEP_SLOT $1 %s.%N" >> begun; '
              f'if [ $1 = 1 ]; then while [ $(wc -l < begun) -lt 5 ]; do sleep 0.02; done; {RESULT}; '
              f'elif [ $1 -lt 4 ]; then sleep 0.05; exit 1; else {RESULT}; fi')
    swept("-p", "n=1..5", "--jobs", "2", *shell(script), status=1)
    begun = {n: (slot, float(at)) for slot, n, at in map(str.split, Path("begun").read_text().splitlines())}
    assert [begun[str(n)][0] for n in range(1, 6)] == list("01111")
    assert begun["3"][1] - begun["2"][1] >= 0.15 and begun["4"][1] - begun["3"][1] >= 0.3


def test_no_slot_rests_where_all_fail(swept, monkeypatch):
    monkeypatch.setattr("sweep.FIRST_REST_S", 60.0)
    began = time.monotonic()
    swept("-p", "n=1..9", "--jobs", "3", *shell("exit 1"), status=1)
    assert len(failures()) == 9 and time.monotonic() - began < 30


@pytest.mark.parametrize("runs, rests", [
    ([0.1] * 9, [0.5, 1, 2, 4, 8, 16, 32, 60, 60]), ([0.1, 11, 0.1], [0.5, 0.5, 1]), ([11], [0]), ([0.1, 0.1, None, 0.1], [0.5, 1, 0, 0.5])],
    ids=["doubles", "slow_failure", "only_slow", "success"])
def test_how_long_a_slot_rests(runs, rests):
    slot, found = sweep.Slot(0), []
    for seconds in runs:
        slot.succeeded() if seconds is None else slot.failed(seconds)
        found.append(slot.rest_s)
    assert found == rests


@pytest.mark.parametrize("oldest_s, rests", [(-float("inf"), False), (0.05, False), (0.2, True)],
                         ids=["none_lives", "younger", "longer"])
def test_a_slot_rests_only_while_another_lives_longer(oldest_s, rests):
    slot = sweep.Slot(0)
    assert not slot.must_rest(oldest_s)
    slot.failed(0.1)
    assert slot.must_rest(oldest_s) == rests
    slot.succeeded()
    assert not slot.must_rest(oldest_s)

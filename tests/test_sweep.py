"""Running what is missing: real jobs, their results, every way in which one fails, and interruptions."""

import contextlib
import fcntl
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from conftest import (
    GOOD,
    STARTING_LINE,
    SWEEP,
    as_nobody,
    kept,
    need_program,
    shell,
    small_disk,
    start,
    stored,
    wait_for,
)

import dbtool
import sweep

pytestmark = pytest.mark.usefixtures("runs_schema")
LONG = f"90.{os.getpid():08}"  # seconds of sleep, by which this run's processes can be told from all others


def logs():
    return {path.name.partition("_sample")[0]: path.read_text() for path in Path("r.db-sweep").glob("*.log")}


def processes(mark):
    """Return the command lines of the processes that have *mark* in it."""
    done = subprocess.run(["ps", "-ww", "-eo", "stat=,args="], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if mark in line and line[0] != "Z"]


def catches(pid, number):
    """Tell whether a process has a handler for a signal: proc(5)."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(caught[1], 16) >> number - 1 & 1


def sleeping():
    return [line for line in processes(LONG) if line.endswith(f" sleep {LONG}")]


# ----------------------------------------------------------------------------------------------- results


def test_every_missing_run_becomes_a_row_and_the_next_call_runs_nothing(swept):
    command = ["-p", "n=1..5", "--samples", "2", "--jobs", "3", "--", *GOOD]
    assert swept(*command) == (
        "sweep: r.db: 2 samples, but no job is told which one it is ({sample} in COMMAND, or an argument of that name):"
        " unless it makes a seed by itself, all of them are the same\nsweep: r.db: 10 of 10 runs stored, 0 failed\n")
    assert stored() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert swept(*command) == "sweep: r.db: nothing is missing\n"
    assert sorted(os.listdir()) == ["r.db", "runs.sql"]


def test_metadata_tells_command_sample_start_and_seconds(swept):
    before = time.time()
    swept("-p", "n=7", *shell('sleep 0.3; echo "{\\"loss\\": 1}"'))
    [row] = dbtool.query("r.db", "SELECT * FROM runs")
    metadata = json.loads(row["metadata"])
    assert metadata["command"] == shlex.join(["sh", "-c", 'sleep 0.3; echo "{\\"loss\\": 1}"', "sh", "7", "1"])
    assert metadata["sample"] == 1 and 0.3 <= metadata["seconds"] < 5
    started = time.mktime(time.strptime(metadata["started"], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before - 1 <= started <= time.time()


def test_what_the_job_says_stays(swept):
    swept("-p", "n=7", *shell('echo "{\\"n\\": 7.0, \\"loss\\": NaN, \\"metadata\\": {\\"mine\\": 1}}"'))
    [row] = dbtool.query("r.db", "SELECT * FROM runs")
    assert (row["n"], row["loss"]) == (7, None) and json.loads(row["metadata"]).items() > {"mine": 1, "sample": 1}.items()


def test_rows_that_do_not_say_their_sample_bring_a_warning(swept):
    for _ in range(2):
        dbtool.insert("r.db", [{"n": 1, "loss": 1}])
    said = swept("-p", "n=1", "--samples", "3", *shell('echo "{\\"loss\\": 1}"'))
    assert said.startswith("sweep: r.db: rows there without metadata.sample, 2, are taken for the first samples\n")


def test_no_combination_is_told_from_none_missing(swept):
    assert swept("-p", "n=1..3", "--where", "n > 7", "--", *GOOD) == (
        "sweep: r.db: nothing is missing: no combination satisfies --where\n")


def test_without_dbtool_beside_it_there_is_a_message(tmp_path):
    shutil.copy(SWEEP, tmp_path)
    done = subprocess.run([sys.executable, "sweep.py", "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "sweep: dbtool.py is missing; copy it to the folder of sweep.py\n")


def test_a_table_without_metadata_has_none(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER, loss REAL);")
    swept("-p", "n=7", "--", *GOOD)
    assert dbtool.query("r.db", "SELECT * FROM runs") == [{"n": 7, "loss": 1.0}]


@pytest.mark.slow
def test_chatter_around_the_result_and_a_mass_of_it_does_no_harm(swept):
    script = ("head -c 9000000 /dev/zero | tr '\\0' '\\n'; head -c 9000000 /dev/zero >&2; echo epoch 1; "
              'printf \'{\\n "loss":\\n 2}\'; echo; echo bye')
    swept("-p", "n=1", *shell(script))
    assert dbtool.query("r.db", "SELECT loss FROM runs") == [{"loss": 2.0}]


def test_values_never_reach_a_shell_and_jobs_have_no_input(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (name TEXT, loss REAL);")
    swept("-p", "name=$(touch x);touch y", "--", sys.executable, "-c",
          "import sys, json; print(json.dumps({'name': sys.argv[1], 'loss': len(sys.stdin.read())}))", "{name}")
    assert dbtool.query("r.db", "SELECT * FROM runs") == [{"name": "$(touch x);touch y", "loss": 0.0}]
    assert sorted(os.listdir()) == ["r.db", "runs.sql"]


def test_workdir_gives_each_job_a_directory_of_its_own(swept):
    Path("job.sh").write_text('#!/bin/sh\necho "$1" > own; echo "{\\"loss\\": 1}"')
    Path("job.sh").chmod(0o755)
    swept("-p", "n=1,2", "--workdir", "runs", "--", "./job.sh", "{n}")
    assert sorted((path.parent.name.rpartition("_")[0], path.read_text()) for path in Path("runs").glob("*/own")) == [
        ("n-1_sample-1", "1\n"), ("n-2_sample-1", "2\n")]


def test_a_job_that_prints_several_records_stores_them_all(swept):
    swept("-p", "n=1", *shell('echo "{\\"loss\\": 1} {\\"loss\\": 2}"'))
    assert dbtool.query("r.db", "SELECT loss FROM runs ORDER BY 1") == [{"loss": 1.0}, {"loss": 2.0}]


def test_the_parameter_is_stored_as_it_was_wanted(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n, loss REAL);")
    command = ["-p", "n=10", *shell('echo "{\\"n\\": \\"10\\", \\"loss\\": 1}"')]
    assert "1 of 1 runs stored" in swept(*command)
    assert "nothing is missing" in swept(*command)


def test_bytes_that_are_no_text_may_stand_in_the_command(swept):
    swept("-p", "n=1", "--", *GOOD, "\udcff")
    assert "\\udcff" in dbtool.query("r.db", "SELECT metadata FROM runs")[0]["metadata"]


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("script, reason", [
    ('echo "{\\"loss\\": 1}"; printf "oops\\n\\n" >&2; exit 3', "exit status 3 (oops)"),
    ("kill -SEGV $$", "killed by signal 11"),
    ("echo hello", "it printed no JSON object"),
    ("true", "it printed no JSON object"),
    ('echo "{\\"loss\\": 1"', "its output: record 1 (line 2): not valid JSON: it ends in the middle"),
    ('echo "{\\"loss\\": \\"high\\"}"', 'column loss: expected a number that a 64-bit float holds or null, got "high"'),
    ('echo "{\\"lost\\": 1}"', '"lost" is no column of runs; did you mean "loss"?'),
    ('echo "{\\"loss\\": -1}"', "CHECK constraint failed"),
    ('echo "{\\"loss\\": 1, \\"n\\": 9}"', "it was to run with n 1, but its result says 9; is the parameter passed on"),
    ('echo "{\\"loss\\": 1, \\"n\\": null}"', "column n: expected a 64-bit integer, got null"),
], ids=lambda value: value[:40])
def test_a_failed_job_is_named_with_its_reason_and_its_log_stays(swept, script, reason):
    script = f'if [ "$1" = 1 ]; then :; {script}; else echo "{{\\"loss\\": 0}}"; fi'
    said = swept("-p", "n=1,2", "--jobs", "2", *shell(script), status=1)
    first, again, last = said.splitlines()
    assert first == again and first.startswith("sweep: r.db: n=1 sample=1: ") and reason in first, said
    assert last.startswith("sweep: r.db: 1 of 2 runs stored, 1 failed; to go on, run: python3 ")
    path = first.rpartition("; see ")[2]
    assert path.startswith("r.db-sweep/") and reason in Path(path).read_text()
    assert f"command: {shlex.join(['sh', '-c', script, 'sh', '1', '1'])}\n" in Path(path).read_text()
    assert stored() == [2]


def test_the_log_has_what_the_job_printed(swept):
    swept("-p", "n=1", "--logs", "deep/logs", *shell("echo to out; echo to err >&2; exit 1"), status=1)
    [log] = Path("deep/logs").iterdir()
    assert re.fullmatch(r"command: .*\nrun: n=1 sample=1\nattempt: 1\nstarted: \S+Z\n(to out\nto err|to err\nto out)\n"
                        r"seconds: \d\.\d{3}\nreason: exit status 1 \(to err\)\n", log.read_text())


def test_a_refused_result_can_be_mended_and_inserted(swept, expect_success):
    swept("-p", "n=1", *shell('echo "{\\"lost\\": 1}"'), status=1)
    [log] = Path("r.db-sweep").iterdir()
    [result] = re.findall("^result: (.*)$", log.read_text(), re.M)
    expect_success("insert", "r.db", stdin=result.replace("lost", "loss").encode())
    assert swept("-p", "n=1", "--", *GOOD) == "sweep: r.db: nothing is missing\n"


def test_what_a_launcher_adds_is_not_taken_for_the_last_words(swept):
    said = swept("-p", "n=1", *shell("echo oops >&2; echo 'srun: error: node1: task 0: Exited' >&2; exit 1"), status=1)
    assert "exit status 1 (oops); see" in said


def test_a_failure_of_one_does_not_spoil_the_batch(swept):
    script = 'sleep 0.2; if [ "$1" = 3 ]; then echo "{\\"loss\\": -1}"; else echo "{\\"loss\\": 1}"; fi'
    swept("-p", "n=1..8", "--jobs", "8", *shell(script), status=1)
    assert stored() == [1, 2, 4, 5, 6, 7, 8]


def test_the_summary_names_the_first_ten(swept):
    said = swept("-p", "n=1..13", *shell('test $1 = 1 && echo "{\\"loss\\": 1}"'), status=1).splitlines()
    assert len(said) == 13 and said[0] == said[1]  # the first of its kind is named at once
    assert said[11] == "sweep: r.db: and 2 more failed; see r.db-sweep"
    assert said[12].startswith("sweep: r.db: 1 of 13 runs stored, 12 failed; to go on, run: ")


def test_retries_try_again_and_success_removes_the_log(swept):
    script = 'echo x >> "tries$1"; [ $(wc -l < "tries$1") = 3 ] && echo "{\\"loss\\": 1}"'
    said = swept("-p", "n=1,2", "--retries", "1", *shell(script), status=1)
    assert "0 of 2 runs stored, 2 failed" in said and "attempt: 2" in logs()["n-1"]
    assert swept("-p", "n=1,2", "--retries", "1", *shell(script)) == "sweep: r.db: 2 of 2 runs stored, 0 failed\n"
    assert not os.path.exists("r.db-sweep")


@pytest.mark.slow
def test_max_failures_stops_a_hopeless_sweep_but_keeps_what_runs(swept):
    script = 'if [ "$1" = 1 ]; then sleep 2; echo "{\\"loss\\": 1}"; else exit 1; fi'
    said = swept("-p", "n=1..100", "--jobs", "2", "--max-failures", "3", *shell(script), status=1)
    assert "sweep: stopped by 3 failures: r.db: 1 of 100 runs stored, 3 failed, 99 left; to go on, run: " in said
    assert stored() == [1]


def test_a_result_that_says_null_contradicts(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (n INTEGER, loss REAL)")
    said = swept("-p", "n=1", *shell('echo "{\\"loss\\": 1, \\"n\\": null}"'), status=1)
    assert "it was to run with n 1, but its result says null; is the parameter passed on" in said


def test_max_failures_counts_a_run_only_when_its_retries_failed_too(swept):
    said = swept("-p", "n=1..4", "--jobs", "1", "--retries", "2", "--max-failures", "2",
                 *shell('echo "$1" >> tried; exit 1'), status=1)
    assert "stopped by 2 failures: r.db: 0 of 4 runs stored, 4 failed, 4 left" in said
    assert Path("tried").read_text().split() == list("1234123412")  # a failed run is tried again in the end


@pytest.mark.slow
def test_a_run_that_failed_and_was_not_tried_again_is_named(swept):
    script = 'if [ "$1" = 1 ]; then exit 3; fi; sleep 0.5; exit 4'
    said = swept("-p", "n=1,2", "--jobs", "2", "--retries", "5", "--max-failures", "1", *shell(script), status=1)
    assert "sweep: r.db: n=1 sample=1: exit status 3; see " in said
    assert "sweep: r.db: n=2 sample=1: exit status 4; see " in said
    assert "0 of 2 runs stored, 2 failed, 2 left" in said


def test_two_files_share_a_folder_for_logs_and_directories(call_sweep):
    failing, succeeding = ["sh", "-c", "pwd >> ../places; exit 1"], ["sh", "-c", "pwd >> ../places; echo '{\"loss\": 1}'"]
    for path, command in ("a.db", failing), ("b.db", succeeding):
        call_sweep(path, "-p", "n=1", "--logs", "logs", "--workdir", "work", "--", *command)
    assert len(os.listdir("logs")) == 1 and stored("b.db") == [1]
    assert len(set(Path("work/places").read_text().split())) == 2


def test_a_file_that_cannot_be_written_is_noticed_before_anything_runs(swept, public):
    swept("-p", "n=0", "--", *GOOD)
    for name in ("r.db", "runs.sql"):
        shutil.copy(name, public)
    (public / "r.db").chmod(0o444)
    public.chmod(0o777)
    words = ["-p", "n=1,2", *shell(f"touch {public}/ran")]
    status, said = as_nobody(lambda: sweep.main([str(public / "r.db"), "--schema", str(public / "runs.sql"), *words]))
    assert status == 1 and "may not be written" in said and said.count("\n") == 1, said
    assert not (public / "ran").exists()


def test_a_program_that_vanishes_is_a_failure_of_the_job(swept):
    said = swept("-p", "n=1,2", "--jobs", "1", "--", "./{n}", status=1)
    assert "n=1 sample=1: can't be started: No such file or directory: ./1" in said and "2 failed" in said


def test_a_word_that_no_program_can_get_is_a_failure_of_the_job(swept, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (name TEXT, loss REAL);")
    (tmp_path / "params").write_text('{"name": "a"}{"name": "b\\u0000"}{"name": "c"}')
    said = swept("--params", "params", "--jobs", "1", "--", "sh", "-c", 'echo "{\\"loss\\": 1}"', "sh", "{name}", status=1)
    assert "can't be started: embedded null byte" in said and "2 of 3 runs stored, 1 failed" in said


def test_logs_in_a_directory_of_ones_own_leave_it_there(swept, tmp_path):
    (tmp_path / "logs").mkdir()
    swept("-p", "n=1", "--logs", "logs", "--", *GOOD)
    assert os.listdir("logs") == []


def test_timeout_ends_the_whole_group(swept):
    began = time.monotonic()
    said = swept("-p", "n=1", "--timeout", "0.5", *shell(f"sleep {LONG} & sleep {LONG}; wait"), status=1)
    assert "n=1 sample=1: timed out after 0.5 s; see" in said and time.monotonic() - began < 5
    assert processes(LONG) == []


@pytest.mark.slow
def test_a_job_that_ended_in_time_is_not_late_because_the_sweep_was(swept):
    running = start("-p", "n=1", "--timeout", "1.5", *shell('touch begun; sleep 0.5; echo "{\\"loss\\": 1}"'))
    wait_for(lambda: os.path.exists("begun"))
    running.send_signal(signal.SIGSTOP)
    time.sleep(2)
    running.send_signal(signal.SIGCONT)
    _, said = running.communicate(timeout=20)
    assert running.returncode == 0 and stored() == [1], said


@pytest.mark.slow
def test_a_job_is_told_only_once_to_end(swept):
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGTERM)).start()
    script = "trap 'echo told >> told' TERM; i=0; while [ $i -lt 15 ]; do sleep 0.1; i=$((i + 1)); done; exit 1"
    assert "1 ended unfinished" in swept("-p", "n=1", "--grace", "0.1", *shell(script), status=75)
    assert Path("told").read_text() == "told\n"


@pytest.mark.slow
def test_a_job_that_ignores_the_signal_is_killed(swept, monkeypatch):
    monkeypatch.setattr("sweep.KILL_GRACE_S", 0.5)
    said = swept("-p", "n=1", "--timeout", "0.5", *shell("trap '' TERM; while :; do sleep 0.1; done"), status=1)
    assert "timed out" in said


def test_what_a_job_leaves_behind_in_its_group_ends_with_it(swept):
    swept("-p", "n=1", *shell(f'sleep {LONG} & echo "{{\\"loss\\": 1}}"'))
    assert stored() == [1] and processes(LONG) == []


# ------------------------------------------------------------------------------------------ interruption


@pytest.mark.parametrize("number", [
    signal.SIGINT,
    *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)),
], ids=lambda number: number.name)
def test_a_signal_stops_it_stores_what_finishes_and_says_how_to_go_on(number):
    script = f'if [ "$1" = 1 ]; then sleep 1; echo "{{\\"loss\\": 1}}"; else sleep {LONG}; fi'
    arguments = ["-p", "n=1..9", "--jobs", "3", *shell(script)]
    running = start(*arguments)
    wait_for(lambda: len(sleeping()) == 2)
    running.send_signal(number)
    said = running.stderr.readline()
    assert STARTING_LINE.fullmatch(said)
    said = running.stderr.readline()
    assert said == f"sweep: {number.name}: waiting 10 s for 3 running jobs; a second signal ends them now\n"
    wait_for(lambda: stored() == [1])
    running.send_signal(number)
    out, said = running.communicate(timeout=20)
    assert (running.returncode, out) == (75, "")
    assert said == (f"sweep: stopped by {number.name}: r.db: 1 of 9 runs stored, 0 failed, 2 ended unfinished, 8 left;"
                    f" to go on, run: python3 {shlex.join([SWEEP, 'r.db', *arguments[:4], '--schema', os.path.realpath('runs.sql')])}"
                    f" {shlex.join(arguments[4:])}\n")
    assert processes(LONG) == [] and logs() == {}
    assert sorted(os.listdir()) == ["r.db", "runs.sql"]


@pytest.mark.slow
def test_after_the_grace_period_jobs_are_told_to_end_and_then_killed():
    script = "trap 'echo \"{\\\"loss\\\": 1}\"; exit 0' TERM; [ $1 = 2 ] && trap '' TERM; while :; do sleep 0.1; done # " + LONG
    running = start("-p", "n=1,2,3", "--jobs", "2", *shell(script))
    wait_for(lambda: len([line for line in processes(LONG) if line.split()[1] == "sh"]) == 2)
    began = time.monotonic()
    running.terminate()
    _, said = running.communicate(timeout=40)
    assert running.returncode == 75 and 14 < time.monotonic() - began < 20
    assert "1 of 3 runs stored, 0 failed, 1 ended unfinished, 2 left" in said
    assert stored() == [1]  # it printed its result when it was told to end
    assert processes(LONG) == []


@pytest.mark.slow
def test_a_signal_when_all_is_done_is_no_failure(swept):
    running = start("-p", "n=1", "--jobs", "1", *shell('touch begun; sleep 0.7; echo "{\\"loss\\": 1}"'))
    wait_for(lambda: os.path.exists("begun"))
    running.terminate()
    _, said = running.communicate(timeout=20)
    assert running.returncode == 0 and "1 of 1 runs stored" in said


def test_a_signal_while_planning_stops_it(tmp_path):
    endless = "(WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT count(*) FROM c) > n"
    running = start("-p", "n=1..3", "--where", endless, *shell("true"))
    wait_for(lambda: os.path.exists("r.db-sweep.lock"))
    time.sleep(0.3)
    running.send_signal(signal.SIGUSR1)
    out, said = running.communicate(timeout=20)
    assert (running.returncode, out, said) == (75, "", "sweep: r.db: stopped by SIGUSR1\n")


@pytest.mark.slow
def test_kill_9_leaves_no_orphan_and_the_next_sweep_completes(swept):
    script = f'setsid sleep {LONG} & sleep {LONG}; echo "{{\\"loss\\": 1}}"'
    running = start("-p", "n=1..3", "--jobs", "3", *shell(script))
    wait_for(lambda: len(sleeping()) == 6)
    running.kill()
    running.communicate(timeout=20)  # nobody holds its output open
    wait_for(lambda: processes(LONG) == [])
    swept("-p", "n=1..3", "--", *GOOD)
    assert stored() == [1, 2, 3]


def test_a_second_sweep_on_the_same_file_is_told_who_is_at_work(call_sweep):
    running = start("-p", "n=1", *shell('sleep 0.6; echo "{\\"loss\\": 1}"'))
    wait_for(lambda: os.path.exists("r.db-sweep.lock") and Path("r.db-sweep.lock").read_text())
    result = call_sweep("./r.db", "-p", "n=2", "--", *GOOD)
    assert (result.status, result.out) == (75, "")
    assert re.fullmatch(rf"sweep: \./r\.db: another sweep is at work on it: process {running.pid} on \S+, since .*;"
                        r" wait until it ends\n", result.err)
    running.communicate(timeout=20)
    assert running.returncode == 0 and stored() == [1]
    assert call_sweep("r.db", "-p", "n=2", "--", *GOOD).status == 0


def test_a_lock_file_that_somebody_removes_does_not_matter(swept):
    assert swept("-p", "n=1", *shell('rm r.db-sweep.lock; echo "{\\"loss\\": 1}"')) == (
        "sweep: r.db: 1 of 1 runs stored, 0 failed\n")


@pytest.mark.parametrize("which", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_commit_that_fails_is_tried_again_and_stores_once(swept, which):
    strace = need_program("strace")
    swept("-p", "n=0", "--", *GOOD)
    done = subprocess.run(
        [strace, "-f", "-qq", "-o", "/dev/null", "-e", f"inject=fdatasync:error=EIO:when={which}", sys.executable, SWEEP,
         "r.db", "-p", "n=1..3", "--jobs", "3", *shell('sleep 0.3; echo "{\\"loss\\": 1}"')],
        capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and stored() == [0, 1, 2, 3], done.stderr


def test_an_error_in_the_program_keeps_what_had_finished(swept, monkeypatch):
    def broken(*arguments):
        raise KeyError("a bug")

    monkeypatch.setattr("dbtool.insert_records", broken)
    with pytest.raises(KeyError):
        swept("-p", "n=1..3", "--jobs", "1", *shell('echo "{\\"loss\\": 1}"'))
    assert kept("r.db") and not os.path.exists("r.db-sweep.lock")


@pytest.mark.slow
def test_what_a_full_folder_for_temporary_files_cannot_hold_stays_in_memory(tmp_path):
    with small_disk(tmp_path, 5) as disk:
        script = 'head -c 6500000 /dev/zero | tr "\\0" "\\n"; echo "{\\"loss\\": 1}"'
        running = start("-p", "n=1..3", "--jobs", "3", *shell(script), env={**os.environ, "TMPDIR": str(disk)})
        _, said = running.communicate(timeout=60)
        assert running.returncode == 0 and stored() == [1, 2, 3], said
        assert os.listdir(disk) == []


def test_a_lock_file_that_a_dead_sweep_left_does_not_matter(swept):
    Path("r.db-sweep.lock").write_text("process 1 on nowhere\n")
    swept("-p", "n=1", "--", *GOOD)
    assert not os.path.exists("r.db-sweep.lock")


@pytest.mark.slow
def test_jobs_go_on_while_the_file_is_locked_and_nothing_is_lost(swept):
    swept("-p", "n=0", "--", *GOOD)
    running = start("-p", "n=1..8", "--jobs", "2", *shell('echo "{\\"loss\\": 1}"; echo "$1" >> ended'))
    with contextlib.closing(sqlite3.connect("r.db", isolation_level=None)) as db:
        wait_for(lambda: os.path.exists("ended"))
        db.execute("BEGIN IMMEDIATE")
        done = db.execute("SELECT count(*) FROM runs").fetchone()[0]
        wait_for(lambda: len(Path("ended").read_text().split()) == 8)
        time.sleep(2.5)
        assert db.execute("SELECT count(*) FROM runs").fetchone()[0] == done
        db.execute("COMMIT")
    _, said = running.communicate(timeout=30)
    assert running.returncode == 0, said
    assert stored() == list(range(9))
    assert said.endswith("sweep: r.db: 8 of 8 runs stored, 0 failed\n")
    assert "locked by another process; the jobs go on, and results wait in memory until it can be written" in said


@pytest.mark.slow
def test_results_that_cannot_be_stored_are_kept_and_the_next_sweep_stores_them(swept):
    swept("-p", "n=0", "--", *GOOD)
    with contextlib.closing(sqlite3.connect("r.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        running = start("-p", "n=1..3", "--jobs", "3", *shell('echo "{\\"loss\\": 1}"; echo "$1" >> ended'))
        wait_for(lambda: os.path.exists("ended") and len(Path("ended").read_text().split()) == 3)
        running.terminate()
        running.terminate()
        time.sleep(0.5)
        running.terminate()
        _, said = running.communicate(timeout=20)
        assert running.returncode == 75 and "the input is kept in " in said, said
        assert sum(path.read_text().count('"n": ') for path in kept("r.db")) == 3
    assert swept("-p", "n=1..3", "--", *GOOD) == "sweep: r.db: nothing is missing\n"
    assert stored() == [0, 1, 2, 3] and kept("r.db") == []


def test_what_a_listed_line_had_to_keep_is_stored_by_the_next_sweep(swept, call_sweep):
    [line] = call_sweep("r.db", "--list", "-p", "n=1", "--", "sh", "-c", 'echo chatter; echo "{\\"n\\": 1, \\"loss\\": 1}"'
                        ).out.splitlines()
    os.mkdir("r.db")  # what can't be stored is kept
    environment = {name: value for name, value in os.environ.items() if name != "DBTOOL_SCHEMA"}
    done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "the input is kept in " in done.stderr
    os.rmdir("r.db")
    assert swept("-p", "n=1", "--", "false") == "sweep: r.db: nothing is missing\n"
    assert stored() == [1] and not kept("r.db")


def test_a_results_file_that_breaks_stops_the_sweep_and_the_results_are_kept():
    running = start("-p", "n=1..50", "--jobs", "1", *shell('sleep 0.1; echo "{\\"loss\\": 1}"'))
    wait_for(lambda: len(stored()) > 2)
    with contextlib.closing(sqlite3.connect("r.db")) as db:
        db.execute("ALTER TABLE runs RENAME TO walks")
    _, said = running.communicate(timeout=20)
    assert running.returncode == 1
    assert "has no table runs" in said and "the input is kept in " in said and "Traceback" not in said
    assert kept("r.db")


@pytest.mark.slow
def test_the_disk_is_full_for_a_while(tmp_path):
    with small_disk(tmp_path, 1) as disk:
        (disk / "r.db").symlink_to(disk / "real.db")
        subprocess.run([sys.executable, SWEEP, disk / "real.db", "-p", "n=0", "--", *GOOD], check=True,
                       stderr=subprocess.DEVNULL)
        running = subprocess.Popen(
            [sys.executable, SWEEP, disk / "real.db", "-p", "n=1..20", "--jobs", "2",
             *shell('sleep 0.1; echo "{\\"loss\\": 1}"; echo "$1" >> ended')], stderr=subprocess.PIPE, text=True)
        wait_for(lambda: os.path.exists("ended"))
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 1000)
        wait_for(lambda: len(Path("ended").read_text().split()) == 20)
        time.sleep(1.5)
        os.unlink(disk / "filler")
        _, said = running.communicate(timeout=30)
        assert running.returncode == 0, said
        assert stored(disk / "real.db") == list(range(21))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL], ids=lambda n: n.name)
def test_stopped_at_random_moments_it_ends_complete_and_without_duplicates(number):
    """25 moments for each of four signals; what a job has finished is never run again, but after SIGKILL."""
    rng = random.Random(number)
    script = 'sleep "0.0$((${1} % 7))"; echo "{\\"loss\\": 1}"; echo "$1" >> ended # ' + LONG
    arguments = ["-p", "n=1..1000", "--jobs", "4", *shell(script)]
    for _ in range(25):
        running = start(*arguments)
        wait_for(lambda pid=running.pid: catches(pid, signal.SIGTERM), pause=0.001)  # before, Python itself is starting
        time.sleep(rng.random() * 0.5)
        running.send_signal(number)
        _, said = running.communicate(timeout=30)
        assert running.returncode in (75, 0, -9), said
        assert "Traceback" not in said
        wait_for(lambda: processes(LONG) == [])
        assert len(set(stored())) == len(stored())
        if number != signal.SIGKILL:
            assert sorted(map(int, Path("ended").read_text().split() if os.path.exists("ended") else [])) == stored()
    last = start(*arguments)
    _, said = last.communicate(timeout=60)
    assert last.returncode == 0, said
    assert stored() == list(range(1, 1001))


# ---------------------------------------------------------------------------------------------- capacity


@pytest.mark.slow
def test_a_thousand_jobs_at_once():
    running = start("-p", "n=1..1000", "--jobs", "1000", *shell('echo x >> begun; while [ ! -e go ]; do sleep 1; done;'
                                                               ' echo "{\\"loss\\": 1}"'),
                    preexec_fn=lambda: __import__("resource").setrlimit(7, (256, 8192)))
    wait_for(lambda: os.path.exists("begun") and len(Path("begun").read_text().split()) == 1000, 60)
    Path("go").touch()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert stored() == list(range(1, 1001))


def test_too_few_descriptors_are_an_error_at_once():
    running = start("-p", "n=1..1000", "--jobs", "1000", "--", *GOOD,
                    preexec_fn=lambda: __import__("resource").setrlimit(7, (256, 256)))
    _, said = running.communicate(timeout=20)
    assert running.returncode == 2 and said == (
        "sweep: r.db: --jobs 1000 needs 4100 open files; this system allows 256\n")
    running = start("-p", "n=1,2", "--jobs", "1000", "--", *GOOD,
                    preexec_fn=lambda: __import__("resource").setrlimit(7, (256, 256)))
    assert running.communicate(timeout=20)[1] == (
        "sweep: r.db: 2 runs missing; 2 at once\nsweep: r.db: 2 of 2 runs stored, 0 failed\n")


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsdecode(b"r\xff.db")
    done = subprocess.run([sys.executable, SWEEP, name, "-p", "n=1,2", "--workdir", "work", "--", *GOOD],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.endswith(": 2 of 2 runs stored, 0 failed\n"), done.stderr
    assert stored(os.fsencode(name)) == [1, 2]


@pytest.mark.slow
def test_signals_at_the_end_do_not_change_the_status():
    for trial in range(20):
        running = start("-p", "n=1..3", "--jobs", "1", *shell(f"sleep {LONG}"))
        wait_for(lambda: len(sleeping()) == 1)
        for _ in range(2):
            running.send_signal(signal.SIGINT)
            time.sleep(0.03)
        time.sleep(0.002 * trial)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=20) == 75
        running.communicate()


def test_what_has_no_result_is_tried_again(swept):
    swept("-p", "n=1,2", "--jobs", "1", "--retries", "1", *shell('echo "$1" >> tried; echo text'), status=1)
    assert Path("tried").read_text().split() == ["1", "2", "1", "2"]


def test_the_lock_on_a_full_disk_changes_no_status(swept, monkeypatch, tmp_path):
    monkeypatch.setenv("DBTOOL_JOURNAL", "delete")
    with small_disk(tmp_path, 1) as small:
        os.symlink(small / "r.db", "r.db")
        swept("-p", "n=1", "--", *GOOD)
        with contextlib.suppress(OSError), open(small / "rest", "wb", buffering=0) as rest:
            while True:
                rest.write(b"x" * 512)
        assert swept("-p", "n=1", "--", "false") == "sweep: r.db: nothing is missing\n"
        assert not os.path.exists(small / "r.db-sweep.lock")


@pytest.mark.slow
def test_a_function_is_told_to_end(swept, tmp_path):
    (tmp_path / "work.py").write_text("""import signal, sys, time
def train(n):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cleaned up")) if n == 2 else None
    time.sleep(30)
""")
    began = time.monotonic()
    said = swept("-p", "n=1,2", "--jobs", "2", "--timeout", "1", "--call", "work:train", status=1)
    assert "timed out after 1 s" in said and time.monotonic() - began < 4
    assert "cleaned up" in logs()["n-2"]


def test_a_result_may_be_an_array_over_several_lines(swept):
    swept("-p", "n=1", "--", "printf", '[INFO] start\n[{"loss": 1},\n{"loss": 2}\n]\n[done]\n')
    assert stored() == [1, 1]


@pytest.mark.slow
def test_slots_are_busy_97_percent_of_the_time():
    """Eight slots, and 200 jobs whose lengths have a long tail: the sum of their times by that of the slots."""
    rng = random.Random(5)
    lengths = [min(2.0, 0.1 * rng.paretovariate(1.2)) for _ in range(200)]
    Path("lengths").write_text("\n".join(f"{t:.3f}" for t in lengths))
    run = start("-p", "n=1..200", "--jobs", "8", *shell(
        'date +"b %s.%N" >> times; sleep $(sed -n "${1}p" lengths); echo "{\\"loss\\": 1}"; date +"e %s.%N" >> times'))
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    events = sorted((float(when), 1 if kind == "b" else -1) for kind, when in
                    (line.split() for line in Path("times").read_text().splitlines()))
    running, busy, full_until = 0, 0.0, [when for when, kind in events if kind == 1][-1]
    for (when, kind), (later, _) in zip(events, events[1:]):
        running += kind
        if later <= full_until:  # after the last start there is nothing left to fill a slot with
            busy += running * (later - when)
    share = busy / (8 * (full_until - events[0][0]))
    assert share >= 0.97, share


@pytest.mark.xfail(reason="a goal that is just missed since jobs have logs and origins: 2.75 to 3.05 times", strict=False)
@pytest.mark.slow
def test_trivial_jobs_run_at_three_times_the_rate_of_gnu_parallel():
    parallel = need_program("parallel")

    def timed(*command, **options):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        return time.perf_counter() - began

    own, other = [], []
    numbers = "\n".join(map(str, range(600)))
    for trial in range(5):
        other.append(timed(parallel, "-j4", "true", input=numbers, text=True) / 600)
        own.append(timed(sys.executable, SWEEP, f"{trial}.db", "-p", "n=1..1800", "--jobs", "4", "--", "echo",
                         '{"n": {n}, "loss": 1}') / 1800)
        assert len(stored(f"{trial}.db")) == 1800
    assert min(own) * 3 <= min(other), (own, other)  # the fastest of each: what else runs can only slow them down


# ------------------------------------------------------------------------------------------------ report


@pytest.mark.slow
def test_a_terminal_shows_one_line_in_place():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    running = subprocess.Popen([sys.executable, SWEEP, "r.db", "-p", "n=1..8", "--jobs", "2",
                                *shell('sleep 0.5; echo "{\\"loss\\": 1}"')], stderr=follower)
    os.close(follower)
    text = b""
    with contextlib.suppress(OSError):
        while data := os.read(leader, 4096):
            text += data
    assert running.wait(timeout=20) == 0
    first, *shown, summary = text.decode().replace("\r\n", "\n").split("\r\x1b[K")
    assert STARTING_LINE.fullmatch(first) and summary == "sweep: r.db: 8 of 8 runs stored, 0 failed\n"
    lines = [line for line in shown if line]
    assert len(lines) > 2
    assert all(re.fullmatch(r"\d of 8 done, [012] running, 0 failed, .*", line) and len(line) == 39 for line in lines), lines


@pytest.mark.slow
def test_elsewhere_it_is_a_line_a_minute(swept, monkeypatch):
    monkeypatch.setattr("sweep.LINE_EVERY_S", 0.5)
    said = swept("-p", "n=1..4", "--jobs", "2", *shell('sleep 0.3; echo "{\\"loss\\": 1}"'))
    lines = said.splitlines()
    assert len(lines) == 2 and re.fullmatch(r"sweep: \d of 4 done, 2 running, 0 failed, .* left; longest, 0:0\d: n=\d sample=1", lines[0]), said


# ------------------------------------------------------------------------------- functions, other engines


@pytest.fixture
def module(tmp_path):
    (tmp_path / "work.py").write_text("""\
import os
def train(n, rate=2.0):
    print("chatter", {"loss": 5})
    return {"loss": n * rate}
def seeded(n, sample):
    return {"loss": sample, "metadata": {"folder": os.getcwd()}}
def bad(n):
    raise ValueError("n is no good")
def nothing(n):
    pass
""")


def test_a_python_function_is_called_with_the_parameters(swept, module):
    swept("-p", "n=1..3", "--call", "work:train")
    assert dbtool.query("r.db", "SELECT n, loss FROM runs ORDER BY n") == [{"n": n, "loss": n * 2.0} for n in (1, 2, 3)]


def test_a_function_may_take_the_sample_and_runs_where_it_should(swept, module, tmp_path):
    swept("-p", "n=1", "--samples", "2", "--call", "work:seeded", "--workdir", "w")
    rows = dbtool.query("r.db", "SELECT loss, metadata FROM runs ORDER BY loss")
    assert [row["loss"] for row in rows] == [1.0, 2.0]
    assert json.loads(rows[0]["metadata"])["folder"].startswith(str(tmp_path / "w" / "n-1_sample-1_"))


def test_a_module_that_reads_the_command_line_finds_none(swept, tmp_path):
    (tmp_path / "cli.py").write_text("import sys\nassert sys.argv == ['cli:train'], sys.argv\ndef train(n): return {'loss': n}\n")
    swept("-p", "n=1", "--call", "cli:train")


@pytest.mark.parametrize("function, reason, logged", [
    ("bad", "exit status 1 (ValueError: n is no good)", "ValueError: n is no good"), ("nothing", "exit status 1", "work:nothing returned null; a dict"),
    ("missing", "exit status 1", "no attribute 'missing'")])
def test_a_function_that_fails_leaves_its_traceback_in_the_log(swept, module, function, reason, logged):
    said = swept("-p", "n=1", "--call", f"work:{function}", status=1)
    assert reason in said and "Traceback" not in said and logged in logs()["n-1"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [
    ["parallel", "-j2"], ["xargs", "-d", "\\n", "-P", "2", "-I{}", "sh", "-c", "{}"], ["sh"]], ids=lambda words: words[0])
def test_the_list_feeds_other_engines(call_sweep, swept, engine):
    command = ["-p", "n=1..6", "--samples", "2", *shell('echo "it\'s $1"; echo "{\\"n\\": $1, \\"loss\\": 1}"')]
    lines = call_sweep("r.db", "--list", *command)
    assert (lines.status, lines.err) == (0, "") and lines.out.count("\n") == 12
    subprocess.run([need_program(engine[0]), *engine[1:]], input=lines.out, text=True, check=True, capture_output=True)
    assert stored() == sorted([*range(1, 7), *range(1, 7)])
    assert swept(*command) == "sweep: r.db: nothing is missing\n"


def test_the_list_of_a_function_runs_too(call_sweep, module, tmp_path):
    lines = call_sweep("r.db", "--list", "-p", "n=1,2", "--call", "work:seeded")
    os.makedirs("elsewhere")
    done = subprocess.run(["sh", "-c", lines.out], cwd="elsewhere", capture_output=True, text=True, check=False)
    assert "column n missing" in done.stderr  # a function that does not return its parameters needs the sweep
    assert lines.out.count("\n") == 2


def test_a_value_of_several_lines_has_no_line_of_shell(call_sweep, tmp_path):
    (tmp_path / "runs.sql").write_text("CREATE TABLE runs (name TEXT, loss REAL);")
    result = call_sweep("r.db", "--list", "--params", "-", "--", "echo", stdin={"name": "a\nb"})
    assert result.status == 1 and "has several lines or a NUL, which a line of shell can't" in result.err and result.err.count("\n") == 1


def test_the_list_of_nothing_is_empty_and_a_closed_pipe_is_silent(tmp_path):
    done = subprocess.run(f"{sys.executable} {SWEEP} r.db -p n=1..20000 --list -- echo | head -1", shell=True,
                          capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_help_and_version():
    for flag, words in [("--help", "usage: sweep.py DATABASE [-p COLUMN=VALUES]"), ("--version", f"sweep {dbtool.__version__}")]:
        done = subprocess.run([SWEEP, flag], capture_output=True, text=True, check=True)
        assert words in done.stdout and done.stderr == ""

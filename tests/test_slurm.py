"""The example for a cluster, on a real Slurm: three nodes of eight CPUs, all on this machine's loopback."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, need, need_program, wait_for

import dbtool

pytestmark = pytest.mark.slow
NODES, CPUS, PORT = 3, 8, 17800
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SrunPortRange={first}-{last}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=10000,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=8
KillWait=5
MailProg=/bin/true
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{low}-{high}] CPUs={cpus} RealMemory=4096
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A Slurm without systemd, cgroups or munge: one slurmctld and a slurmd for each node."""

    def __init__(self, base):
        self.base, self.daemons = base, {}
        (base / "state").mkdir()
        (base / "slurm.conf").write_text(CONFIG.format(
            base=base, host=socket.gethostname().split(".")[0], user=getpass.getuser(), nodes=NODES, cpus=CPUS,
            port=PORT, low=PORT + 1, high=PORT + NODES, first=PORT + 100, last=PORT + 999))
        self.environment = {**os.environ, "SLURM_CONF": str(base / "slurm.conf")}
        self.start("slurmctld", "slurmctld", "-D", "-c")
        for node in range(1, NODES + 1):
            self.start_node(node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").count("\n") == NODES)

    def start(self, name, *command):
        with open(self.base / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
                                                  stderr=out, start_new_session=True)

    def start_node(self, node):
        (self.base / f"spool-node{node}").mkdir(exist_ok=True)
        self.start(f"node{node}", "slurmd", "-D", "-N", f"node{node}")

    def kill_node(self, node):
        """Let a node die with all that runs there."""
        self.daemons[f"node{node}"].kill()
        self.daemons.pop(f"node{node}").wait()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"\0SLURMD_NODENAME=node{node}\0" in path.read_text():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                pass

    def run(self, *command, **options):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=True,
                              **options).stdout

    def jobs(self):
        return self.run("squeue", "-h", "-o", "%A").split()

    @staticmethod
    def wait_for(condition, seconds=60.0):
        wait_for(condition, seconds, pause=0.2)

    def stop(self):
        for job in self.jobs():
            self.run("scancel", job)
        for name in [*(name for name in self.daemons if name != "slurmctld"), "slurmctld"]:
            self.daemons[name].terminate()
            self.daemons[name].wait(timeout=20)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    for program in ("slurmctld", "slurmd", "sbatch", "srun"):
        need_program(program)
    need(os.path.isdir("/proc/self"), "Linux")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    yield started
    started.stop()


@pytest.fixture
def folder(tmp_path):
    """A copy of the project, with a smaller grid; each run writes down its node."""
    copy = tmp_path / "dbtool"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "tests", "*.db*", "__pycache__", "env"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    script = copy / "examples" / "hyperion" / "bench-mlp.sh"
    text = script.read_text()
    assert text.count("60..100..20") == 1
    script.write_text(text.replace("60..100..20", "80"))
    job = script.with_name("job.sh")
    job.write_text(job.read_text().replace("exec python3", 'echo "$SLURMD_NODENAME" >> nodes\nexec python3'))
    yield script.parent
    print(said(script.parent))  # pytest shows it when the test fails


WANTED = 2 * 2 * 2 * 2 * 2  # layers, activation, epochs, sample windows, samples


def submit(cluster, folder, *flags):
    environment = {**cluster.environment, "PATH": f"{folder.parents[2]}/bin:{os.environ['PATH']}"}
    said = subprocess.run(["sbatch", *flags, "./bench-mlp.sh"], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=30, check=True).stdout
    return said.split()[-1]


def done(folder):
    path = folder / "results.db"
    if not path.exists() or not dbtool.query(str(path), "SELECT 1 FROM sqlite_master"):
        return 0
    return dbtool.query(str(path), "SELECT count(*) AS n FROM results")[0]["n"]


def logs(folder):
    return sorted(folder.glob("slurm-*.log"))


def said(folder):
    return "\n".join(path.read_text() for path in logs(folder))


def assert_complete(folder):
    rows = dbtool.query(str(folder / "results.db"), """SELECT count(*) AS n FROM results GROUP BY
        layers, activation, epochs, sample_window_length, training_window_length""")
    assert [row["n"] for row in rows] == [2] * (WANTED // 2), said(folder)


def test_one_line_runs_the_grid_on_all_nodes(cluster, folder):
    submit(cluster, folder)
    cluster.wait_for(lambda: not cluster.jobs(), 120)
    assert_complete(folder)
    assert said(folder).endswith(f"sweep: results.db: {WANTED} of {WANTED} runs stored, 0 failed\n")
    assert set((folder / "nodes").read_text().split()) == {"node1", "node2", "node3"}
    submit(cluster, folder)
    cluster.wait_for(lambda: not cluster.jobs(), 60)
    assert said(folder).endswith("sweep: results.db: nothing is missing\n")


def test_a_node_dies_a_job_is_cancelled_and_submitting_again_completes_the_grid(cluster, folder):
    first = submit(cluster, folder)
    cluster.wait_for(lambda: done(folder) >= 3)
    cluster.kill_node(3)
    before = done(folder)
    cluster.wait_for(lambda: done(folder) > before or not cluster.jobs())
    cluster.run("scancel", first)
    cluster.wait_for(lambda: not cluster.jobs())
    assert 3 <= done(folder) < WANTED, said(folder)
    cluster.start_node(3)
    cluster.wait_for(lambda: cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").count("\n") == NODES)
    submit(cluster, folder)
    cluster.wait_for(lambda: not cluster.jobs(), 120)
    assert_complete(folder)


def test_at_the_time_limit_it_submits_itself_again(cluster, folder):
    script, job = folder / "bench-mlp.sh", folder / "job.sh"
    script.write_text(script.read_text().replace("--grace 90", "--grace 5"))
    # The first run ends at once; the others would wait for ever, were it not for the limit.
    job.write_text(job.read_text().replace(
        "exec python3", "until mkdir first 2>/dev/null || [ -e go_on ]; do sleep 0.2; done\nexec python3"))
    # Slurm counts limits in minutes, and may send the signal up to one earlier than asked: 15 to 75 s after the start.
    submit(cluster, folder, "--time=2", "--signal=B:USR1@45", "--ntasks=2")
    cluster.wait_for(lambda: len(logs(folder)) >= 2, 150)
    (folder / "go_on").touch()
    assert "stopped by SIGUSR1" in said(folder) and "Submitted batch job" in said(folder)
    cluster.wait_for(lambda: not cluster.jobs(), 280)
    assert_complete(folder)


def test_an_environment_that_took_all_the_time_is_made_once(cluster, folder):
    setup = folder / "setup.sh"
    setup.write_text(setup.read_text() + "echo made >> made\nsleep 3\n")
    first = submit(cluster, folder)
    cluster.wait_for(lambda: (folder / "made").exists())
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    cluster.wait_for(lambda: len(logs(folder)) >= 2)
    cluster.wait_for(lambda: not cluster.jobs(), 120)
    assert_complete(folder)
    assert (folder / "made").read_text() == "made\n"

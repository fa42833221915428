"""Network file systems: told from mountinfo, where WAL is unsafe, and a real FUSE mount."""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest
from conftest import RECORD, need, process, script_of

import dbtool

# As proc(5) describes: ID, parent, device, root, mount point, options, optional fields, -, type, source, options.
MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw,nosuid shared:2 - proc proc rw
30 22 0:40 / /home rw,relatime shared:9 - nfs4 server:/export/home rw,vers=4.2
31 30 0:41 / /home/ann/scratch rw shared:10 - lustre 10.0.0.1@o2ib:/scratch rw
32 31 8:2 / /home/ann/scratch/local rw - xfs /dev/sdb1 rw
33 22 0:42 /exported /mnt/my\040data rw shared:11 - cifs //server/my\040data rw
34 22 8:1 /home/local /bind rw,relatime shared:1 - ext4 /dev/sda1 rw
35 22 0:40 /bob /bindnfs rw,relatime shared:9 - nfs4 server:/export/home rw
36 22 0:43 / /work rw - autofs systemd-1 rw
37 36 0:44 / /work rw - nfs server:/work rw
38 22 0:45 / /tab\011and\134back rw - fuse.sshfs me@host: rw
39 22 0:46 / /beegfs rw master:1 propagate_from:2 - beegfs beegfs_nodev rw
""".strip("\n")


@pytest.mark.parametrize(("path", "kind"), [
    ("/results.db", "ext4"), ("/home/ann/results.db", "nfs4"), ("/homes/ann/results.db", "ext4"),
    ("/home/ann/scratch/results.db", "lustre"), ("/home/ann/scratch/local/x/results.db", "xfs"),
    ("/home/ann/scratchy/results.db", "nfs4"), ("/mnt/my data/results.db", "cifs"), ("/mnt/my/results.db", "ext4"),
    ("/bind/results.db", "ext4"), ("/bindnfs/results.db", "nfs4"), ("/work/results.db", "nfs"),
    ("/tab\tand\\back/results.db", "fuse.sshfs"), ("/beegfs/results.db", "beegfs"),
])
def test_file_system(path, kind):
    assert dbtool.file_system(path, MOUNTINFO) == kind
    assert (kind in dbtool.NETWORK) == (kind not in ("ext4", "xfs"))


def test_file_system_of_this_machine(tmp_path):
    need(os.path.exists("/proc/self/mountinfo"), "Linux")
    with open("/proc/self/mountinfo") as file:
        assert dbtool.file_system(str(tmp_path), file.read())


def journal(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("PRAGMA journal_mode").fetchone()[0]


def test_reading_keeps_its_lock_on_a_rollback_journal(expect_success, db_path, monkeypatch):
    monkeypatch.setenv("DBTOOL_JOURNAL", "delete")
    expect_success("insert", db_path, stdin=RECORD)

    with (dbtool.reading(str(db_path)), contextlib.closing(sqlite3.connect(db_path, timeout=0, isolation_level=None)) as db,
          pytest.raises(sqlite3.OperationalError, match="locked")):
        db.execute("BEGIN EXCLUSIVE")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["migrate", "results.db"], ["snapshot", "results.db", "copy.db"], ["schema", "results.db"],
                                   ["query", "results.db", "SELECT 1"], ["migrate", "results.db", "--dry-run"]], ids=" ".join)
def test_every_command_waits_for_a_rollback_journal(expect_success, db_path, words, monkeypatch):
    monkeypatch.setenv("DBTOOL_JOURNAL", "delete")
    expect_success("insert", db_path, stdin=RECORD)
    with contextlib.closing(sqlite3.connect(db_path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        child = subprocess.Popen([sys.executable, script_of(words[0]), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(0.5)
        assert child.poll() is None
        db.execute("COMMIT")
        _, said = child.communicate(timeout=30)
        assert (child.returncode, said) == (0, b"")


def test_override(expect_success, expect_failure, db_path, monkeypatch):
    for mode in ("delete", "wal", "DELETE"):
        monkeypatch.setenv("DBTOOL_JOURNAL", mode)
        expect_success("insert", db_path, stdin=RECORD)
        assert journal(db_path) == mode.lower()
    monkeypatch.setenv("DBTOOL_JOURNAL", "none")
    assert "DBTOOL_JOURNAL is \"none\"; it takes wal or delete" in expect_failure("insert", db_path, stdin=RECORD, status=2)


@pytest.fixture
def network(tmp_path, monkeypatch):
    """A folder on a file system of a type that counts as a network one: a real FUSE mount of another folder."""
    need(os.geteuid() == 0 and shutil.which("bindfs") and os.path.exists("/dev/fuse"), "bindfs and /dev/fuse")
    (tmp_path / "server").mkdir()
    mount = tmp_path / "network"
    mount.mkdir()
    done = subprocess.run(["bindfs", "-o", "fsname=server,subtype=sshfs", tmp_path / "server", mount],
                          capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no FUSE mount here: {done.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_network_file_system(network):
    data = json.dumps(RECORD).encode()
    path = network / "results.db"
    with open("/proc/self/mountinfo") as file:
        assert dbtool.file_system(str(path), file.read()) == "fuse.sshfs"
    first = process("insert", path, stdin=data)
    assert first.returncode == 0 and first.stderr.count(b"\n") == 1
    assert b"is on fuse.sshfs, a network file system, so it has a DELETE journal instead of WAL" in first.stderr
    again = process("insert", path, stdin=data)
    assert (again.returncode, again.stderr) == (0, b"")
    assert journal(path) == "delete"
    # A file that came in WAL mode is switched, but for one that is in use.
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL").fetchall()
        db.execute("SELECT count(*) FROM results").fetchall()
        begin = time.monotonic()
        done = process("insert", path, "--timeout", "1", stdin=data)
        assert (done.returncode, done.stderr) == (0, b"") and time.monotonic() - begin < 10
        assert journal(path) == "wal"
    done = process("insert", path, stdin=data)
    assert done.returncode == 0 and b"DELETE journal" in done.stderr
    assert journal(path) == "delete"
    assert process("query", path, "SELECT count(*) FROM results", "--no-header").stdout == b"4\n"

"""The README's commands, run one after another in a copy of the project, print what it says they print."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import dbadmin
import dbtool

README = (ROOT / "README.md").read_text()
STEPS = [step for block in re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
         for step in re.findall(r"^\$ (.*?)\n((?:(?!\$ ).*\n)*)", block, re.M)]
VARYING = [(r"\d{8}T\d{6}\.\d{6}Z-\S+?-\d+-[0-9a-f]{16}\.json", "KEPT.json"), (r"\b[0-9a-f]{32}\b", "ID"), (r"\b\d+ at once\b", "N at once"),
           (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME")]


def plain(text):
    for pattern, name in VARYING:
        text = re.sub(pattern, name, text)
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project, where `python3` is the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("readme") / "dbtool"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "tests", "*.db*", "__pycache__"))
    (folder.parent / "bin").mkdir()
    (folder.parent / "bin" / "python3").symlink_to(sys.executable)
    return folder


def test_commands_print_what_the_readme_says(copy):
    assert len(STEPS) > 10
    environment = {**os.environ, "PATH": f"{copy.parent}/bin:{os.environ['PATH']}"}
    said, printed = [], []
    for command, output in STEPS:
        done = subprocess.run(["bash", "-c", command], cwd=copy, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60, check=False)
        said.append((command, plain(output)))
        printed.append((command, plain(done.stdout.decode())))
    assert printed == said


@pytest.mark.parametrize("script", [dbtool, dbadmin])
def test_every_command_and_flag_is_documented(script):
    for name, command in script.COMMANDS.items():
        assert f"### {name}\n" in README and f"    {name} " in (script.__doc__ or "")
        assert [flag for flag in command.flags if flag not in README] == []

"""The three scripts: what they import, and what they must not name."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import dbtool

SCRIPTS = ["dbtool.py", "dbadmin.py", "sweep.py"]
MAY_IMPORT = {"dbtool.py": set(), "dbadmin.py": {"dbtool"}, "sweep.py": {"dbtool"}}


def imported(script):
    """Return the modules that a script names in its import statements, wherever they stand."""
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_public_modules_are_imported(script):
    assert [name for name in imported(script) if name.startswith("_") and name != "__future__"] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_go_one_way(script):
    ours = {name.removesuffix(".py") for name in SCRIPTS}
    assert ours & set(imported(script)) == MAY_IMPORT[script]


@pytest.mark.skipif(sys.version_info < (3, 10), reason="sys.stdlib_module_names")
@pytest.mark.parametrize("script", SCRIPTS)
def test_there_are_no_dependencies(script):
    names = {name.partition(".")[0] for name in imported(script)}
    assert names - sys.stdlib_module_names - MAY_IMPORT[script] == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_a_module_ends_in_one_line(script, tmp_path):
    """A Python that was built without sqlite3 is a common thing; input of insert must survive it."""
    (tmp_path / "sqlite3.py").write_text("raise ModuleNotFoundError(\"No module named '_sqlite3'\", name='_sqlite3')")
    done = subprocess.run([sys.executable, ROOT / script, "insert", "r.db"], input=b'{"cost": "ten hours"}', capture_output=True,
                          check=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"_sqlite3" in done.stderr
    assert (b'{"cost": "ten hours"}' in done.stderr) == (script == "dbtool.py")


def test_every_rule_is_whole():
    """A rule for one more type can't be there by half."""
    for rule in dbtool.RULES.values():
        assert rule.wanted and rule.conversions and set(rule.keeps) <= set(dbtool.RULES)
    assert set(dbtool.AFFINITIES.values()) <= set(dbtool.RULES)

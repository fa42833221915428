"""Every command while its system calls fail: a sample of what `tests/faults/run.py --all` tries."""

import pytest
from conftest import need_program
from faults import run


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("call", "signal"), ("import",)], ids=["call", "import"])
@pytest.mark.parametrize("scenario", run.SCENARIOS, ids=lambda scenario: scenario.name)
def test_nothing_is_lost_whichever_call_fails(scenario, kinds, tmp_path):
    need_program("strace")
    run.build_house(tmp_path)
    course = run.Course(tmp_path, scenario)
    verdicts = run.try_faults(course, run.sample((fault for fault in course.faults() if fault.kind in kinds), 1))
    assert any(verdict.call for verdict in verdicts)
    assert [verdict for verdict in verdicts if verdict.problems] == []

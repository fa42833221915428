"""Every command while its system calls fail: a sample of what `tests/faults/run.py --all` tries."""

import pytest
from conftest import need_program
from faults import run

# What is known to go wrong, by the command and the kind of fault.
UNREAD = "an import at the script's top fails before anything can hold what is on standard input"
UNSEEN = "a folder that can't be listed is taken for an empty one"
KNOWN = {("insert", "import"): UNREAD, ("retry", "call"): UNSEEN, ("retry", "import"): UNSEEN}


def cases():
    for scenario in run.SCENARIOS:
        for kinds in ("call", "signal"), ("import",):
            reason = KNOWN.get((scenario.command.split()[0], kinds[0]))
            marks = [pytest.mark.xfail(reason=reason, strict=False)] if reason else []
            yield pytest.param(scenario, kinds, marks=marks, id=f"{scenario.name}-{kinds[0]}")


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "kinds"), list(cases()))
def test_nothing_is_lost_whichever_call_fails(scenario, kinds, tmp_path):
    need_program("strace")
    run.build_house(tmp_path)
    course = run.Course(tmp_path, scenario)
    verdicts = run.try_faults(course, run.sample((fault for fault in course.faults() if fault.kind in kinds), 1))
    assert any(verdict.call for verdict in verdicts)
    assert [verdict for verdict in verdicts if verdict.problems] == []

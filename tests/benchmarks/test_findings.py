"""What is found in synthetic runs: a part of benchmarks/findings.py, of other seeds."""

from collections import Counter

import pytest
from finding_suite.synthetic import HEALTHY, TROUBLES, healthy, troubled

from stabletrain.tracking.findings import findings, outcome


def test_healthy_runs_are_left_alone() -> None:
    """Bug: a rule that finds something in what is fine, such as a small loss with a long tail, or a negative one."""
    alarmed = Counter(
        (kind, found.name)
        for kind in HEALTHY
        for steps in (300, 1500)
        for seed in range(3)
        for found in findings(healthy(kind, seed + 40, steps))
    )
    assert sum(alarmed.values()) <= 1, alarmed


@pytest.mark.parametrize("name", [each[0] for each in TROUBLES])
def test_each_trouble_is_found(name: str) -> None:
    """Bug: a rule that does not see what it is for, or only at one length of a run."""
    expected = next(finding for each, finding, _ in TROUBLES if each == name)
    lengths = (1000, 1500) if name == "clipped never" else (300, 1500)
    runs = [troubled(name, seed + 40, steps) for steps in lengths for seed in range(2)]
    found = [[each.name for each in findings(run)] for run in runs]
    assert sum(expected in names for names in found) >= len(runs) - 1, found
    if expected == "diverged":
        assert [outcome(run, "finished") for run in runs] == ["diverged"] * len(runs)

"""benchmarks/harm.py: a run, its record, and the judgement."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import harm
import json_lines
import pytest
import torch
from harm_suite import data, judge, page
from harm_suite.cases import CASES, noisy
from harm_suite.data import loader, mlp
from harm_suite.fingerprint import fingerprint
from harm_suite.stacks import DEFAULT, NOTHING, STACKS
from harm_suite.training import Case, Task, Training

Record = dict[str, Any]


def runs(metrics: list[float | None], least: float = 0.1, **others: Any) -> list[Record]:
    """Made records of the seeds 0, 1, ..."""
    counts = {"attempts": 100, "skipped": 1, "clipped": 25, "rollbacks": 2, "accepted": 3, "ended": ""}
    record = {"case": "made", "before": 10.0, "least": least, **counts, **others}
    return [{**record, "seed": seed, "metric": metric} for seed, metric in enumerate(metrics)]


@pytest.mark.parametrize(
    ("bare", "made", "answer"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.2, 2.0], judge.HARMED),
        ([1.0, 1.1, 0.9], [1.05, 1.15, 0.95], judge.UNHARMED),  # below `least`
        ([1.0, 3.0, 2.0], [1.9, 3.9, 2.9], judge.UNHARMED),  # below two standard errors of the bare runs, 1.15
        ([1.0, 1.0, 1.0], [1.0, 1.0, 9.0], judge.UNCLEAR),  # below two standard errors of the differences, 5.3
        ([1.0, 1.1, 0.9], [0.1, 0.2, 0.1], judge.UNHARMED),  # better
        ([1.0], [1.2], judge.HARMED),  # one seed: only `least` counts
        ([-2.0, -2.1, -1.9], [-1.0, -1.0, -1.0], judge.HARMED),  # a negative metric
    ],
)
def test_harm_is_a_difference_above_the_noise(bare: list[float], made: list[float], answer: str) -> None:
    """Bug: noise of the seeds is reported as harm, harm as noise, or a better metric as harm."""
    found = judge.judge(runs(bare), runs(made))
    assert found.answer == answer
    assert found.difference == pytest.approx(sum(made) / len(made) - sum(bare) / len(bare))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_metric_that_is_nan_is_harm_and_a_bare_one_is_no_verdict(seed: int) -> None:
    """Bug: NaN > limit is False, so that the worst of all outcomes passes as harmless; at every seed's position."""
    good: list[float | None] = [1.0, 1.1, 0.9]
    lost = [None if index == seed else value for index, value in enumerate(good)]
    assert judge.judge(runs(good), runs(lost)).answer == judge.HARMED
    assert judge.judge(runs(lost), runs(good)).answer == judge.UNCLEAR
    assert not judge.learns(runs(lost))


def test_a_stop_is_harm_whatever_the_metric() -> None:
    """Bug: a run that is stopped at its best moment looks better than the bare one."""
    stopped = runs([0.5, 0.5, 0.5])
    stopped[1]["ended"] = "TrainingStopped at 60: 11 rollbacks"
    found = judge.judge(runs([1.0, 1.0, 1.0]), stopped)
    assert (found.answer, found.stops) == (judge.HARMED, 1)


def test_the_counts_are_sums_and_the_clipped_steps_a_share() -> None:
    """Bug: the share is that of one run, or of all runs' steps counted for each run."""
    found = judge.judge(runs([1.0, 1.0]), runs([1.0, 1.2]))
    assert (found.skipped, found.rollbacks, found.accepted, found.clipped) == (2, 4, 6, 0.25)
    assert found.worst == (1.0, 1.2)


def test_runs_of_other_seeds_are_not_compared() -> None:
    """Bug: differences of unequal seeds are the seeds' noise."""
    with pytest.raises(ValueError, match="same seeds"):
        judge.judge(runs([1.0, 1.0]), runs([1.0]))
    with pytest.raises(ValueError, match="at least one"):
        judge.judge([], [])


def test_a_case_that_does_not_learn_is_no_case() -> None:
    """Bug: a case at chance level, which nothing can harm, counts as unharmed."""
    assert judge.learns(runs([1.0, 9.0]))
    assert not judge.learns(runs([1.0, 9.9]))
    assert not judge.learns(runs([1.0, 1.0], ended="ValueError at 3"))


def line(seed: int) -> Training:
    """A line is fitted. Measure: error of its slope."""
    x = torch.linspace(-1, 1, 64)[:, None]

    def loss(task: Task, batch: list[torch.Tensor]) -> torch.Tensor:
        return (task.net(batch[0]) - 3 * batch[0]).pow(2).mean()

    def metric(task: Task) -> float:
        return float((task.net(x) - 3 * x).pow(2).mean())

    return Training(Task(mlp(1, 8, 1), loss), loader(x, batch=16), 40, metric, least=0.01)


def test_a_run_is_recorded_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a stack is not bare, steps are counted wrongly, a record is repeated, or that of a changed case is kept."""
    monkeypatch.setattr(harm, "CASES", (Case(line, is_held_out=True),))
    monkeypatch.setattr(harm.harness, "quiet", lambda: None)  # the logging of the other tests stays as it is
    record = tmp_path / "harm.jsonl"
    arguments = ["--stack", DEFAULT, "--seeds", "0", "--record", str(record)]
    harm.main(arguments)
    made = {each["stack"]: each for each in json_lines.read(record)}
    assert list(made) == [NOTHING, DEFAULT]
    assert all(each["attempts"] == 40 and each["ended"] == "" for each in made.values())
    assert all(each["metric"] < each["before"] for each in made.values())
    written = record.read_text()

    harm.main([*arguments, "--held-out"])
    assert record.read_text() == written

    harm.main([*arguments, "--shared", "--fresh"])
    assert record.read_text() == written

    changed = [{**each, "setup": "another"} for each in made.values()]
    record.write_text("".join(json.dumps(each) + "\n" for each in changed))
    harm.main(arguments)
    assert [each["setup"] for each in json_lines.read(record)][2:] == [fingerprint(line)] * 2
    assert f"| line * | {made[NOTHING]['before']:.3g} | {made[NOTHING]['metric']:.3g} |" in (
        record.with_suffix(".md").read_text()
    )
    assert "| default | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "old", "new", "is_other"),
    [
        (noisy.label_noise, "g = seeded(seed)", "g = seeded(seed)  # a comment", False),
        (noisy.label_noise, "Digits: 20 %", "Other words", False),
        (noisy.label_noise, "< 0.2", "< 0.3", True),
        (noisy.label_noise, "least=0.02", "least=0.03", True),
        (data.digits, "/ 16", "/ 8", True),  # which label_noise uses
        (noisy.diffusion, "0.05", "0.06", False),  # another case
    ],
)
def test_the_fingerprint_is_of_the_code_of_the_case_alone(
    changed: Any, old: str, new: str, is_other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: runs of a changed case are kept, or all runs are repeated because a comment or another case has changed."""
    before, source = fingerprint(noisy.label_noise), inspect.getsource
    assert old in source(changed)

    def edited(item: Any) -> str:
        return source(item).replace(old, new) if item is changed else source(item)

    monkeypatch.setattr("harm_suite.fingerprint.inspect.getsource", edited)
    assert (fingerprint(noisy.label_noise) != before) == is_other


def test_the_cases_have_names_and_enough_of_them_are_held_out() -> None:
    """Bug: two cases of one name share their records; the hold-out is used up."""
    names = [each.name for each in CASES]
    assert len(set(names)) == len(names) >= 34
    assert sum(each.is_held_out for each in CASES) >= 12
    assert all("Measure:" in each.text for each in CASES)
    assert all(fingerprint(each.make) for each in CASES)


def test_the_page_is_made_from_an_empty_record() -> None:
    """Bug: a page of a partial record fails."""
    assert "# Harm" in page.page(judge.Results([], (0,)), CASES, STACKS, "command")

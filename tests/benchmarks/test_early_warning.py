"""benchmarks/early_warning.py: when a loss has risen, when a reading gives an alarm, and what the page makes of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import early_warning
import json_lines
import pytest
import torch
import torch.nn.functional as F
from early_warning_suite import judge, models, trial
from early_warning_suite.page import page
from early_warning_suite.readings import READINGS, Reader
from early_warning_suite.results import Results
from early_warning_suite.settings import PARTS, SEEDS, SEEN, TROUBLED, Setting
from early_warning_suite.unions import FIXED, OWN, Union

CALM = [1.0 + 0.01 * (step % 7) for step in range(120)]


def test_a_rise_is_dated_by_the_first_of_its_steps() -> None:
    """Bug: the rise is dated by the step at which it is certain, or a short spike is one."""
    losses = [2.0] * 100 + [2.0 + 0.1 * step for step in range(100)]
    at = judge.risen(losses)
    assert at is not None
    assert at < 100 + judge.LASTS
    assert judge.means(losses)[at] > 2.0 + judge.RISE >= judge.means(losses)[at - 1]
    assert judge.risen([2.0] * 100 + [3.0] * 5 + [2.0] * 100) is None
    assert judge.risen([2.0] * 100 + [math.nan]) == 100


def test_an_alarm_needs_two_steps_in_a_row_and_keeps_for_any_limit() -> None:
    """Bug: one peak is an alarm; alarms before the cause count as leads; the kept records give another step than the
    series does."""
    values: list[float | None] = [*CALM]
    values[60] = values[90] = 50.0
    values[100:] = [5.0 * 1.5 ** (step - 100) for step in range(100, 120)]
    values[110] = math.nan  # a reading that is not finite is above every limit
    kept = judge.summary(values, start=80)
    assert kept is not None
    assert judge.fixed(kept, 4.0) == 101
    assert judge.fixed(kept, 1e6) is None
    assert not judge.fixed_before(kept, 4.0)
    for limit in (1.5, 6.0, 30.0, 100.0, 1e3):
        above = [x is not None and not x <= limit for x in values]
        assert judge.fixed(kept, limit) == next((i for i in range(81, 120) if above[i] and above[i - 1]), None)
    assert judge.own_history(CALM) == []
    assert (kept.own, kept.own_before) == (101, 0)
    assert judge.summary([None] * 120, start=80) is None


def made(part: str, setting: str, seed: int, **values: Any) -> dict[str, Any]:
    """A record with readings of these values at every step."""
    start = next((each.start for each in TROUBLED if each.name == setting), None)
    readings = {name: judge.summary(series, start) for name, series in values.pop("series", {}).items()}
    return {
        "part": part,
        "setting": setting,
        "seed": seed,
        "risen": None,
        "loss": [4.0, 2.0, 3.0],
        "detect_spikes": [],
        "skip_outliers": [],
        "slow_rise": [],
        "readings": {name: kept._asdict() for name, kept in readings.items() if kept is not None},
        **values,
    }


def test_the_page_counts_leads_and_false_alarms() -> None:
    """Bug: an alarm after the rise, or in a run that never rose, is a lead; limits come from the runs they judge."""
    kind, other = TROUBLED[0].name, TROUBLED[1].name
    rising: list[float | None] = [1.0] * 150 + [10.0] * 150
    calm: list[float | None] = [1.0] * 300
    records = [
        made("calibration", SEEN[0].name, 10, series={"bound": calm}),
        made("seen", SEEN[0].name, 0, series={"bound": calm}),
        made("unseen", "another", 0, series={"bound": [2.0] * 300}),
        *(made("troubled", kind, seed, risen=200, series={"bound": rising}) for seed in SEEDS["troubled"]),
        made("troubled", other, 0, risen=140, series={"bound": rising}),
        made("troubled", other, 1, series={"bound": rising}, slow_rise=[(160, "slow rise")]),
    ]
    results, bound = Results(records), Union("", ["bound"])
    assert results.limits["bound"] == 1.5
    assert results.led(bound) == (3, 4)
    assert results.whole_kinds("bound", FIXED) == {kind: 49}
    assert results.lead(records[-2], ["bound"], FIXED) == -11
    assert results.lead(records[3], ["bound"], OWN) == 49
    assert (results.false("seen", bound), results.false("unseen", bound)) == ((0, 1), (1, 1))
    assert results.lead(records[3], ["bound"], FIXED, every=50) == 1
    text = page(results, "command")
    assert "| attention bound | 1.5 | **49** |" in text
    assert page(Results([]), "command")


def test_a_run_is_recorded_once_and_has_all_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a reading is missing, infinite in a healthy run, or changes the training; a run is repeated."""
    monkeypatch.setattr(trial, "STEPS", 60)
    short = Setting(name="short", lr=5e-3)
    monkeypatch.setitem(PARTS, "calibration", (short,))
    monkeypatch.setitem(SEEDS, "calibration", (10,))
    monkeypatch.setattr(trial.train, "__defaults__", (60,))
    monkeypatch.setattr(trial.record, "__defaults__", (60,))
    record = tmp_path / "runs.jsonl"
    early_warning.main(["--part", "calibration", "--record", str(record), "--write"])
    written = record.read_text()
    early_warning.main(["--part", "calibration", "--record", str(record)])
    assert record.read_text() == written
    (run,) = json_lines.read(record)
    assert set(run["readings"]) == {each.key for each in READINGS}
    assert all(math.isfinite(kept["largest"]) for kept in run["readings"].values())
    assert "calibration 1 of 1" in record.with_suffix(".md").read_text()


def test_the_readings_are_those_of_their_definitions() -> None:
    """Bug: a reading of weights after the step, of another call, or of a power iteration that has not converged."""
    torch.manual_seed(0)
    net = models.build("gpt")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3.0)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, betas=(0.9, 0.95))
    reader = Reader(net, optimizer)
    inputs, targets = trial.batch(TROUBLED[0], seed=0, step=0)
    for _ in range(30):  # of the same step, from the same weights
        with reader.forward():
            loss = F.cross_entropy(net(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        reader.before_step()
        before = [p.detach().clone() for p in net.parameters()]
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        read = reader.after_step()
        moved = [p.detach() - w for p, w in zip(net.parameters(), before, strict=True)]
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in net.parameters()]
        with torch.no_grad():
            for parameter, weight in zip(net.parameters(), before, strict=True):
                parameter.copy_(weight)
        optimizer.load_state_dict(state)
    norms = [w.norm() for w in before]
    matrices = [i for i, w in enumerate(before) if w.ndim > 1]
    expected = {
        "loss": loss,
        "update": torch.stack([m.norm() for m in moved]).norm() / torch.stack(norms).norm(),
        "update_most": max(moved[i].norm() / norms[i] for i in matrices),
        "spectral": max(torch.linalg.matrix_norm(before[i], 2) for i in matrices),
        "weight_norm": torch.stack(norms).norm(),
        "output": net(inputs).abs().max(),
    }
    # at the first step the moment is (1 - beta2) g^2, corrected to g^2: every used row has ratio 1
    assert read["rms_t"] == pytest.approx(1.0, rel=1e-3)
    assert any((moment == 0).any() for moment in moments)
    for name, value in expected.items():
        assert read[name] == pytest.approx(float(value), rel=2e-3), name
    assert read["bound"] >= read["logit"] > 0
    assert read["largest"] >= read["output"]


def test_no_two_settings_share_a_record() -> None:
    """Bug: two settings of one name, or of the same arguments."""
    for part in PARTS.values():
        assert len({each.name for each in part}) == len({each.digest for each in part}) == len(part)

"""benchmarks/early_warning.py: when a loss has risen, when a reading gives an alarm, and what the page makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import early_warning
import json_lines
import pytest
import torch
import torch.nn.functional as F
from early_warning_suite import judge, trial
from early_warning_suite.page import page
from early_warning_suite.readings import READINGS, readings
from early_warning_suite.results import Results
from early_warning_suite.settings import PARTS, SEEDS, SEEN, TROUBLED, Setting
from early_warning_suite.sharpness import sharpness
from early_warning_suite.unions import FIXED, OWN, Union
from torch import nn

CALM = [1.0 + 0.01 * (step % 7) for step in range(120)]


def test_a_rise_is_dated_by_the_first_of_its_steps() -> None:
    """Bug: the rise is dated by the step at which it is certain, or a short spike is one."""
    losses = [2.0] * 100 + [2.0 + 0.1 * step for step in range(100)]
    at = judge.risen(losses, [1.0] * 200)
    assert at is not None
    assert at < 100 + judge.LASTS
    assert judge.means(losses)[at] > 2.0 + judge.RISE >= judge.means(losses)[at - 1]
    assert judge.risen([2.0] * 100 + [3.0] * 5 + [2.0] * 100, [1.0] * 205) is None
    assert judge.risen([2.0] * 100 + [math.nan], [1.0] * 101) == 100
    assert judge.risen([2.0] * 101, [1.0] * 100 + [math.inf]) == 100  # the weights are lost with this step


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


def test_a_run_is_recorded_once_with_all_readings_and_trains_as_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a reading is missing or infinite in a healthy run; a run is repeated; reading changes the training."""
    short = Setting(name="short", lr=5e-3)
    monkeypatch.setitem(PARTS, "calibration", (short,))
    monkeypatch.setitem(SEEDS, "calibration", (10,))
    monkeypatch.setattr(trial.record, "__defaults__", (52,))
    record = tmp_path / "runs.jsonl"
    arguments = ["--part", "calibration", "--record", str(record)]
    threads = torch.get_num_threads()
    try:
        early_warning.main([*arguments, "--write"])
        written = record.read_text()
        early_warning.main(arguments)
        bare = trial.train(short, 10, 6, monitored=False)
        assert trial.train(short, 10, 6)["loss"] == bare["loss"]
    finally:
        torch.set_num_threads(threads)
    assert record.read_text() == written
    (run,) = json_lines.read(record)
    assert set(run["readings"]) == {each.key for each in READINGS} - {"zeros"}  # a gpt has no ReLU
    assert all(math.isfinite(kept["largest"]) for kept in run["readings"].values())
    assert run["readings"]["sharpness"]["looks"][4] is not None  # step 49
    assert "calibration 1 of 1" in record.with_suffix(".md").read_text()
    assert run["loss"][0] == judge.rounded(bare["loss"][0] or math.nan)


def test_a_reading_is_that_of_the_worst_layer() -> None:
    """Bug: the last layer's, the calmest entropy's largest, or a metric of a similar name."""
    metrics = {"stability/loss": 2.0, "stability/grad_norm": 1.0, "stability/update_ratio": 0.5, "train/loss": 9.0}
    layers = {"attention_bound/a": 7.0, "attention_bound/b": 3.0, "attention_entropy/a/0": 0.5}
    layers |= {"attention_entropy/a/1": 2.0, "weight_norm/a": 3.0, "weight_norm/b": 4.0, "update_ratio/a": 0.7}
    found = readings(metrics | {f"stability_layers/{name}": value for name, value in layers.items()})
    assert found.pop("entropy") == pytest.approx(2.0, rel=1e-2)
    expected = {"loss": 2.0, "grad_norm": 1.0, "update": 0.5, "bound": 7.0, "weight_norm": 5.0, "update_most": 0.7}
    assert found == expected


def test_the_sharpness_is_that_of_the_dense_hessian() -> None:
    """Bug: the most negative eigenvalue; a curvature that is infinite because a row was never used; the learning rate
    of another optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs, targets = torch.randint(0, 5, (12, 2)), torch.randint(0, 3, (12,))  # row 5 is never used

    def loss() -> torch.Tensor:
        return F.cross_entropy(net(inputs), targets)

    for optimizer in (torch.optim.SGD(net.parameters(), 0.1, momentum=0.5), torch.optim.AdamW(net.parameters(), 0.01)):
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        parameters = list(net.parameters())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
        rows = [torch.autograd.grad(each, parameters, retain_graph=True, materialize_grads=True) for each in gradient]
        hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        if isinstance(optimizer, torch.optim.AdamW):
            moment = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parameters]) / (1 - 0.999**3)
            scale = torch.where(moment > 0, (moment.sqrt() + 1e-8).rsqrt(), 0.0)
            hessian, edge = scale[:, None] * hessian * scale, 2 * 1.9 / 0.1 / 0.01
        else:
            edge = 2 * 1.5 / 0.1
        expected = torch.linalg.eigvalsh(hessian)[-1] / edge
        assert sharpness(net, loss, optimizer) == pytest.approx(float(expected), rel=2e-2)


def test_no_two_settings_share_a_record() -> None:
    """Bug: two settings of one name, or of the same arguments."""
    for part in PARTS.values():
        assert len({each.name for each in part}) == len({each.digest for each in part}) == len(part)

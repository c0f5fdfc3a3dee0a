"""What a dry run prints, and whether a run fits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from printed_plans import PLAN, RANK, printed

from stabletrain.config.compose import compose
from stabletrain.launch import dry_run
from stabletrain.planning.plan import Option, Plan, Verdict


def test_what_does_not_fit_is_said_with_what_helps(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the device memory of plugins is forgotten; an option that needs more is offered; wide output is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    config = compose("char_gpt", ["strategy=fsdp2", "launch.processes=2", "memory=80GB", "dry_run=true"]).config
    tried: list[int] = []

    def plan(changed: Any) -> Plan:
        tried.append(changed["data"]["batch_size"])
        peak = {16: 20_000_000_000}.get(changed["data"]["batch_size"], 90_000_000_000)
        return replace(PLAN, per_rank=replace(RANK, peak=peak))

    monkeypatch.setattr(dry_run, "_plan", plan)
    verdict = dry_run._verdict(config, PLAN)
    assert tried == [32, 16, 32]
    assert verdict.needed == 85_000_000_000
    assert verdict.options == [Option(override="data.batch_size=16", peak=65_000_000_000)]
    text = printed(capsys, (replace(PLAN, verdict=verdict), None))
    assert "It does not fit into 80 GB: 85 GB are needed, 5 GB too much." in text
    assert "with data.batch_size=16: 65 GB, fits" in text
    assert "16 processes on 2 nodes" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_several_jobs_are_rows_and_unknown_is_said(capsys: Any) -> None:
    """Bugs: a job without a plan ends the table; an unknown peak is 0."""
    unknown = replace(PLAN, per_rank=replace(RANK, peak=None, activations=None))
    verdict = Verdict(memory=10**12, needed=1, fits=None)
    text = printed(capsys, (replace(unknown, verdict=verdict), None), (None, "x.py, line 3: no values"))
    assert "seed=0" in text
    assert "unknown" in text
    assert "no plan: x.py, line 3: no values" in " ".join(text.split())


def test_json(capsys: Any) -> None:
    """Bug: a sentence among the JSON, which no script can read."""
    found = json.loads(printed(capsys, (PLAN, None), (None, "why"), as_json=True))["jobs"]
    assert found[0]["plan"]["per_rank"]["peak"] == 40_000_000_000
    assert (found[1]["plan"], found[1]["no_plan_since"]) == (None, "why")

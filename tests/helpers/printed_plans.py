"""A plan of a run that nobody could make here, and what is printed of plans."""

from __future__ import annotations

from typing import Any

from stabletrain.cli.plan import print_plans
from stabletrain.config.compose import compose
from stabletrain.launch.launcher import Job
from stabletrain.planning.plan import Collective, Group, PerRank, Plan, PluginPlan

RANK = PerRank(
    parameters=4_000_000_000,
    buffers=0,
    gradients=4_000_000_000,
    optimizer_state=8_000_000_000,
    largest_group=500_000_000,
    buckets=0,
    window_gradients=0,
    activations=20_000_000_000,
    batch=65_000,
    peak=40_000_000_000,
    peak_parts={"activations": 20_000_000_000},
    peak_at="backward of net.blocks.3",
)
PLAN = Plan(
    recipe="char_gpt",
    processes=8,
    nodes=2,
    strategy="FSDP2Strategy",
    precision="bf16-mixed",
    optimizer="AdamW",
    parameters=16_000_000_000,
    trained=16_000_000_000,
    groups=[Group(name="a.0", last="a.3", kind="Block", count=4, parameters=1, whole_bytes=4, rank_bytes=1)],
    per_rank=RANK,
    micro_batches=1,
    collectives=[Collective(kind="all-gather", count=9, bytes=1_000_000)],
    source="traced",
    stopped_by=None,
    checkpoint_bytes=1,
    steps=10,
    steps_per_epoch=None,
    plugins=[PluginPlan(key="plugins.spike", name="Rollback", text="snapshots", device_bytes=45_000_000_000)],
)


def printed(capsys: Any, *plans: tuple[Plan | None, str | None], as_json: bool = False) -> str:
    """What the command line prints."""
    composed = compose("char_gpt", ["logger=none"])
    jobs = [Job(recipe="char_gpt", composed=composed, number=i, name=f"seed={i}") for i in range(len(plans))]
    print_plans(jobs, plans, as_json=as_json)
    text: str = capsys.readouterr().out
    return text

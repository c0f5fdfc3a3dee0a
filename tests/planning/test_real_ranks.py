"""A plan is compared with what the same callback finds on ranks that train."""

from pathlib import Path
from typing import Any

import planned_runs
import pytest
from planned_runs import planned
from rank_pool import on_ranks

SLOW = [
    ("ddp", 2, {"accumulate_grad_batches": 3}),
    ("ddp_zero1", 2, {}),
    ("hsdp", 4, {}),
    ("tensor_parallel", 2, {}),
    ("fsdp2_tp", 4, {}),
    ("fsdp2_checkpoint", 2, {"precision": "bf16-mixed"}),
    ("zero2", 2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
]


def assert_equal(folder: Path, kind: str, size: int, options: dict[str, Any]) -> None:
    plan = planned(kind, size, options)
    assert plan.stopped_by is None
    rank = plan.per_rank
    for _ in range(2):
        real = on_ranks(planned_runs.measured, size, folder, kind, options)[0]
        if real["peak"] == rank.peak:
            break  # gloo's thread may hold a message a moment longer: of 22 runs one had a peak that was 1.5 kB higher
    for name in ("parameters", "gradients", "optimizer_state", "activations", "buckets", "peak", "peak_parts"):
        assert getattr(rank, name) == real[name], name
    assert [(each.kind, each.count, each.bytes) for each in plan.collectives] == real["collectives"]


def test_memory_and_messages_of_fsdp2_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    """Bugs: DTensor's bookkeeping counts as optimizer state; a gather is missed; gradients of all ranks are counted."""
    assert_equal(tmp_path, "fsdp2", 2, {})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size", "options"), SLOW)
def test_memory_and_messages_are_those_of_real_ranks(
    tmp_path: Path, kind: str, size: int, options: dict[str, Any]
) -> None:
    """Bugs: as above, for strategies that replicate, cut or divide; a window's second micro-batch is not counted."""
    assert_equal(tmp_path, kind, size, options)

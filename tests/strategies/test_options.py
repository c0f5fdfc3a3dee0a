"""Every option of FSDP2Strategy against DDP: bit for bit where the arithmetic is the same, close where it is not."""

from pathlib import Path
from typing import Any

import pytest
import sharded_uses
import torch
from rank_pool import on_ranks
from sharded_on_ranks import Case, End, ends

WINDOWS = (("accumulate_grad_batches", 3), ("max_steps", 3))
VALIDATED = (("limit_val_batches", 2), ("val_check_interval", 2), ("num_sanity_val_steps", 2), ("max_steps", 4))
MIXED = (("precision", "bf16-mixed"),)

QUICK: dict[str, tuple[Case, Case]] = {
    "accumulation, BatchNorm": (Case("Convolutions", "ddp", WINDOWS), Case("Convolutions", {}, WINDOWS)),
    "bf16-mixed, checkpointed": (Case("Scalar", "ddp", MIXED), Case("Scalar", {"checkpoint_units": True}, MIXED)),
}
EXACT: dict[str, tuple[Case, Case]] = {
    "ranks that start with different values": (Case("Encoder", rank_seeds=True), Case("Encoder", {}, rank_seeds=True)),
    "accumulation": (Case("Scalar", "ddp", WINDOWS), Case("Scalar", {}, WINDOWS)),
    "validation": (Case("Convolutions", "ddp", VALIDATED), Case("Convolutions", {}, VALIDATED)),
    "bf16-true": (
        Case("Scalar", "ddp", (("precision", "bf16-true"),)),
        Case("Scalar", {}, (("precision", "bf16-true"),)),
    ),
    "zero2": (Case("Scalar"), Case("Scalar", {"reshard_after_forward": False})),
    "offload": (Case("Scalar"), Case("Scalar", {"offload": True})),
    "checkpointed, BatchNorm": (Case("Convolutions"), Case("Convolutions", {"checkpoint_units": True})),
    "compiled": (Case("Scalar"), Case("Scalar", {"compile_units": "aot_eager"})),
    "compiled and checkpointed": (
        Case("Scalar"),
        Case("Scalar", {"compile_units": "aot_eager", "checkpoint_units": True}),
    ),
    "units within units": (Case("Blocks"), Case("Blocks", {"units": ["Block", "encoder.*.linear"]})),
    "also": (Case("Blocks"), Case("Blocks", {"also": ["generate"]})),
    "checkpointed by the plugin": (
        Case("Convolutions", "ddp", callbacks="checkpointed"),
        Case("Convolutions", {}, callbacks="checkpointed"),
    ),
    "kept in fp32, bf16-mixed": (
        Case("Encoder", "ddp", callbacks="bf16_mixed_with_norms"),
        Case("Encoder", {}, callbacks="bf16_mixed_with_norms"),
    ),
    "kept in fp32, bf16-true": (
        Case("Blocks", "ddp", callbacks="bf16_true_with_norms"),
        Case("Blocks", {}, callbacks="bf16_true_with_norms"),
    ),
}
CLOSE: dict[str, tuple[Case, Case, float]] = {
    "reduced in every micro-batch": (Case("Scalar", "ddp", WINDOWS), Case("Scalar", {"defer": False}, WINDOWS), 1e-6),
    "Lightning's clipping": (
        Case("Scalar", "ddp", (("gradient_clip_val", 0.1),)),
        Case("Scalar", {}, (("gradient_clip_val", 0.1),)),
        1e-6,
    ),
    "gathered in bf16": (Case("Scalar", "ddp", MIXED), Case("Scalar", {"gather": "bf16"}, MIXED), 5e-3),
    "gathered in bf16, norms kept": (
        Case("Blocks", "ddp", callbacks="bf16_mixed_with_norms"),
        Case("Blocks", {"gather": "bf16"}, callbacks="bf16_mixed_with_norms"),
        5e-3,
    ),
}


def trained(folder: Path, cases: dict[str, Any], size: int = 2) -> dict[str, list[tuple[End, End]]]:
    """Both ends of each case, of each rank."""
    found = on_ranks(ends, size, folder, [case for pair in cases.values() for case in pair[:2]], limit=500)
    for end in (end for rank in found for end in rank):
        assert not end.error, end.error
    return {name: [(rank[2 * i], rank[2 * i + 1]) for rank in found] for i, name in enumerate(cases)}


def assert_exact(found: dict[str, list[tuple[End, End]]]) -> None:
    for name, pairs in found.items():
        for ddp, fsdp in pairs:
            assert fsdp.losses == ddp.losses, name
            assert fsdp.validated == ddp.validated, name
            different = [key for key in ddp.tensors if not torch.equal(ddp.tensors[key], fsdp.tensors[key])]
            assert different == [], name


def test_quick_ones_are_exact(tmp_path: Path) -> None:
    """Bugs: gradients are reduced in every micro-batch; statistics follow each rank's own data, or are counted twice by
    the second forward; weights are converted after they were sharded."""
    assert_exact(trained(tmp_path, QUICK))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_they_are_exact(tmp_path: Path) -> None:
    """Bugs: as above; the values of each rank's own seed; a validation with each rank's statistics; modules kept in
    fp32 are gathered together with others."""
    found = trained(tmp_path, EXACT)
    assert_exact(found)
    assert all(len(fsdp.validated) == 2 * (1 + 2) for _, fsdp in found["validation"])


@pytest.mark.slow
def test_they_are_close(tmp_path: Path) -> None:
    """Bug: a window whose gradients are averaged twice, or a norm of one rank's shards."""
    for name, pairs in trained(tmp_path, CLOSE).items():
        for ddp, fsdp in pairs:
            assert len(fsdp.losses) == len(ddp.losses)
            assert fsdp.losses == pytest.approx(ddp.losses, rel=CLOSE[name][2]), name


@pytest.mark.slow
def test_without_synchronized_buffers_statistics_differ(tmp_path: Path) -> None:
    """Bug: the option does nothing, or the tests above would pass without it."""
    cases = [Case("Convolutions", {"sync_buffers": on}, (("max_steps", 3),)) for on in (True, False)]
    (on0, off0), (_, off1) = on_ranks(ends, 2, tmp_path, cases)
    key = "net.0.1.running_mean"
    assert not torch.equal(off0.tensors[key], off1.tensors[key])
    assert not torch.equal(on0.tensors[key], off1.tensors[key])
    assert on0.losses == off0.losses  # in training, the statistics of a batch count


@pytest.mark.slow
def test_replicas_of_shards(tmp_path: Path) -> None:
    """Bugs: groups that do not average with each other; each rank holds a quarter where it should hold a half."""
    cases = {"hsdp": (Case("Scalar"), Case("Scalar", {"replicate": 2}))}
    for pairs in trained(tmp_path, cases, size=4).values():
        for ddp, fsdp in pairs:
            assert fsdp.losses == pytest.approx(ddp.losses, rel=1e-5)
            assert 0.49 < fsdp.local < 0.56
        first = pairs[0][1].tensors
        assert all(torch.equal(first[key], fsdp.tensors[key]) for _, fsdp in pairs for key in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["meta", "phases", "second_fit", "manual", "unfrozen", "other_package", "lightnings_checkpoints", "inference_mode"],
)
def test_uses(what: str, tmp_path: Path) -> None:
    """Bugs are named in the functions of `sharded_uses`, which make the assertions."""
    on_ranks(getattr(sharded_uses, what), 2, tmp_path)

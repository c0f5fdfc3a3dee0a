"""FSDP2Strategy trains modules as others write them, with the losses and weights of DDP, bit for bit."""

from pathlib import Path

import pytest
import torch
from rank_pool import on_ranks
from sharded_on_ranks import Case, End, ends

MODULES = {
    "Encoder": 3,
    "Tied": 3,
    "TiedFunction": 3,
    "SharedWeight": 0,
    "SharedLayer": 2,
    "SharedNorm": 2,
    "PartlyFrozen": 3,
    "Scalar": 3,
    "TwoForwards": 3,
    "DictOutput": 3,
    "LoRA": 3,
    "Convolutions": 3,
    "Normed": 0,
    "Recurrent": 0,
    "Demo": 4,
}
"""Modules, and how many units they have."""
HUGGING_FACE = ["HuggingFace", "HuggingFaceTied", "HuggingFaceRecomputed", "HuggingFaceReentrant"]


def both(folder: Path, modules: list[str], size: int = 2) -> dict[str, list[tuple[End, End]]]:
    """The ends under DDP and FSDP2, by module, of each rank."""
    cases = [Case(name, kind) for name in modules for kind in ("ddp", {})]
    found = on_ranks(ends, size, folder, cases, limit=400)
    return {name: [(rank[2 * i], rank[2 * i + 1]) for rank in found] for i, name in enumerate(modules)}


def assert_equal(pairs: list[tuple[End, End]]) -> None:
    for ddp, fsdp in pairs:
        assert not ddp.error, ddp.error
        assert not fsdp.error, fsdp.error
        assert len(ddp.losses) == 6
        assert fsdp.losses == ddp.losses
        assert fsdp.names == ddp.names
        assert fsdp.tensors.keys() == ddp.tensors.keys()
        different = [name for name in ddp.tensors if not torch.equal(ddp.tensors[name], fsdp.tensors[name])]
        assert different == []


QUICK = ("Tied", "Scalar", "LoRA", "Convolutions")


def check(modules: list[str], folder: Path) -> None:
    for name, pairs in both(folder, modules).items():
        assert_equal(pairs)
        for _, fsdp in pairs:
            assert len(fsdp.units) == MODULES[name], name
            assert fsdp.local < 0.56, name


def test_losses_and_weights_are_those_of_ddp(tmp_path: Path) -> None:
    """Bugs: a unit whose part is used elsewhere; a tied weight trained twice; names that change; whole gradients that
    are not averaged; BatchNorm statistics of each rank."""
    check(list(QUICK), tmp_path)


@pytest.mark.slow
def test_losses_and_weights_of_the_others_are_those_of_ddp(tmp_path: Path) -> None:
    """Bugs: as above."""
    check([name for name in MODULES if name not in QUICK], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_decoders(name: str, tmp_path: Path) -> None:
    """Bugs: units other than those that the model names; its own gradient checkpointing gathers sharded weights."""
    pytest.importorskip("transformers")
    found = both(tmp_path, [name])[name]
    assert_equal(found)
    assert [end.units for _, end in found] == [[f"model.model.layers.{i}" for i in range(3)]] * 2

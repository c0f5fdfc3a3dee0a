"""Copies in the nodes' memory on several ranks: kills, lost nodes, damage; the end is that of an undisturbed run."""

import shutil
from pathlib import Path
from typing import Any

import memory_copies
import pytest
import torch
from rank_pool import RanksFailed, on_ranks

EVERY = {"every": 2}


def killed(size: int, folder: Path, *trainings: dict[str, Any]) -> list[Any]:
    """Train until a rank is killed, in the last of some trainings; the results of rank 0 of those before."""
    with pytest.raises(RanksFailed) as failed:
        on_ranks(memory_copies.call, size, folder, list(trainings))
    assert -9 in failed.value.codes, failed.value
    before = folder / "found-0.pt"
    return torch.load(before, weights_only=False) if before.exists() else []


def assert_same(found: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for name, each in whole["weights"].items():
        assert torch.equal(found[0]["weights"][name], each), name
    assert found[0]["losses"] == whole["losses"][found[0]["start"] :]


def copies(folder: Path, node: int) -> list[Path]:
    """The folders of the copies in a node's memory."""
    return sorted((folder / f"memory-{node}").glob("*/*/node-*/*/step-*"))


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


def test_a_lost_node_gets_its_shards_back_from_the_next_one(tmp_path: Path) -> None:
    """Bugs: shards not sent, or under another rank; plugin or data state not in them; copies of two steps mixed; copies
    left in memory after the end."""
    whole = {"run": "whole", "kind": "fsdp2", "nodes": 2}
    run = {"run": "cut", "kind": "fsdp2", "nodes": 2, "memory": EVERY}
    (undisturbed,) = killed(2, tmp_path, whole, {**run, "dies": (7, 1, True)})
    assert copies(tmp_path / "cut", 1) == []
    found = on_ranks(memory_copies.call, 2, tmp_path, [{**run, "restarted": True}])
    assert [each["start"] for (each,) in found] == [6, 6]
    assert [each["left"] for (each,) in found] == [[], []]
    assert_same([each for (each,) in found], undisturbed)


@pytest.mark.slow
def test_one_node_after_the_other_is_lost(tmp_path: Path) -> None:
    """Bugs: what came back from a neighbour is not written again, so that the second loss ends the run; a stale copy of
    the first attempt is taken; sharded run on four ranks and replicated one, with one writer per node."""
    for kind in ("fsdp2", "ddp"):
        whole = {"run": f"whole-{kind}", "kind": kind, "nodes": 2}
        run = {"run": kind, "kind": kind, "nodes": 2, "memory": EVERY}
        (undisturbed,) = killed(4, tmp_path, whole, {**run, "dies": (5, 3, True)})[-1:]
        killed(4, tmp_path, {**run, "restarted": True, "dies": (7, 0, True)})
        names = {each.parent.name for each in copies(tmp_path / kind, 1)}
        assert names == ({"whole"} if kind == "ddp" else {f"{rank:05d}-of-00004" for rank in range(4)})
        found = on_ranks(memory_copies.call, 4, tmp_path, [{**run, "restarted": True}])
        assert [each["start"] for (each,) in found] == [6] * 4
        assert_same([each for (each,) in found], undisturbed)


@pytest.mark.slow
def test_damage_is_as_good_as_none(tmp_path: Path) -> None:
    """Bugs: a flipped or truncated copy is read; a good one on the other node is not used instead; parts of two copies
    are combined; a copy is taken that not all ranks have."""
    run = {"run": "cut", "kind": "fsdp2", "nodes": 2, "memory": EVERY}
    (undisturbed,) = killed(2, tmp_path, {**run, "run": "whole", "memory": None}, {**run, "dies": (7, 1, False)})
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "cut", saved)
    shard = "00001-of-00002/step-{:08d}"
    tensors = "tensors-00000-of-00001.safetensors"

    def resumed(*damaged: str) -> tuple[int, list[str]]:
        shutil.rmtree(tmp_path / "cut")
        shutil.copytree(saved, tmp_path / "cut")
        for each in damaged:
            node, _, name = each.partition("/")
            (file,) = (tmp_path / "cut" / f"memory-{node}").glob(f"*/*/node-*/{name}")
            if name.endswith("manifest.json"):
                file.unlink()
            elif name.endswith("state.json"):
                file.write_bytes(file.read_bytes()[:-1])
            else:
                flip(file)
        found = on_ranks(memory_copies.call, 2, tmp_path, [{**run, "restarted": True}])
        assert_same([each for (each,) in found], undisturbed)
        return found[0][0]["start"], [text for text in found[0][0]["said"] if "damaged" in text]

    own, kept = (f"{node}/{shard.format(6)}" for node in (1, 0))
    start, said = resumed(f"{own}/{tensors}")
    assert start == 6  # from node 0
    assert "does not match its checksum" in said[0]
    assert resumed(f"{own}/manifest.json", f"{kept}/state.json")[0] == 4
    (first,) = [int(each.name[5:]) for each in (saved / "checkpoints").glob("step-*")]
    all_copies = [f"{node}/{shard.format(step)}/{tensors}" for node in (0, 1) for step in (4, 6)]
    assert resumed(*all_copies)[0] == first == 1  # the one on the disk


@pytest.mark.slow
def test_a_full_memory_of_one_node_does_not_end_the_run(tmp_path: Path) -> None:
    """Bugs: a rank that cannot write leaves the others waiting; a warning for each copy; half a copy is left; the
    complete one is given up for it."""
    found = on_ranks(memory_copies.full, 2, tmp_path)
    said = [text for text in found[0]["said"] if "could not be written" in text]
    assert len(said) == 2  # the first and the second failure; of the third nothing is said
    assert "rank 1: No space left on device" in said[0]
    assert [text for text in found[1]["said"] if "could not" in text] == []
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2

"""Checkpoints that each rank writes its own part of: they move between strategies and sizes, and none is half good."""

from pathlib import Path
from typing import Any

import divided_checkpoints
import kill_ranks
import moving
import pytest
import torch
from rank_pool import on_ranks

from stabletrain.runtime.checkpoints import load, verify
from stabletrain.runtime.checkpoints.consolidating import consolidate

AT_TWO = ["ddp", "zero1", "fsdp2"]
"""Strategies of one arithmetic: from each other's checkpoints they end bit-identical."""
SIZES = {1: ["single", "fsdp2"], 2: [*AT_TWO, "tp"], 4: [*AT_TWO, "hsdp", "tp"]}


def assert_continues(found: dict[str, Any], whole: dict[str, Any], same_bits: bool) -> None:
    """The losses after the cut are those of the uninterrupted run, with ``same_bits`` everything at the end, too."""
    losses = whole["losses"][moving.CUT :]
    assert found["losses"] == (losses if same_bits else pytest.approx(losses, rel=1e-5))
    if same_bits:
        assert found["end"].keys() == whole["end"].keys()
        assert all(torch.equal(each, whole["end"][name]) for name, each in found["end"].items())


def test_strategies_of_one_size_continue_each_others_runs_bit_for_bit(tmp_path: Path) -> None:
    """Bugs: optimizer state under another parameter, a plugin's or the data's state lost, weights rounded."""
    pairs = [("fsdp2", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "zero1"), ("zero1", "ddp")]
    for saved, resumed in on_ranks(moving.save_and_resume, 2, tmp_path, AT_TWO, pairs):
        for source, kind in pairs:
            assert_continues(resumed[f"{source}-2", kind], saved[kind], same_bits=True)
    path = tmp_path / "fsdp2-2" / "step-00000004"
    assert sorted(load(path)["state_dict"]) == sorted(moving.Net("single").state_dict())
    file = consolidate(tmp_path / "fsdp2-2", tmp_path / "one.pt").file
    module = moving.Net("single")
    module.load_state_dict(torch.load(file, weights_only=True))
    for name, weight in saved["ddp"]["weights"].items():
        assert torch.equal(module.get_parameter(name), weight)


@pytest.mark.slow
def test_all_pairs_of_strategies_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bugs: parts that are put together in another order, a replica or a tied weight written twice or never."""
    saved = {size: on_ranks(moving.save_each, size, tmp_path, kinds) for size, kinds in SIZES.items()}
    sources = [(kind, size) for size, kinds in SIZES.items() for kind in kinds]
    names = [f"{kind}-{size}" for kind, size in sources]
    pairs = 0
    for size, kinds in SIZES.items():
        here = [(name, kind) for name in names for kind in kinds]
        for rank, found in enumerate(on_ranks(moving.resume_each, size, tmp_path, here, limit=400)):
            for kind in kinds:
                for source, other in sources:
                    alike = {*AT_TWO} if size == 2 else {"ddp", "zero1"}  # gloo's sums of 4 depend on the collective
                    same = other == size and (source == kind or {source, kind} <= alike)
                    assert_continues(found[f"{source}-{other}", kind], saved[size][rank][kind], same)
                    pairs += rank == 0
    for name in names:
        verify(tmp_path / name / "step-00000004")
    with capsys.disabled():
        print(f"\n{pairs} ordered pairs of {len(names)} strategies and sizes continue each other's runs")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`divided_checkpoints.faults` on two ranks."""
    return on_ranks(divided_checkpoints.faults, 2, tmp_path_factory.mktemp("faults"), "fsdp2")


@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])
def test_each_rank_writes_and_copies_its_own_part_only(faults: list[dict[str, Any]], kind: str) -> None:
    """Bugs: a rank gathers the whole state, replicas are written by every rank, a snapshot holds more than shards."""
    whole = 3 * 4 * sum(p.numel() for p in moving.Net("single", width=26_000).parameters())
    limit = 0.51 * whole + 20_000  # the random numbers of both ranks are in rank 0's part
    for found in (each["shares"][kind] for each in faults):
        assert max(found["written"]) < limit
        assert found["copied"] < limit
        if kind == "fsdp2":
            assert found["snapshot"] < limit


def test_a_rank_that_cannot_write_makes_all_give_the_checkpoint_up(faults: list[dict[str, Any]]) -> None:
    """Bugs: a checkpoint without a rank's part, a rank that waits for ever, a run that ends, several messages."""
    first, second = (each["unwritable"] for each in faults)
    for found in (*first, *second):
        assert found["names"] == ["step-00000002", "step-00000006"]
        assert found["reached"] == 6
    for found in first:
        assert len(found["said"]) == 1
        assert "rank 1 has not written its part: No space left on device" in found["said"][0]
    assert [each["said"] for each in second] == [[], []]


def test_names_are_the_models_after_a_validation_too(faults: list[dict[str, Any]]) -> None:
    """Bug: FSDP2 keeps its root group whole after a forward alone; the optimizer's parameters have no names then."""
    for found in faults:
        assert "optimizer_states.0.state.net.0.weight.exp_avg" in found["validated"]
        assert len(found["validated"]) == 3 * len(list(moving.Net("single").parameters()))


def assert_falls_back(first: dict[Any, Any], second: dict[Any, Any]) -> None:
    """Both ranks resume from the previous checkpoint, and rank 0 says why."""
    assert len(first) >= 3
    for case, (step, said) in first.items():
        assert step == 2, case
        assert len(said) == 1, case
        assert "step-00000004 is damaged" in said[0]
        assert second[case] == (2, [])


def test_damage_of_a_ranks_file_means_the_previous_one_on_all_ranks(faults: list[dict[str, Any]]) -> None:
    """Bugs: ranks that resume from different checkpoints; a rank that reads a file which only another has verified."""
    assert_falls_back(*(each["damage"] for each in faults))


@pytest.mark.slow
def test_damage_of_any_file_means_the_previous_one_on_all_ranks(tmp_path: Path) -> None:
    """Bug: a file that no rank verifies."""
    assert_falls_back(*on_ranks(divided_checkpoints.damage, 2, tmp_path, "fsdp2"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_checkpoint_of_another_model_is_one_message(tmp_path: Path, kind: str) -> None:
    """Bugs: a traceback of torch, the previous checkpoint read instead, ranks that fail differently."""
    for wider, deeper in on_ranks(divided_checkpoints.another_model, 2, tmp_path, kind):
        assert "net.0.weight has shape [12, 6] in it, and [16, 6] in the model" in wider
        assert "it has no net.5.weight, which the model has with shape [3, 3]" in deeper


@pytest.mark.slow
def test_lightnings_sharded_checkpoints_are_still_read(tmp_path: Path) -> None:
    """Bug: a run with SaveCheckpoints can no longer resume from the folder of a ModelCheckpoint."""
    assert on_ranks(divided_checkpoints.lightnings_own, 2, tmp_path) == [2, 2]


@pytest.mark.slow
def test_kills_of_a_random_rank_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bugs: a manifest before every rank's file is on the disk, a name before the manifest, parts of several steps.

    50 kills: ``python tests/helpers/kill_ranks.py FOLDER 50``.
    """
    counts = kill_ranks.main(tmp_path, 8)
    assert counts["lost"] == 0
    with capsys.disabled():
        print(
            f"\n{counts['kills']} SIGKILLs of a rank, {counts['torn']} torn writes, {counts['read']} checkpoints read"
        )

"""Real processes that share the layers of a small GPT, compared with a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensor_parallel as cases
import torch
from rank_pool import on_ranks
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_ranks_equal(results: list[dict[str, Any]]) -> None:
    first, *others = results
    for other in others:
        assert str(first["outcomes"]) == str(other["outcomes"])  # NaN is NaN
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


def assert_like_one_process(got: dict[str, Any], alone: dict[str, Any], steps: int) -> None:
    """Losses within 1e-5, norms within 1e-5 relative, the same steps skipped and clipped."""
    for mine, theirs in list(zip(got["outcomes"], alone["outcomes"], strict=True))[:steps]:
        assert mine[5] == theirs[5], (mine, theirs)
        if not mine[5]:
            assert mine[1] == pytest.approx(theirs[1], abs=1e-5)
            assert mine[2:5] == pytest.approx(theirs[2:5], rel=1e-5)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Bugs: wrong logits or partial gradients; norms that count a rank's part, or a whole parameter twice; a NaN that
    one rank sees is skipped there only; ranks that drift apart."""
    options = {"qk_norm": True, "tie_embeddings": True, "nan_at": (3, 0)}
    alone = cases.train(tmp_path, None, 1, options)
    got = on_ranks(cases.train_on_ranks, 2, tmp_path, "tensor_parallel", 2, {**options, "nan_at": (3, 1)})
    assert_ranks_equal(got)
    assert [each[5] for each in got[0]["outcomes"]] == [i == 3 for i in range(cases.BATCHES)]
    assert any(each[4] < each[2] for each in got[0]["outcomes"])  # clipped
    assert_like_one_process(got[0], alone, 10)


def test_wrong_plans_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Bugs: plans that run and train something else: qkv cut into equal parts (logits off by 0.1), gradients of q/k
    norms that cover a rank's heads only; an error of torch instead of one message; ranks with different data."""
    mine, theirs = on_ranks(cases.wrong_plans, 2, tmp_path)
    assert mine == theirs
    assert "the output of net differs from that of the whole module by 0.1" in mine["equal parts"]
    assert "Add 'net.blocks.0.attention.query_norm': 'partial'" in mine["no partial"]
    assert "Remove the style 'partial' of net.norm" in mine["partial outside"]
    assert mine["after a validation"] == mine["no partial"]
    assert "SGD has the parameters from before the module was cut" in mine["early optimizer"]
    for name in ("heads not divided", "no rowwise"):
        assert "the cut module fails in training_step (RuntimeError" in mine[name], mine[name]
    assert "Add 'net.blocks.0.attention.query_norm': 'partial'" in mine["nan at first"]  # found at the second batch
    assert "different first batches" in mine["other batches"]
    assert mine["right"] == "no error"
    assert "different weights after the first step" in mine["unchecked"]


@pytest.mark.slow
def test_the_check_leaves_no_trace(tmp_path: Path) -> None:
    """Bugs: the check draws random numbers, changes buffers, metrics, logs or hidden state, or uses up a batch."""
    assert on_ranks(cases.check_leaves_no_trace, 2, tmp_path) == [[], []]


@pytest.mark.slow
def test_dropout_is_the_same_where_tensors_are_whole_and_another_where_they_are_cut(tmp_path: Path) -> None:
    """Bugs: each rank drops the same hidden units of its part; ranks whose residual streams or generators drift apart;
    a mask that comes again in the next layer or step."""
    mine, theirs = on_ranks(cases.dropout, 2, tmp_path, 0.3)
    assert_ranks_equal([mine, theirs])
    assert torch.equal(mine["random"], theirs["random"])
    masks: list[Tensor] = [*mine["masks"], *theirs["masks"]]
    assert len(masks) == 8
    for i, one in enumerate(masks):
        assert one.float().mean().item() == pytest.approx(0.3, abs=0.02)
        for other in masks[:i]:
            agree = (one == other).float().mean().item()
            assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.04)


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_the_checkpoint_has_whole_tensors(tmp_path: Path) -> None:
    """Bugs: torch writes a fused layer's rows, of which a rank has three blocks, to wrong places without an error;
    random numbers of cut regions that are not resumed."""
    for result in on_ranks(cases.resume, 2, tmp_path, "tensor_parallel", 2):
        assert result["differ"] == []
        assert result["count"] > 100
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "step=8.ckpt", tmp_path / "whole.pt")
    read = torch.load(tmp_path / "whole.pt", weights_only=True)["state_dict"]
    for name, weight in result["kept"].items():
        assert torch.equal(read[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("tensor_parallel", 2), ("fsdp2_tp", 4)])
def test_a_checkpoint_of_one_process_is_loaded(tmp_path: Path, kind: str, ranks: int) -> None:
    """Bugs: weights or Adam's moments of the fused layer in the order of a plain shard; a file that is refused."""
    alone = cases.train(tmp_path, None, 1, {"qk_norm": True}, data=cases.batches(6))
    path = tmp_path / "single.ckpt"
    alone["trainer"].save_checkpoint(path)
    options = {"ckpt_path": str(path), "max_epochs": 2, "data": cases.batches(6)}
    resumed = cases.train(tmp_path, None, 1, {"qk_norm": True}, **options)
    got = on_ranks(cases.load_single_file, ranks, tmp_path, kind, ranks, str(path))
    assert_ranks_equal(got)
    assert got[0]["global_step"] == 12
    assert_like_one_process(got[0], resumed, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("tensor_parallel", 2), ("fsdp2_tp", 4)])
def test_damaged_weights_of_one_rank_are_rolled_back(tmp_path: Path, kind: str, ranks: int) -> None:
    """Bugs: a snapshot of whole instead of local tensors; a rank that goes on with its NaN."""
    got = on_ranks(cases.roll_back, ranks, tmp_path, kind, ranks)
    assert_ranks_equal(got)
    assert all(weight.isfinite().all() for weight in got[0]["weights"].values())
    assert got[0]["rollbacks"] >= 1


@pytest.mark.slow
def test_four_ranks_in_two_groups_train_as_one_process_does(tmp_path: Path) -> None:
    """Bugs: gradients of what FSDP2 leaves whole that are not averaged, or summed twice; norms over two meshes; a fused
    layer whose rows FSDP2 cuts again; resume."""
    options = {"qk_norm": True, "nan_at": (3, 0)}
    alone = cases.train(tmp_path, None, 1, options)
    got = on_ranks(cases.train_on_ranks, 4, tmp_path, "fsdp2_tp", 4, {**options, "nan_at": (3, 2)})
    assert_ranks_equal(got)
    assert_like_one_process(got[0], alone, 8)
    for result in on_ranks(cases.resume, 4, tmp_path, "fsdp2_tp", 4):
        assert result["differ"] == []

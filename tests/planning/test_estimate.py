"""Plans of modules that cannot be traced, and of sizes that need no step."""

from pathlib import Path
from typing import Any

import planned_runs
import pytest
import torch
from lightning.pytorch import LightningDataModule
from planned_runs import BATCH, CONTEXT, ReadsValues, StepsItself, module, planned, small
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain import CheckReplicas
from stabletrain.errors import UserError
from stabletrain.planning.plan import as_json, from_json
from stabletrain.workloads import CharGPT


@pytest.fixture(scope="module")
def traced() -> Any:
    return planned("fsdp2", 4, {})


def test_a_step_that_reads_a_value_leaves_state_and_messages(traced: Any) -> None:
    """Bugs: the plan is lost with the step; the line of the user's code is not named; the formula forgets a gather."""
    plan = planned("fsdp2", 4, {}, small(ReadsValues))
    assert plan.source == "formula"
    assert plan.stopped_by is not None
    assert f"{Path(planned_runs.__file__).name}, line " in plan.stopped_by
    assert plan.per_rank.peak is None
    assert plan.per_rank.activations is None
    for name in ("parameters", "gradients", "optimizer_state", "largest_group"):
        assert getattr(plan.per_rank, name) == getattr(traced.per_rank, name), name
    of_step = [each for each in traced.collectives if each.kind != "broadcast"]  # Lightning's, whether to stop
    assert plan.collectives == of_step


@pytest.mark.parametrize("kind", ["ddp", "zero2", pytest.param("hsdp", marks=pytest.mark.slow)])
def test_messages_by_formula_are_those_of_the_trace(kind: str) -> None:
    """Bugs: ZeRO-2 gathers twice; HSDP's all-reduce is missed; DDP's buckets are counted as of its first step."""
    of_step = [each for each in planned(kind, 4, {}).collectives if each.kind != "broadcast"]
    assert planned(kind, 4, {}, small(ReadsValues)).collectives == of_step


@pytest.mark.parametrize("kind", ["single", "ddp", "fsdp2"])
def test_the_optimizers_state_is_named_in_the_peak(kind: str) -> None:
    """Bug: without sharding the largest part that does not change is called "batch, buckets, averages"."""
    rank = planned(kind, 1 if kind == "single" else 2, {}).per_rank
    held = rank.peak_parts["optimizer state, temporary tensors"]
    assert held == pytest.approx(rank.optimizer_state, rel=0.02)


def test_manual_optimization_is_not_traced() -> None:
    """Bug: a module that steps in training_step is traced as if Lightning stepped."""
    plan = planned("ddp", 2, {}, small(StepsItself))
    assert plan.stopped_by is not None
    assert "manual optimization" in plan.stopped_by
    assert plan.per_rank.optimizer_state == planned("ddp", 2, {}).per_rank.optimizer_state


def test_a_data_module_without_its_files_is_a_sentence_and_nothing_is_prepared() -> None:
    """Bugs: a download begins; a missing file ends the dry run."""

    class Missing(LightningDataModule):
        def prepare_data(self) -> None:
            raise AssertionError("this would download")

        def setup(self, stage: str) -> None:
            raise FileNotFoundError("no such folder: /data")

    plan = planned("fsdp2", 2, {}, data=Missing())
    assert plan.stopped_by is not None
    assert "Missing gave no batch: FileNotFoundError: no such folder: /data" in plan.stopped_by
    assert plan.per_rank.optimizer_state


def test_processes_that_do_not_fit_the_strategy_are_refused() -> None:
    """Bug: a plan for a mesh that the run cannot have."""
    with pytest.raises(UserError, match="replicate must divide the number of processes"):
        planned("hsdp", 3, {})


def test_a_plan_leaves_nothing_behind(traced: Any) -> None:
    """Bug: after a plan the process has a fake process group, or modules convert in another way."""
    assert not torch.distributed.is_initialized()
    made = module().to(torch.float64)
    assert made.net.head.weight.dtype == torch.float64
    assert type(made.net.head.weight) is torch.nn.Parameter
    assert float(torch.ones(2).sum()) == 2.0


def test_json_is_the_plan(traced: Any) -> None:
    """Bug: a field is lost between the process that plans and the one that prints."""
    assert from_json(as_json(traced)) == traced


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("single", 1, "nothing is compared: one process has no copies"),
        ("fsdp2", 2, "nothing is compared: no rank holds a copy"),
        pytest.param("ddp", 2, "compares the copies of weights and optimizer state every 7", marks=pytest.mark.slow),
        pytest.param("hsdp", 4, "compares the copies", marks=pytest.mark.slow),
    ],
)
def test_a_check_of_copies_says_where_there_are_none(kind: str, size: int, said: str) -> None:
    """Bug: the plan of a sharded run promises a comparison, and the run then says that there is nothing to compare."""
    plan = planned(kind, size, {}, plugins=[("plugins.replicas", CheckReplicas(every=7))])
    assert plan.plugins[0].text.startswith(said)


class FineTuned(CharGPT):
    """Trains its output layer only, logs in its step, and asks its loader for the data."""

    def __init__(self) -> None:
        super().__init__(layers=2, heads=4, width=32, context=CONTEXT, sample_length=0)
        self.net.blocks.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/also", loss, prog_bar=True, on_epoch=True)
        self.log_dict({"one": 1.0})
        assert len(self.trainer.train_dataloader.dataset) == 8  # type: ignore[union-attr]
        return loss


class Tokens(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randint(0, 84, (8, CONTEXT + 1)), BATCH)  # type: ignore[arg-type]


def test_a_module_with_frozen_layers_that_logs_is_traced() -> None:
    """Bugs: the tracker's hooks raise on frozen parameters; logging takes values; a loader without its data."""
    plan = planned("single", 1, {}, FineTuned, data=Tokens())
    assert plan.stopped_by is None
    frozen = sum(p.numel() for p in FineTuned().net.blocks.parameters())
    assert plan.parameters - plan.trained == frozen
    assert plan.per_rank.gradients == 4 * plan.trained
    assert plan.per_rank.peak is not None
    assert plan.per_rank.peak > plan.per_rank.parameters


def test_a_module_without_an_optimizer_has_none() -> None:
    """Bug: the name of Lightning's stand-in for it."""
    assert planned("single", 1, {}, lambda: module(lambda _: None)).optimizer == "none"  # type: ignore[arg-type,return-value]

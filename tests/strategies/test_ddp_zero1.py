"""DDPZeRO1Strategy trains DDP's weights, bit for bit, with a part of the optimizer state on each rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zero1_on_ranks
from rank_pool import on_ranks

from stabletrain import DDPZeRO1Strategy


def assert_same_training(found: dict[str, Any], ddp: dict[str, Any]) -> None:
    """The weights are equal, and the rates at the steps that both have made."""
    assert found["step"] == ddp["step"] == 11
    assert all(torch.equal(found["weights"][key], each) for key, each in ddp["weights"].items())
    assert found["rates"] == ddp["rates"][-len(found["rates"]) :]


def test_weights_and_rates_are_those_of_ddp(tmp_path: Path) -> None:
    """Bugs: a scheduler that changes the rates of an optimizer that does not step; lost groups; the whole state on each
    rank; a skipped step that moves the state of one rank; an optimizer whose step needs all parameters at once."""
    ranks = on_ranks(zero1_on_ranks.whole, 2, tmp_path)
    for rank in ranks:
        assert_same_training(rank["zero1"], ranks[0]["ddp"])
        assert 0 < rank["zero1"]["held"] < rank["ddp"]["held"]
        assert "ddp_zero1: Prodigy uses a number of all parameters" in rank["joint"]
        assert "ddp_zero1: " in rank["dtypes"]
        assert "strategy=ddp" in rank["dtypes"]
    assert sum(rank["zero1"]["held"] for rank in ranks) == ranks[0]["ddp"]["held"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_it_is_a_strategy_of_the_trainers_package(package: str) -> None:
    """Bug: checks of one package that do not know the classes of the other."""
    lightning = pytest.importorskip(package)
    trainer = lightning.Trainer(strategy=DDPZeRO1Strategy(), devices=2, accelerator="cpu", logger=False)
    mro = [
        each.__module__.partition(".")[0] for each in type(trainer.strategy).__mro__ if each.__name__ == "DDPStrategy"
    ]
    assert mro[0] == package.partition(".")[0]
    assert trainer.world_size == 2


@pytest.mark.slow
def test_a_checkpoint_is_that_of_ddp(tmp_path: Path) -> None:
    """Bug: a checkpoint that holds the state of one rank, or that another strategy cannot resume from."""
    for rank in on_ranks(zero1_on_ranks.resumed, 2, tmp_path, limit=200):
        ddp = rank.pop("ddp")
        for found in rank.values():
            assert_same_training(found, ddp)

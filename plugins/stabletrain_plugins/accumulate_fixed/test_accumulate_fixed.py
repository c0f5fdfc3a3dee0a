"""Steps of a number of micro-batches, samples or tokens."""

from typing import Any

import pytest
import torch
from fits import HEALTHY, Net, batches, everything, fit
from torch.utils.data import DataLoader

from stabletrain import AccumulateFixed, AccumulateMean, UserError

ITEMS = batches(*[HEALTHY] * 6)


class Rows(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch, HEALTHY), batch_idx)


def rows() -> Any:
    return DataLoader(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"micro_batches": 4},
        {"target_samples": 16},
        {"target_tokens": 160, "tokens_per_sample": 10},
        {"target_samples": 32, "samples_per_batch": 8},
    ],
)
def test_it_is_the_trainers_own_accumulation_with_a_mean_at_the_end(arguments: dict[str, Any]) -> None:
    """Bugs: a target is another number of micro-batches; the size outlives the fit, or is known too late."""
    expected = everything(fit(Rows(), rows(), AccumulateMean(), accumulate_grad_batches=4, max_epochs=2))
    trainer = fit(Rows(), rows(), AccumulateFixed(**arguments), max_epochs=2)
    found = everything(trainer)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"micro_batches": 0}, "micro_batches must be a whole number >= 1"),
        ({"micro_batches": 2.0}, "micro_batches must be a whole number >= 1"),
        ({"micro_batches": True}, "micro_batches must be a whole number >= 1"),
        ({"target_samples": -4}, "target_samples must be"),
        ({"micro_batches": 2, "target_samples": 8}, "one size of a step, got micro_batches=2 and target_samples=8"),
        ({"target_tokens": 8}, "tokens_per_sample must be"),
        ({"target_samples": 18}, "multiple of 4.*got 18. Nearest: 16 or 20"),
        ({"target_samples": 3}, "multiple of 4.*got 3. Nearest: 4"),
        ({"target_tokens": 100, "tokens_per_sample": 3}, "multiple of 12.*Nearest: 96 or 108"),
        ({"micro_batches": 2, "trainer": 3}, "both set the number"),
    ],
)
def test_mistakes(arguments: dict[str, Any], says: str) -> None:
    """Bug: a size that does not divide is rounded without a word."""
    size = arguments.get("trainer", 1)
    own = {key: value for key, value in arguments.items() if key != "trainer"}
    with pytest.raises(UserError, match=says):
        fit(Rows(), rows(), AccumulateFixed(**own), accumulate_grad_batches=size)


def test_a_loader_without_a_batch_size() -> None:
    """Bug: an AttributeError, where the user can give the number."""
    with pytest.raises(UserError, match="Give samples_per_batch"):
        fit(Net(), ITEMS, AccumulateFixed(target_samples=16))

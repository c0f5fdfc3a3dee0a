"""Loaders that give nothing or raise, and modules that train in unusual ways: each is said, and nothing breaks."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from doctor_suite.modules import Mlp, digit_loaders, digits
from torch import Tensor, nn
from torch.nn import functional as F

import stabletrain
from stabletrain.checkup.answer import Answer
from stabletrain.checkup.table import CHECKS
from stabletrain.errors import UserError

LEARNING = frozenset(check.name for check in CHECKS if check.family == "learning")
"""Checks that need further steps, which take most of the time."""


def answers(module: Any, train: Any, val: Any = None, *, asked: Iterable[str] = ()) -> dict[str, Answer]:
    """All answers; of the checks of learning only those that are asked."""
    torch.manual_seed(0)
    report = stabletrain.doctor(module, train, val, skip=LEARNING - set(asked), seconds=600)
    return {each.check.name: each.answer for each in report.results}


class Some:
    """A loader of a few batches, which raises after them."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error = count, error

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = digits()
        for i in range(self.count):
            yield x[32 * i : 32 * i + 32], y[32 * i : 32 * i + 32]
        if self.error is not None:
            raise self.error


def test_an_empty_loader() -> None:
    """Bug: an exception from within, or fine answers about nothing."""
    found = answers(Mlp(), Some(0), asked=LEARNING)
    assert found["loader"].text == "the train loader is empty"
    assert {each.kind for name, each in found.items() if name not in ("loader", "leak")} == {"not applicable"}


def test_an_empty_validation_loader() -> None:
    """Bug: nobody notices that nothing is validated."""
    assert "validation loader is empty" in answers(Mlp(), Some(4), Some(0))["loader"].text


def test_a_loader_that_raises_is_named_with_the_batch_and_the_others_are_used() -> None:
    """Bugs: the exception ends everything; its place is lost."""
    found = answers(Mlp(), Some(3, OSError("no such image")), asked=["one batch"])
    assert found["loader"].text == "the train loader raises at batch 3: OSError: no such image"
    assert "in __iter__" in found["loader"].details
    assert found["non-finite data"].kind == "fine"
    assert found["one batch"].kind == "fine"


def test_one_batch() -> None:
    """Bug: checks that compare two batches fail."""
    found = answers(Mlp(), Some(1), asked=["one batch"])
    assert found["loader"].kind == "finding"
    assert "one batch" in found["loader"].text
    assert found["ignores input"].kind == "not applicable"
    assert found["one batch"].kind == "fine"


class Unusual(Mlp):
    """Needs its Trainer, logs, uses its logger, has callbacks, and returns None for each third batch."""

    def configure_callbacks(self) -> Any:
        raise AssertionError("callbacks of the run may save or stop")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        self.logger.experiment.add_scalar("loss", loss, self.trainer.global_step)  # type: ignore[union-attr]
        assert self.trainer.callback_metrics is not None
        return None if batch_idx % 3 == 2 else {"loss": loss, "z": 1}


def test_a_module_that_needs_its_trainer_logs_and_returns_none_or_a_dictionary() -> None:
    """Bugs: no Trainer, or no logger, in a step; a step without a loss shifts what belongs together."""
    found = answers(Unusual(), *digit_loaders(), asked=["rate too high", "no better than guessing"])
    assert found["raises"].kind == "fine", found["raises"]
    assert found["loss at the start"].kind == "fine"
    assert found["rate too high"].kind == "fine"
    assert "80 of 120 steps" in found["no better than guessing"].text


def test_a_module_that_returns_no_loss() -> None:
    """Bug: a module that trains nothing is fine."""

    class Nothing(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    found = answers(Nothing(), *digit_loaders())
    assert found["raises"].text == "training_step has returned no loss in 120 batches, so nothing is trained"
    assert found["frozen"].kind == "not applicable"


class ByHand(Mlp):
    """Steps by hand, with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(3, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), 0.01), torch.optim.SGD(self.other.parameters(), 0.01)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        for optimizer, loss in (
            (first, lambda: F.cross_entropy(self.net(batch[0]), batch[1])),
            (second, lambda: self.other(torch.ones(1, 3)).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()


def test_manual_optimization_says_which_checks_apply() -> None:
    """Bugs: losses of two optimizers are taken for one curve; a parameter of the second is called not optimized."""
    found = answers(ByHand(), *digit_loaders(), asked=LEARNING)
    for name in ("one batch", "rate too high", "rate too low", "no better than guessing", "loss rises"):
        assert found[name].kind == "not applicable"
        assert "manual optimization" in found[name].text
    for name in ("raises", "not in optimizer", "dead units", "loss at the start", "scale", "probabilities"):
        assert found[name].kind == "fine", (name, found[name])


def test_manual_optimization_of_several_losses_at_once() -> None:
    """Bug: a loss for each sample, whose gradients are given, is called an error of the module."""

    class OfEach(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[0]  # type: ignore[index]
            optimizer.zero_grad()
            loss = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            self.manual_backward(loss, gradient=torch.full_like(loss, 1 / len(loss)))
            optimizer.step()

    assert answers(OfEach(), *digit_loaders())["raises"].kind == "fine"


def test_a_generator_that_steps_before_the_discriminator() -> None:
    """Bug: its first loss is about noise, the same one for both batches, so that the input seems to be ignored."""

    class FromNoise(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, x in zip(self.optimizers(), (torch.randn_like(batch[0]), batch[0]), strict=True):  # type: ignore[arg-type]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(self.net(x), batch[1]))
                optimizer.step()

    assert answers(FromNoise(), *digit_loaders())["ignores input"].kind == "not applicable"


class Waits(Mlp):
    """Lowers its rate when the validation says so, weighs its loss by the size of its data, asks twice for a loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(self.trainer.train_dataloader.dataset) > self.trainer.train_dataloader.batch_size  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.LBFGS(self.parameters(), 0.1, max_iter=2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def test_a_module_that_waits_for_its_validation_and_asks_for_its_data() -> None:
    """Bugs: an error, as there is no metric of a validation or no dataset; each evaluation by LBFGS is a step."""
    found = answers(Waits(), *digit_loaders(), asked=["loss rises"])
    assert found["raises"].kind == "fine", found["raises"]
    assert found["loss rises"].text.endswith("after 120 steps at the configured rate")


def test_sparse_tensors_are_left_out() -> None:
    """Bug: operations that they do not have are findings about healthy data."""

    class Sparse(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0].to_dense(), batch[1]), batch_idx)

    found = answers(Sparse(), [(x.flatten(1).to_sparse(), y) for x, y in Some(4)])
    assert not [name for name, each in found.items() if each.kind == "finding" and "itself" in each.text]
    assert found["raises"].kind == "fine", found["raises"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": "frozen"}, r"skip: expected a list .* got 'frozen'"),
        ({"skip": 5}, r"skip: expected a list .* got 5"),
        ({"accelerator": "gpuu"}, r"accelerator='gpuu': the Trainer does not accept that"),
    ],
)
def test_a_wrong_argument_is_one_message(arguments: Any, message: str) -> None:
    """Bugs: the letters of a name are taken for names; a wrong accelerator is a finding about the module."""
    with pytest.raises(UserError, match=message):
        stabletrain.doctor(Mlp(), *digit_loaders(), **arguments)


def test_an_exception_in_the_module_keeps_its_traceback() -> None:
    """Bug: only the last line of it is left."""

    class Broken(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 5:
                raise KeyError("mask")
            return super().training_step(batch, batch_idx)

    found = answers(Broken(), *digit_loaders(), asked=["one batch"])
    assert found["raises"].text == "in batch 5: KeyError: 'mask'"
    assert "test_bad_input.py" in found["raises"].details
    assert "in training_step" in found["raises"].details
    assert found["frozen"].kind == "fine"
    assert found["one batch"].kind == "not applicable"


def test_tokens_in_a_mapping() -> None:
    """Bug: batches are taken for pairs of tensors."""

    class Tokens(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 7))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            ids = batch["input_ids"]
            return F.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    generator = torch.Generator().manual_seed(0)
    tokens = 5
    rows = (torch.arange(tokens) + torch.randint(7, (64, 1), generator=generator)) % 7
    batches = [{"attention_mask": torch.ones(16, tokens), "input_ids": each} for each in rows.split(16)]
    found = answers(Tokens(), batches, asked=["one batch"])
    assert found["raises"].kind == "fine", found
    assert found["one batch"].kind == "fine", found

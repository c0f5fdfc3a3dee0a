"""What the guard does not support is refused before the first step: what is wrong, and what to do."""

from typing import Any

import pytest
import torch
from fits import HEALTHY, Net, SkipHighLoss, assert_same, batches, everything, fit
from lightning.pytorch.strategies import SingleDeviceStrategy

from stabletrain import ClipNorm, ClipZScore, Guard, SkipNonFinite, UserError, default_callbacks

ITEMS = batches(HEALTHY, HEALTHY)


class PastLightning(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers(use_pl_optimizer=False).step()  # type: ignore[union-attr]


class LossUnseen(PastLightning):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        Net.training_step(self, batch, batch_idx).backward()
        self.optimizers().step()  # type: ignore[union-attr]


class NothingToApply(PastLightning):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.optimizers().step()  # type: ignore[union-attr]


class Unoptimized(Net):
    def configure_optimizers(self) -> Any:
        return None


class SecondOrder(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Engine(SingleDeviceStrategy):
    """Accumulates and steps by itself, as DeepSpeed's does."""

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (PastLightning, {}, ["PastLightning", "self.optimizers()", "use_pl_optimizer=False", "remove the plugins"]),
        (LossUnseen, {}, ["LossUnseen", "AdamW", "self.manual_backward(loss)", "remove the plugins"]),
        (SecondOrder, {}, ["LBFGS", "several times", "first-order"]),
        (Net, {"strategy": Engine("cpu")}, ["Engine", "steps in its own engine", "strategy=ddp"]),
        (
            Net,
            {"gradient_clip_val": 0.5},
            ["gradient_clip_val=0.5", "ClipNorm", "both clip", "Trainer(gradient_clip_val=...)"],
        ),
    ],
)
def test_refusals(make: Any, options: dict[str, Any], words: list[str]) -> None:
    """Bug: training that goes on unguarded, clips twice, or dies in the middle with a message of Lightning's."""
    with pytest.raises(UserError) as refused:
        fit(make(), ITEMS, ClipNorm(), SkipNonFinite(), **options)
    for word in words:
        assert word in str(refused.value)


class OwnStep(torch.optim.SGD):
    """Steps by another method, as sharpness-aware minimisation does."""

    def second_step(self) -> None:
        torch.optim.SGD.step(self)


class StepsOtherwise(PastLightning):
    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.manual_backward(Net.training_step(self, batch, batch_idx))
        optimizer: Any = self.optimizers()
        optimizer.second_step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return OwnStep(self.parameters(), 0.01)


def test_steps_that_cannot_be_seen_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a run whose plugins do nothing, without a word."""
    fit(StepsOtherwise(), batches(*[HEALTHY] * 101), SkipNonFinite())
    assert [record.message for record in caplog.records if "100 batches" in record.message] == [
        "100 batches had a backward pass, and no step() of an optimizer of self.optimizers() was called: stabletrain "
        "judges no other steps, so nothing is skipped, clipped or measured"
    ]


def test_a_step_without_gradients_is_no_step() -> None:
    """Bug: a module that calls ``step`` where it has computed nothing is refused, or such a step counts."""
    skip = SkipNonFinite()
    fit(NothingToApply(), ITEMS, ClipNorm(), skip)
    assert skip.state_dict()["counters"]["attempted"] == 0


@pytest.mark.filterwarnings("ignore:.*`LightningModule.configure_optimizers` returned `None`:UserWarning")
def test_a_module_without_optimizer_is_refused() -> None:
    """Bug: an IndexError from inside."""
    with pytest.raises(UserError, match=r"configure_optimizers returned none\. Return one"):
        fit(Unoptimized(), ITEMS, SkipNonFinite())


def test_the_trainers_own_clipping_is_allowed_beside_a_skip() -> None:
    """Bug: a refusal of what works."""
    assert fit(Net(), ITEMS, SkipNonFinite(), SkipHighLoss(), gradient_clip_val=0.5).global_step == 2


@pytest.mark.parametrize(
    ("module", "options", "word"),
    [
        (Net("adamw-loop"), {}, "AdamW has no kernel that can drop a step"),
        (Net("adamw-fused"), {"fp16": True}, "GradScaler"),
        (Net("adamw-fused", "step"), {}, "use ScheduleLR instead"),
    ],
)
def test_device_mode_where_it_is_impossible(module: Net, options: dict[str, Any], word: str) -> None:
    """Bug: a decision that is never executed."""
    with pytest.raises(UserError, match='mode="auto"') as refused:
        fit(module, ITEMS, SkipNonFinite(), Guard(mode="device"), **options)
    assert word in str(refused.value)
    assert fit(module, ITEMS, SkipNonFinite(), Guard(mode="auto"), **options).global_step == 2


@pytest.mark.parametrize(("options", "argument"), [({"mode": "fast"}, "mode"), ({"max_attempts": 0}, "max_attempts")])
def test_wrong_options(options: dict[str, Any], argument: str) -> None:
    """Bug: a typo that silently means the default; a message that names another argument."""
    with pytest.raises(UserError, match=rf"\(Guard\({argument}=\.\.\.\)\)"):
        Guard(**options)


def test_a_default_clip_makes_way_for_the_trainers(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: a refusal of Trainer(gradient_clip_val) with the default stack; both clip, the fallback of another rule
    included; a default that is silently off, or said to be so in each of several fits' steps; a metric of the idle."""
    ends = []
    for stack in ([], default_callbacks(spike="none"), default_callbacks(clip="none", spike="none")):
        caplog.clear()
        trained = fit(Net(), batches(*[HEALTHY] * 40), *stack, gradient_clip_val=0.05)
        ends.append(everything(trained))
        said = [r.getMessage() for r in caplog.records if "gradient_clip_val" in r.getMessage()]
        assert len(said) == any(isinstance(each, ClipZScore) for each in stack)
        assert all("gradient_clip_val=0.05" in text and "ClipZScore" in text for text in said)
        if stack:
            assert trained.callback_metrics["clipped"] == 0
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])
    stack = default_callbacks(spike="none")
    fit(Net(), ITEMS, *stack, gradient_clip_val=0.05)
    free = [
        everything(fit(Net(), batches(*[HEALTHY] * 40), *each)) for each in (stack, default_callbacks(spike="none"))
    ]
    assert_same(*free)


@pytest.mark.parametrize("stack", [lambda: default_callbacks(clip="zscore"), lambda: [ClipNorm()]])
def test_a_clip_that_was_chosen_is_refused_beside_the_trainers(stack: Any) -> None:
    """Bug: the user's own choice is dropped without an error."""
    with pytest.raises(UserError, match="would both clip"):
        fit(Net(), ITEMS, *stack(), gradient_clip_val=0.5)

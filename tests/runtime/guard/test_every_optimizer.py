"""Skip, rollback and resume are exact with optimizers of every kind of state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from every_optimizer import Exactness
from fits import HEALTHY, NAN_LOSS, Net, batches, fit
from optimizer_list import OPTIMIZERS
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from stabletrain import Guard, SkipNonFinite, UserError


class Helper:
    """Counts, and holds a tensor that is replaced, an optimizer and a scheduler, as SPAM's warm-up does."""

    def __init__(self, inner: Optimizer) -> None:
        self.count, self.rows, self.inner = 0, [torch.zeros(2)], inner
        self.scheduler = CosineAnnealingLR(SGD([nn.Parameter(torch.zeros(1))], 1.0), 50)

    def advance(self) -> float:
        self.count += 1
        self.rows = [*self.rows[-2:], torch.full((2,), float(self.count))]
        self.scheduler.optimizer.step()
        self.scheduler.step()
        return float(self.scheduler.get_last_lr()[0]) + 1e-3 * float(torch.stack(self.rows).sum())


class InAttributes(SGD):
    """Its step depends on numbers, tensors, a flag, a text and a generator in attributes, and on a helper object."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.01, momentum=0.9)
        self.total, self.mean = 0, torch.zeros(())
        self.is_late, self.phase, self.by_parameter = False, "warm", dict[Tensor, Tensor]()
        self.swap, self.other = torch.ones(1), torch.full((1,), 2.0)
        self.generator = torch.Generator().manual_seed(3)
        self.helper = Helper(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.total += 1
        self.is_late, self.phase = self.total > 6, "warm" if self.total % 3 else "cold"
        self.swap, self.other = self.other, self.swap
        self.mean.mul_(0.9).add_(0.1 * self.total)
        if self.total > 5:
            self.late = self.total  # an attribute that is not there at first
        rate = self.helper.advance() * (1 + self.mean.item()) * self.swap.item() * (2 if self.phase == "cold" else 1)
        rate *= 0.5 if self.is_late and hasattr(self, "late") else 1.0
        for group in self.param_groups:
            for p in group["params"]:
                past = self.by_parameter.setdefault(p, torch.zeros_like(p))
                past.add_(p.grad)
                p.grad.add_(past, alpha=1e-3 * rate).add_(torch.randn(p.shape, generator=self.generator), alpha=1e-4)
        super().step()
        return loss


class Several(Optimizer):
    """Optimizers in a list and in a dictionary; groups and state are computed from them."""

    shows = True

    def __init__(self, params: list[Any]) -> None:
        half = len(params) // 2
        self.listed, self.named = [AdamW(params[:half], 1e-2)], {"rest": [Adam(params[half:], 1e-3)]}
        self.defaults: dict[str, Any] = {}
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}  # type: ignore[assignment]

    @property
    def _all(self) -> list[Any]:
        return [*self.listed, *self.named["rest"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for each in self._all for group in each.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {key: value for each in self._all for key, value in each.state.items()}

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for each in self._all:
            each.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self._all:
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"all": [each.state_dict() for each in self._all]} if self.shows else {}

    def load_state_dict(self, state_dict: Any) -> None:
        for each, state in zip(self._all, state_dict.get("all", ()), strict=self.shows):
            each.load_state_dict(state)


class Silent(Several):
    """Its ``state_dict`` says nothing of them."""

    shows = False


def of(package: str, name: str, **options: Any) -> Callable[[Any], Optimizer]:
    """An optimizer of a package that may be missing."""

    def make(parameters: Any) -> Optimizer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Optimizer = getattr(pytest.importorskip(package), name)(parameters, **{"lr": 1e-3, **options})
        if package == "schedulefree":
            found.train()  # type: ignore[attr-defined]
        return found

    return make


QUICK: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, 1e-3),
    "SGD": lambda p: SGD(p, 0.05, momentum=0.9),
    "attributes": InAttributes,
    "several": Several,
    "several, not in the state_dict": Silent,
    "StableSPAM": of("pytorch_optimizer", "StableSPAM", t_max=15, update_proj_gap=7),
    "Ranger21": of("pytorch_optimizer", "Ranger21", num_iterations=40),
    "schedulefree": of("schedulefree", "AdamWScheduleFree", lr=1e-2),
    "torchao": of("torchao.optim", "AdamW8bit"),
}


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """torchao compiles its step, which takes minutes on a CPU."""
    with dynamo.config.patch(disable=True):
        yield


@pytest.mark.parametrize("name", QUICK)
def test_skip_rollback_and_resume_are_exact(name: str, tmp_path: Path, not_compiled: None) -> None:
    # catches StableSPAM's total_step and Ranger21's lookahead_step left as they are by a rollback; attributes that no
    # state_dict shows left out of a checkpoint; torchao's 8-bit state written to a file that cannot be read
    assert Exactness(QUICK[name], tmp_path).all_problems() == {}


class Counting(AdamW):
    """Changes an attribute at each step, although the kernel may do nothing."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return super().step(closure)


def test_device_mode_is_not_for_a_step_that_does_more_than_the_kernel() -> None:
    # catches a dropped step in device mode, whose step() is called, that moves an attribute
    class Mine(Net):
        def configure_optimizers(self) -> Any:
            return Counting(self.parameters(), fused=True)

    items = batches(HEALTHY, NAN_LOSS, HEALTHY)
    with pytest.raises(UserError, match="Counting has a step"):
        fit(Mine(), items, SkipNonFinite(), Guard(mode="device"))
    mine = fit(Mine(), items, SkipNonFinite())
    assert mine.optimizers[0].count == 2  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_is_installed_is_exact(name: str, tmp_path: Path, not_compiled: None) -> None:
    # catches state that an optimizer keeps where none of the tests above has it
    try:
        assert Exactness(OPTIMIZERS[name], tmp_path, of_module=True).all_problems() == {}
    except ModuleNotFoundError as error:
        pytest.skip(str(error))

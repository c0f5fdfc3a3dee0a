"""Steps of a module that calls its optimizers by hand (manual optimization), of which it may have several.

Lightning calls ``on_before_backward`` for each ``manual_backward``, and ``on_before_optimizer_step`` for each ``step``
of an optimizer from ``self.optimizers()``. In between, the module does what it wants. So what belongs to a step is
observed: its loss is the sum of the losses whose backward passes have changed a gradient of its optimizer since these
gradients were removed or applied. See docs/decisions/0016-steps-by-hand.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime import gradients
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.guard.optimizer_buffers import buffers_of_optimizers, parameters_of
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records.event_log import logger

_IDLE_BATCHES = 100
"""Batches without a step after which there is a warning; more than are accumulated by hand."""


class BackwardWindow(AccumulationWindow):
    """The backward passes whose gradients the next step of one optimizer applies.

    Args:
        trainer: in a fit.
        windows: those of all optimizers; this one is added.
    """

    def __init__(self, trainer: Trainer, windows: list[BackwardWindow]) -> None:
        super().__init__(trainer)
        self._windows = windows
        windows.append(self)
        self._batches: tuple[int, int] | None = None
        self.spans_batches: bool | None = None
        """Whether the last step had gradients of several batches; None before the first."""

    @property
    def is_open(self) -> bool:
        """Between two batches: whether an optimizer that steps once for several batches has not stepped yet."""
        return any(each.spans_batches and not each.is_empty for each in self._windows)

    @property
    def may_be_open(self) -> bool:
        """Between two batches: whether the gradients that there are may be applied by the next step."""
        return not self.is_empty and self.spans_batches is not False

    def add(self, loss: Tensor) -> None:
        """Add a loss, as passed to backward: backward passes add up gradients, and average none."""
        batch = trainer_internals.batches_seen(self._trainer)
        first = self._batches[0] if self._batches else batch
        so_far = super().take()  # a sum takes no more memory if the optimizer never steps
        super().add(sum(so_far, loss.detach().sum()))
        self._batches = (first, batch)

    def take(self) -> list[Tensor]:
        """Return the sum of the losses, and remove it."""
        if self._batches is not None:
            self.spans_batches = self._batches[0] != self._batches[1]
        return super().take()

    def clear(self) -> None:
        """Remove the losses."""
        super().clear()
        self._batches = None


class ManualSteps:
    """What belongs to the next step of each optimizer, observed from outside of ``training_step``.

    Args:
        trainer: in a fit, with its optimizers.
        module: the module, with manual optimization.
        ranks: of the fit.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, ranks: Ranks) -> None:
        self._module, self._ranks = module, ranks
        self.optimizers: list[Optimizer] = list(trainer.optimizers)
        self.windows: list[BackwardWindow] = []
        for _ in self.optimizers:
            BackwardWindow(trainer, self.windows)
        several = len(self.optimizers) > 1
        self.names = optimizer_names(module, self.optimizers) if several else [""]
        """Names of the optimizers for events and metrics; of a single one empty."""
        self.buffers = buffers_of_optimizers(module, self.optimizers)
        self._index = {id(optimizer): i for i, optimizer in enumerate(self.optimizers)}
        self._marks: list[list[tuple[Tensor | None, int]]] = []
        self._loss: Tensor | None = None
        self.had_backward = False
        """Whether there was a backward pass in the batch in progress."""
        self._idle: int | None = 0  # batches with a backward pass and without a step; None: there was a step

    def index(self, optimizer: Optimizer) -> int:
        """The position of an optimizer in ``self.optimizers()``."""
        return self._index[id(optimizer)]

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass begins: what came before gradients were removed belongs to no step any more."""
        self._loss = loss
        self._marks = [_marks(optimizer) for optimizer in self.optimizers]
        for window, marks in zip(self.windows, self._marks, strict=True):
            if not window.is_empty and all(grad is None for grad, _ in marks):
                window.clear()

    def after_backward(self) -> Iterator[tuple[int, Tensor]]:
        """The optimizers for which the backward pass has computed gradients, by index, and its loss."""
        self.had_backward = True
        before, self._marks = self._marks, []
        loss, self._loss = self._loss, None
        if loss is None:
            return
        for index, (optimizer, marks) in enumerate(zip(self.optimizers, before, strict=True)):
            if any(now is not then or version != old for (now, version), (then, old) in _pairs(optimizer, marks)):
                yield index, loss

    def has_step(self, index: int) -> bool:
        """Whether a call of an optimizer's ``step`` has gradients to apply, on any rank. A collective.

        Raises:
            UserError: if there are gradients, but the loss they come from is not known.
        """
        optimizer = self.optimizers[index]
        if self._ranks.any(not self.windows[index].is_empty):
            return True
        grads = gradients.of(parameters_of(optimizer))
        if self._ranks.any(bool(grads) and gradients.global_norm(grads).item() != 0.0):
            raise UserError(
                f"{type(self._module).__name__} steps {type(optimizer).__name__} with gradients whose loss stabletrain "
                "has not seen, so the step cannot be judged. In training_step, call self.manual_backward(loss) before "
                "the step instead of loss.backward(), and step once for each backward pass; or remove the plugins that "
                "skip, clip, measure or roll back"
            )
        return False

    def refuse_undecided(self) -> None:
        """Called for a step of which Lightning did not tell.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{type(self._module).__name__} steps an optimizer past Lightning, which then calls no hook in which the "
            "step could be judged. In training_step, take the optimizers from self.optimizers(), without "
            "use_pl_optimizer=False, and call step() on those; or remove the plugins that skip, clip, measure or roll "
            "back"
        )

    def end_batch(self, stepped: bool) -> None:
        """Warn once if the module trains, and no optimizer steps where Lightning knows of it (such as in SAM's way)."""
        had_backward, self.had_backward = self.had_backward, False
        if self._idle is None:
            return
        self._idle = None if stepped else self._idle + had_backward
        if self._idle == _IDLE_BATCHES:
            self._idle = None
            if self._ranks.is_first:
                logger.warning(
                    "%d batches had a backward pass, and no step() of an optimizer of self.optimizers() was called: "
                    "stabletrain judges no other steps, so nothing is skipped, clipped or measured",
                    _IDLE_BATCHES,
                )

    def remove(self, optimizer: Optimizer) -> None:
        """The gradients of an optimizer were removed, by its ``zero_grad``."""
        self.windows[self.index(optimizer)].clear()

    def clear(self) -> None:
        """The state was restored: gradients are those of undone steps."""
        for window in self.windows:
            window.clear()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def optimizer_names(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[str]:
    """The submodule that each optimizer trains, such as ``discriminator``; ``optimizer_0`` where that is ambiguous.

    >>> import torch
    >>> gan = nn.ModuleDict({"generator": nn.Linear(1, 1), "discriminator": nn.Linear(1, 1)})
    >>> optimizer_names(gan, [torch.optim.SGD(gan[name].parameters()) for name in ("generator", "discriminator")])
    ['generator', 'discriminator']
    >>> optimizer_names(gan, [torch.optim.SGD(gan.parameters()), torch.optim.SGD(gan["generator"].parameters())])
    ['optimizer_0', 'optimizer_1']
    """
    modules = {id(p): name.split(".")[:-1] for name, p in module.named_parameters()}
    paths = [[modules.get(id(p), []) for p in parameters_of(each)] for each in optimizers]
    names = []
    for i, mine in enumerate(paths):
        others = [path for j, each in enumerate(paths) if j != i for path in each]
        shared = _common(mine)
        levels = (shared[:depth] for depth in range(1, len(shared) + 1))
        alone = next((level for level in levels if all(path[: len(level)] != level for path in others)), None)
        names.append(".".join(alone) if alone else f"optimizer_{i}")
    return names


def _common(paths: Sequence[list[str]]) -> list[str]:
    """The beginning that all paths share."""
    levels = [set(level) for level in zip(*paths, strict=False)]
    length = next((depth for depth, level in enumerate(levels) if len(level) > 1), len(levels))
    return paths[0][:length] if paths else []


def _marks(optimizer: Optimizer) -> list[tuple[Tensor | None, int]]:
    """The gradients, and their version counters, by which it shows that a backward pass has changed them."""
    return [(p.grad, 0 if p.grad is None else _version(p.grad)) for p in parameters_of(optimizer)]


def _version(gradient: Tensor) -> int:
    return (gradient if gradient.is_sparse else gradients.local(gradient))._version


def _pairs(
    optimizer: Optimizer, marks: list[tuple[Tensor | None, int]]
) -> Iterator[tuple[tuple[Tensor | None, int], tuple[Tensor | None, int]]]:
    return zip(_marks(optimizer), marks, strict=False)  # parameters may have been added

"""The Lightning side of a plugin: what every callback that shares the guard has in common.

`RuleCallback` is the shell of a rule, `stabletrain.runtime.guard.transform.TransformCallback` that of a per-tensor
transform; a schedule or a monitor derives from `GuardMember` itself and overrides only what it needs.
"""

from __future__ import annotations

import functools
import typing
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.outcome import Outcome
from stabletrain.core.plugin import Plugin
from stabletrain.core.rule import Rule
from stabletrain.core.state import from_plain, to_plain
from stabletrain.errors import require
from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.guard.step_guard import Mode, StepGuard
from stabletrain.runtime.internals import trainer as trainer_internals


class GuardMember(Callback):
    """A callback that shares one guard with all others of its Trainer.

    No registry: ``trainer.callbacks`` is it. At setup the first member makes the guard and leads: it alone passes
    Lightning's hooks on. Subclasses override `on_gradients`, `on_outcome`, `metrics` and the state hooks as needed.
    """

    _guard: StepGuard | None = None
    _leads: bool = False
    _fitted: weakref.ref[Trainer] | None = None
    _loaded: bool = False

    # ---- what subclasses override -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the history: a fit begins with a Trainer that this callback has not served before."""

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """The optimizer exists, and the guard is about to look at it: a schedule takes over here."""

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Look at the complete, unscaled, untouched gradients of attempted step ``step``; do not change them."""

    def on_outcome(self, outcome: Outcome) -> None:
        """An outcome became history. The learning rate of the next step may be set here."""

    def metrics(self) -> dict[str, float]:
        """What to send to the loggers at a flush, besides the guard's own metrics."""
        return {}

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard of this Trainer; the first member makes it."""
        if stage != "fit":
            return
        if self._fitted is None or self._fitted() is not trainer:
            self.reset()
        self._fitted = weakref.ref(trainer)
        self._loaded = False
        members = [c for c in trainer.callbacks if isinstance(c, GuardMember)]  # type: ignore[attr-defined]
        self._leads = self is members[0]
        if self._leads:
            options = next((m.options() for m in members if isinstance(m, Guard)), {})
            before = None if self._guard is None or self._guard.trainer is not trainer else self._guard.counters
            guard = StepGuard(trainer, trainer_internals.unwrapped(pl_module), members, **options)
            guard.counters = before or guard.counters
            for member in members:
                member._guard = guard
        trainer_internals.silence_step_hooks(self, among=Callback if self._leads else GuardMember)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer exists: take control of its steps."""
        if self._leads and self._guard is not None:
            self._guard.open()
            if not self._guard.control.watches_windows:
                self.__dict__["on_train_batch_start"] = None  # one hook less at every step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when a checkpoint had nothing for this plugin."""
        if trainer_internals.resumes_from_checkpoint(trainer) and not self._loaded:
            rank_zero_warn(f"the checkpoint holds no state of {self.state_key}: it begins with an empty history")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A micro-batch begins."""
        if self._leads and self._guard is not None:
            self._guard.open_window()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The loss of a micro-batch is known."""
        if self._leads and self._guard is not None:
            self._guard.take_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete and unscaled."""
        if self._leads and self._guard is not None:
            self._guard.decide(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step, if there was one, is over."""
        if self._leads and self._guard is not None:
            self._guard.end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation sees a settled state and up-to-date metrics."""
        self._settle_and_flush()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks that monitor metrics at the end of an epoch see those of its last steps."""
        self._settle_and_flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last outcome becomes history, the last metrics go out."""
        self._settle_and_flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo everything that was installed."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo everything that was installed: after an exception Lightning calls no teardown."""
        if self._leads and self._guard is not None and not isinstance(exception, Exception):
            self._guard.settle()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The counts of the run; subclasses add their own."""
        if self._guard is None:
            return {}
        self._guard.settle()
        return {"counters": self._guard.counters._asdict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._loaded = True
        if self._guard is not None and "counters" in state_dict:
            self._guard.counters = Counters(**state_dict["counters"])

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies leave the running fit behind; ``log`` is the module's: Lightning puts it there."""
        fit = {"_guard", "_leads", "_fitted", "log", "log_dict", *trainer_internals.STEP_HOOKS}
        return {key: value for key, value in self.__dict__.items() if key not in fit}

    def _settle_and_flush(self) -> None:
        if self._leads and self._guard is not None and self._guard.is_open:
            self._guard.settle()
            self._guard.flush()

    def _close(self) -> None:
        if self._leads and self._guard is not None:
            self._guard.close()
        trainer_internals.restore_step_hooks(self)


class Guard(GuardMember):
    """Options of the guard that all plugins of a Trainer share; only needed to change a default.

    Args:
        mode: where decisions are made. ``"exact"``: the host reads loss and norm before each step. ``"device"``: clip
            and skip ride on a fused optimizer's kernel, and the host never waits for the step in progress. ``"auto"``
            (default): device on CUDA with a fused optimizer, else exact.
        max_attempts: attempted steps after which the run is stopped, at least 1; None: twice ``max_steps`` if that is
            set. It ends a run that would skip for ever.
        events: file for the event log, one JSON object a line; None: ``events.jsonl`` in the logger's folder.
    """

    def __init__(self, mode: Mode = "auto", max_attempts: int | None = None, events: str | Path | None = None) -> None:
        known = mode in ("auto", "exact", "device")
        require(known, "Guard", "mode", '"auto", "exact" or "device"', mode, "guard")
        enough = max_attempts is None or max_attempts >= 1
        require(enough, "Guard", "max_attempts", ">= 1, or null", max_attempts, "guard")
        self.mode: Mode = mode
        self.max_attempts = max_attempts
        self.events = events

    def options(self) -> dict[str, Any]:
        """The options as keyword arguments of `StepGuard`."""
        events = None if self.events is None else Path(self.events)
        return {"mode": self.mode, "max_attempts": self.max_attempts, "events": events}


class PluginMember(GuardMember, Plugin):
    """A member whose arguments are checkpointed: the base of what a rule and a transform are as callbacks."""

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint; Lightning asks for it at every hook."""
        return self.name or self.plugin

    def state_dict(self) -> dict[str, Any]:
        """The arguments; subclasses with a history add it, as tensors and plain Python types."""
        return {**super().state_dict(), "arguments": _plain(self.arguments())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; other arguments than it was made with are said aloud."""
        super().load_state_dict(state_dict)
        saved, mine = state_dict["arguments"], self.arguments()
        plain = _plain(mine)
        changed = [f"{key}={mine[key]!r} (was {saved.get(key)!r})" for key in mine if plain[key] != saved.get(key)]
        if changed:
            rank_zero_warn(f"{self.state_key}: goes on from a checkpoint with other arguments: {', '.join(changed)}")


class RuleCallback(PluginMember):
    """The Lightning callback of a rule: ``class ClipNorm(RuleCallback, ClipNormRule)``, nothing more.

    The constructor, its defaults and its documentation are the rule's. `as_callback` derives such a class.
    """

    state: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, Rule):
            raise TypeError(f"{cls.__name__}: a RuleCallback needs a Rule as its second base class")
        if cls.__doc__ is None:
            cls.__doc__ = next(base.__doc__ for base in cls.__mro__[2:] if issubclass(base, Rule))

    def reset(self) -> None:
        """Begin with an empty history."""
        self.state = self.rule.init()

    def metrics(self) -> dict[str, float]:
        """The rule's readings; of an instance with a name of its own, below that name."""
        readings = self.rule.readings(self.state)
        return {f"{self.rule.name}/{key}": value for key, value in readings.items()} if self.rule.name else readings

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and arguments, as plain Python types."""
        return {**super().state_dict(), "state": to_plain(self.state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        try:
            self.state = from_plain(self.rule.state_type(), state_dict["state"])
        except (ValueError, KeyError):
            rank_zero_warn(f"{self.state_key}: the checkpoint is of another version: it begins with an empty history")
            self.state = self.rule.init()

    def __eq__(self, other: object) -> bool:
        """Callbacks are themselves: two with equal arguments are still two."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def rule(self) -> Rule[Any]:
        """This callback, seen as the rule that it is."""
        return typing.cast(Rule[Any], self)


@functools.cache
def as_callback(rule: type[Rule[Any]]) -> type[RuleCallback]:
    """The public callback of a rule: ``ClipNormRule`` becomes ``ClipNorm``.

    >>> from stabletrain_plugins.clip_norm.rule import ClipNormRule
    >>> as_callback(ClipNormRule)(max_norm=2.0).max_norm
    2.0
    """
    name = rule.__name__.removesuffix("Rule")
    module = "stabletrain" if rule.__module__.startswith("stabletrain_plugins.") else rule.__module__
    return type(name, (RuleCallback, rule), {"__module__": module, "__doc__": rule.__doc__})


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else repr(value) for key, value in arguments.items()}

"""Base classes of the plugins' Lightning callbacks, which share one guard.

`RuleCallback` wraps a rule, `stabletrain.runtime.guard.transform.TransformCallback` a per-tensor transform; a schedule
or a monitor derives from `GuardMember` itself and overrides only what it needs.
"""

from __future__ import annotations

import functools
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from stabletrain import settings
from stabletrain.core.lengths import Length
from stabletrain.core.outcome import Outcome
from stabletrain.core.plugin import Plugin
from stabletrain.core.positions import resolve
from stabletrain.core.rule import Rule
from stabletrain.core.state import from_plain, to_plain
from stabletrain.errors import UserError
from stabletrain.optim.loading import convert_when_loading
from stabletrain.runtime.data.uneven import refuse_uneven_training, refuse_uneven_validation
from stabletrain.runtime.guard.given_twice import attach, check_slots, given_once
from stabletrain.runtime.guard.hidden_fields import HiddenFields
from stabletrain.runtime.guard.per_optimizer import PerOptimizer
from stabletrain.runtime.guard.publishing import warn_of_old_names
from stabletrain.runtime.guard.start_record import show_first_batch
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain.runtime.run_length import run_length
from stabletrain.runtime.stop import TrainingStopped

T = typing.TypeVar("T")


@refuse_in_fabric
class GuardMember(Callback, metaclass=HiddenFields):
    """A callback that shares one guard with all others of its Trainer: the base class of every plugin.

    The members are found in ``trainer.callbacks``; there is no other registry. In ``setup`` the first member of the
    list, the leader, creates the guard; only the leader forwards Lightning's hooks to it. Subclasses override
    `on_gradients`, `on_update`, `on_outcome`, `metrics` and the state hooks as needed.
    """

    sets_limits: ClassVar[bool] = False
    transforms_gradients: ClassVar[bool] = False

    least_micro_batches: ClassVar[int] = 1
    """Micro-batches, over time and ranks, that a step must have; with more than 1, `check_plugin` trains nothing."""
    needs_attention: ClassVar[bool] = False
    """Whether it refuses a module without attention; then `check_plugin` trains nothing."""
    chosen_by_default: bool = False
    """Whether ``default_callbacks`` has chosen it, and not the user."""
    per_optimizer: ClassVar[tuple[str, ...]] = ()
    """Attributes of which each optimizer has its own value, if the module has several; see `start_optimizer`."""

    _guard: StepGuard | None = None
    _optimizers: PerOptimizer | None = None
    _optimizer_names: Sequence[str] = ("",)
    _leads: bool = False
    _is_first_batch: bool = False
    _fitted: weakref.ref[Trainer] | None = None
    _loaded: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "load_state_dict" in cls.__dict__:  # a checkpoint may hold anything as its state
            cls.load_state_dict = names_its_plugin(cls.load_state_dict)  # type: ignore[method-assign]
        if isinstance(key := cls.__dict__.get("state_key"), property) and key.fget is not None:
            cls.state_key = given_once(key.fget)  # type: ignore[method-assign]

    @given_once
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return super().state_key

    # ---- what subclasses override -----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Clear the history; called when a fit starts with another Trainer than the last one."""

    def start_optimizer(self) -> None:
        """Set the attributes of ``per_optimizer`` to their values before the first step."""

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Called once per fit, when the optimizer exists and before the guard reads it; a schedule takes over here."""

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Read the complete, unscaled gradients of attempted step ``step``, before any is changed; do not change them.

        Args:
            step: attempted steps before this one.
            parameters: of the optimizer, in its order.
        """

    def on_update(self, optimizer: Optimizer, dropped: Tensor | None) -> None:
        """Called directly after an optimizer's update, on all ranks; weights may be changed here, without a host read.

        Args:
            optimizer: that was stepped.
            dropped: above 0 if its kernel has dropped the step, which only the device knows; None: it was applied.
        """

    def on_outcome(self, outcome: Outcome) -> None:
        """Called after the rules have observed an outcome. The learning rate of the next step may be set here."""

    def on_attempt(self, outcome: Outcome) -> None:
        """Called with the outcome of every attempted step, also of one without a loss, before the rules observe it."""

    def check_state(self, now: bool) -> bool:
        """Whether weights and optimizer state are not damaged, the same answer on all ranks, which call it together.

        Called between two steps; it may call collectives, and request a rollback with `StepGuard.request`.

        Args:
            now: the state is about to be stored, in a snapshot or checkpoint: check it, unless it has been checked
                already. False: a step has ended, check if it is time.
        """
        return True

    def on_change(self) -> None:
        """Called when the training changes by design (`stabletrain.announce`): forget what was learned before.

        The outcomes of all earlier steps were observed; the step that is decided next is the first after the change.
        """

    def metrics(self) -> dict[str, float]:
        """Metrics for the loggers, in addition to the guard's; called at each flush.

        They are logged as ``stability/<name>``; a name that begins so stays as it is.
        """
        return {}

    def guard_options(self) -> dict[str, Any]:
        """Keyword arguments of `StepGuard` that this callback sets; see `stabletrain.runtime.guard.options.Guard`."""
        return {}

    @property
    def observes_gradients(self) -> bool:
        """Whether `on_gradients` is overridden."""
        return type(self).on_gradients is not GuardMember.on_gradients

    @property
    def follows_updates(self) -> bool:
        """Whether `on_update` is overridden."""
        return type(self).on_update is not GuardMember.on_update

    @property
    def observes_outcomes(self) -> bool:
        """Whether `on_outcome` is overridden."""
        return type(self).on_outcome is not GuardMember.on_outcome

    @property
    def records_attempts(self) -> bool:
        """Whether `on_attempt` is overridden."""
        return type(self).on_attempt is not GuardMember.on_attempt

    @property
    def checks_state(self) -> bool:
        """Whether `check_state` is overridden."""
        return type(self).check_state is not GuardMember.check_state

    def state_is_good(self) -> bool:
        """Whether no plugin of this Trainer finds damage: ask before the state is stored. A collective."""
        return self._guard is None or self._guard.check_state(now=True)

    def announce(self, trainer: Trainer, reason: str) -> bool:
        """Pass an announced change (`stabletrain.announce`) to the guard; False while there is none for this fit."""
        if self._guard is None or self._guard.trainer is not trainer or not self._guard.is_training:
            return False
        self._guard.changes.announce(reason, trainer.global_step)
        return True

    def attempted(self, observe_from: int | None = None) -> int:
        """The steps of the run that were decided, also before a resume.

        Args:
            observe_from: from this number on an outcome in flight is observed first, by a collective if the step was
                dropped: to be given on all ranks, between two batches. None: never.
        """
        guard = self._guard
        if guard is not None and observe_from is not None and guard.decided >= observe_from:
            guard.settle()
        return 0 if guard is None else guard.decided

    # ---- several optimizers -----------------------------------------------------------------------------------------

    def use_optimizers(self, names: Sequence[str]) -> None:
        """A fit begins: the names of the optimizers; of a single one empty."""
        self._optimizer_names = names
        self._of_optimizers.restart(len(names))

    def select_optimizer(self, index: int) -> None:
        """The attributes of ``per_optimizer`` become those of this optimizer."""
        self._of_optimizers.select(index)

    @property
    def _several(self) -> bool:
        """Whether the module has several optimizers."""
        return len(self._optimizer_names) > 1

    @property
    def _of_optimizers(self) -> PerOptimizer:
        if self._optimizers is None:
            self._optimizers = PerOptimizer(self, self.per_optimizer, self.start_optimizer)
        return self._optimizers

    def each_optimizer(self) -> Iterator[str]:
        """Select one optimizer after another; the ending of its metrics' names, empty if there is only one."""
        for index in self._of_optimizers:
            name = self._optimizer_names[index] if index < len(self._optimizer_names) else ""
            yield f"/{name}" if name else ""

    def each_of(self, values: Sequence[T]) -> Iterator[T]:
        """Select one optimizer after another; the value of each, first that of the first one."""
        self._of_optimizers.grow(len(values))
        for index in self._of_optimizers:
            if index < len(values):
                yield values[index]

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard of this Trainer; the first member creates it."""
        attach(self)
        if stage != "fit":
            return
        if self._fitted is None or self._fitted() is not trainer:
            self._optimizers, self._optimizer_names = None, ("",)
            self.reset()
        self._fitted = weakref.ref(trainer)
        self._loaded = False
        members = [c for c in trainer.callbacks if isinstance(c, GuardMember)]  # type: ignore[attr-defined]
        self._leads = self is members[0]
        if self._leads:
            settings.register(trainer.callbacks)  # type: ignore[attr-defined]
            check_slots(members)
            options = {key: value for m in members for key, value in m.guard_options().items()}
            guard = StepGuard(trainer, trainer_internals.unwrapped(pl_module), members, **options)
            if self._guard is not None and self._guard.trainer is trainer:
                guard.load_state_dict(self._guard.state_dict())
            for member in members:
                member._guard = guard
        trainer_internals.silence_step_hooks(self, among=Callback if self._leads else GuardMember)
        self.__dict__["state_key"] = self.state_key  # see `given_once`

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer exists: open the guard, which wraps the optimizer's step."""
        if self._leads and self._guard is not None:
            self._guard.open()
            self._is_first_batch = True
            if trainer_internals.resumes_from_checkpoint(trainer):
                convert_when_loading(trainer, once=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the fit resumes from a checkpoint that holds no state of this plugin."""
        if trainer_internals.resumes_from_checkpoint(trainer) and not self._loaded:
            rank_zero_warn(f"the checkpoint holds no state of {self.state_key}: its history starts empty")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a micro-batch."""
        if self._leads and self._guard is not None:
            if self._guard.ranks.size > 1:
                refuse_uneven_training(trainer)
            if self._is_first_batch:
                self._is_first_batch = False
                show_first_batch(trainer, batch)
            self._guard.start_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Pass the loss of a micro-batch to the guard."""
        if self._leads and self._guard is not None:
            self._guard.take_loss(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the first window: has the optimizer stepped already? With manual optimization: whose loss is it?"""
        if self._leads and self._guard is not None:
            self._guard.end_backward()
            if pl_module.automatic_optimization and self._guard.watch.is_over:
                self.__dict__["on_after_backward"] = None  # needed with manual optimization only

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide the step: the gradients are complete."""
        if self._leads and self._guard is not None:
            self._guard.decide(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a micro-batch; with the last one of its window, also the step."""
        if self._leads and self._guard is not None:
            self._guard.end_batch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the outcome in flight and send the metrics before validation."""
        if self._leads and self._guard is not None:
            refuse_uneven_validation(trainer)
        self._settle_and_flush()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the callbacks that monitor a metric by its old name."""
        if self._leads:
            warn_of_old_names(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the outcome in flight and send the metrics: other callbacks monitor them at the epoch's end."""
        self._settle_and_flush()
        if self._leads:
            warn_of_old_names(trainer)
            if self._guard is not None:
                self._guard.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the last outcome, send the last metrics, and warn if many steps were dropped."""
        self._settle_and_flush()
        if self._leads and self._guard is not None:
            self._guard.is_training = False
            warn_of_old_names(trainer)
            self._guard.say_end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore everything that the guard replaced."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore everything that the guard replaced: Lightning calls no teardown after an exception."""
        if self._leads and self._guard is not None and self._guard.is_open:
            if not isinstance(exception, Exception):
                self._guard.settle(alone=True)
            self._guard.say_end()
        if self._leads and isinstance(exception, UserError) and len(exception.args) == 1:
            exception.args = (settings.worded(str(exception)),)
        if isinstance(exception, TrainingStopped):
            exception.shorten()
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The guard's state, such as the run's step counters; subclasses add their own."""
        attach(self)  # a checkpoint may be saved before the first setup
        return {} if self._guard is None else self._guard.state_dict()

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self._loaded = True
        if self._guard is not None:
            self._guard.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit from pickles and copies; Lightning sets ``log`` and ``log_dict`` to the module's."""
        fit = {"_guard", "_optimizers", "_leads", "_fitted", "log", "log_dict", "state_key"}
        fit.update(trainer_internals.STEP_HOOKS)
        return {key: value for key, value in self.__dict__.items() if key not in fit}

    def _settle_and_flush(self) -> None:
        if self._leads and self._guard is not None and self._guard.is_open:
            self._guard.settle()
            self._guard.flush()
            self._guard.events.show()

    def _close(self) -> None:
        if self._leads and self._guard is not None:
            self._guard.close()
        trainer_internals.restore_step_hooks(self)
        self.__dict__.pop("state_key", None)


class PluginMember(GuardMember, Plugin):
    """A member whose arguments are checkpointed: the base class of the callbacks of rules and transforms."""

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint; Lightning reads it at every hook."""
        return self.name or self.plugin

    def state_dict(self) -> dict[str, Any]:
        """The arguments; subclasses with a history add it, as tensors and plain Python types."""
        return {**super().state_dict(), "arguments": _plain(self.arguments())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint; warns if it was made with other arguments."""
        super().load_state_dict(state_dict)
        saved, mine = dict(state_dict["arguments"]), self.arguments()
        plain = _plain(mine)
        changed = [f"{key}={mine[key]!r} (was {saved.get(key)!r})" for key in mine if plain[key] != saved.get(key)]
        if changed:
            rank_zero_warn(f"{self.state_key}: the checkpoint was made with other arguments: {', '.join(changed)}")


class RuleCallback(PluginMember):
    """The Lightning callback of a rule: ``class ClipNorm(RuleCallback, ClipNormRule): ...``, with an empty body.

    The constructor, its defaults and its documentation are the rule's. `as_callback` derives such a class.
    """

    sets_limits = True
    per_optimizer = ("state",)

    state: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, Rule):
            raise TypeError(f"{cls.__name__}: a RuleCallback needs a Rule as its second base class")
        if cls.__doc__ is None:
            cls.__doc__ = next(base.__doc__ for base in cls.__mro__[2:] if issubclass(base, Rule))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":  # at every step, and a frozen dataclass asks each of its bases whether it is an argument
            self.__dict__["state"] = value
        else:
            super().__setattr__(name, value)

    def reset(self) -> None:
        """Start with an empty history."""
        self.start_optimizer()

    def start_optimizer(self) -> None:
        """Start with an empty history of an optimizer."""
        self.state = self.rule.init()

    def change_states(self, change: Callable[[Any], Any]) -> None:
        """Replace the state by a function of it; with several optimizers, that of each."""
        for _ in self.each_optimizer():
            self.state = change(self.state)

    @property
    def states(self) -> list[Any]:
        """The states, one for each optimizer."""
        return [self.state for _ in self.each_optimizer()]

    @states.setter
    def states(self, states: Sequence[Any]) -> None:
        for state in self.each_of(states):
            self.state = state

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of the run is known: begin, and find the steps from which on baselines are learned anew."""
        super().on_train_start(trainer, pl_module)
        if type(self.rule).begin is not Rule.begin:
            run, applied = run_length(trainer), trainer.global_step
            if self._several and self.rule.compares_loss:
                run = replace(run, total_steps=None)  # its loss need not fall
            self.change_states(lambda state: self.rule.begin(state, run, applied))
        if self._guard is not None and (positions := self.rule.expected_changes()):
            self._guard.changes.expect(self.rule.label, _expected(self.rule, positions, trainer))

    def on_change(self) -> None:
        """Learn the baselines anew."""
        self.change_states(self.rule.forget)

    def metrics(self) -> dict[str, float]:
        """The rule's readings, without ``stability/``; prefixed by ``name/`` if the instance has a name."""
        prefix = f"{self.rule.name}/" if self.rule.name else ""
        return {
            f"{prefix}{key}{suffix}": value
            for suffix in self.each_optimizer()
            for key, value in self.rule.readings(self.state).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The rule's state and arguments, as plain Python types."""
        own = super().state_dict()  # observes an outcome in flight
        states = (self.rule.init() if each is None else each for each in self.states)  # None: before the first fit
        first, *others = map(to_plain, states)
        return {**own, "state": first, **({"optimizers": others} if others else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        try:
            saved = [state_dict["state"], *state_dict.get("optimizers", ())]
            self.states = [from_plain(self.rule.state_type(), each) for each in saved]
        except (ValueError, KeyError):
            rank_zero_warn(f"{self.state_key}: the checkpoint was written by another version: its history starts empty")
            self.change_states(lambda _: self.rule.init())

    def __eq__(self, other: object) -> bool:
        """Compare by identity: two callbacks with equal arguments are not equal."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    @property
    def rule(self) -> Rule[Any]:
        """This callback, typed as a rule."""
        return self  # type: ignore[return-value]


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


def _expected(rule: Rule[Any], positions: Sequence[Length], trainer: Trainer) -> dict[int, str]:
    """The reasons of expected changes, by the number of applied steps before them."""
    key = rule.setting("expect")
    run = run_length(trainer)
    if trainer_internals.is_fast_dev_run(trainer):
        run = replace(run, total_steps=None)  # so short that no position need come
        positions = [each for each in positions if each.unit != "percent"]
    return {step: f"plugins.{rule.slot}.expect={length}" for step, length in resolve(positions, run, name=key).items()}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {key: value if isinstance(value, plain) else repr(value) for key, value in arguments.items()}

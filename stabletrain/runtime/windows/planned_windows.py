"""The base class of plugins that decide over how many micro-batches a gradient is accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy

from stabletrain.core.accumulation_plan import Plan, micro_batches, size_at
from stabletrain.core.planned import Planned, Sizes
from stabletrain.errors import UserError, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.support import refuse_manual
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.windows import WindowControl
from stabletrain.settings import worded


class PlannedWindows(GuardMember):
    """Sets the size of accumulation windows for one fit; a shorter window is the mean over what it holds.

    Subclasses define `_make_plan`.
    """

    plugin: ClassVar[str]
    slot: ClassVar[str] = "accumulate"

    samples_per_batch: int | None
    tokens_per_sample: int | None

    _plan: Plan | None = None
    _own_size: int | None = None
    _windows: WindowControl | None = None
    _saved: list[int] | None = None
    _known: int | None = None

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def _make_plan(self, trainer: Trainer) -> Plan | None:
        """The plan of the run; None: it needs the training data, which are not loaded yet."""
        raise NotImplementedError

    def _check_positive(self, **arguments: object) -> None:
        for argument, value in arguments.items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            self._require(value is None or whole, argument, "a whole number >= 1, or null", value)

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    def _key(self, argument: str) -> str:
        return worded(f"{self.plugin}: plugins.{self.slot}.{argument}", self.slot, type(self).__name__)

    def check_data(self, trainer: Trainer, data: object) -> None:
        """Before a run is opened, and before data are loaded: find a size that does not divide.

        Args:
            trainer: of the run.
            data: its data module; only if it has the attribute ``samples_per_batch``, the samples in a batch of one
                rank, or the argument of this name is given, the sizes are known now.

        Raises:
            UserError: as at the start of training.
        """
        given = self.samples_per_batch
        per_rank = getattr(data, "samples_per_batch", None) if given is None else given
        ranks = trainer.num_devices * trainer.num_nodes
        if not isinstance(per_rank, int) or (ranks > 1 and not isinstance(trainer.strategy, both(DDPStrategy))):
            return  # ranks of other strategies may share their data
        self._known = per_rank * ranks
        try:
            self._make_plan(trainer)
        finally:
            self._known = None

    # ---- in a fit ---------------------------------------------------------------------------------------------------

    def guard_options(self) -> dict[str, Any]:
        """The guard weighs shorter windows."""
        return {"weigh_windows": True}

    def window_plan(self, trainer: Trainer) -> Plan | None:
        """The plan of the fit; None while the training data are not loaded and it needs them."""
        if self._plan is None:
            self._plan = self._make_plan(trainer)
        return self._plan

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        stages = self.window_plan(trainer) or ()
        later = "".join(f", {stage.size} from step {stage.step}" for stage in stages[1:])
        return Planned(text=f"{stages[0].size if stages else '?'} micro-batches in a step{later}")

    def reset(self) -> None:
        """Forget the window of an earlier run."""
        self._saved = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard, and set the size of the first windows, if it is known."""
        if stage == "fit":
            self._restore(trainer)
            refuse_manual(type(self).__name__, pl_module)
            self._plan = None
            self._check_alone(trainer)
            self._set_first(trainer)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The data are loaded: set the size of the first windows."""
        self._check_alone(trainer)
        self._set_first(trainer)
        plan = self._plan
        if plan is None:
            raise UserError(
                f"{self._key('samples_per_batch')}: the samples in a micro-batch are not known, since the train loader "
                "has no batch_size. Give samples_per_batch, of one rank"
            )
        if len(plan) > 1 and self._windows is None:
            self._windows = WindowControl(trainer, lambda: self._next_size(trainer, plan), self._saved)
            self._saved = None
        super().on_train_start(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the windows back to the Trainer."""
        self._restore(trainer)
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the windows back to the Trainer."""
        super().on_exception(trainer, pl_module, exception)
        self._restore(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Where the window in progress began, and its size."""
        own = super().state_dict()
        window = self._saved if self._windows is None else self._windows.state()
        return own if window is None else {**own, "window": list(window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint; after a rollback the next batch begins a window."""
        super().load_state_dict(state_dict)
        if self._windows is not None:
            self._windows.end_window()
        elif window := state_dict.get("window"):
            self._saved = [int(each) for each in window]

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        own = super().__getstate__()
        return {key: value for key, value in own.items() if key not in ("_windows", "_plan", "_own_size")}

    def _next_size(self, trainer: Trainer, plan: Plan) -> int:
        step = trainer.global_step
        guard = self._guard
        if guard is not None and size_at(plan, step) != size_at(plan, step - 1):
            guard.settle()  # the step before may have been dropped on the device
        return size_at(plan, trainer.global_step)

    def _set_first(self, trainer: Trainer) -> None:
        plan = self.window_plan(trainer)
        if plan is not None:
            if self._own_size is None:
                self._own_size = trainer.accumulate_grad_batches
            trainer.accumulate_grad_batches = size_at(plan, trainer.global_step)

    def _restore(self, trainer: Trainer) -> None:
        if self._windows is not None:
            self._saved = self._windows.state()
            self._windows.undo()
            self._windows = None
        if self._own_size is not None:
            trainer.accumulate_grad_batches = self._own_size
            self._own_size = None

    def _check_alone(self, trainer: Trainer) -> None:
        callbacks: Sequence[object] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, both(GradientAccumulationScheduler)) for each in callbacks):
            raise UserError(
                f"{type(self).__name__} and Lightning's GradientAccumulationScheduler both set the number of "
                "micro-batches. Remove one of them (config key plugins/accumulate=none)"
            )
        if others := [each for each in callbacks if isinstance(each, PlannedWindows) and each is not self]:
            raise UserError(
                f"{type(self).__name__} and {type(others[0]).__name__} both set the number of micro-batches. Remove "
                "one of them"
            )
        plan = self.window_plan(trainer)
        mine = None if plan is None else size_at(plan, 0)
        if self._own_size is None and trainer.accumulate_grad_batches not in (1, mine):
            raise UserError(
                f"{type(self).__name__} and Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) both "
                "set the number of micro-batches. Remove accumulate_grad_batches (config key "
                "trainer.accumulate_grad_batches), or take plugins/accumulate=mean, which leaves it to the Trainer"
            )

    # ---- samples and tokens -----------------------------------------------------------------------------------------

    def _size_of(self, trainer: Trainer, target: int, what: str, argument: str) -> int | None:
        """The micro-batches that have so many samples or tokens over all ranks; None: the data are not loaded yet."""
        per = self._samples(trainer) if what == "samples" else self._tokens(trainer)
        return None if per is None else micro_batches(target, per, what, self._key(argument))

    def _samples(self, trainer: Trainer) -> int | None:
        """The samples in a micro-batch of all ranks."""
        if self._known is not None:
            return self._known
        per_rank = self.samples_per_batch
        if per_rank is None:
            loader = trainer.train_dataloader
            per_rank = getattr(loader, "batch_size", None)
            if per_rank is None:
                per_rank = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return None if per_rank is None else int(per_rank) * _data_ranks(trainer)

    def _tokens(self, trainer: Trainer) -> int | None:
        """The tokens in a micro-batch of all ranks."""
        if self.tokens_per_sample is None:
            raise UserError(f"{self._key('tokens_per_sample')}: expected the tokens in a sample, got null")
        samples = self._samples(trainer)
        return None if samples is None else samples * self.tokens_per_sample


def _data_ranks(trainer: Trainer) -> int:
    """The number of ranks that see different data."""
    arguments = getattr(trainer.strategy, "distributed_sampler_kwargs", None) if trainer.world_size > 1 else None
    return int((arguments or {}).get("num_replicas", trainer.world_size))

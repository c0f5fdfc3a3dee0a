"""Switches schedule-free optimizers between the weights that are trained and their average, which is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.runtime.guard.given_twice import attach, given_once
from stabletrain.runtime.internals.fabric import refuse_in_fabric
from stabletrain.runtime.internals.module_state import change_saved_weights
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.plugin_state import names_its_plugin
from stabletrain_plugins.switch_schedulefree.support import check_support, is_schedule_free


@refuse_in_fabric
class SwitchScheduleFree(Callback):
    """Evaluate and save the averaged weights of a schedule-free optimizer; train the others.

    A schedule-free optimizer has two sets of weights, and two methods that move the model from one to the other,
    ``train()`` and ``eval()``. This callback calls them: the model has the average in the sanity check, validation,
    test, prediction, in every checkpoint and after the fit, also if an exception ends one of these; at every step it
    has the weights that are trained. Validation and checkpoints change no bit of the training: what ``eval()`` moved is
    put back from a copy, since ``train()`` alone gives it back up to rounding only. A checkpoint also has the trained
    weights, for an exact resume.

    With other optimizers it does nothing. Accepted are those with ``train``, ``eval`` and a group key ``train_mode``:
    schedulefree's and pytorch-optimizer's.

    Raises:
        UserError: in ``on_fit_start``, for a learning rate that changes after its warm-up, or for modules whose running
            statistics would be those of the trained weights (BatchNorm).
    """

    plugin: ClassVar[str] = "switch_schedulefree"
    slot: ClassVar[str] = "averaging"

    def __init__(self) -> None:
        self._trained: dict[int, Tensor] = {}  # copies of the trained weights while the model has the average, by id
        self._saved: dict[str, Tensor] = {}
        self._module: LightningModule | None = None
        self._optimizers: list[Any] = []
        self._undo: Callable[[], None] | None = None

    @given_once
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    # ---- the fit -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier fit has left."""
        attach(self)
        if stage == "fit":
            self._restore()
            self._saved = {}

    def check_optimizers(self, trainer: Trainer, module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
        """Refuse what does not go with a schedule-free optimizer.

        Args:
            trainer: with its callbacks.
            module: to be trained.
            optimizers: of the module.

        Raises:
            UserError: for a learning rate that changes after its warm-up, or modules with running statistics.
        """
        if any(map(is_schedule_free, optimizers)):
            check_support(trainer, module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, and check schedule and modules."""
        self._optimizers = [each for each in trainer.optimizers if is_schedule_free(each)]
        if self._optimizers:
            self.check_optimizers(trainer, pl_module, self._optimizers)
            self._module = pl_module
            self._undo = change_saved_weights(trainer, self._averaged_state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the weights that are trained: those in the checkpoint, exactly, if the run was resumed."""
        if self._saved:
            for name, p in pl_module.named_parameters():
                if name in self._saved and _in_average(self._optimizers, p):
                    self._trained[id(p)] = self._saved[name]
            self._saved = {}
        self._to_trained()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train the weights that are trained, whatever was restored or evaluated since the last step."""
        if any(not group["train_mode"] for each in self._optimizers for group in each.param_groups):
            self._to_trained()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._to_average()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on, after a validation within the fit."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._to_trained()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the model; the trained weights are kept for a checkpoint at the fit's end."""
        self._to_average()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the average in the model also after an exception; a checkpoint may still be saved."""
        self._to_average()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what was changed on the Trainer, and free the copy."""
        if stage == "fit":
            self._restore()

    # ---- evaluation alone --------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self._evaluate(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average."""
        self._evaluate(trainer)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note in the saved optimizer that the saved weights are the average."""
        for index, optimizer in enumerate(trainer.optimizers):
            if optimizer in self._optimizers:
                for group in checkpoint["optimizer_states"][index].get("param_groups", ()):
                    group["train_mode"] = False

    def state_dict(self) -> dict[str, Any]:
        """Return the trained weights by name; none of sharded parameters, which are computed from the average."""
        attach(self)
        if not self._optimizers or self._module is None:
            return {"trained": self._saved}
        found = {
            name: self._trained.get(id(p), p.detach())
            for name, p in self._module.named_parameters()
            if _in_average(self._optimizers, p) and not isinstance(p, DTensor)
        }
        return {"trained": found}

    @names_its_plugin
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the trained weights for the start of the training.

        Args:
            state_dict: from `state_dict`.
        """
        self._saved = dict(state_dict["trained"])

    # ---- switching ---------------------------------------------------------------------------------------------------

    def _to_average(self) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if group["train_mode"]:
                    moved = [p for p in group["params"] if "z" in optimizer.state.get(p, {})]
                    self._trained |= {id(p): p.detach().clone() for p in moved}
            optimizer.eval()

    @torch.no_grad()
    def _to_trained(self) -> None:
        for optimizer in self._optimizers:
            optimizer.train()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) in self._trained:
                        p.copy_(self._trained[id(p)])
        self._trained = {}

    def _averaged_state(self, collect: Callable[[], Any]) -> Any:
        """The weights of a checkpoint: the average, whatever the model has at the moment."""
        if not any(group["train_mode"] for each in self._optimizers for group in each.param_groups):
            return collect()
        self._to_average()
        try:
            return {name: each.clone() if isinstance(each, Tensor) else each for name, each in collect().items()}
        finally:
            self._to_trained()

    def _evaluate(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            if is_schedule_free(optimizer):
                optimizer.eval()  # type: ignore[attr-defined]

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._optimizers, self._module, self._trained = [], None, {}


def _in_average(optimizers: Sequence[Optimizer], parameter: Tensor) -> bool:
    """Whether an optimizer has an average for a parameter, and so two sets of weights."""
    return any("z" in optimizer.state.get(parameter, {}) for optimizer in optimizers)

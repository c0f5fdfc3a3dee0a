"""How a strategy that divides the model among processes restores a verified checkpoint: each its own parts only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lightning.pytorch import Trainer

from stabletrain.runtime.checkpoints.agreement import Together
from stabletrain.runtime.checkpoints.content import check_content, explain_weights, report_conversions
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.hyper_parameters import live_object
from stabletrain.runtime.checkpoints.loading import is_ours, is_own, load_good, load_own
from stabletrain.runtime.checkpoints.names import parameter_names, with_own_names
from stabletrain.runtime.checkpoints.optimizer_keys import for_parameters
from stabletrain.runtime.checkpoints.placing import live_tensors, placed, places_of
from stabletrain.runtime.internals import dividing, shards
from stabletrain.runtime.internals import trainer as trainer_internals

Instead: TypeAlias = Callable[[Any], Any]
"""From the path that is given, the one that this process reads; called on all ranks."""


class DividedReading:
    """Restores model and optimizers of one trainer; checkpoints that are not ours are left to its strategy.

    Args:
        trainer: before it restores a checkpoint.
        instead: what is read instead of a path.
    """

    def __init__(self, trainer: Trainer, instead: Instead = lambda path: path) -> None:
        self._trainer, self._instead = trainer, instead
        self._checkpoint: dict[str, Any] | None = None
        self._undo = [
            dividing.around_reading(trainer, self._read),
            dividing.around_weights(trainer, self._load_weights),
            dividing.before_optimizers(trainer, self._load_optimizers),
        ]

    def remove(self) -> None:
        """Let the strategy read all checkpoints again."""
        while self._undo:
            self._undo.pop()()

    def _read(self, load: Callable[[], dict[str, Any]], path: Any) -> dict[str, Any]:
        trainer = self._trainer
        path = self._instead(path)
        own = is_own(path)
        if not own:
            path, ours = trainer.strategy.broadcast((path, is_ours(path)))
            if not ours:
                return load()
        module = trainer_internals.unwrapped(trainer.lightning_module)
        shards.reshard(module)
        optimizers = trainer.optimizers if trainer.state.fn == "fit" else []
        try:
            self._checkpoint = (load_own if own else load_good)(
                Path(path),
                lambda checkpoint: check_content(checkpoint, trainer),
                functools.partial(live_object, trainer),
                places_of(module, optimizers),
                Together(trainer),
            ).checkpoint
        except CheckpointError as error:
            raise CheckpointError(f"{error} (config key resume)") from None
        if trainer.is_global_zero:
            report_conversions(self._checkpoint, module)
        return self._checkpoint

    def _load_weights(self, load: Callable[[], None], checkpoint: Mapping[str, Any]) -> None:
        if self._checkpoint is None:
            load()
            return
        module = trainer_internals.unwrapped(self._trainer.lightning_module)
        live = live_tensors(module)
        state = with_own_names(checkpoint["state_dict"], module)
        for name, value in state.items():
            if name in live:
                state[name] = placed(value, live[name])
        explain_weights(lambda: module.load_state_dict(state, strict=module.strict_loading), state, module)

    def _load_optimizers(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        names = parameter_names(trainer_internals.unwrapped(self._trainer.lightning_module))
        for optimizer, saved in zip(self._trainer.optimizers, checkpoint["optimizer_states"], strict=False):
            lacking = [each for each in optimizer.defaults if any(each not in g for g in saved["param_groups"])]
            if lacking:
                raise CheckpointError(
                    f"resume: the checkpoint is of another optimizer: it has no {lacking[0]}, which "
                    f"{type(optimizer).__name__} needs. Use the optimizer that it was saved with (config key "
                    "optimizer), or another checkpoint (config key resume)"
                )
            groups = [group["params"] for group in optimizer.param_groups]
            state = for_parameters(saved, [[names.get(p, p) for p in group] for group in groups])
            for i, p in enumerate(p for group in groups for p in group):
                if isinstance(values := state["state"].get(i), dict):
                    state["state"][i] = {key: placed(each, p) for key, each in values.items()}
            optimizer.load_state_dict(state)

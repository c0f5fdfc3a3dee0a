"""A fit goes on from the newest checkpoint of its folder by itself, if the checkpoint is of the same recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.checkpoints.agreement import Together
from stabletrain.runtime.checkpoints.loading import is_ours, newest_entry
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo
from stabletrain.runtime.checkpoints.what_is_trained import describe_model, describe_training, differences
from stabletrain.runtime.internals import resuming
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.settings import worded

logger = logging.getLogger("stabletrain")


class Trained:
    """What a fit trains, described for its checkpoints.

    Args:
        trainer: of the fit, in a hook ``setup``.
        ready: called when all is described: the optimizers exist, and no state of theirs was loaded.
    """

    def __init__(self, trainer: Trainer, ready: Callable[[], None] = lambda: None) -> None:
        self._trainer, self._ready = trainer, ready
        self.description: dict[str, str] = {}
        """By name; empty until the strategy has set up model and optimizers."""
        self.close = resuming.after_strategy_setup(trainer, self._describe)
        """Undoes what this has done to the trainer."""

    def model(self) -> dict[str, str]:
        """The part of the description that is known when the model exists."""
        return describe_model(trainer_internals.unwrapped(self._trainer.lightning_module))

    def _describe(self) -> None:
        trainer = self._trainer
        module, schedulers = trainer_internals.unwrapped(trainer.lightning_module), trainer.lr_scheduler_configs
        training = describe_training(module, list(trainer.optimizers), [each.scheduler for each in schedulers])
        self.description = {**self.model(), **training}
        self._ready()


class GoOn:
    """Lets a fit go on from the newest checkpoint of a folder; refuses one of another recipe.

    The recipe is that of run.yaml, if the run has one; else what the script trains (`what_is_trained`), which is
    compared before the state of an optimizer is loaded. A ``ckpt_path`` that the user gave wins.

    Args:
        trainer: of the fit, in a hook ``setup``, on all ranks.
        folder: of the checkpoints.
        recipe: hash of run.yaml; None: there is none.
        owner: name of the plugin, for messages.
        key: its config node, for messages, such as ``plugins.checkpoints``.
        named: its class, as a script knows it.
    """

    def __init__(self, trainer: Trainer, folder: Path, recipe: str | None, *, owner: str, key: str, named: str) -> None:
        self._trainer, self._folder, self._recipe = trainer, folder, recipe
        self._owner, self._key, self._named = owner, key, named
        self._found: CheckpointInfo | None = None
        self.has_gone_on = False
        """Whether the fit has gone on from the folder's checkpoint."""
        self.trained = Trained(trainer, self._compare)
        self._undo = resuming.go_on_from(trainer, self._choose, self._tell)

    def close(self) -> None:
        """Undo what this has done to the trainer."""
        self._undo()
        self.trained.close()

    def _choose(self) -> Path | None:
        ranks = Together(self._trainer)
        found, problem = ranks.share(self._look() if ranks.is_first else (None, ""))
        if problem:
            raise UserError(self._worded(problem))
        if found is not None:
            self._found = found
            self._compare()
        elif not is_ours(self._folder):
            if ranks.is_first:
                logger.warning("%s: there is no checkpoint in %s: starts from scratch", self._owner, self._folder)
            return None
        return self._folder  # with damaged ones only, reading it says what is wrong with each

    def _look(self) -> tuple[CheckpointInfo | None, str]:
        try:
            entry = newest_entry(self._folder)
        except OSError as error:
            return None, f"{self._folder} cannot be read ({error.strerror})"
        return None if entry is None else entry.manifest.info, ""

    def _compare(self) -> None:
        """Called when the model is known, and again when all is."""
        found, mine = self._found, self.trained.description or self.trained.model()
        if found is None:
            return
        theirs = found.trained if self.trained.description else {key: found.trained.get(key, "") for key in mine}
        different = differences(theirs, mine) if found.trained else []
        if self._recipe and found.recipe and self._recipe != found.recipe and not different:
            different = ["its run.yaml, in the keys that determine the training"]
        if different:
            raise UserError(
                self._worded(
                    f"the newest checkpoint in {self._folder} (step {found.step}) is of another recipe: "
                    f"{'; '.join(different)}. Use another folder for this one (config key {self._key}.folder), or "
                    f"delete that one; to go on from it all the same, name it (config key resume): {self._folder}"
                )
            )

    def _tell(self) -> None:
        trainer, self.has_gone_on = self._trainer, True
        if not trainer.is_global_zero:
            return
        step, end = trainer.global_step, ""
        if self._found is not None and not self._found.trained:
            end = " (what it was trained with is not known: it is of an earlier version)"
        if resuming.batches_are_over(trainer):
            end += (
                ", where this run has ended: there is nothing left to train. For a new run use another folder, for a "
                "longer one raise max_steps or max_epochs"
            )
        logger.warning("%s: goes on from step %d of %s%s", self._owner, step, self._folder, end)

    def _worded(self, problem: str) -> str:
        slot = self._key.rpartition(".")[2]
        return worded(f"{self._owner}: {self._key}.resume=auto: {problem}", slot, self._named)

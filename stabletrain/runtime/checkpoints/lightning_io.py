"""How ``ckpt_path=`` is read: folders of verified checkpoints, and Lightning's files as data only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from stabletrain.errors import UserError
from stabletrain.optim.loading import convert_when_loading
from stabletrain.runtime.checkpoints.agreement import Together
from stabletrain.runtime.checkpoints.content import check_content, explain_weights, report_conversions
from stabletrain.runtime.checkpoints.divided_reading import DividedReading, Instead
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.hyper_parameters import live_object
from stabletrain.runtime.checkpoints.loading import is_ours, is_own, load_good, load_own
from stabletrain.runtime.checkpoints.names import with_own_names
from stabletrain.runtime.checkpoints.single_file import load_file, with_known_classes
from stabletrain.runtime.internals import dividing
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.loader import override
from stabletrain.runtime.internals.packages import CheckpointIO, both
from stabletrain.runtime.plugin_state import FOREIGN_STATE


def check_when_reading(trainer: Trainer, instead: Instead = lambda path: path) -> Callable[[], None]:
    """Let a trainer read verified checkpoints, and check every checkpoint before anything of it is restored.

    A state that a callback, scheduler or data module cannot restore ends the run with one message. That of an optimizer
    in 32 bits is converted for one in 8 bits, and back.

    Args:
        trainer: before it restores a checkpoint; its strategy gathers checkpoints on rank 0, or divides the model with
            DTensors.
        instead: gets each path on all ranks, and returns what this rank reads: a copy in memory, or the path itself.

    Returns:
        The function that undoes this.
    """
    strategy = trainer.strategy
    if isinstance(strategy.checkpoint_io, VerifiedIO):  # somebody has asked for it before, as the launcher does
        return strategy.checkpoint_io.read_instead(instead)
    inner = strategy.checkpoint_io
    verified = strategy.checkpoint_io = VerifiedIO(inner, trainer, instead)
    undos = [convert_when_loading(trainer), trainer_internals.around_restoring(trainer, _explain)]
    if isinstance(strategy, both(ModelParallelStrategy)):
        undos.append(DividedReading(trainer, verified.instead).remove)
    else:
        undos.append(dividing.around_weights(trainer, functools.partial(_explain_weights, trainer)))

    def undo() -> None:
        for each in reversed(undos):
            each()
        if isinstance(strategy.checkpoint_io, VerifiedIO):
            strategy.checkpoint_io = inner

    return undo


def load_onto_cpu(trainer: Trainer) -> Callable[[], None]:
    """Let a trainer's own CheckpointIO read files with the state of 8-bit optimizers.

    It reads the files of ``torch.save`` with ``map_location="cpu"``: Lightning passes a function that does the same,
    which torch refuses for tensors that wrap others, such as the state of torchao's optimizers. That state is converted
    for an optimizer in 32 bits, and back.

    Args:
        trainer: before it restores a checkpoint.

    Returns:
        The function that undoes this.
    """
    inner, undo_converting = trainer.strategy.checkpoint_io, convert_when_loading(trainer)
    if isinstance(inner, VerifiedIO) or not _is_torchs(inner):
        return undo_converting
    load = inner.load_checkpoint

    def load_checkpoint(path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        target = "cpu" if map_location is None else map_location
        found: dict[str, Any] = with_known_classes(lambda: load(path, target, weights_only))
        return found

    undo_loading = override(inner, "load_checkpoint", load_checkpoint)

    def undo() -> None:
        undo_loading()
        undo_converting()

    return undo


class VerifiedIO(CheckpointIO):
    """Reads verified checkpoints, the same one on all ranks, and checks what another CheckpointIO reads.

    Args:
        inner: reads and writes single files.
        trainer: that restores the checkpoints.
        instead: as for `check_when_reading`.
    """

    def __init__(self, inner: CheckpointIO, trainer: Trainer, instead: Instead = lambda path: path) -> None:
        self.inner = inner
        self._trainer, self._instead = trainer, instead

    def instead(self, path: Any) -> Any:
        """What this process reads instead of a path."""
        return self._instead(path)

    def read_instead(self, instead: Instead) -> Callable[[], None]:
        """Let another function say what is read instead of a path; returns the function that undoes this."""
        before, self._instead = self._instead, instead

        def undo() -> None:
            self._instead = before

        return undo

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; single files with ``weights_only=True``, unless it is False.

        Args:
            path: the checkpoint.
            map_location: where the tensors of single files go instead, as for ``torch.load``.
            weights_only: False: also build objects from it, which can run code.

        Raises:
            CheckpointError: on all ranks, if there is none that all of them can read.
        """
        path = self.instead(path)
        if is_ours(path):
            checkpoint = self._load_verified(path)
        else:
            checkpoint = self._load_other(path, map_location, weights_only)
        if self._trainer.is_global_zero:
            report_conversions(checkpoint, self._trainer.lightning_module)
        return checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a single file with the inner CheckpointIO."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a single file with the inner CheckpointIO."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Called by Lightning at the end of a run."""
        self.inner.teardown()

    def _load_verified(self, path: Any) -> dict[str, Any]:
        try:
            load = load_own if is_own(path) else load_good
            return load(
                Path(path),
                lambda checkpoint: check_content(checkpoint, self._trainer),
                functools.partial(live_object, self._trainer),
                ranks=Together(self._trainer),
            ).checkpoint
        except CheckpointError as error:
            raise CheckpointError(f"{error} (config key resume)") from None

    def _load_other(self, path: Any, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
        """Of each rank: a file, a URL, or the folder of a sharded strategy. ``weights_only=False`` means trust."""
        # Lightning's default is a function, which torch refuses for tensors that wrap others (torchao's 8-bit state)
        map_location = "cpu" if map_location is None else map_location
        if weights_only is False:
            return self.inner.load_checkpoint(path, map_location, weights_only)

        def read_with_inner() -> Any:
            return self.inner.load_checkpoint(path, map_location, True)

        try:
            if "://" not in str(path) and (Path(path) / "meta.pt").is_file() and _is_torchs(self.inner):
                raise CheckpointError(
                    "it is a sharded checkpoint of Lightning, which is read as a pickle, by the strategies that write "
                    "it: resume with one of them (strategy=fsdp2), or convert it with "
                    "python -m lightning.pytorch.utilities.consolidate_checkpoint, if you trust it"
                )
            if "://" not in str(path) and not Path(path).is_dir() and _is_torchs(self.inner):
                checkpoint = load_file(path, read_with_inner)
            else:
                checkpoint = read_with_inner()
            check_content(checkpoint, self._trainer)
        except CheckpointError as error:
            raise CheckpointError(
                f"resume: {path}: {str(error).removeprefix(f'{path} ')} (config key resume)"
            ) from error
        return checkpoint


def _is_torchs(inner: CheckpointIO) -> bool:
    """Whether a CheckpointIO reads files of ``torch.save``; some wrap another one."""
    return isinstance(getattr(inner, "checkpoint_io", inner), both(TorchCheckpointIO))


def _explain_weights(trainer: Trainer, load: Callable[[], None], checkpoint: Mapping[str, Any]) -> None:
    module = trainer_internals.unwrapped(trainer.lightning_module)
    state = with_own_names(checkpoint["state_dict"], module)
    if isinstance(checkpoint, dict) and state.keys() != checkpoint["state_dict"].keys():
        checkpoint["state_dict"] = state
    explain_weights(load, state, module)


def _explain(what: str, restore: Callable[[], None]) -> None:
    try:
        restore()
    except UserError:
        raise
    except FOREIGN_STATE as error:
        raise CheckpointError(
            f"resume: the checkpoint's state of the {what} cannot be restored ({type(error).__name__}: {error}). It "
            "was made by other code, or changed: use another checkpoint, or start from scratch (config key resume)"
        ) from error

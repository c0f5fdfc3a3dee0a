"""Whether a checkpoint holds what Lightning and torch restore from it: checked before anything is restored."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.migration.utils import migrate_checkpoint
from packaging.version import InvalidVersion, Version
from torch import Tensor

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.fields import INT_LIMIT, shown
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.snapshots.tensor_kinds import PLAIN

logger = logging.getLogger("stabletrain")

_VERSION = "pytorch-lightning_version"
_OF_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
_MIGRATED = (LookupError, TypeError, ValueError, AttributeError)


def check_content(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Check the entries that every Lightning checkpoint has; what modules and callbacks add is theirs to check.

    A parameter that is read with another kind of number (whole instead of real, say) is an error; if only the precision
    differs, torch converts it when it is loaded, and `report_conversions` says so.

    Args:
        checkpoint: what was read; one of an older Lightning is migrated.
        trainer: that is about to restore it.

    Raises:
        CheckpointError: naming the first entry that does not fit.
    """
    _require_version(checkpoint)
    _check_weights(checkpoint.get("state_dict"), trainer.lightning_module)
    is_fit = trainer.state.fn == "fit"
    for key in ("epoch", "global_step"):
        if is_fit or key in checkpoint:
            _require_count(key, checkpoint.get(key))
    if is_fit or "loops" in checkpoint:
        loops = _mapping("loops", checkpoint.get("loops"))
        for name, template in trainer_internals.loop_states(trainer).items():
            if name in loops or (is_fit and name == "fit_loop"):
                _check_loop(f"loops.{name}", loops.get(name), template)
    _check_training(checkpoint, is_fit)


def report_conversions(checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Log a warning if loading the weights changes their precision."""
    mine = _own_tensors(module)
    found = checkpoint["state_dict"].items()
    pairs = [(each.dtype, mine[name].dtype) for name, each in found if name in mine and isinstance(each, Tensor)]
    changed = [f"{saved} to {own}".replace("torch.", "") for saved, own in pairs if saved != own]
    if changed:
        logger.warning(
            "resume: the precision of %d tensors differs from the checkpoint's: they are converted from %s",
            len(changed),
            ", ".join(sorted(set(changed))),
        )


def explain_weights(load: Callable[[], object], state: Mapping[str, Any], module: LightningModule) -> None:
    """Load weights; if they are those of another model, the error names the first difference.

    Args:
        load: loads them.
        state: of the checkpoint.
        module: that gets them.

    Raises:
        CheckpointError: with the first name that is missing, or both shapes.
        RuntimeError: whatever else ``load`` raises.
    """
    try:
        load()
    except RuntimeError as error:
        difference = _first_difference(state, module)
        if difference is None:
            raise
        raise CheckpointError(
            f"resume: the checkpoint is of another model: {difference}. Use the model that it was saved with (config "
            "key model), or another checkpoint (config key resume)"
        ) from error


def _first_difference(state: Mapping[str, Any], module: LightningModule) -> str | None:
    mine = {name: each for name, each in module.state_dict().items() if isinstance(each, Tensor)}
    theirs = {name: each for name, each in state.items() if isinstance(each, Tensor)}
    for name, own in mine.items():
        if name not in theirs:
            return f"it has no {name}, which the model has with shape {list(own.shape)}"
        if theirs[name].shape != own.shape:
            return f"{name} has shape {list(theirs[name].shape)} in it, and {list(own.shape)} in the model"
    for name, found in theirs.items():
        if name not in mine:
            return f"it has {name} with shape {list(found.shape)}, which the model does not have"
    return None


def _require_version(checkpoint: dict[str, Any]) -> None:
    """Bring a checkpoint of an older Lightning into the present form, as Lightning does before it restores one."""
    version = checkpoint.get(_VERSION)
    try:
        if not isinstance(version, str) or len(version) > 100:
            raise InvalidVersion
        is_old = Version(version) < Version("2.0.0")
    except InvalidVersion:
        _fail(_VERSION, "a version", version)
    try:
        if is_old:
            migrate_checkpoint(checkpoint)
    except _MIGRATED as error:
        raise CheckpointError(
            f"checkpoint: Lightning cannot migrate it from version {version} ({type(error).__name__}: {error})"
        ) from None


def _check_weights(weights: Any, module: LightningModule) -> None:
    mine = _own_tensors(module)
    for name, value in _mapping("state_dict", weights).items():
        own = mine.get(name)
        if own is None:  # what a module adds in its own state_dict can be anything: metrics, for example, add lists
            continue
        if not isinstance(value, Tensor):
            _fail(f"state_dict.{name}", "a tensor", value)
        if _kind(own.dtype) != _kind(value.dtype):
            _fail(f"state_dict.{name}", f"a tensor of {own.dtype}, as in the model", value.dtype)


def _own_tensors(module: LightningModule) -> dict[str, Tensor]:
    """Parameters and buffers by name; without those of classes that quantize, which are loaded in another form."""
    found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in found if type(tensor) in PLAIN}


def _check_loop(path: str, state: Any, template: Mapping[str, Any]) -> None:
    for key, value in _mapping(path, state).items():
        if key.endswith("state_dict"):
            _check_loop_extra(f"{path}.{key}", value)
        elif key in template:
            _check_progress(f"{path}.{key}", value, template[key])


def _check_loop_extra(path: str, state: Any) -> None:
    """What a loop adds to its progress: counts, and the states of train loaders."""
    for key, value in _mapping(path, state).items():
        if key == "combined_loader":
            if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
                _fail(f"{path}.{key}", "a list of dicts", value)
        elif key == "_batches_that_stepped":
            _require_count(f"{path}.{key}", value)


def _check_progress(path: str, value: Any, template: Any) -> None:
    """Lightning copies all entries into the attributes of its counters, so names and types must be theirs."""
    if isinstance(template, dict):
        found = _mapping(path, value)
        for key in [*template, *found]:
            if key not in found or key not in template:
                _fail(f"{path}.{key}", "there" if key in template else "absent", found.get(key))
        for key, each in template.items():
            _check_progress(f"{path}.{key}", found[key], each)
    elif isinstance(template, bool):
        if type(value) is not bool:
            _fail(path, "true or false", value)
    else:
        _require_count(path, value)


def _check_training(checkpoint: Mapping[str, Any], is_fit: bool) -> None:
    """The states of callbacks, optimizers and schedulers, which files with weights only lack."""
    if is_fit and not {"optimizer_states", "lr_schedulers"} <= checkpoint.keys():
        raise CheckpointError(
            "it holds the weights only (save_weights_only): training cannot be resumed from it; load it in the model"
        )
    if "callbacks" in checkpoint and not isinstance(checkpoint["callbacks"], dict):
        _fail("callbacks", "a dict", checkpoint["callbacks"])
    for key in ("optimizer_states", "lr_schedulers"):
        states = checkpoint.get(key, [])
        if not isinstance(states, list | tuple):
            _fail(key, "a list", states)
        for i, state in enumerate(states):
            _mapping(f"{key}.{i}", state)
            if key == "optimizer_states" and "param_groups" in state:
                _check_optimizer(f"{key}.{i}", state)


def _check_optimizer(path: str, state: Mapping[str, Any]) -> None:
    if not isinstance(state.get("state"), dict):
        _fail(f"{path}.state", "a dict", state.get("state"))
    groups = state["param_groups"]
    if not isinstance(groups, list | tuple):
        _fail(f"{path}.param_groups", "a list", groups)
    for i, group in enumerate(groups):
        where = f"{path}.param_groups.{i}"
        if not isinstance(_mapping(where, group).get("params"), list | tuple):
            _fail(f"{where}.params", "a list", group.get("params"))
        if not all(type(each) in (int, str) for each in group["params"]):
            _fail(f"{where}.params", "numbers or names", group["params"])
        if group.get("lr") is not None and not _is_number(group["lr"], math.inf):
            _fail(f"{where}.lr", "a number >= 0", group["lr"])
        betas = group.get("betas", ())
        if not isinstance(betas, list | tuple) or not all(_is_number(each, 1.0) for each in betas):
            _fail(f"{where}.betas", "numbers from 0 to 1", betas)
        if "amsgrad" in group:
            _check_averages(f"{path}.state", [state["state"].get(each) for each in group["params"]])


def _check_averages(path: str, states: Sequence[Any]) -> None:
    """Adam and AdamW fail at their first step if a parameter has one of these entries without the others.

    Their groups have the option ``amsgrad``. Optimizers such as Adafactor use the same names, but for some parameters.
    """
    known = [each for each in states if isinstance(each, dict) and each]
    needed = {name for each in known for name in each if name in _OF_ADAM}
    for each in known:
        for name in needed:
            if not isinstance(each.get(name), Tensor) and not (name == "step" and type(each.get(name)) in (int, float)):
                _fail(f"{path}.{name}", "there for every parameter of its group", each.get(name))


def _is_number(value: Any, below: float) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < below


def _mapping(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _fail(path, "a dict with text as keys", value)
    return value


def _require_count(path: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < INT_LIMIT:
        _fail(path, "a count >= 0", value)


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating"
    return "bool" if dtype == torch.bool else "integer"


def _fail(path: str, expected: str, got: Any) -> NoReturn:
    raise CheckpointError(f"checkpoint: {path} must be {expected}, got {shown(got)}")

"""State of optimizers in a checkpoint that their ``state_dict`` does not show, and a warning for what cannot be saved.

Numbers and tensors in attributes are saved if training has changed them, and the groups and the state of optimizers
that an optimizer holds. Flags and texts are saved only if they have
changed after the first step: optimizers note in such attributes what they have set up in this process.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.checkpoints.data_only import refused_in
from stabletrain.runtime.checkpoints.lightning_io import VerifiedIO
from stabletrain.runtime.hidden.plain import Unsaved, from_plain, to_plain
from stabletrain.runtime.internals.optimizer_attributes import Found, find, is_data, marks_of

_Key = tuple[int, str, str]
"""Number of the optimizer, path of the object from it, and name of the attribute; empty for a generator."""
_GROUPS, _STATE = "param_groups", "state"


class OptimizerState:
    """Saves and restores the attributes of optimizers.

    Args:
        trainer: in ``setup`` of a fit.
        module: that is trained.
        name: of the plugin, to start messages with.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        self._trainer, self._module, self._name = trainer, module, name
        self._optimizers: Sequence[Optimizer] = ()
        self._first: dict[_Key, list[Any]] = {}  # numbers and tensors when the fit started
        self._settled: dict[_Key, list[Any]] | None = None  # and all else, after the first step
        self._steps = 0
        self._loaded: list[list[Any]] = []
        self._restored: set[_Key] = set()
        self._has_begun = False
        self._warned: set[str] = set()

    def load(self, saved: list[list[Any]]) -> None:
        """Restore this when training starts.

        Args:
            saved: from `state`.
        """
        self._loaded = saved

    def on_fit_start(self, optimizers: Sequence[Optimizer]) -> None:
        """Before the optimizers' states are loaded.

        Args:
            optimizers: of the fit.
        """
        self._optimizers = optimizers
        self._first = {key: _marks(value, flags=False) for key, value in self._values()}

    def on_loop_start(self) -> None:
        """Restore what was loaded; call it after ``on_train_start`` of all callbacks and of the module."""
        self._has_begun = True
        if not self._loaded:
            return
        found = [find(each, self._module) for each in self._optimizers]
        unknown = [saved for saved in self._loaded if not self._put(found, *saved)]
        if unknown:
            names = ", ".join(f"{path}.{name}" for _, path, name, _ in unknown[:4])
            rank_zero_warn(
                f"{self._name}: the checkpoint holds attributes of optimizers that this run does not have ({names}): "
                "they are not restored"
            )
        self._loaded = []

    def update_begins(self) -> None:
        """A step of an optimizer begins."""
        self._steps += 1
        if self._steps > len(self._optimizers) and self._settled is None:
            self._settled = {key: _marks(value, flags=True) for key, value in self._values()}

    def state(self) -> list[list[Any]]:
        """What training has changed, as tensors and plain Python types: `_Key` and value of each."""
        if not self._has_begun:
            return self._loaded
        saved = []
        for key, value in (*self._values(), *self._unshown()):
            if not self._is_changed(key, value):
                continue
            try:
                saved.append([*key, self._plain(value)])
            except Unsaved:
                self._warn(
                    f"{'.'.join(key[1:])} cannot be saved, so a resumed run starts without: expected numbers, tensors "
                    "and containers of them. Return it from the optimizer's state_dict"
                )
        self._check_readable()
        return saved

    def _is_changed(self, key: _Key, value: Any) -> bool:
        if key in self._restored or _marks(value, flags=False) != self._first.get(key, []):
            return True
        return self._settled is not None and _marks(value, flags=True) != self._settled.get(key, [])

    def _values(self) -> Iterator[tuple[_Key, Any]]:
        """All attributes that may be state; not those of objects within ``state``, which its ``state_dict`` shows."""
        for i, optimizer in enumerate(self._optimizers):
            found = find(optimizer, self._module)
            for owner in found.owners:
                if ".state[" not in owner.path:
                    values = owner.state().items()
                    yield from (((i, owner.path, name), value) for name, value in values if is_data(value))
                if isinstance(owner.thing, Optimizer) and owner.thing is not optimizer:
                    yield (i, owner.path, _GROUPS), [_options(group) for group in owner.thing.param_groups]
            yield from (((i, path, ""), generator.get_state()) for path, generator in found.generators)
            yield from (((i, path, ""), value) for path, value in found.values if ".state[" not in path)

    def _plain(self, value: Any) -> list[Any]:
        if isinstance(value, dict) and value and all(isinstance(key, Tensor) for key in value):
            names = {p: name for name, p in self._module.named_parameters()}
            if not all(key in names for key in value):
                raise Unsaved
            return ["by parameter", {names[key]: to_plain(each) for key, each in value.items()}]
        return ["value", to_plain(value)]

    def _put(self, found: list[Found], number: int, path: str, name: str, plain: list[Any]) -> bool:
        """Set an attribute; False if there is no such optimizer or object."""
        if number >= len(found):
            return False
        device, (kind, content) = self._trainer.strategy.root_device, plain
        self._restored.add((number, path, name))
        if not name:
            generators = [each for at, each in found[number].generators if at == path]
            for each in generators[:1]:
                each.set_state(from_plain(content, torch.device("cpu")))
            return bool(generators)
        owner = next((each for each in found[number].owners if each.path == path), None)
        if owner is None:
            return False
        if isinstance(owner.thing, Optimizer) and name in (_GROUPS, _STATE):
            return _put_into(owner.thing, name, from_plain(content, device))
        if kind == "by parameter":
            parameters: dict[str, nn.Parameter] = dict(self._module.named_parameters())
            known = {key: each for key, each in content.items() if key in parameters}
            owner.names[name] = {parameters[key]: from_plain(each, device) for key, each in known.items()}
            return len(known) == len(content)
        value, live = from_plain(content, device), owner.names.get(name)
        if isinstance(value, Tensor) and isinstance(live, Tensor) and value.shape == live.shape:
            with torch.no_grad():
                live.copy_(value)
        else:
            owner.names[name] = value
        return True

    def _unshown(self) -> Iterator[tuple[_Key, Any]]:
        """The state of optimizers that an optimizer holds and its ``state_dict`` does not show."""
        for i, optimizer in enumerate(self._optimizers):
            inner = [each for each in find(optimizer, self._module).owners if isinstance(each.thing, Optimizer)]
            shown = _shown(optimizer) if len(inner) > 1 else None
            for owner in inner:
                if shown is not None and owner.thing is not optimizer and not _is_in(owner.thing, shown):
                    yield (i, owner.path, _STATE), owner.thing.state_dict()["state"]

    def _check_readable(self) -> None:
        """Warn of what a resumed run would refuse to read."""
        for optimizer in self._optimizers:
            shown = _shown(optimizer)
            name = type(optimizer).__name__
            is_ours = isinstance(self._trainer.strategy.checkpoint_io, VerifiedIO)  # refuses it when it is written
            if shown is not None and not is_ours and (refused := refused_in(shown)):
                self._warn(
                    f"the state of the optimizer {name} holds a {refused.kind} ({refused.path}), which is not read "
                    "from a checkpoint as data: resuming from it will fail, unless the file is trusted "
                    "(fit(weights_only=False)). Use another optimizer"
                )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"{self._name}: {message}")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _put_into(optimizer: Optimizer, name: str, value: Any) -> bool:
    if name == _STATE:
        optimizer.load_state_dict({**optimizer.state_dict(), _STATE: value})
        return True
    for group, saved in zip(optimizer.param_groups, value, strict=False):
        for key, each in saved.items():
            if isinstance(each, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(each)
            else:
                group[key] = each
    return len(optimizer.param_groups) == len(value)


def _shown(optimizer: Optimizer) -> dict[str, Any] | None:
    """The ``state_dict``; None for one that must be collected from all ranks first (ZeroRedundancyOptimizer)."""
    try:
        return optimizer.state_dict()
    except RuntimeError:
        return None


def checked(saved: Any) -> list[list[Any]]:
    """A state of `OptimizerState`, read from a checkpoint of any content.

    Raises:
        TypeError, ValueError: if it is something else.
    """
    for number, path, name, (kind, content) in saved:
        if type(number) is not int or not isinstance(path, str) or not isinstance(name, str):
            raise TypeError("expected the path of an attribute")
        for each in content.values() if kind == "by parameter" else [content]:
            from_plain(each, torch.device("cpu"))
    return list(saved)


def _marks(value: Any, flags: bool) -> list[Any]:
    if isinstance(value, torch.Tensor | int | float | complex | str | list | tuple | dict | None):
        found = list(marks_of(value))
    else:
        try:
            found = [pickle.dumps(value)]
        except Exception:  # code of any class
            found = []
    return found if flags else [each for each in found if not (each is None or isinstance(each, bool | str))]


def _is_in(inner: Optimizer, shown: Any) -> bool:
    """Whether the tensors in the state of an optimizer are in a ``state_dict``."""
    pointers = {each.data_ptr() for each in _tensors(shown)}
    return all(each.data_ptr() in pointers for each in _tensors(inner.state))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)

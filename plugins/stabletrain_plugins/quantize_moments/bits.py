"""How many bits the state of each parameter has: decided by its group, never by other optimizers of the process."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from stabletrain.errors import UserError, require
from stabletrain.extras import require as require_package
from stabletrain.optim.conversion import converted

Bits: TypeAlias = Literal[8, 32]

logger = logging.getLogger("stabletrain")


def bitsandbytes_class(name: str) -> Any:
    """Return an optimizer class of bitsandbytes; if that is not installed, one that raises a `UserError`.

    Args:
        name: such as ``AdamW8bit``.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        return getattr(importlib.import_module("bitsandbytes.optim"), name)

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        require_package("bitsandbytes", f"{name} (config key optimizer)")

    return type(name, (Optimizer,), {"__init__": refuse})


class BitsPerGroup:
    """Mixed into an 8-bit optimizer of bitsandbytes: the bits of a parameter's state are those of its group.

    They are the group's ``optim_bits``; without it ``embedding_bits`` in groups whose ``kind`` is ``"embedding"``, and
    8 in others. bitsandbytes has one manager of exceptions for the whole process, keyed by the position and the address
    of a parameter, so that an exception for one model changes the bits in the next one. Here each optimizer has its
    own: exceptions for its own parameters, which bitsandbytes' own embedding classes and ``override_config`` make, hold
    as usual; those that only share a position with one of its parameters are ignored, and that is logged once.
    """

    param_groups: list[dict[str, Any]]
    mng: Any

    def own_exceptions(self, embedding_bits: Bits, min_8bit_size: int) -> None:
        """Check the arguments, and detach the optimizer from the manager of the process; at the constructor's end.

        Args:
            embedding_bits: of groups of the kind ``"embedding"``: 8 or 32.
            min_8bit_size: tensors with fewer elements have 32-bit state, >= 0.

        Raises:
            UserError: if an argument or a group's ``optim_bits`` is out of range.
        """
        name = type(self).__name__
        require(embedding_bits in (8, 32), name, "embedding_bits", "8 or 32", embedding_bits, "optimizer")
        require(min_8bit_size >= 0, name, "min_8bit_size", ">= 0 elements", min_8bit_size, "optimizer")
        self._embedding_bits: Bits = embedding_bits
        for group in self.param_groups:
            self._set_bits(group)
        manager: Any = type(self.mng)
        self.mng = object.__new__(manager)
        self.mng.initialize()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group` does; its ``optim_bits`` is checked."""
        _check_bits(type(self).__name__, param_group)
        super().add_param_group(param_group)  # type: ignore[misc]
        if hasattr(self, "_embedding_bits"):  # not within the constructor
            self._set_bits(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load a state: of this class, or in 32 bits of the same algorithm, which is converted.

        Args:
            state_dict: from ``state_dict()``.
            move_to_device: whether its tensors move to the parameters' device.

        Raises:
            UserError: if it is the state of another algorithm, or of other parameters.
        """
        super().load_state_dict(converted(state_dict, self), move_to_device)  # type: ignore[misc, arg-type]

    def check_overrides(self) -> None:
        """Read the process's exceptions for this optimizer's own parameters; called at the first step."""
        shared = type(self.mng).get_instance()
        mine = {id(p): position for position, p in self._positions()}
        for module, name, config in shared.module_weight_config_triple:
            if id(getattr(module, name, None)) in mine:
                self.mng.pid2config[id(getattr(module, name))] = config
        for key in mine.keys() & shared.pid2config.keys():
            self.mng.pid2config[key] = shared.pid2config[key]
        foreign = [
            position
            for key, position in mine.items()
            if position in shared.index2config and key not in self.mng.pid2config
        ]
        if foreign:
            logger.warning(
                "%s: bitsandbytes' GlobalOptimManager holds settings of another model for %d positions (group, "
                "parameter) that this optimizer has too, such as %s: %s. They are ignored: the bits of a parameter's "
                "state are those of its group (optim_bits, embedding_bits)",
                type(self).__name__,
                len(foreign),
                foreign[0],
                shared.index2config[foreign[0]],
            )

    def get_config(self, gindex: int, pindex: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of one parameter's update; ``optim_bits`` is that of its group."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        if "optim_bits" in group:
            config["optim_bits"] = group["optim_bits"]
        return config

    def _set_bits(self, group: dict[str, Any]) -> None:
        """Write the bits of embeddings into their group, for whoever shows groups, and for checkpoints."""
        if group.get("kind") == "embedding":
            group.setdefault("optim_bits", self._embedding_bits)

    def _positions(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                yield (index, place), parameter


def _check_bits(name: str, group: Mapping[str, Any]) -> None:
    if (bits := group.get("optim_bits", 8)) not in (8, 32):
        raise UserError(f"{name}: optim_bits of a parameter group: expected 8 or 32, got {bits!r}")

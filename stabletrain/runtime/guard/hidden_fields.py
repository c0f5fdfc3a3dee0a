"""Callbacks are dataclasses, for their arguments, but OmegaConf must not take them for structured configs."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

_FIELDS, _PARAMS = "__dataclass_fields__", "__dataclass_params__"


class HiddenFields(ABCMeta):
    """Metaclass of callbacks: `dataclasses.is_dataclass` is False for them and for their classes.

    OmegaConf turns dataclass instances into DictConfigs, also those in the arguments of ``hydra.utils.instantiate``; it
    asks for the attribute ``__dataclass_fields__`` of the class, which this metaclass refuses. The fields are kept in a
    class of their own, next in the method resolution order: there `dataclasses.dataclass` finds those to inherit, and
    `dataclasses.fields` those of an instance.
    """

    def mro(cls) -> list[type]:
        """The method resolution order, with the class that keeps the fields of this one."""
        keeper = type(f"{cls.__name__}Fields", (), {"__module__": cls.__module__})
        return [cls, keeper, *super().mro()[1:]]

    @property
    def __dataclass_fields__(cls) -> dict[str, Any]:
        raise AttributeError(f"{cls.__name__} is a callback, and not for use as a dataclass")

    @__dataclass_fields__.setter
    def __dataclass_fields__(cls, fields: dict[str, Any]) -> None:
        keeper = cls.__mro__[1]
        setattr(keeper, _FIELDS, fields)
        setattr(keeper, _PARAMS, cls.__dict__[_PARAMS])

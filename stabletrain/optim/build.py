"""Build an optimizer of a module's parameters from a class and some of its arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from stabletrain.optim.groups import check_groups, parameter_groups
from stabletrain.optim.options import KEY, GroupOptions
from stabletrain.optim.table import log_table

MakeOptimizer = Callable[..., Optimizer]
_HOOK = "configure_optimizers"
_REPLACED = "replaced"


class Arguments:
    """The arguments of an optimizer's class, some of which are given.

    Args:
        make: the class, or a ``functools.partial`` of it.
    """

    def __init__(self, make: MakeOptimizer) -> None:
        self._parameters = _parameters(make)
        self._given: Mapping[str, Any] = make.keywords if isinstance(make, functools.partial) else {}

    def has(self, name: str) -> bool:
        """Whether there is such an argument."""
        return name in self._parameters

    def is_given(self, name: str) -> bool:
        """Whether the user has set it."""
        return name in self._given

    def unknown(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of the names that are no argument, each with the arguments; none if the class takes any."""
        if any(each.kind is each.VAR_KEYWORD for each in self._parameters.values()):
            return {}
        known = [name for name in self._parameters if name != "params"]
        return {name: known for name in names if name not in self._parameters}

    def value(self, name: str) -> Any:
        """Its value, or its default; None if it has none, or does not exist."""
        if name in self._given:
            return self._given[name]
        parameter = self._parameters.get(name)
        return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _parameters(make: MakeOptimizer) -> dict[str, inspect.Parameter]:
    """The parameters of a class, also those that it passes to its base classes as ``**kwargs``."""
    kind = make.func if isinstance(make, functools.partial) else make
    found = dict(inspect.signature(make).parameters)
    for base in kind.__mro__[1:] if isinstance(kind, type) else ():
        if base is Optimizer or not any(each.kind is each.VAR_KEYWORD for each in found.values()):
            break
        inherited = inspect.signature(base).parameters
        own = {name: each for name, each in found.items() if each.kind is not each.VAR_KEYWORD}
        found = {**inherited, **own}
    return found


def build_optimizer(module: nn.Module, make: MakeOptimizer, options: GroupOptions, key: str = KEY) -> Optimizer:
    """Build the optimizer of all trained parameters of a module, in groups decided here; log their table.

    An optimizer without an argument ``weight_decay`` gets one group, unless the options ask for several.

    Args:
        module: the module.
        make: the optimizer's class with its arguments.
        options: of the groups.
        key: config key of the options, for messages.

    Raises:
        UserError: see `stabletrain.optim.groups.parameter_groups`.
    """
    arguments = Arguments(make)
    decay = arguments.value("weight_decay")
    groups = parameter_groups(
        module,
        weight_decay=decay or 0.0,
        lr=arguments.value("lr"),
        decay_embeddings=options.decay_embeddings,
        layer_decay=options.layer_decay,
        layers=options.layers,
        overrides=options.overrides,
        key=key,
    )
    if not arguments.has("weight_decay") and options == GroupOptions():
        groups = [{"params": [each for each in module.parameters() if each.requires_grad]}]
    optimizer = make(groups)
    check_groups(module, optimizer.param_groups)
    log_table(module, optimizer)
    return optimizer


class Replaced(NamedTuple):
    """What `replace_configure_optimizers` has replaced.

    Args:
        method: the attribute of the module instance before; None: there was none.
        options: of the groups that the replacement makes; None: it does not say.
    """

    method: Any
    options: GroupOptions | None


def replace_configure_optimizers(
    module: Any, configure: Callable[[Any], Any], options: GroupOptions | None = None
) -> Callable[[], None]:
    """Replace ``configure_optimizers`` of one module instance; its class is unchanged.

    Args:
        module: a LightningModule.
        configure: called with the module.
        options: of the groups that it makes, for what replaces it in turn.

    Returns:
        A function that restores the module.
    """
    before = vars(module).get(_HOOK)

    def configure_optimizers(module: Any) -> Any:
        return configure(module)

    setattr(configure_optimizers, _REPLACED, Replaced(before, options))
    # a bound method, because Lightning checks for overridden hooks by the method's function
    bound = types.MethodType(configure_optimizers, module)
    setattr(module, _HOOK, bound)

    def undo() -> None:
        if vars(module).get(_HOOK) is not bound:
            return
        if before is None:
            delattr(module, _HOOK)
        else:
            setattr(module, _HOOK, before)

    return undo


def own_configure_optimizers(module: Any) -> tuple[Callable[[], Any], GroupOptions | None]:
    """Return a module's own method, also while `replace_configure_optimizers` has replaced it, and that one's options.

    Args:
        module: a LightningModule.
    """
    found, options = vars(module).get(_HOOK), None
    while isinstance(replaced := getattr(getattr(found, "__func__", None), _REPLACED, None), Replaced):
        found, options = replaced.method, options or replaced.options
    own: Callable[[], Any] = getattr(type(module), _HOOK).__get__(module) if found is None else found
    return own, options

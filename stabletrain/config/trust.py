"""Which classes and functions a config may build: those of trusted packages that do not run other code.

A config may come from a tracking store or a download, and building it calls the objects that its ``_target_`` keys
name. So every name is resolved, and the module of the object is checked, not only its name: ``torch.os.system`` is
``posix.system``.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from stabletrain.config.discovery import owner_packages
from stabletrain.errors import UserError

ENV = "STABLETRAIN_TRUST"

BUILT_IN = frozenset({"stabletrain", "stabletrain_plugins", "torch", "lightning", "torchmetrics", "bitsandbytes"})
_LARGE = frozenset({"torch", "lightning"})

# Modules of trusted packages that run code, load pickles or start processes.
_RUNS_CODE = (
    "torch.hub", "torch.package", "torch.jit", "torch.serialization", "torch.testing", "torch.multiprocessing",
    "torch.ops", "torch.classes", "torch.onnx", "torch.export", "torch.fx", "torch.compiler", "torch.library",
    "torch.utils.cpp_extension", "torch.utils.model_zoo", "torch.utils.collect_env", "torch.utils.benchmark",
    "torch.utils.bundled_inputs", "torch.utils.bottleneck", "torch.utils.show_pickle", "torch.utils.file_baton",
    "torch.utils.data.datapipes", "torch.distributed.run", "torch.distributed.launch", "torch.distributed.launcher",
    "torch.distributed.elastic", "torch.distributed.rpc", "torch.distributed.nn", "torch.distributed.argparse_util",
    "stabletrain.config", "stabletrain.launch", "stabletrain.cli.main", "stabletrain.worker", "stabletrain.testing",
    "lightning.app", "lightning.fabric.cli", "lightning.pytorch.cli", "lightning.fabric.utilities.load",
    "lightning.fabric.utilities.cloud_io", "lightning.fabric.utilities.consolidate_checkpoint",
    "lightning.pytorch.utilities.upgrade_checkpoint", "lightning.pytorch.utilities.consolidate_checkpoint",
    "lightning.pytorch.core.saving", "lightning.fabric.strategies.launchers", "lightning.pytorch.strategies.launchers",
)  # fmt: skip
# Parts of the large packages whose functions a config may call; elsewhere in them it may build classes only.
_FUNCTIONS = ("torch.nn", "torch.optim", "torch.distributed.fsdp", "torch.distributed.device_mesh")


class TrustError(UserError):
    """A config names an object that it may not build."""


class TargetError(UserError):
    """The object that a ``_target_`` names does not exist."""


def trusted_packages(extra: Iterable[str] = ()) -> frozenset[str]:
    """Return the packages from which a config may build objects.

    They are stabletrain, torch, lightning, torchmetrics and bitsandbytes; packages with an entry point of the group
    ``stabletrain.plugins``; and those in the environment variable ``STABLETRAIN_TRUST``, separated by commas.

    Args:
        extra: further packages, from the command line or from code, never from a config.
    """
    named = os.environ.get(ENV, "").split(",")
    return BUILT_IN | owner_packages() | {name.strip() for name in (*named, *extra) if name.strip()}


def resolve(target: object, trust: Iterable[str] = ()) -> Any:
    """Return the class or function that a ``_target_`` names, if a config may call it.

    Args:
        target: dotted name, such as ``torch.optim.AdamW``.
        trust: further trusted packages.

    Raises:
        TrustError: if the name, or the object itself, is not from a trusted package.
        TargetError: if there is no such object.

    >>> resolve("stabletrain.errors.UserError").__name__
    'UserError'
    >>> resolve("os.system")
    Traceback (most recent call last):
    ...
    stabletrain.config.trust.TrustError: 'os.system' may not be built from a config: package 'os' is not trusted; ...
    """
    packages = trusted_packages(trust)
    if not isinstance(target, str) or not target or not all(part.isidentifier() for part in target.split(".")):
        raise TargetError(f"expected the dotted name of a class or function, got {target!r}")
    top = target.split(".")[0]
    if not _covered(target, packages):
        raise TrustError(
            f"{target!r} may not be built from a config: package {top!r} is not trusted; trusted are "
            f"{', '.join(sorted(packages))}; if you trust its code, add --trust {top}"
        )
    _refuse_code_runners(target, target)
    found = _locate(target, packages)
    _check_object(target, found, packages)
    return found


def check_targets(node: object, trust: Iterable[str] = (), key: str = "") -> Iterator[tuple[str, UserError]]:
    """Yield the config key and the error of every ``_target_`` in a node that may not be built.

    Args:
        node: mappings, lists and plain values.
        trust: further trusted packages.
        key: the node's config key.
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            try:
                resolve(node["_target_"], trust)
            except UserError as error:
                yield f"{key}._target_" if key else "_target_", error
        for name, value in node.items():
            yield from check_targets(value, trust, f"{key}.{name}" if key else str(name))
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for index, value in enumerate(node):
            yield from check_targets(value, trust, f"{key}[{index}]")


def instantiate(node: Mapping[str, Any], *, trust: Iterable[str] = (), key: str = "") -> Any:
    """Check all targets in a config node, then build it; only this function calls Hydra's ``instantiate``.

    Args:
        node: a plain mapping with ``_target_``.
        trust: further trusted packages.
        key: the node's config key, for messages.

    Raises:
        TrustError: if a target may not be built.
        Exception: the exception that a constructor raises, not wrapped in Hydra's.
    """
    for where, error in check_targets(node, trust, key):
        raise type(error)(f"{where}: {error}")
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    try:
        return build(node, _convert_="all")
    except InstantiationException as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _covered(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _refuse_code_runners(target: str, name: str) -> None:
    if _covered(name, _RUNS_CODE) or name in ("torch.load", "torch.save"):
        raise TrustError(
            f"{target!r} may not be built from a config: it can run other code, load pickles or start processes; "
            f"call it from your own code instead"
        )
    if any(part.startswith("_") for part in target.split(".")):
        raise TrustError(f"{target!r} may not be built from a config: names that start with '_' are private")


def _locate(target: str, packages: frozenset[str]) -> Any:
    parts = target.split(".")
    found: Any = _import(parts[0], target)
    for index, part in enumerate(parts[1:], start=1):
        path = ".".join(parts[:index])
        following = getattr(found, part, None)
        if following is None and isinstance(found, ModuleType):
            following = _import(f"{path}.{part}", target, optional=True)
        if following is None:
            names = [name for name in dir(found) if not name.startswith("_")]
            near = get_close_matches(part, names, 1)
            hint = f"; did you mean '{path}.{near[0]}'?" if near else ""
            raise TargetError(f"{target!r}: {path!r} has no {part!r}{hint}")
        if isinstance(following, ModuleType) and not _covered(following.__name__, packages):
            raise TrustError(
                f"{target!r} may not be built from a config: it is part of {following.__name__!r}, which is not trusted"
            )
        found = following
    return found


def _import(name: str, target: str, *, optional: bool = False) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise TargetError(f"{target!r}: importing {name!r} failed: {error}") from error
        if optional:
            return None
        raise TargetError(f"{target!r}: there is no package {name!r}; install it or correct the name") from None


def _check_object(target: str, found: Any, packages: frozenset[str]) -> None:
    """Check the type of an object and the module that defines it."""
    bound_to = found.__self__ if inspect.ismethod(found) else None
    is_class = inspect.isclass(found)
    if not (is_class or inspect.isfunction(found) or inspect.isclass(bound_to)):
        raise TrustError(
            f"{target!r} may not be built from a config: expected a class, function or classmethod, "
            f"got a {type(found).__name__}"
        )
    for owner in (found, bound_to):
        home = getattr(owner, "__module__", None)
        if owner is None:
            continue
        if not isinstance(home, str) or not _covered(home, packages):
            raise TrustError(
                f"{target!r} may not be built from a config: it is defined in {home!r}, which is not trusted"
            )
        _refuse_code_runners(target, home)
    home = found.__module__
    if not is_class and home.split(".")[0] in _LARGE and not _covered(home, _FUNCTIONS):
        raise TrustError(
            f"{target!r} may not be built from a config: of {home.split('.')[0]} a config may build classes, and call "
            f"functions of {', '.join(_FUNCTIONS)}; call it from your own code instead"
        )

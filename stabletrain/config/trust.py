"""Which classes a config may build: subclasses of what its key needs, from trusted packages.

A config may come from a tracking store or a download, and building it calls what its ``_target_`` keys name. So a name
is accepted only if it leads to a class of the kind that its place needs (`stabletrain.config.kinds`), and the module
that defines the class is checked, not only the name: ``torch.os.system`` is ``posix.system``. Functions are never
accepted, and of methods only the presets of rules, such as ``stabletrain.ClipZScore.zclip``.
"""

from __future__ import annotations

import importlib
import inspect
import os
import typing
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from stabletrain.config.discovery import owner_packages
from stabletrain.config.kinds import described
from stabletrain.errors import UserError
from stabletrain.extras import pip_line

ENV = "STABLETRAIN_TRUST"

BUILT_IN = frozenset(
    {"stabletrain", "stabletrain_plugins", "torch", "lightning", "torchmetrics", "bitsandbytes", "datetime"}
)

OPTIMIZERS = frozenset(
    {
        "optimi.AdamW",
        "optimi.Lion",
        "optimi.StableAdamW",
        "pytorch_optimizer.AdEMAMix",
        "pytorch_optimizer.AdaGC",
        "pytorch_optimizer.Lamb",
        "pytorch_optimizer.Lion",
        "pytorch_optimizer.Prodigy",
        "pytorch_optimizer.SOAP",
        "pytorch_optimizer.SPAM",
        "pytorch_optimizer.StableAdamW",
        "pytorch_optimizer.StableSPAM",
        "schedulefree.AdamWScheduleFree",
        "schedulefree.SGDScheduleFree",
        "torchao.optim.AdamW8bit",
        "torchao.optim.AdamWFp8",
    }
)
"""Classes of packages that are not trusted as a whole: those that an option of ``optimizer`` builds.

Constructors of these packages take ``**kwargs`` and ignore what they do not know; a config may give them named
arguments only.
"""

_COMPILES = "it compiles or loads code"
_PROCESSES = "it starts processes or servers"
_INTERNAL = "it is no part of a run"
_SENDS = "it sends the run to a server as soon as it is built"
_DOWNLOADS = "it downloads data or weights"

EFFECTS = {
    "torch.jit": _COMPILES,
    "torch.fx": _COMPILES,
    "torch.export": _COMPILES,
    "torch.onnx": _COMPILES,
    "torch.package": _COMPILES,
    "torch.testing": _INTERNAL,
    "torch.utils.data.datapipes": "it opens files and runs functions by name",
    "torch.distributed.nn": _PROCESSES,
    "torch.distributed.rpc": _PROCESSES,
    "torch.distributed.elastic": _PROCESSES,
    "lightning.app": _PROCESSES,
    "lightning.fabric.cli": _PROCESSES,
    "lightning.pytorch.cli": _PROCESSES,
    "lightning.pytorch.serve": _PROCESSES,
    "lightning.fabric.plugins.environments.mpi": "it starts MPI as soon as it is built",
    "lightning.pytorch.loggers.comet": _SENDS,
    "lightning.pytorch.loggers.litlogger": _SENDS,
    "lightning.pytorch.loggers.wandb": _SENDS,
    "lightning.pytorch.loggers.mlflow": "it writes to mlruns/ in the current folder; use logger=mlflow",
    "lightning.pytorch.trainer": "a run has one Trainer; its arguments are in the config key trainer",
    "lightning.pytorch.demos.lstm": _DOWNLOADS,
    "lightning.pytorch.demos.mnist_datamodule": _DOWNLOADS,
    "lightning.pytorch.demos.transformer": _DOWNLOADS,
    "stabletrain.cli": _INTERNAL,
    "stabletrain.config": _INTERNAL,
    "stabletrain.launch": _INTERNAL,
    "stabletrain.testing": _INTERNAL,
    "stabletrain.worker": _INTERNAL,
    "torchmetrics.audio.dnsmos": _DOWNLOADS,
    "torchmetrics.audio.nisqa": _DOWNLOADS,
    "torchmetrics.image.arniqa": _DOWNLOADS,
    "torchmetrics.image.dists": _DOWNLOADS,
    "torchmetrics.image.fid": _DOWNLOADS,
    "torchmetrics.image.inception": _DOWNLOADS,
    "torchmetrics.image.kid": _DOWNLOADS,
    "torchmetrics.image.lpip": _DOWNLOADS,
    "torchmetrics.image.mifid": _DOWNLOADS,
    "torchmetrics.image.perceptual_path_length": _DOWNLOADS,
    "torchmetrics.multimodal.clip_iqa": _DOWNLOADS,
    "torchmetrics.multimodal.clip_score": _DOWNLOADS,
    "torchmetrics.text.bert": _DOWNLOADS,
    "torchmetrics.text.infolm": _DOWNLOADS,
    "torchmetrics.text.rouge": _DOWNLOADS,
    "torchmetrics.text.sacre_bleu": _DOWNLOADS,
    "torchmetrics.video.vmaf": _DOWNLOADS,
}
"""Modules of the built-in packages with classes of an accepted kind that do more than their kind, and why.

They need a trust of their own (``--trust lightning.pytorch.loggers.wandb``), and so do built-in classes that inherit
from theirs.
"""


class TrustError(UserError):
    """A config names an object that it may not build."""


class TargetError(UserError):
    """The object that a ``_target_`` names does not exist."""


def trusted_packages(extra: Iterable[str] = ()) -> frozenset[str]:
    """Return the packages from which a config may build objects.

    They are stabletrain, torch, lightning, torchmetrics, bitsandbytes and datetime; packages with an entry point of
    the group ``stabletrain.plugins``; and those in the environment variable ``STABLETRAIN_TRUST``, separated by commas.

    Args:
        extra: further packages, from the command line or from code, never from a config.
    """
    return BUILT_IN | owner_packages() | _named(extra)


def resolve(target: object, bases: Collection[type], trust: Iterable[str] = ()) -> Any:
    """Return the class that a ``_target_`` names, or the preset of a rule, if a config may build it.

    Args:
        target: dotted name, such as ``torch.optim.AdamW``.
        bases: the classes of which it must be one, or a subclass.
        trust: further trusted packages.

    Raises:
        TrustError: if it is not from a trusted package, is no class, or is a class of another kind.
        TargetError: if there is no such object.

    >>> resolve("stabletrain.errors.UserError", [Exception]).__name__
    'UserError'
    >>> resolve("os.system", [Exception])
    Traceback (most recent call last):
    ...
    stabletrain.config.trust.TrustError: 'os.system' may not be built from a config: package 'os' is not trusted; ...
    """
    trust = tuple(trust)
    packages = trusted_packages(trust)
    if isinstance(target, str) and target in OPTIMIZERS:
        packages |= {target.split(".")[0]}
    if not isinstance(target, str) or not target or not all(part.isidentifier() for part in target.split(".")):
        raise TargetError(f"expected the dotted name of a class, got {target!r}")
    top = target.split(".")[0]
    if not _covered(target, packages):
        raise TrustError(
            f"{target!r} may not be built from a config: package {top!r} is not trusted; trusted are "
            f"{', '.join(sorted(packages))}; if you trust its code, add --trust {top}"
        )
    _refuse_effects(target, target, _named(trust))
    found = _locate(target, packages)
    _check_object(target, found, packages, _named(trust))
    if not is_a(found, bases):
        got = f"got a {_class_of(found).__name__} from _target_ {target!r}"
        raise TrustError(f"expected a {described(bases)}, {got}{_other_lightning(_class_of(found), bases)}")
    if inspect.isabstract(_class_of(found)):
        raise TrustError(f"{target!r} is an abstract class: choose one of its subclasses")
    return found


def _other_lightning(found: type, bases: Collection[type]) -> str:
    """What to do about a class of ``pytorch_lightning``, whose classes have the same names; else nothing."""
    names = {base.__name__ for base in bases if base.__module__.startswith("lightning.")}
    for base in found.__mro__:
        if base.__name__ in names and base.__module__.startswith("pytorch_lightning."):
            return (
                f", whose {base.__name__} is that of pytorch_lightning; a config builds those of lightning.pytorch: "
                "import lightning.pytorch in its module, or make the object in your own script"
            )
    return ""


def is_a(found: Any, bases: Collection[type]) -> bool:
    """Return whether a class, or the class that a preset builds, is one of these or inherits from one.

    Classes are compared by inheritance alone: ``issubclass`` asks the class itself, which may say yes to anything.
    """
    return any(base in _class_of(found).__mro__ for base in bases)


def _class_of(found: Any) -> type:
    return found.__self__ if inspect.ismethod(found) else found  # type: ignore[return-value]


def _named(extra: Iterable[str]) -> frozenset[str]:
    """The packages that the user has named."""
    return frozenset(name.strip() for name in (*os.environ.get(ENV, "").split(","), *extra) if name.strip())


def _covered(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _refuse_effects(target: str, name: str, named: frozenset[str]) -> None:
    for module, reason in EFFECTS.items():
        if _covered(name, [module]) and not any(_covered(module, [each]) for each in named):
            raise TrustError(
                f"{target!r} may not be built from a config: {reason}; if you want it, add --trust {module}"
            )
    if any(part.startswith("_") for part in target.split(".")):
        raise TrustError(f"{target!r} may not be built from a config: names that start with '_' are private")
    if _covered(name, BUILT_IN) and ".test_" in name:
        raise TrustError(f"{target!r} may not be built from a config: it is part of a test")


def _locate(target: str, packages: frozenset[str]) -> Any:
    parts = target.split(".")
    found: Any = _import(parts[0], target)
    for index, part in enumerate(parts[1:], start=1):
        path = ".".join(parts[:index])
        try:
            following = getattr(found, part, None)
        except RuntimeError as error:  # of torch.classes
            raise TargetError(f"{target!r}: {path!r} has no {part!r} ({error})") from None
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
        line = pip_line(error.name)
        advice = f"install it: {line}" if line else "install it or correct the name"
        raise TargetError(f"{target!r}: there is no package {name!r}; {advice}") from None
    except ImportError as error:
        raise TargetError(f"{target!r}: importing {name!r} failed: {error}") from error
    except Exception as error:
        if not _covered(name, BUILT_IN):  # a bug in the user's own module, which needs its traceback
            raise
        raise TargetError(f"{target!r}: importing {name!r} failed: {error}") from error


def _check_object(target: str, found: Any, packages: frozenset[str], named: frozenset[str]) -> None:
    """Check that an object is a class or the preset of a rule, and the modules that define it."""
    if not inspect.isclass(found) and not _is_preset(found):
        got = "function" if inspect.isroutine(found) else type(found).__name__
        raise TrustError(
            f"{target!r} may not be built from a config: expected a class, got a {got}; call it from your own code "
            f"instead"
        )
    for owner in dict.fromkeys((found, _class_of(found))):
        home = getattr(owner, "__module__", None)
        if not isinstance(home, str) or not _covered(home, packages):
            raise TrustError(
                f"{target!r} may not be built from a config: it is defined in {home!r}, which is not trusted"
            )
        _refuse_effects(target, home, named)
    if _covered(found.__module__, BUILT_IN):
        for base in _class_of(found).__mro__:
            _refuse_effects(target, base.__module__, named)


def _is_preset(found: Any) -> bool:
    """Whether an object is an alternative constructor of a rule: a class method of its own that returns ``Self``."""
    from stabletrain.core.rule import Rule

    if not (inspect.ismethod(found) and inspect.isclass(found.__self__)):
        return False
    rules = [each for each in found.__self__.__mro__ if issubclass(each, Rule) and each is not Rule]
    own = any(vars(each).get(found.__name__) is not None for each in rules)
    return own and found.__func__.__annotations__.get("return") in ("Self", typing.Self)

"""Lightning's two packages: ``lightning.pytorch`` and ``pytorch_lightning`` are the same code, but other classes.

A script imports one of them, and gives its Trainer our callbacks. An ``isinstance`` with a class of the other package
is False without an error, in our code and in Lightning's. So everywhere else

- a check against a class of Lightning is ``isinstance(thing, both(Class))``, also in ``issubclass`` and ``except``;
- a class of ours that Lightning looks for derives from `Callback`, `Checkpoint`, `CheckpointIO` or `Logger` of this
  module, which derive from the classes of both packages;
- members of Lightning's enumerations, which are texts, are compared with texts.

Annotations name the classes of ``lightning.pytorch``, for either. A test forbids all other uses.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import lightning.fabric.plugins.io.checkpoint_io as fabric_checkpoint_io
import lightning.pytorch as lightning_pytorch
import lightning.pytorch.loggers.logger as pytorch_logger
from lightning_utilities.core import rank_zero

if TYPE_CHECKING:
    import pytorch_lightning

    AnyTrainer: TypeAlias = lightning_pytorch.Trainer | pytorch_lightning.Trainer
    """For arguments of functions that users call."""

    class AcceptedByBoth(Any):  # type: ignore[misc]
        """For type checkers only: an object of a subclass may be passed to the Trainers of both packages."""


T = TypeVar("T")

OTHER_NAME = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
"""The same package under its other name."""


def both(kind: type[T]) -> tuple[type[T], ...]:
    """A class of Lightning and the class of the same name in the other package, for ``isinstance`` and the like.

    Args:
        kind: a class of ``lightning.pytorch`` or ``lightning.fabric``.

    Raises:
        ValueError: if it is none.

    >>> from lightning.pytorch.callbacks import Timer
    >>> [each.__module__ for each in both(Timer)]
    ['lightning.pytorch.callbacks.timer', 'pytorch_lightning.callbacks.timer']
    """
    return _both(cast(Any, kind))


def own(kind: type[T], thing: T) -> type[T]:
    """The one of `both` classes that an object is an instance of: that of the package its Trainer is from.

    Args:
        kind: a class of ``lightning.pytorch`` or ``lightning.fabric``.
        thing: an instance of it, or of the other package's.
    """
    return next(each for each in both(kind) if isinstance(thing, each))


@functools.cache
def _both(kind: Any) -> tuple[Any, ...]:
    package = ".".join(kind.__module__.split(".")[:2])
    if package not in OTHER_NAME:
        raise ValueError(f"both: expected a class of {' or '.join(OTHER_NAME)}, got one of {kind.__module__}")
    if not _OTHER_IS_THERE:
        return (kind,)
    module = importlib.import_module(kind.__module__.replace(package, OTHER_NAME[package], 1))
    return (kind, getattr(module, kind.__name__))


def _import_other() -> bool:
    """Import ``pytorch_lightning``, which ``lightning`` requires; False if it is missing, or cannot be imported.

    Lightning's messages ("GPU available: ...") go to the logger of the package that was imported last, which the
    script may have silenced. It stays the logger of the package that the script itself has imported.
    """
    log = rank_zero.log
    order = [name for name in sys.modules if name in ("stabletrain", "lightning", "pytorch_lightning")]
    try:
        importlib.import_module("pytorch_lightning")
    except Exception:  # the other one, of a version that does not work here: no script can use it
        return False
    finally:
        rank_zero.log = log
    if "pytorch_lightning" in order and order[-1] == "lightning":  # stabletrain has imported lightning
        rank_zero.log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    return True


_OTHER_IS_THERE = _import_other()

if TYPE_CHECKING:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO as CheckpointIO
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch.callbacks import Checkpoint as Checkpoint
    from lightning.pytorch.loggers.logger import Logger as Logger
    from lightning.pytorch.strategies import ModelParallelStrategy as ModelParallelStrategy

    class ModelParallelMethods(ModelParallelStrategy):
        """For type checkers."""
else:

    class Callback(*both(lightning_pytorch.Callback)):
        """A callback of both packages."""

    class Checkpoint(Callback, *both(lightning_pytorch.callbacks.Checkpoint)):
        """A callback that both packages treat as one that saves checkpoints: called last, and instead of their own."""

    class CheckpointIO(*both(fabric_checkpoint_io.CheckpointIO)):
        """Reads and writes checkpoints, for both packages."""

    class Logger(*both(pytorch_logger.Logger)):
        """A logger of both packages."""

    class ModelParallelMethods:
        """Base of what the classes of a strategy for each package share; with `both` of ModelParallelStrategy after it.

        No class of Lightning at run time: each of the two strategies comes first in the order of its own package.
        """

    class ModelParallelStrategy(*both(lightning_pytorch.strategies.ModelParallelStrategy)):
        """A strategy that shards the model, for the Trainers of both packages."""

        def optimizer_step(self, optimizer, closure, model=None, **kwargs):
            """As Lightning's, which accepts modules of its own package only."""
            model = model or self.lightning_module
            return self.precision_plugin.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

"""Read a checkpoint that is a single file of ``torch.save``, as Lightning writes it: as data only."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stabletrain.runtime.checkpoints.archive import DATA_ONLY, file_problem
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.internals.quantized_state import import_known

_REFUSED = re.compile(r"(?:[Uu]nsupported (?:global: )?GLOBAL|Unsupported class) ([\w.]+)")


def load_file(path: str | Path, read: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Read a file onto the CPU with ``weights_only=True``: nothing in it can run code.

    Args:
        path: the file; links are followed.
        read: reads it; None: ``torch.load``.

    Raises:
        CheckpointError: a clause without the path, if it is no checkpoint, is damaged, or holds more than data.
    """
    path = Path(path)
    problem = file_problem(path)
    if problem is not None:
        raise CheckpointError(f"it {problem}")
    try:
        checkpoint = with_known_classes(read or (lambda: torch.load(path, map_location="cpu", weights_only=True)))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        name = _REFUSED.search(str(error))
        what = f"an object of {name.group(1)}" if name else "Python objects, or is damaged"
        hint = ". If it is a tensor class of a package (torchao), import the package before resuming" if name else ""
        raise CheckpointError(f"it holds {what}, and {DATA_ONLY}{hint}") from error
    except Exception as error:  # foreign content: torch raises many kinds
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"it cannot be read as a checkpoint: {type(error).__name__}: {first}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"it holds a {type(checkpoint).__name__}, expected the dict of a checkpoint")
    return checkpoint


def with_known_classes(read: Callable[[], Any]) -> Any:
    """Read a file; again, if it holds the 8-bit state of an optimizer whose package was not imported yet.

    Args:
        read: reads it with ``weights_only=True``.
    """
    try:
        return read()
    except pickle.UnpicklingError as error:
        name = _REFUSED.search(str(error))
        if name is None or not import_known(name.group(1)):
            raise
    return read()

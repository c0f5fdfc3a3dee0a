"""Flipped bits in a weight or in a checkpoint on disk."""

from __future__ import annotations

import os
import random
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.tensor import DTensor

from stabletrain.chaos.fault import Fault
from stabletrain.chaos.gradients import find_parameter
from stabletrain.runtime.checkpoints.newest_file import newest_files

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FlipWeightBit(Fault):
    """Flips one bit of one weight before a step; the weight is not restored later.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        parameter: name of the parameter; None: the first that is trained.
        element: index of the weight in the flattened parameter; None: drawn with ``seed``.
        bit: number of the bit, from 0, the lowest; None: the highest bit of the exponent.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank with the fault; None: all ranks, at the same weight.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.
        seed: for drawing the element, >= 0.

    Raises:
        UserError: if an argument is out of range, or there is no such parameter, element or bit.
    """

    def __init__(
        self,
        at_step: int,
        parameter: str | None = None,
        element: int | None = None,
        bit: int | None = None,
        steps: int = 1,
        rank: int | None = None,
        once: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(at_step, steps, rank, once, seed)
        self.parameter = parameter
        self.element = element
        self.bit = bit
        self.require(element is None or element >= 0, "element", ">= 0 or None")
        self.require(bit is None or bit >= 0, "bit", ">= 0 or None")

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Flip the bit."""
        weight = find_parameter(self, module, self.parameter).detach()
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        size, width = local.numel(), 8 * local.element_size()
        if not size:
            return  # this rank has no shard of the parameter
        self.require(self.element is None or self.element < size, "element", f"< {size}, the parameter's size")
        self.require(self.bit is None or self.bit < width, "bit", f"< {width}, the width of {local.dtype}")
        element = random.Random(f"{self.seed} {step}").randrange(size) if self.element is None else self.element
        bit = width - 2 if self.bit is None else self.bit
        at = torch.unravel_index(torch.tensor(element), local.shape)
        before = local[at].reshape(1).clone()
        bits = before.view(_INTEGERS[local.element_size()])
        after = torch.bitwise_xor(bits, torch.ones_like(bits) << bit).view(local.dtype)
        local[at] = after[0]
        name = self.parameter or "the first parameter"
        self.log_fault(trainer, step, f"bit {bit} of weight {element} of {name}: {before.item():g} -> {after.item():g}")


class FlipCheckpointBit(Fault):
    """Flips one bit of the newest checkpoint on disk, without changing the file's time, as a disk error would.

    This happens before the first batch at or after ``at_step`` at which there is a checkpoint.

    Args:
        at_step: first attempted optimizer step at which the fault may happen, from 0.
        once: apply the fault only once, even if a resumed run repeats the step.
        seed: for drawing the bit, which is in the middle half of the file, >= 0.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(self, at_step: int, once: bool = True, seed: int = 0) -> None:
        super().__init__(at_step, 1, 0, once, seed)

    def is_due(self, trainer: Trainer, step: int) -> bool:
        """True at and after ``at_step`` once there is a checkpoint."""
        return step >= self.at_step and self._last < 0 and newest_checkpoint(trainer) is not None

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Flip the bit."""
        file = newest_checkpoint(trainer)
        if file is None:
            return
        draw, status = random.Random(f"{self.seed} {self.at_step}"), file.stat()
        at, bit = draw.randrange(status.st_size // 4, status.st_size * 3 // 4 + 1), draw.randrange(8)
        with open(file, "r+b") as content:
            content.seek(at)
            (byte,) = content.read(1)
            content.seek(at)
            content.write(bytes([byte ^ 1 << bit]))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        self.log_fault(trainer, step, f"bit {bit} of byte {at} of {file} flipped")


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest checkpoint of the trainer's checkpoint callbacks; if it is a folder, its largest file."""
    found = [path.resolve() for callback in trainer.checkpoint_callbacks for path in _checkpoints_of(callback)]
    found = [path for path in found if path.exists()]
    if not found:
        return None
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    if newest.is_dir():
        files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
        return max(files, key=lambda path: path.stat().st_size, default=None)
    return newest if newest.stat().st_size else None


def _checkpoints_of(callback: Checkpoint) -> list[Path]:
    last, folder = getattr(callback, "last", None), getattr(callback, "dirpath", None)
    if last:  # a callback with an attribute `last` names its newest checkpoint
        return [Path(last)]
    return newest_files(Path(folder))[:1] if folder else []

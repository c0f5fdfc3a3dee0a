"""The device that is measured, and how large everything is."""

from __future__ import annotations

import gc
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Place:
    """A device with the sizes of the trainings on it.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        layers: blocks of the GPT.
        width: size of its vectors.
        heads: attention heads.
        sequence: tokens of a sequence.
        vocabulary: number of different tokens.
        most: sequences in a batch, at most.
        block: steps that a case makes in a turn; with the defaults there is one snapshot in 50.
        rounds: turns of each case.
        host_steps: steps of the tiny network.
        repeats: of what is timed alone.
    """

    device: str = "cuda"
    layers: int = 12
    width: int = 768
    heads: int = 12
    sequence: int = 1024
    vocabulary: int = 50_304
    most: int = 64
    block: int = 50
    rounds: int = 3
    host_steps: int = 600
    repeats: int = 20

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def warm_up(self) -> int:
        """First steps with snapshots, after each power of two at first; from then on there is one in 50."""
        return 64 if self.on_cuda else 4

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Most bytes of the device that tensors took since the last call."""
        gc.collect()  # of trainings that have ended
        if not self.on_cuda:
            return 0
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    def card(self) -> str:
        """The device with its driver, for the page."""
        if not self.on_cuda:
            return "no GPU: a rehearsal on the CPU, whose figures mean nothing"
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
        name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{name} ({total:.0f} GiB), driver {driver or 'unknown'}, CUDA {torch.version.cuda}"


REHEARSAL = Place("cpu", 1, 32, 2, 16, 64, 2, 3, 1, 160, 2)

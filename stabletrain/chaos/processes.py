"""Processes that are killed, preempted, stopped for a while, or slow."""

from __future__ import annotations

import functools
import os
import signal as signals
import subprocess
import sys
import time
from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer

from stabletrain.chaos.fault import Fault

_LONGEST = 7 * 24 * 3600
"""Seconds."""
_CONTINUE = "import os, sys, time; time.sleep(float(sys.argv[1])); os.kill(int(sys.argv[2]), int(sys.argv[3]))"


class SendSignal(Fault):
    """Sends a signal to the process before a batch: it is killed (SIGKILL), preempted (SIGTERM), stopped (SIGSTOP).

    Args:
        at_step: attempted optimizer step before which it is sent, from 0.
        signal: ``"SIGKILL"``, ``"SIGTERM"``, ``"SIGINT"`` or ``"SIGSTOP"``.
        seconds: how long SIGSTOP stops the process, > 0; None: until it receives SIGCONT from elsewhere.
        rank: the only rank that receives it; None: all ranks.
        once: apply the fault only once, even if a resumed run repeats the step.

    Raises:
        UserError: if an argument is out of range.
    """

    ends_process: ClassVar[bool] = True

    def __init__(
        self,
        at_step: int,
        signal: Literal["SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP"] = "SIGKILL",
        seconds: float | None = None,
        rank: int | None = None,
        once: bool = True,
    ) -> None:
        super().__init__(at_step, 1, rank, once)
        self.signal = signal
        self.seconds = seconds
        allowed = ("SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP")
        self.require(signal in allowed, "signal", f"one of {', '.join(allowed)}")
        self.require(seconds is None or 0 < seconds <= _LONGEST, "seconds", f"> 0 and at most {_LONGEST}, or None")
        self.require(seconds is None or signal == "SIGSTOP", "seconds", "None unless signal is SIGSTOP")

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Send the signal to this process."""
        self.log_fault(trainer, step, f"{self.signal}{f' for {self.seconds:g} s' if self.seconds else ''}")
        if self.seconds is not None:  # a stopped process cannot continue by itself
            arguments = [str(self.seconds), str(os.getpid()), str(int(signals.SIGCONT))]
            helper = subprocess.Popen([sys.executable, "-S", "-c", _CONTINUE, *arguments])
            self.undo_later(functools.partial(_wait_for, helper))
        os.kill(os.getpid(), signals.Signals[self.signal])


def _wait_for(helper: subprocess.Popen[bytes]) -> None:
    helper.wait()


class SlowRank(Fault):
    """Makes a rank sleep before its batches.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        seconds: sleep before each affected step, > 0.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank that sleeps; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, at_step: int, seconds: float = 1.0, steps: int = 10, rank: int | None = 0, once: bool = True
    ) -> None:
        super().__init__(at_step, steps, rank, once)
        self.seconds = seconds
        self.require(0 < seconds <= _LONGEST, "seconds", f"> 0 and at most {_LONGEST}")

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Sleep."""
        if step == self.at_step:
            self.log_fault(trainer, step, f"{self.seconds:g} s of sleep before each of {self.steps} steps")
        time.sleep(self.seconds)

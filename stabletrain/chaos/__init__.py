"""Fault injection: the faults of long runs, caused at a known step, to test how a recipe handles them.

    from stabletrain.chaos import BadGradient
    Trainer(callbacks=[*default_callbacks(), BadGradient(at_step=100)])

    stabletrain train char_gpt +chaos=nan_grad chaos.at_step=100

Every fault is a Lightning callback that works with unmodified modules, acts before the plugins measure the step, draws
its random numbers from its own seed, and undoes its temporary changes.
"""

from stabletrain.chaos.batches import BadBatch
from stabletrain.chaos.bits import FlipCheckpointBit, FlipWeightBit
from stabletrain.chaos.disk import FullDisk
from stabletrain.chaos.fault import Fault
from stabletrain.chaos.gradients import BadGradient, ScaledGradient
from stabletrain.chaos.losses import ScaledLoss
from stabletrain.chaos.processes import SendSignal, SlowRank
from stabletrain.chaos.rates import LearningRateSurge

__all__ = [
    "BadBatch",
    "BadGradient",
    "Fault",
    "FlipCheckpointBit",
    "FlipWeightBit",
    "FullDisk",
    "LearningRateSurge",
    "ScaledGradient",
    "ScaledLoss",
    "SendSignal",
    "SlowRank",
]

"""Faults on purpose: what goes wrong in long runs, made to happen at a known step, so that a recipe can be drilled.

    from stabletrain.chaos import BadGradient
    Trainer(callbacks=[*default_callbacks(), BadGradient(at_step=100)])

    stabletrain train char_gpt +chaos=nan_grad chaos.at_step=100

Every fault is a Lightning callback that works on unmodified modules, strikes before the plugins look at the step, takes
its random numbers from its own seed, and puts back whatever it changed to strike.
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

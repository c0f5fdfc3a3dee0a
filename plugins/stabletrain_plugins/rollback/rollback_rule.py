"""The arguments of `Rollback`: those of the spike and divergence detector, and its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stabletrain.core.bytes import parse
from stabletrain.core.spikes import SpikeDetection

Drop: TypeAlias = Literal["offending", "since_snapshot", "none"]
"""Which batches a rollback excludes."""


@dataclass(frozen=True, kw_only=True)
class RollbackRule(SpikeDetection):
    """Restore a healthy snapshot when training diverges, exclude the offending batches, and continue.

    A ring of snapshots in memory has everything that training changes, the data position included. A snapshot is
    trusted after ``trust_after`` healthy steps. Three things lead to a rollback: the loss is raised for ``patience``
    steps (the detector of `DetectSpikes`), another plugin requests one (too many skipped steps in a row), or the
    weights are damaged. Then the newest trusted snapshot is restored (with damaged weights a nearer one whose weights
    were good), the batches since the incident began are excluded, also from later epochs and after a restart, the
    learning rate is warmed up again over ``rewarm`` steps, and training continues in the same process. If an incident
    repeats at the same position, an older snapshot is restored, and twice as many batches are excluded. A loss that
    rises slowly, or has not fallen in the first tenth of the run, is reported.

    But if the loss then leaves its level at the same position and by as much as before, with undamaged weights, it is
    not an error but meant, such as another loss term or new classes: after ``accept`` steps the new level is
    accepted. All rules learn it, the batches that the rollback excluded are given back, and the learning rate is warmed
    up again. A run of ``accept`` bad batches in a row looks the same; ``accept=None`` never accepts a level.

    Without a snapshot to restore, the newest good checkpoint on disk from before the incident is restored. Without one,
    and after ``max_rollbacks``, the run is stopped, with a diagnosis in its folder.

    Each rollback and each accepted level is a line in ``interventions.jsonl``; with ``replay``, another run does the
    same at the same steps and ends with bit-identical weights.

    Args:
        every: applied steps from one snapshot to the next, >= 1; before the first also after 1, 2, 4, 8, ... steps.
        keep: snapshots in the ring, >= 2; each takes as much memory as parameters and optimizer state.
        trust_after: healthy steps that make a snapshot trusted, 1 to ``every``; an unhealthy step costs five of them.
        drop: which batches are excluded: ``"offending"`` (since the incident began), ``"since_snapshot"``, ``"none"``.
        baselines: histories of all rules after a rollback: ``"restore"`` (the snapshot's) or ``"reset"`` (empty).
        rewarm: applied steps of the second learning-rate warm-up, >= 0; 0: none. It scales whatever rate is set.
        max_rollbacks: rollbacks in a run, >= 1; one more request is a clean stop.
        cool_down: attempted steps after the position of an incident within which another one is taken for the same, and
            an older state is restored, >= 0.
        accept: attempted steps after which a new level of the loss, that comes again at the same position after going
            back, is accepted, >= 1, but not before ``patience`` steps; None: never.
        check_every: attempted steps between checks of the weights, >= 1; from the second unhealthy step in a row on
            they are checked after each step.
        max_growth: factor on a weight tensor's root mean square between two checks that means damage, > 1.
        where: ``"host"``: snapshots in main memory; ``"device"``: on the device of the tensors, which is faster.
        max_memory: limit on the memory of snapshots and taped batches on a rank, as ``"8GB"`` or ``"500MiB"``; more is
            an error before the first snapshot. If later batches are larger, fewer are kept. None: the free memory.
        tape: ``"batches"``: keep the batches since the oldest snapshot in memory; ``"indices"``: keep sample indices,
            and fetch again, where the training process itself fetches from a map-style dataset without drawing random
            numbers. Exact only if the dataset returns the same for the same index; a warning says if it did not.
        spill: folder on a local disk for the snapshots, instead of memory; each snapshot then costs a write to it.
        replay: an ``interventions.jsonl``, or the folder of its run: make these interventions, and decide nothing until
            the last of them is made.
        on_slow_rise: a rise of the loss that is too slow for an outlier: ``"report"`` it as a divergence, or also
            ``"rollback"``.
        z_threshold: distance of the limit from the median, in robust standard deviations, > 0.
        window: steps of history, >= 2.
        delay: steps after which an accepted step enters the history, >= 0.
        min_samples: steps of history from which on there is a limit, 2 to ``window``.
        patience: steps after which a raised loss is a divergence, 1 to ``window``; also the number of consecutive
            non-finite steps after which a rollback is requested.
        regime_after: steps after which a raised gradient norm is a new level, 2 to ``window``.
        min_sigma_norm: floor of the norm's standard deviation, in nats of its logarithm, > 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of its median, >= 0.
        score_window: steps over which the metric ``stability/spike_score`` is computed, >= 1.
        expect: positions at which the training changes by design, such as ``[600, "3ep"]``: from there all rules learn
            their baselines anew. Applied steps, epochs or percent of the run, above 0; None: none.
        name: name in events, metrics and checkpoints.

    Raises:
        UserError: if an argument is out of range; in a fit, if memory does not suffice, or if the log to replay belongs
            to another run.
        TrainingStopped: in a fit, after ``max_rollbacks``, or without a state to restore.

    References:
        Chowdhery et al., PaLM, 2022, https://arxiv.org/abs/2204.02311 (section 5.1: restart about 100 steps before the
        spike, skip 200 to 500 batches).

    >>> RollbackRule(every=200, keep=2).trust_after
    25
    """

    plugin = "rollback"
    slot = "spike"

    every: int = 25
    keep: int = 3
    trust_after: int = 25
    drop: Drop = "offending"
    baselines: Literal["restore", "reset"] = "restore"
    rewarm: int = 100
    max_rollbacks: int = 10
    cool_down: int = 100
    accept: int | None = 40
    check_every: int = 10
    max_growth: float = 10.0
    where: Literal["host", "device"] = "host"
    max_memory: str | None = None
    tape: Literal["batches", "indices"] = "batches"
    spill: str | None = None
    replay: str | None = None
    on_slow_rise: Literal["report", "rollback"] = "report"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.every >= 1, "every", ">= 1")
        self.require(self.keep >= 2, "keep", ">= 2: one snapshot not trusted yet, and one to restore")
        self.require(1 <= self.trust_after <= self.every, "trust_after", f"from 1 to every={self.every}")
        self.require(
            self.drop in ("offending", "since_snapshot", "none"), "drop", '"offending", "since_snapshot", "none"'
        )
        self.require(self.baselines in ("restore", "reset"), "baselines", '"restore" or "reset"')
        self.require(self.rewarm >= 0, "rewarm", ">= 0")
        self.require(
            self.max_rollbacks >= 1, "max_rollbacks", ">= 1; to detect without rollbacks, use plugins/spike=detect"
        )
        self.require(self.cool_down >= 0, "cool_down", ">= 0")
        self.require(self.accept is None or self.accept >= 1, "accept", ">= 1, or null: accept no new level")
        self.require(self.check_every >= 1, "check_every", ">= 1")
        self.require(1 < self.max_growth < math.inf, "max_growth", "> 1 and finite")
        self.require(self.where in ("host", "device"), "where", '"host" or "device"')
        self.require(self.on_slow_rise in ("report", "rollback"), "on_slow_rise", '"report" or "rollback"')
        self.require(self.tape in ("batches", "indices"), "tape", '"batches" or "indices"')
        self.require(self.spill is None or bool(str(self.spill).strip()), "spill", "a folder, or null")
        if self.max_memory is not None:
            parse(self.max_memory, name=self.setting("max_memory"))

    def requests_rollback_of_slow_rise(self) -> bool:
        """Whether a slow rise requests a rollback."""
        return self.on_slow_rise == "rollback"

"""The plan of a run: plain data, the same in tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are gathered together; without sharding, all.

    Args:
        name: of the module; of several like it in a row, the first.
        last: of the last one; empty: there is one.
        kind: name of the module's class.
        count: of modules like it in a row.
        parameters: in one of them, elements.
        whole_bytes: of one of them while it is gathered, in the dtype in which it is.
        rank_bytes: what one rank keeps of one of them.
    """

    name: str
    last: str
    kind: str
    count: int
    parameters: int
    whole_bytes: int
    rank_bytes: int


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Messages of one kind in an optimizer step.

    Args:
        kind: such as ``all-gather``.
        count: in one step.
        bytes: of the whole tensors, of all of them together; what one rank sends depends on the algorithm.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PerRank:
    """Bytes on the first rank; None: not known.

    Args:
        parameters: that the rank keeps between steps.
        buffers: of the module.
        gradients: that the optimizer gets.
        optimizer_state: between steps.
        largest_group: the largest group of parameters while it is whole; 0: nothing is sharded.
        buckets: of DistributedDataParallel, beside the gradients.
        window_gradients: that accumulation holds besides ``gradients`` between micro-batches.
        activations: that the forward pass of a micro-batch keeps for the backward pass.
        batch: one micro-batch.
        peak: the most that there is at any time of a step.
        peak_parts: what the peak consists of.
        peak_at: in which part of the step the peak is.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer_state: int | None
    largest_group: int
    buckets: int
    window_gradients: int
    activations: int | None
    batch: int | None
    peak: int | None
    peak_parts: Mapping[str, int] = field(default_factory=dict)
    peak_at: str | None = None


@dataclass(frozen=True, kw_only=True)
class PluginPlan:
    """What one plugin, or another choice of the config, will do.

    Args:
        key: its config key.
        name: of its class.
        text: what it will do and when.
        host_bytes: main memory that it will hold on each rank; None: it says nothing about it.
        device_bytes: memory of the device that it will hold, on top of the step's peak.
    """

    key: str
    name: str
    text: str
    host_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """A change of the config that was tried in the same way.

    Args:
        override: for the command line.
        peak: bytes with it, the plugins' device memory included.
    """

    override: str
    peak: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a rank's device has enough memory.

    Args:
        memory: of a device, bytes.
        needed: the peak and the plugins' device memory; of what is known, if the peak is not.
        fits: None: not known, since activations are not, and the rest fits.
        options: changes that would help, the best first.
    """

    memory: int
    needed: int
    fits: bool | None
    options: Sequence[Option] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of one run; `as_json` has it with these names.

    Args:
        recipe: its name.
        processes: per node.
        nodes: of the run.
        strategy: name of the strategy's class.
        precision: as Lightning names it.
        optimizer: name of the optimizer's class.
        parameters: elements of the module.
        trained: of these, with a gradient.
        groups: what is gathered together.
        per_rank: memory of a rank.
        micro_batches: in an optimizer step.
        collectives: in an optimizer step.
        source: ``traced``, from two steps; ``formula``: from sizes alone, since no step could be traced.
        stopped_by: what ended the trace, with file and line; None: nothing.
        checkpoint_bytes: of one checkpoint, all ranks together; of parameters, buffers and optimizer state.
        steps: optimizer steps of the run; None: not known.
        steps_per_epoch: None: not known.
        plugins: what each will do.
        notes: what else should be known about these numbers.
        verdict: None: no ``memory`` was given.
    """

    recipe: str
    processes: int
    nodes: int
    strategy: str
    precision: str
    optimizer: str
    parameters: int
    trained: int
    groups: Sequence[Group]
    per_rank: PerRank
    micro_batches: int
    collectives: Sequence[Collective]
    source: Literal["traced", "formula"]
    stopped_by: str | None
    checkpoint_bytes: int | None
    steps: int | None
    steps_per_epoch: float | None
    plugins: Sequence[PluginPlan] = ()
    notes: Sequence[str] = ()
    verdict: Verdict | None = None


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain dictionaries, lists, texts and numbers.

    Args:
        plan: of one run.
    """
    found: dict[str, Any] = asdict(plan)
    return found


def from_json(content: Mapping[str, Any]) -> Plan:
    """The plan that `as_json` has made plain.

    Args:
        content: from `as_json`, maybe through a file or a connection.
    """
    verdict = content["verdict"]
    return Plan(
        **{
            **content,
            "groups": [Group(**each) for each in content["groups"]],
            "per_rank": PerRank(**content["per_rank"]),
            "collectives": [Collective(**each) for each in content["collectives"]],
            "plugins": [PluginPlan(**each) for each in content["plugins"]],
            "verdict": verdict and Verdict(**{**verdict, "options": [Option(**each) for each in verdict["options"]]}),
        }
    )

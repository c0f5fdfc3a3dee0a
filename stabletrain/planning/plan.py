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
        curve: of a schedule, the learning rate as a share of the base rate, evenly distributed over the run.
    """

    key: str
    name: str
    text: str
    host_bytes: int | None = None
    device_bytes: int | None = None
    curve: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Counted floating-point operations: of products of matrices, convolutions and attention, forward and backward.

    Args:
        micro_batch: of one micro-batch of one rank, without what a strategy or plugin recomputes.
        attention: of these, those of attention: queries with keys, and weights with values.
        samples: rows of the micro-batch; None: not known.
        tokens: of the micro-batch that are looked up in embeddings; None: its data are no tokens.
        embeddings: elements of parameters that are looked up only, and multiplied with nothing.
        uncounted: types of modules with matrices as weights that were called while nothing was counted.
        recomputes: whether the module computes a part of its forward pass a second time in backward, which is counted.
    """

    micro_batch: int
    attention: int
    samples: int | None
    tokens: int | None
    embeddings: int
    uncounted: Sequence[str] = ()
    recomputes: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Steps that were trained on this machine.

    Args:
        steps: optimizer steps that were measured, after those to warm up.
        seconds: of a step, the median.
        low: the first quartile.
        high: the third quartile.
        device: its name.
        peak_flops: operations per second of one device at the run's precision; None: not known.
        hours: of the run's steps, without validation and checkpoints; None: the number of steps is not known.
        mfu: share of the devices' peak that the counted operations use; None: not known.
        price: of a device for an hour; None: not given.
        cost: of the hours on all devices; None: not known.
    """

    steps: int
    seconds: float
    low: float
    high: float
    device: str
    peak_flops: float | None = None
    hours: float | None = None
    mfu: float | None = None
    price: float | None = None
    cost: float | None = None


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
        readers: ranks that read batches of their own.
        samples: rows of a micro-batch of one rank; None: not known.
        tokens: of a micro-batch of one rank; None: its data are no tokens.
        rate: the learning rate that the optimizer was made with; None: not known.
        scheduler: names of the module's own schedulers of the learning rate; empty: it has none.
        flops: counted; None: they could not be.
        no_flops_since: why they could not be counted; None: they were.
        measured: None: no steps were measured.
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
    readers: int = 1
    samples: int | None = None
    tokens: int | None = None
    rate: float | None = None
    scheduler: str = ""
    flops: Flops | None = None
    no_flops_since: str | None = None
    measured: Measured | None = None

    @property
    def epochs(self) -> float | None:
        """Passes over the training data; None: not known."""
        return self.steps / self.steps_per_epoch if self.steps and self.steps_per_epoch else None

    @property
    def tokens_per_step(self) -> int | None:
        """Of all ranks and micro-batches; None: the data are no tokens."""
        return None if self.tokens is None else self.tokens * self.micro_batches * self.readers

    @property
    def samples_per_step(self) -> int | None:
        """Of all ranks and micro-batches; None: not known."""
        return None if self.samples is None else self.samples * self.micro_batches * self.readers

    @property
    def flops_per_step(self) -> int | None:
        """Counted, of all ranks and micro-batches; None: not known."""
        return None if self.flops is None else self.flops.micro_batch * self.micro_batches * self.readers


_COMPUTED = ("epochs", "tokens_per_step", "samples_per_step", "flops_per_step")


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain dictionaries, lists, texts and numbers.

    Args:
        plan: of one run.
    """
    found: dict[str, Any] = asdict(plan)
    return found | {name: getattr(plan, name) for name in _COMPUTED}


def from_json(content: Mapping[str, Any]) -> Plan:
    """The plan that `as_json` has made plain.

    Args:
        content: from `as_json`, maybe through a file or a connection.
    """
    verdict, flops, measured = (content[name] for name in ("verdict", "flops", "measured"))
    return Plan(
        **{
            **{name: value for name, value in content.items() if name not in _COMPUTED},
            "groups": [Group(**each) for each in content["groups"]],
            "per_rank": PerRank(**content["per_rank"]),
            "collectives": [Collective(**each) for each in content["collectives"]],
            "plugins": [PluginPlan(**{**each, "curve": tuple(each["curve"])}) for each in content["plugins"]],
            "flops": flops and Flops(**flops),
            "measured": measured and Measured(**measured),
            "verdict": verdict and Verdict(**{**verdict, "options": [Option(**each) for each in verdict["options"]]}),
        }
    )

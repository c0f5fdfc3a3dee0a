"""Names that users know from Lightning, and that are no options here: why, and what to use instead."""

from __future__ import annotations

from collections.abc import Iterable

from stabletrain.config.problems import suggestion

_STARTS_PROCESSES = (
    "it starts its processes from within the run, by fork or spawn, where the launcher would not see them; use "
    "strategy=ddp with launch.processes, which starts as many (in a script, Trainer(strategy={name!r}) works with all "
    "plugins)"
)
_OWN_ENGINE = (
    "DeepSpeed accumulates, clips and steps in its own engine, past all plugins; use strategy=fsdp2 (zero2 and "
    "ddp_zero1 are ZeRO stages 2 and 1)"
)
_FSDP1 = "the first version of FSDP joins parameters into flat ones, on which plugins cannot decide; use strategy=fsdp2"

_REFUSED = {
    "strategy": {
        "ddp_spawn": _STARTS_PROCESSES,
        "ddp_fork": _STARTS_PROCESSES,
        "ddp_notebook": _STARTS_PROCESSES,
        "fsdp": _FSDP1,
        "fsdp_cpu_offload": _FSDP1,
        "deepspeed": _OWN_ENGINE,
    }
}


def why_unknown(group: str, option: str, known: Iterable[str]) -> str:
    """Return the end of a message about a name that is no option of a config group: why, or the most similar option.

    Args:
        group: of the config.
        option: as typed.
        known: the options of the group.

    >>> why_unknown("strategy", "fsdp", ["ddp"])
    ': the first version of FSDP joins parameters into flat ones, on which plugins cannot decide; use strategy=fsdp2'
    """
    refused = _REFUSED.get(group, {})
    name = next((each for each in (option, option.partition("_stage_")[0]) if each in refused), None)
    return suggestion(option, known) if name is None else f": {refused[name].format(name=option)}"

"""Check how a run is started: the nodes ``launch`` and ``runtime`` of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from stabletrain.config.address import parse_address
from stabletrain.config.problems import Problem, suggestion
from stabletrain.config.restarts import WITHOUT_CHECKPOINTS, missing_for_restarts, restarts_problem
from stabletrain.config.types import mismatch
from stabletrain.errors import UserError

_LAUNCH_KEYS: dict[str, Any] = {
    "kind": Literal["local", "torchrun", "slurm"],
    "processes": int,
    "nodes": int,
    "threads": int,
    "timeout": int | str,
    "restarts": int | None,
    "progress_steps": int,
    "rdzv": str | None,
    "join_timeout": int | str,
    "same_versions": bool,
    "sbatch": dict,
    "requeue": bool,
    "detach": bool,
}
_RUNTIME_KEYS: dict[str, Any] = {"sigterm_every": int}


def check_launch(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the mistakes in the node ``launch``, and where ``trainer`` contradicts it.

    Args:
        config: a composed config, or the content of run.yaml.
    """
    launch, trainer = config.get("launch"), config.get("trainer")
    if not isinstance(launch, Mapping) or not isinstance(trainer, Mapping):
        return
    yield from _keys_of("launch", launch, _LAUNCH_KEYS)
    if problem := restarts_problem(config):
        yield Problem("launch.restarts", problem)
    if launch.get("requeue") is True and missing_for_restarts(config) == WITHOUT_CHECKPOINTS:
        yield Problem("launch.requeue", f"{WITHOUT_CHECKPOINTS}; or launch.requeue=false")
    for key in ("kind", "processes", "nodes", "threads"):
        if key not in launch:
            yield Problem(f"launch.{key}", "this key is needed, but has no value; set it, or do not remove it")
    for argument, source in (("devices", "processes"), ("num_nodes", "nodes")):
        if argument not in trainer:
            yield Problem(f"trainer.{argument}", f"launch.{source} sets it, but it was removed; do not remove it")
        elif source in launch and trainer[argument] != launch[source]:
            yield Problem(
                f"trainer.{argument}", f"launch.{source} sets it; use launch.{source}={trainer[argument]} instead"
            )
    if config.get("dry_run") is not True or launch.get("kind") != "torchrun":  # a plan needs no nodes that meet
        yield from _nodes_of_run(launch)
    sbatch = launch.get("sbatch")
    if isinstance(sbatch, Mapping) and str(sbatch.get("signal")).startswith("B:"):
        text = "it is sent to the batch script alone, and the processes do not save: leave out B:"
        yield Problem("launch.sbatch.signal", text)
    for key, value in (launch.get("sbatch") or {}).items() if isinstance(launch.get("sbatch"), Mapping) else ():
        if not str(key).replace("-", "").isalnum() or not isinstance(value, str | int | None) or "\n" in str(value):
            yield Problem(
                f"launch.sbatch.{key}", f"expected a long option of sbatch with a one-line value, got {value!r}"
            )


def _nodes_of_run(launch: Mapping[str, Any]) -> Iterator[Problem]:
    """What several nodes need."""
    kind, rdzv, several = launch.get("kind"), launch.get("rdzv"), launch.get("nodes") != 1
    if several and kind == "local":
        yield Problem("launch.nodes", "several nodes need launch=torchrun with launch.rdzv=HOST:PORT, or launch=slurm")
    if rdzv is None:
        if several and kind == "torchrun":
            text = (
                "several nodes need the address at which they meet: launch.rdzv=HOST:PORT of the node that starts them"
            )
            yield Problem("launch.rdzv", text)
    elif isinstance(rdzv, str):
        if not several or kind != "torchrun":
            yield Problem("launch.rdzv", "it is for several nodes with launch=torchrun; set launch.nodes, or remove it")
        try:
            parse_address(rdzv)
        except UserError as error:
            yield Problem("launch.rdzv", str(error).partition(": ")[2])


def check_runtime(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the mistakes in the node ``runtime``.

    Args:
        config: a composed config, or the content of run.yaml.
    """
    given = config.get("runtime")
    if isinstance(given, Mapping):
        yield from _keys_of("runtime", given, _RUNTIME_KEYS)


def _keys_of(node: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the unknown keys of a node, and the values of another type; whole numbers must be at least 1."""
    for key, value in given.items():
        text = mismatch(value, known[key]) if key in known else f"there is no such key{suggestion(key, known)}"
        if text:
            yield Problem(f"{node}.{key}", text)
        elif known[key] is int and value < 1:
            yield Problem(f"{node}.{key}", f"expected at least 1, got {value}")

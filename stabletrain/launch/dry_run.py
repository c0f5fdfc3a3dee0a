"""``dry_run=true``: in the process that checks the configs, the plan of each run is made, too.

Nothing is written and nothing is downloaded; the data module gives one batch.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from stabletrain.config.problems import Problem
from stabletrain.core import bytes as amounts
from stabletrain.errors import UserError
from stabletrain.launch.assemble import build_data, build_model, override_optimizer, run_callbacks, trainer_arguments
from stabletrain.launch.cause import place_in_code
from stabletrain.launch.checks import problem_of, quiet
from stabletrain.planning.estimate import CannotPlan, estimate
from stabletrain.planning.fit import NoBatch
from stabletrain.planning.flops import count_flops
from stabletrain.planning.parts import Parts
from stabletrain.planning.plan import Option, Plan, Verdict, as_json
from stabletrain.runtime import rng
from stabletrain.runtime.internals.fake_world import NotTraceable, drop_memory, needs_values, with_values
from stabletrain.runtime.records.run_files import CHECKPOINTS

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Variables by which libraries that data modules use do not download."""
ACCELERATORS = ("auto", "gpu", "cuda")
"""Accelerators of a recipe in whose place the CPU does where there is no GPU."""
_TRIED = 3
"""Changes of the config that are tried at most if a run does not fit."""


def for_this_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the CPU as its accelerator, so that a laptop plans a run on GPUs; a wrong name stays.

    Args:
        config: composed.
    """
    trainer = config["trainer"]
    if trainer.get("accelerator", "auto") not in ACCELERATORS:
        return dict(config)
    return {**config, "trainer": {**trainer, "accelerator": "cpu"}}


def plan_of(config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None, list[Problem]]:
    """The plan of a run that `check_config` has accepted.

    Args:
        config: composed.

    Returns:
        The plan as plain data, or None; why there is none; the mistakes that only now were found.
    """
    os.environ.update(_OFFLINE)
    with quiet(), rng.preserved():
        try:
            plan = _plan(config)
        except (CannotPlan, NotTraceable) as error:
            return None, str(error), []
        except UserError as error:
            return None, None, [problem_of(error, "strategy", config.get("strategy"))]
        plan = _with_flops(config, plan)
        if config.get("memory") is not None:
            plan = replace(plan, verdict=_verdict(config, plan))
    return as_json(plan), None, []


def _with_flops(config: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan with the counted operations, or why there are none."""
    try:
        flops = count_flops(_maker(for_this_machine(config)))
    except CannotPlan as error:
        return replace(plan, no_flops_since=str(error))
    except Exception as error:  # whatever the module's step raises without values
        return replace(plan, no_flops_since=_stopped(error))
    return replace(plan, flops=flops, samples=flops.samples, tokens=flops.tokens)


def _plan(config: Mapping[str, Any]) -> Plan:
    launch, accelerator = config["launch"], config["trainer"].get("accelerator", "auto")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    make = _maker(for_this_machine(config))
    return estimate(config["recipe"], launch["processes"], launch["nodes"], make, _stopped, on_gpu=on_gpu)


def _maker(config: Mapping[str, Any]) -> Callable[[Any], Parts]:
    config = {**copy.deepcopy(dict(config)), "run_dir": config["run_dir"] or ""}

    def make(mode: Any) -> Parts:
        torch.manual_seed(config["seed"])
        module = _model(config, mode)
        if config.get("optimizer"):
            override_optimizer(module, config["optimizer"], config.get("param_groups") or {})
        arguments = trainer_arguments(config)
        named = {key.partition(".")[2]: value for key, value in arguments.items()}
        quiet_ones = {**named, "enable_checkpointing": False, "enable_progress_bar": False}
        folder = os.path.join(config["run_dir"], CHECKPOINTS)
        callbacks = run_callbacks(config, quiet_ones, folder)  # type: ignore[arg-type]
        return Parts(module, with_values(build_data)(config), named, callbacks)

    return make


def _model(config: Mapping[str, Any], mode: Any) -> LightningModule:
    """The module, made without memory; with memory first, if its constructor reads values of tensors."""
    try:
        return build_model(config)
    except UserError:
        raise
    except Exception:
        try:
            module: LightningModule = with_values(build_model)(config)
        except Exception as error:
            raise CannotPlan(_stopped(error)) from error
        drop_memory(mode, module)
        return module


def _stopped(error: Exception) -> str:
    """What ended a trace: where in the user's code, and why."""
    if isinstance(error, NoBatch):
        return str(error)
    place = place_in_code(error)
    lines = str(error).strip().splitlines()
    kind = type(error).__name__
    if needs_values(error):
        reason = f"the step needs the values of tensors ({lines[0] if lines else kind})"
    else:
        reason = f"{kind}: {lines[0]}" if lines else kind
    return f"{place}: {reason}" if place else reason


# ---- does it fit? ---------------------------------------------------------------------------------------------------


def _verdict(config: Mapping[str, Any], plan: Plan) -> Verdict:
    memory = int(amounts.parse(config["memory"], name="memory"))
    needed = needs(plan)
    if needed > memory:
        return Verdict(memory=memory, needed=needed, fits=False, options=_options(config, needed))
    return Verdict(memory=memory, needed=needed, fits=True if plan.per_rank.peak is not None else None)


def needs(plan: Plan) -> int:
    """Bytes of a device that a rank needs; of what is known, if the peak is not.

    Args:
        plan: of the run.
    """
    rank = plan.per_rank
    held = sum(each.device_bytes or 0 for each in plan.plugins)
    known = (rank.parameters, rank.buffers, rank.gradients, rank.optimizer_state, rank.buckets, rank.window_gradients)
    return held + (rank.peak if rank.peak is not None else sum(each or 0 for each in known))


def _options(config: Mapping[str, Any], needed: int) -> list[Option]:
    """Changes that need less, each planned as the run itself was; the best first."""
    found = []
    for override, change in list(_changes(config))[:_TRIED]:
        changed = copy.deepcopy(dict(config))
        change(changed)
        try:
            peak = needs(_plan(changed))
        except Exception:  # the change does not suit this module or strategy
            continue
        if peak < needed:
            found.append(Option(override=override, peak=peak))
    return sorted(found, key=lambda each: each.peak)


def _changes(config: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    strategy, launch = config.get("strategy") or {}, config["launch"]
    if strategy.get("checkpoint_units") is False:
        yield "strategy.checkpoint_units=true", lambda c: c["strategy"].update(checkpoint_units=True)
    size = (config.get("data") or {}).get("batch_size")
    if isinstance(size, int) and size >= 2:
        yield f"data.batch_size={size // 2}", lambda c: c["data"].update(batch_size=size // 2)
    if "checkpoint_units" in strategy:
        more = launch["processes"] * 2

        def double(c: dict[str, Any]) -> None:
            c["launch"].update(processes=more)
            c["trainer"].update(devices=more)

        yield f"launch.processes={more}", double

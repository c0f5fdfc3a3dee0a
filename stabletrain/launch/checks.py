"""Check a config in the process that would train it: first the signatures, then everything is built.

No data is read and nothing is trained or written. An exception from a constructor becomes a `Problem` with its key.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.config.discovery import BUILT
from stabletrain.config.kinds import TRAINER_PARTS
from stabletrain.config.problems import Problem
from stabletrain.config.trust import ENV as TRUST_ENV
from stabletrain.config.validate import check_constructors, check_signatures, unwritable_folders
from stabletrain.errors import UserError
from stabletrain.launch.assemble import Assembled, Parts, assembled, build_model, build_parts
from stabletrain.runtime import rng
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.strategy_checks import check_settings
from stabletrain.runtime.guard.support import check_setup, decides_on_device
from stabletrain.runtime.signal_watch import SignalWatch
from stabletrain.terminal import quiet as quiet

T = TypeVar("T")

_ABOUT_VALUES = (UserError, ValueError, OSError, ImportError, MisconfigurationException)
"""What a constructor raises for a value that it does not accept; in the user's own code, another one is a bug."""

_OF_THE_MACHINE = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")


class ConstructorBug(Exception):
    """The user's own code has raised an exception that is not about a value; the message is its traceback."""


def check_config(config: Mapping[str, Any], *, build: bool = True) -> list[Problem]:
    """Return the mistakes in a config. The model is built on the meta device, without memory, if that is possible.

    Args:
        config: composed.
        build: whether to build everything, if the signatures fit; otherwise only what is cheap.

    Raises:
        ConstructorBug: if the user's own code fails.
    """
    with quiet():
        problems = check_signatures(config)
        if not build:
            return [*problems, *check_constructors(config)]
        if problems:
            return problems
        config = {**config, "run_dir": config["run_dir"] or str(Path("runs", config["recipe"]).absolute())}
        if config["launch"]["kind"] == "slurm":
            config = _without_the_machine(config)
        try:
            attempt = _Attempt(config)
            with torch.device("meta"):
                model = build_model(config)
            _build(config, SignalWatch(), attempt, model=lambda: model)
        except Exception:  # for instance a module that reads the values of its tensors
            attempt.problems.clear()
        else:
            if not attempt.problems:
                return []
        attempt = _Attempt(config)
        _build(config, SignalWatch(), attempt)
        return attempt.problems


def check_and_build(config: Mapping[str, Any], watch: SignalWatch) -> tuple[Assembled | None, list[Problem]]:
    """Check a config and build the run; return the run, or None and the mistakes.

    The random generators are in the state in which building the run leaves them.

    Args:
        config: composed, with ``run_dir``, or the content of a run.yaml.
        watch: the handler of the process's signals.

    Raises:
        ConstructorBug: if the user's own code fails.
    """
    problems = check_signatures(config)
    if problems:
        return None, problems
    attempt = _Attempt(config)
    parts = _build(config, watch, attempt)
    return (None, attempt.problems) if attempt.problems else (assembled(parts, config), [])


class _Attempt:
    """Builds parts, and collects the problems of those that fail."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[Problem] = []
        self.trainer_error: Exception | None = None

    def __call__(self, key: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except Exception as error:
            if _is_bug(error):
                raise ConstructorBug("".join(traceback.format_exception(error)).rstrip()) from error
            if key == "trainer":
                self.trainer_error = error
            else:
                self.problems.append(problem_of(error, key, _node(self.config, key)))
            return None


def _build(
    config: Mapping[str, Any],
    watch: SignalWatch,
    attempt: _Attempt,
    *,
    model: Callable[[], LightningModule] | None = None,
) -> Parts:
    parts = build_parts(config, watch, attempt, model=model)
    for key, callback in parts.callbacks:
        attempt.problems += unwritable_folders(callback, key, config)
    with rng.preserved(), quiet():
        if attempt.trainer_error is not None:
            attempt.problems += _blame(attempt.trainer_error, parts, is_complete=not attempt.problems)
        module, trainer, optimizer = parts.model, parts.trainer, None
        if module is not None and config.get("optimizer") and not attempt.problems:
            optimizer = attempt("optimizer", lambda: module.configure_optimizers())
        if module is not None and trainer is not None:
            attempt("strategy", lambda: _check_strategy(trainer, module))
            trainer.datamodule = parts.data  # type: ignore[attr-defined]
            # without a strategy, as when a batch job is checked on another machine, the ranks are not known
            for key, callback in parts.callbacks if parts.data is not None and config.get("strategy") else ():
                if check := getattr(callback, "check_data", None):
                    attempt(key, partial(check, trainer, parts.data))
            for key, callback in parts.callbacks if optimizer is not None else ():
                if check := getattr(callback, "check_optimizers", None):
                    attempt(key, partial(check, trainer, module, [optimizer]))
            members = [callback for _, callback in parts.callbacks if isinstance(callback, GuardMember)]
            if not members:
                attempt("strategy", lambda: check_settings(trainer, module))
            if members:
                attempt("plugins", lambda: check_setup(trainer, module, members))
                if optimizer is not None:
                    for key, callback in parts.callbacks:
                        if hasattr(callback, "check_optimizer"):
                            attempt(key, partial(callback.check_optimizer, optimizer, module))
                    attempt("guard", lambda: _check_mode(config, trainer, module, optimizer))
    return parts


def _check_strategy(trainer: Trainer, module: LightningModule) -> None:
    """Refuse strategies that start processes from within this one, whose results the launcher would not see.

    A strategy with a method ``check_module`` says itself whether it fits the module and the number of processes.
    """
    if check_module := getattr(trainer.strategy, "check_module", None):
        check_module(trainer, module)
    if any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(trainer.strategy.launcher).__mro__):
        raise UserError(
            f"strategy.strategy: {type(trainer.strategy).__name__} would start its processes itself, by fork or spawn, "
            "but launch.processes sets how many there are; use strategy=ddp"
        )


def _check_mode(config: Mapping[str, Any], trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
    """Refuse ``guard.mode=device`` where it is impossible."""
    mode = (config.get("guard") or {}).get("mode", "auto")
    before = trainer.strategy.optimizers
    trainer.strategy.optimizers = [optimizer]
    try:
        decides_on_device(trainer, module, mode, torch.device("cpu"))
    finally:
        trainer.strategy.optimizers = before


def problem_of(error: Exception, key: str, node: object = None) -> Problem:
    """Return the problem that an exception of a constructor describes, with the most precise key that it names.

    Args:
        error: raised while the object at ``key`` was built.
        key: config key of the object.
        node: the config there.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, _ABOUT_VALUES):
        text = f"{type(error).__name__}: {text}"
    known = (*BUILT, *TRAINER_PARTS, "plugins", "callbacks", "guard", "param_groups", "runtime", "launch", "resume")
    begins = re.match(rf"(\w+: )?((?:{'|'.join(known)})(?:\.\w+|\[\d+\])*): ", text)
    if begins:
        return Problem(begins[2], (begins[1] or "") + text[begins.end() :])
    names = re.search(r"\(config key ([\w.]+\w)", text)
    if names:
        return Problem(names[1], text)
    return Problem(_argument(key, node, text), text)


def _argument(key: str, node: object, text: str) -> str:
    """The key of the one argument that a message names, or whose value it names; else the object's key."""
    given = {name: value for name, value in node.items() if name[:1] != "_"} if isinstance(node, Mapping) else {}
    by_name = [name for name in given if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", text)]
    by_value = [
        name
        for name, value in given.items()
        if isinstance(value, str | int | float) and re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w.]*\w)", text)
    ]
    both = [name for name in by_name if name in by_value]
    found = both or by_name or by_value
    return f"{key}.{found[0]}" if len(found) == 1 else key


def _blame(error: Exception, parts: Parts, *, is_complete: bool) -> list[Problem]:
    """Find the arguments that the Trainer does not accept: those that fail alone, or without which all is well.

    If parts are missing, for which there is a problem already, only the arguments that fail alone are sure.
    """
    names = {key: key.partition(".")[2] for key in parts.arguments}
    callbacks = [callback for _, callback in parts.callbacks]

    def raises(keys: list[str], callbacks: list[Callback]) -> Exception | None:
        try:
            Trainer(
                **{names[key]: parts.arguments[key] for key in keys},
                callbacks=[*callbacks, parts.interrupt],
                logger=parts.logger,
            )
        except Exception as failed:
            return failed
        return None

    quiet = [key for key in names if names[key] == "enable_checkpointing"]
    alone = {key: raises([key], callbacks if key in quiet else []) for key in names}
    problems = [problem_of(failed, key) for key, failed in alone.items() if failed]
    if not problems and is_complete:
        without = [key for key in names if raises([other for other in names if other != key], callbacks) is None]
        without += [
            key
            for key, callback in parts.callbacks
            if raises(list(names), [other for other in callbacks if other is not callback]) is None
        ]
        found = problem_of(error, "trainer")
        others = f" (together with {', '.join(without[1:])})" if without[1:] else ""
        problems = [Problem(without[0], found.text + others) if without else found]
    return problems


def _is_bug(error: Exception) -> bool:
    """Whether an exception comes from the user's own code, and is not about a value that it does not accept."""
    if isinstance(error, _ABOUT_VALUES):
        return False
    packages = [name for name in os.environ.get(TRUST_ENV, "").split(",") if name]
    modules = [str(frame.f_globals.get("__name__")) for frame in _frames(error)]
    return any(module == name or module.startswith(f"{name}.") for module in modules for name in packages)


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _node(config: Mapping[str, Any], key: str) -> object:
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _without_the_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A batch job runs on another machine: what depends on its devices cannot be checked here."""
    trainer = {key: value for key, value in config["trainer"].items() if f"trainer.{key}" not in _OF_THE_MACHINE}
    return {**config, "trainer": {**trainer, "accelerator": "cpu"}, "strategy": None, "precision": None}

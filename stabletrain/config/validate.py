"""Check a composed config against the signatures that it is called with; return every mistake with its key.

The signatures are the schema: a ``_target_`` is resolved (`stabletrain.config.construct`), and its arguments are
checked against ``inspect.signature`` and the type hints; ``trainer``, ``precision`` and ``strategy`` against
Lightning's Trainer.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.config import construct, discovery, kinds
from stabletrain.config.build import build_callback
from stabletrain.config.discovery import BUILT
from stabletrain.config.kinds import TRAINER_PARTS
from stabletrain.config.launch_keys import check_launch, check_runtime
from stabletrain.config.origins import with_origin
from stabletrain.config.outputs import check_outputs, typed_keys
from stabletrain.config.problems import Problem, suggestion
from stabletrain.config.resume import resume_problem
from stabletrain.config.trust import OPTIMIZERS
from stabletrain.config.types import mismatch
from stabletrain.config.values import check_values
from stabletrain.core import bytes
from stabletrain.errors import UserError
from stabletrain.optim.options import KEY, GroupOptions, group_options
from stabletrain.runtime.records.run_files import RUN_YAML, RUN_YAML_RECORD
from stabletrain.runtime.records.writable import unwritable
from stabletrain.settings import by_config

if TYPE_CHECKING:
    from stabletrain.config.compose import Composed

_TOP_LEVEL: dict[str, Any] = {
    "recipe": str,
    "seed": int,
    "run_dir": str | None,
    "resume": str | None,
    "dry_run": bool,
    "memory": Any,
    "objective": str | None,
    "callbacks": dict,
    "plugins": dict,
    "guard": dict | None,
    "param_groups": dict | None,
    "runtime": dict | None,
    "launch": dict,
    "trainer": dict,
    "precision": dict | None,
    "strategy": dict | None,
}
_OPTIONAL = ("dry_run", "memory", "objective", KEY, "runtime")
"""Composing adds them; run.yaml leaves the first three out, and one of an earlier version has no other."""
_NOT_TRAINER_KEYS = {
    "logger": "use the group logger: logger=none or logger=mlflow",
    "callbacks": "use the key callbacks: callbacks.NAME._target_=...",
    "plugins": "use precision=OPTION, or plugins/SLOT=OPTION for stabletrain's plugins",
    "default_root_dir": "use run_dir=FOLDER",
}


def check(composed: Composed, trust: Iterable[str] = ()) -> list[Problem]:
    """Return every mistake in a composed config; this imports torch and Lightning, and the modules that it names.

    Args:
        composed: returned by `stabletrain.config.compose.compose`.
        trust: further packages that ``_target_`` may name.
    """
    found = check_keys(composed)
    reported = {problem.key for problem in found}
    trust = tuple(trust)
    named = [*check_signatures(composed.config, trust), *check_constructors(composed.config, trust)]
    return with_origin(found + [problem for problem in named if problem.key not in reported], composed.origins)


def check_keys(composed: Composed) -> list[Problem]:
    """Return the mistakes that the config itself shows: nothing heavy is imported.

    Args:
        composed: returned by `stabletrain.config.compose.compose`.
    """
    reported = {problem.key for problem in composed.problems}
    config = composed.config
    paths = check_outputs(config, typed_keys(composed.overrides))
    found = [*check_content(config), *_run_dir(config), *paths]
    return [*composed.problems, *(problem for problem in found if problem.key not in reported)]


def check_content(config: Mapping[str, Any]) -> list[Problem]:
    """Return the mistakes in the keys and values of a config, or of a run.yaml.

    Args:
        config: its content; in run.yaml there are also the keys ``trust``, ``typed`` and ``choices``.
    """
    own = {key: value for key, value in config.items() if key not in RUN_YAML_RECORD}
    return [
        *_own_keys(own),
        *_memory(own),
        *_strategy(own),
        *check_launch(own),
        *check_runtime(own),
        *_resume(own),
        *_unresolved(own),
        *check_values(own),
    ]


def check_signatures(config: Mapping[str, Any], trust: Iterable[str] = ()) -> list[Problem]:
    """Return the mistakes in what the config calls: classes, their arguments, and the values' types.

    Args:
        config: a composed config, or the content of a run.yaml.
        trust: further packages that ``_target_`` may name.
    """
    trust = tuple(trust)
    return [*_nodes(config, trust), *_guard(config), *_param_groups(config), *_trainer(config, trust)]


def check_node(node: Mapping[str, Any], key: str, trust: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield the mistakes in a node and in the nodes inside it.

    Args:
        node: a mapping with ``_target_``; for the keys ``trainer``, ``strategy`` and, without one, ``precision``,
            arguments of Lightning's Trainer.
        key: the node's config key, or an option as typed; its first word says what may be built.
        trust: further packages that ``_target_`` may name.
    """
    place = kinds.place_of(key)
    if place in TRAINER_PARTS and not kinds.is_node(place, node):
        from lightning.pytorch import Trainer

        found, faults = construct.parse_arguments(Trainer, node, key, trust)
        if found:
            yield from _arguments(Trainer, "Lightning's Trainer", node, key, complete=False)
        yield from _inner_problems(found, faults)
    else:
        call, faults = construct.parse(node, key, trust)
        yield from _inner_problems(call, faults)


def _inner_problems(value: object, faults: Iterable[construct.Fault]) -> Iterator[Problem]:
    for key, error in faults:
        yield Problem(key, str(error))
    for call in construct.calls(value):
        name = str(call.given["_target_"]).rsplit(".", 1)[1]
        complete = not call.partial and "_args_" not in call.given
        yield from _arguments(call.target, name, call.given, call.key, complete=complete)


def _arguments(
    target: Callable[..., Any], name: str, given: Mapping[str, Any], key: str, *, complete: bool
) -> Iterator[Problem]:
    """Yield unknown arguments, values of the wrong type and, if ``complete``, missing arguments."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    hints = hints_of(target)
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepts_any = accepts_any and given.get("_target_") not in OPTIMIZERS
    named = {
        parameter_name: parameter
        for parameter_name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    for argument, value in given.items():
        if argument in construct.NODE_KEYS:
            continue
        if argument not in named:
            if not accepts_any:
                yield Problem(f"{key}.{argument}", f"{name} has no argument {argument!r}{suggestion(argument, named)}")
            continue
        if value == "???":
            continue
        text = None if _contains_node(value) else mismatch(value, hints.get(argument, named[argument].annotation))
        text = text or _non_finite(value, named[argument].default)
        if text:
            yield Problem(f"{key}.{argument}", text)
    if complete:
        for argument, parameter in named.items():
            if parameter.default is parameter.empty and argument not in given:
                yield Problem(f"{key}.{argument}", f"{name} needs this argument; set it")


def _non_finite(value: object, default: object) -> str | None:
    """Return what is wrong with NaN or an infinite number as a value; None if it is none, or the default is one."""
    if isinstance(value, list):
        return next(filter(None, (_non_finite(each, default) for each in value)), None)
    if not isinstance(value, float) or math.isfinite(value):
        return None
    expected = isinstance(default, float) and not math.isfinite(default)
    return None if expected else f"expected a finite number, got {value!r}"


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a callable's arguments; those that cannot be evaluated are missing.

    Args:
        target: a class or function.
    """
    classes = inspect.getmro(target) if inspect.isclass(target) else ()
    if inspect.isclass(target) and "__signature__" not in vars(target):
        target = target.__init__
    try:
        return {name: p.annotation for name, p in inspect.signature(target, eval_str=True).parameters.items()}
    except Exception:
        pass
    try:
        return typing.get_type_hints(target)
    except Exception:
        pass
    # a dataclass inherits fields whose hints have names of the base class's module
    names: dict[str, Any] = {}
    for owner in reversed(classes):
        names |= vars(sys.modules.get(owner.__module__, typing))
    found: dict[str, Any] = {}
    for name, hint in getattr(target, "__annotations__", {}).items():
        try:
            found[name] = eval(hint, names) if isinstance(hint, str) else hint
        except Exception:  # an argument whose hint cannot be evaluated is not checked
            continue
    return found


def _contains_node(value: object) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_contains_node, value.values()))
    return isinstance(value, list) and any(map(_contains_node, value))


def _own_keys(config: Mapping[str, Any]) -> Iterator[Problem]:
    known = (*BUILT, *_TOP_LEVEL)
    for key, value in config.items():
        if key not in known:
            yield Problem(key, f"there is no such key{suggestion(key, known)}")
        elif key in _TOP_LEVEL:
            text = mismatch(value, _TOP_LEVEL[key])
            if text:
                yield Problem(key, text)
    for key in _TOP_LEVEL:
        if key not in config and key not in _OPTIONAL:
            advice = f"do not remove it (~{key}), and start the recipe's defaults list with train"
            yield Problem(key, f"this key is needed, but has no value; {advice}")
    if isinstance(config.get("seed"), int) and not 0 <= config["seed"] < 2**32:
        yield Problem("seed", f"expected 0 to 2**32 - 1, got {config['seed']}")


def _nodes(config: Mapping[str, Any], trust: tuple[str, ...]) -> Iterator[Problem]:
    slots = discovery.slots()
    for key in BUILT:
        yield from _optional_node(config.get(key), key, trust, f"select an option: {key}=OPTION")
        if config.get(key) is None and key in ("model", "data"):
            yield Problem(
                key, f"nothing is selected; add {key}=OPTION{suggestion('', discovery.groups().get(key, {}))}"
            )
    for parent in ("plugins", "callbacks"):
        nodes = config.get(parent)
        for name, node in nodes.items() if isinstance(nodes, Mapping) else ():
            if parent == "callbacks":
                advice = f"add {parent}.{name}._target_=..."
            elif name in slots:
                options = [option.name for option in slots[name].options if option.name != "none"]
                advice = f"add plugins/{name}=OPTION{suggestion('', options)}"
            else:
                advice = f"there is no slot {name!r}{suggestion(str(name), slots)}"
            yield from _optional_node(node, f"{parent}.{name}", trust, advice)


def _optional_node(node: object, key: str, trust: tuple[str, ...], advice: str) -> Iterator[Problem]:
    if node is None:
        return
    if not isinstance(node, Mapping):
        yield Problem(key, f"expected _target_ and its arguments, got {node!r}; {advice}")
    elif "_target_" not in node:
        yield Problem(key, f"arguments are set ({', '.join(map(str, node))}), but no option is selected; {advice}")
    else:
        yield from check_node(node, key, trust)


def check_constructors(config: Mapping[str, Any], trust: Iterable[str] = ()) -> Iterator[Problem]:
    """Build the plugins, the schedule and the fault, which is cheap, so that their constructors check the values.

    Args:
        config: a composed config.
        trust: further packages that ``_target_`` may name.
    """
    plugins = config.get("plugins")
    nodes = {f"plugins.{slot}": node for slot, node in plugins.items()} if isinstance(plugins, Mapping) else {}
    nodes |= {key: config.get(key) for key in ("schedule", "chaos", "precision")}
    for key, node in nodes.items():
        if not isinstance(node, Mapping) or "_target_" not in node or next(check_node(node, key, trust), None):
            continue
        if "???" in node.values():  # reported already: the key has no value
            continue
        try:
            built = build_callback(node, key=key, trust=trust)
            steps = trainer.get("max_steps") if isinstance(trainer := config.get("trainer"), Mapping) else None
            if key == "schedule" and isinstance(steps, int) and steps > 0 and hasattr(built, "check_run"):
                built.check_run(steps)
        except (ValueError, TypeError, AttributeError) as error:
            yield Problem(key, str(error).removeprefix(f"{key}: "))
            continue
        yield from unwritable_folders(built, key, config)


def unwritable_folders(callback: object, key: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the folders that a callback writes to, at once or later, and cannot; its ``writes_to`` names them.

    Args:
        callback: built; ``writes_to`` has the folders by the names of arguments.
        key: its config key.
        config: of the run; a batch job may have folders of its own.
    """
    writes_to = {} if _is_elsewhere(config) else getattr(callback, "writes_to", {})
    for argument, path in writes_to.items():
        if reason := unwritable(str(path), folder=True):
            yield Problem(f"{key}.{argument}", f"{reason}; choose another folder")


def _is_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether the run is executed on machines whose folders may be their own."""
    launch = config.get("launch")
    return isinstance(launch, Mapping) and launch.get("kind") == "slurm"


def _guard(config: Mapping[str, Any]) -> Iterator[Problem]:
    from stabletrain.runtime.guard.options import Guard

    given = config.get("guard")
    if not isinstance(given, Mapping):
        return
    problems = list(_arguments(Guard, "Guard", given, "guard", complete=False))
    problems += [
        Problem(f"guard.{name}", f"expected a plain value, got {value!r:.200}")
        for name, value in given.items()
        if _contains_node(value)
    ]
    if not problems:
        try:
            with by_config():
                events = Guard(**given).events
            wanted = None if _is_elsewhere(config) else events
            if wanted is not None and (reason := unwritable(str(wanted), folder=False)):
                problems = [Problem("guard.events", f"{reason}; choose another file, or null")]
        except UserError as error:
            problems = [Problem("guard", str(error))]
    yield from problems


def _param_groups(config: Mapping[str, Any]) -> Iterator[Problem]:
    given = config.get(KEY)
    if not isinstance(given, Mapping):
        return
    problems = list(_arguments(GroupOptions, KEY, given, KEY, complete=False))
    yield from problems
    if problems:
        return
    try:
        options = group_options(KEY, **given)
    except UserError as error:
        key, _, text = str(error).partition(": ")
        yield Problem(key, text)
        return
    if config.get("optimizer") is None and options != GroupOptions():
        yield Problem(KEY, "it is about the optimizer that optimizer=NAME selects, and none is selected; select one")


def _trainer(config: Mapping[str, Any], trust: tuple[str, ...]) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for part in TRAINER_PARTS:
        given = config.get(part)
        if not isinstance(given, Mapping):
            continue
        if kinds.is_node(part, given):
            for argument in ({"precision", "plugins"} if part == "precision" else {part}) & seen.keys():
                yield Problem(
                    seen[argument], f"{part} sets it too; remove one of them ({part}=none removes the group's)"
                )
            yield from check_node(given, part, trust)
            continue
        for argument in given:
            where = f"{part}.{argument}"
            if argument in _NOT_TRAINER_KEYS and not (part == "precision" and argument == "plugins"):
                yield Problem(where, _NOT_TRAINER_KEYS[argument])
            elif argument in seen:
                yield Problem(
                    where, f"{seen[argument]} sets it too; remove one of them ({part}=none removes the group's)"
                )
            seen.setdefault(argument, where)
        yield from check_node(given, part, trust)


def _unresolved(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield interpolations that are left in keys that are no nodes."""
    for key, value in config.items():
        if key not in kinds.PLACES and key not in TRAINER_PARTS:
            for where, error in construct.unresolved(value, str(key)):
                yield Problem(where, str(error))


def _strategy(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A strategy object beside the name of another one."""
    node = config.get("strategy")
    if isinstance(node, Mapping) and "_target_" in node and "strategy" in node:
        text = (
            f"expected one strategy, got an object of this class and {node['strategy']!r}, which the chosen option "
            "names; remove this one, or choose strategy=none and give it as strategy.strategy._target_=..."
        )
        yield Problem("strategy._target_", text)


def _memory(config: Mapping[str, Any]) -> Iterator[Problem]:
    """The memory of a device, which is for a dry run only."""
    memory = config.get("memory")
    if memory is None:
        return
    if not isinstance(memory, str):
        is_number = isinstance(memory, int | float) and not isinstance(memory, bool)
        advice = f" without a unit; write memory={memory:g}GB" if is_number else ""
        yield Problem("memory", f"expected {bytes.FORMS}, got {memory!r}{advice}")
        return
    if config.get("dry_run") is False:
        yield Problem("memory", "a dry run says whether the run fits into it; add dry_run=true, or remove it")
    try:
        if bytes.parse(memory, name="memory") <= 0:
            yield Problem("memory", f"expected more than nothing, got {memory!r}")
    except UserError as error:
        yield Problem("memory", str(error).removeprefix("memory: "))


def _run_dir(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem if the run's folder contains a run."""
    wanted = config.get("run_dir")
    if not isinstance(wanted, str):
        return
    path = Path(os.path.abspath(os.path.expanduser(wanted)))
    if os.path.lexists(path / RUN_YAML):  # False for a name that is too long
        yield Problem("run_dir", f"{path} already contains a run; choose another folder, or delete it")


def _resume(config: Mapping[str, Any]) -> Iterator[Problem]:
    resume = config.get("resume")
    if not isinstance(resume, str):
        return
    problem = resume_problem(resume)
    if problem is not None:
        yield Problem("resume", problem)

"""The config files, their defaults and the signatures agree."""

from __future__ import annotations

from stabletrain.config.discovery import Option, content
from stabletrain.config.validate import check_node
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice

CALLBACKS = ("rule", "transform", "callback", "schedule")
"""Kinds of plugins that are Lightning callbacks."""

_HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})


def options_exist(subject: Subject) -> None:
    """The plugin has at least one option and a code file named for its kind."""
    if not subject.options:
        wrong("at least one file conf/<group>/<option>.yaml", f"none below {subject.plugin.folder / 'conf'}")
    if subject.plugin.kind == "other":
        wrong(
            "a code file named for its kind (rule.py, transform.py, callback.py, ...)",
            f"none in {subject.plugin.folder}",
        )


def targets_are_public(subject: Subject) -> None:
    """Every ``_target_`` names a public object that a config may build."""
    for option in subject.options:
        nodes = list(subject.targets(option))
        if not nodes:
            wrong(f"{choice(option)} to have a _target_", f"{sorted(subject.node(option) or {})} in {option.file}")
        for node in nodes:
            subject.resolve(node["_target_"])


def keys_are_parameters(subject: Subject) -> None:
    """The YAML file has every parameter of the constructor, and no other key."""
    for option in subject.options:
        for node in subject.targets(option):
            given, named = set(node) - _HYDRA_KEYS, set(subject.parameters(node))
            written = _written(option)
            if missing := sorted(named - given - written):
                wrong(f"{option.file} to set every parameter of {node['_target_']}", f"no {', '.join(missing)}")
            if unknown := sorted(given - named):
                wrong(f"{option.file} to set parameters of {node['_target_']} only", ", ".join(unknown))


def values_are_arguments(subject: Subject) -> None:
    """Every value has the type of its parameter, and the option can be built."""
    for option in subject.options:
        for problem in check_node(subject.node(option), choice(option), subject.trust):
            wrong(f"{option.file} to hold valid arguments", f"{problem.key}: {problem.text}")
        if "_target_" in subject.node(option):
            try:
                built = subject.build(option)
            except Exception as error:
                wrong(f"{choice(option)} to be buildable as written", f"{type(error).__name__}: {error}")
            if subject.plugin.kind in CALLBACKS:
                from lightning.pytorch import Callback

                from stabletrain.runtime.internals.packages import both

                if not isinstance(built, both(Callback)):
                    wrong(f"{choice(option)} to be a Lightning callback", type(built).__name__)


def defaults_agree(subject: Subject) -> None:
    """For every target, one option has the constructor's defaults and no other values."""
    by_target: dict[str, list[Option]] = {}
    for option in subject.options:
        for node in subject.targets(option):
            by_target.setdefault(str(node["_target_"]), []).append(option)
    for target, options in by_target.items():
        found = {choice(option): subject.differences(option) for option in options}
        if all(found.values()):
            name = min(found, key=lambda each: len(found[each]))
            wrong(
                f"an option of {target} with the defaults of its signature (closest: {name})",
                "; ".join(found[name]),
            )


def _written(option: Option) -> set[str]:
    """The top-level keys of the file, including those with interpolations."""
    return set(content(option))

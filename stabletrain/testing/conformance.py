"""The conformance check: one table says which checks apply to which kind of plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from stabletrain.config.discovery import PluginInfo, plugins
from stabletrain.errors import UserError
from stabletrain.testing.checks import (
    cleanup,
    config,
    extremes,
    imports,
    nonfinite,
    pickling,
    reasons,
    replaying,
    resuming,
    skipped_steps,
    training,
)
from stabletrain.testing.checks.config import CALLBACKS
from stabletrain.testing.failure import CheckFailed, Wrong
from stabletrain.testing.subject import Subject

Check: TypeAlias = Callable[[Subject], None]

ALL = ("rule", "transform", "callback", "schedule", "optimizer", "precision", "strategy", "other")
TRAINED = (*CALLBACKS, "optimizer", "precision")
RULES = ("rule",)

CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    # the config, against the code
    (config.options_exist, ALL),
    (imports.import_is_light, ALL),
    (config.targets_are_public, ALL),
    (config.keys_are_parameters, ALL),
    (config.values_are_arguments, ALL),
    (config.defaults_agree, ALL),
    (pickling.can_be_copied, CALLBACKS),
    # the rule, alone
    (imports.rule_is_pure, RULES),
    (replaying.state_is_plain, RULES),
    (replaying.deterministic, RULES),
    (replaying.resumes_at_any_cut, RULES),
    (nonfinite.nothing_is_poisoned, RULES),
    (extremes.extremes_do_not_crash, RULES),
    (reasons.events_give_reasons, RULES),
    (skipped_steps.foreign_skips_are_not_learned, RULES),
    # in a Trainer
    (training.harmless_until_triggered, CALLBACKS),
    (training.nan_losses_do_not_break, TRAINED),
    (training.order_is_irrelevant, CALLBACKS),
    (training.second_fit_equals_first, TRAINED),
    (resuming.resumed_equals_uninterrupted, TRAINED),
    (cleanup.everything_is_undone, CALLBACKS),
)
"""Every check, with the kinds of plugin that it applies to; cheap ones first."""


def check_plugin(name: str) -> None:
    """Hold a plugin to the contract: its config against its code, its behaviour alone, resumed, and in a training.

    Takes a few seconds on one CPU core; needs no GPU and writes to a temporary folder only.

    Args:
        name: of an installed plugin, ours or anybody's, as ``stabletrain ls plugins`` lists it.

    Raises:
        CheckFailed: an AssertionError that names the check, the plugin, what was expected and what was found.
        UserError: if no such plugin is installed.

    >>> check_plugin("clip_norn")
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: check_plugin: there is no plugin 'clip_norn'; did you mean 'clip_norm'?
    """
    found = plugins()
    if name not in found:
        from stabletrain.config.problems import suggestion

        raise UserError(f"check_plugin: there is no plugin {name!r}{suggestion(name, found)}")
    check(found[name])


def check(plugin: PluginInfo) -> None:
    """Run every check that applies to a plugin.

    Args:
        plugin: as discovery describes it.

    Raises:
        CheckFailed: at the first check that fails.
    """
    subject = Subject(plugin)
    for each in checks_for(plugin.kind):
        run_check(each, subject)


def checks_for(kind: str) -> Iterator[Check]:
    """Yield the checks that apply to a kind of plugin.

    Args:
        kind: such as ``rule``.
    """
    return (each for each, kinds in CHECKS if kind in kinds)


def run_check(each: Check, subject: Subject) -> None:
    """Run one check.

    Args:
        each: the check.
        subject: the plugin under test.

    Raises:
        CheckFailed: if the plugin does not pass it.
    """
    try:
        each(subject)
    except Wrong as found:
        raise CheckFailed(each.__name__, subject.plugin.name, found.expected, found.got) from found.__cause__
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckFailed(each.__name__, subject.plugin.name, "no exception", got) from error

"""The conformance check, with the table of checks and of the kinds of plugin that each applies to."""

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
    packages,
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
    # the config agrees with the code
    (config.options_exist, ALL),
    (imports.import_is_light, ALL),
    (config.targets_are_public, ALL),
    (config.keys_are_parameters, ALL),
    (config.values_are_arguments, ALL),
    (config.defaults_agree, ALL),
    (pickling.copies_are_equal, CALLBACKS),
    # the rule alone
    (imports.rule_is_pure, RULES),
    (replaying.state_is_plain, RULES),
    (replaying.is_deterministic, RULES),
    (replaying.resumes_from_any_state, RULES),
    (nonfinite.state_stays_finite, RULES),
    (extremes.extremes_do_not_crash, RULES),
    (reasons.events_have_reasons, RULES),
    (skipped_steps.skips_by_others_are_ignored, RULES),
    # in a Trainer
    (training.untriggered_changes_no_weights, CALLBACKS),
    (training.handles_nonfinite_losses, TRAINED),
    (training.callback_order_does_not_matter, CALLBACKS),
    (training.second_fit_equals_first, TRAINED),
    (resuming.resumed_equals_uninterrupted, TRAINED),
    (cleanup.fit_leaves_no_changes, CALLBACKS),
    (packages.both_packages_agree, (*CALLBACKS, "optimizer")),
)
"""Every check with the kinds of plugin that it applies to, cheap ones first."""


_TRAIN_TOY = (
    training.untriggered_changes_no_weights,
    training.handles_nonfinite_losses,
    training.callback_order_does_not_matter,
    training.second_fit_equals_first,
    resuming.resumed_equals_uninterrupted,
    cleanup.fit_leaves_no_changes,
    packages.both_packages_agree,
)
"""Checks that train a toy without attention, whose steps have one micro-batch on one rank."""


def check_plugin(name: str) -> None:
    """Check that a plugin's config agrees with its code, and test its behaviour in replays, resumes and trainings.

    Takes a few seconds on one CPU core, needs no GPU and writes to a temporary folder only.

    Args:
        name: of an installed plugin of any distribution, as ``stabletrain ls plugins`` lists it.

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
        plugin: as found by `stabletrain.config.discovery`.

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
        CheckFailed: if the plugin fails it.
    """
    try:
        if each in _TRAIN_TOY and subject.refuses_toy:
            return
        each(subject)
    except Wrong as found:
        raise CheckFailed(each.__name__, subject.plugin.name, found.expected, found.got) from found.__cause__
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise CheckFailed(each.__name__, subject.plugin.name, "no exception", got) from error

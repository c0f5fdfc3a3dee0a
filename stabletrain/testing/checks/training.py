"""A plugin in real trainings on the CPU: alone, with others in any order, in a second fit, and with NaN losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from stabletrain.config.construct import instantiate_arguments
from stabletrain.config.discovery import Option
from stabletrain.errors import UserError
from stabletrain.testing.checks.equality import difference, nonfinite_numbers
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from stabletrain.testing.toy import Fitted

SPIKES = {7: 1e3, 70: 1e3, 71: 50.0, 90: 1e4}
"""Factors on the loss of single batches: large faults, also in the warm-up of a rule."""


class Parts(NamedTuple):
    """The callbacks, optimizer and Trainer arguments of an option."""

    callbacks: list[Callback]
    make_optimizer: Any
    trainer: dict[str, Any]


def parts(subject: Subject, option: Option) -> Parts:
    """Build new parts of an option, by the kind of its plugin."""
    kind = subject.plugin.kind
    if kind == "optimizer":
        return Parts([], subject.build(option), {})
    if kind in ("precision", "strategy") and "_target_" not in (subject.node(option) or {}):
        from stabletrain.testing.trainer import lightning_package

        arguments: Mapping[str, Any] = subject.node(option) or {}
        built = instantiate_arguments(lightning_package().Trainer, arguments, trust=subject.trust, key=choice(option))
        return Parts([], None, built)
    return Parts([subject.build(option)], None, {})


def train(folder: Path, made: Parts, **arguments: Any) -> Fitted:
    """Train `ToyModule` with these parts.

    Args:
        folder: the Trainer's ``default_root_dir``.
        made: the parts.
        arguments: of `stabletrain.testing.toy.fit`; ``callbacks`` replaces those of the parts.
    """
    from stabletrain.testing.toy import fit

    arguments.setdefault("callbacks", made.callbacks)
    return fit(folder, make_optimizer=made.make_optimizer, trainer=made.trainer, **arguments)


def trainable(subject: Subject) -> list[Option]:
    """The options; of a precision without those that refuse this machine or the toy's optimizer with a `UserError`."""
    if subject.plugin.kind != "precision":
        return list(subject.options)
    found = []
    for option in subject.options:
        with TemporaryDirectory() as folder, suppress(UserError):
            train(Path(folder), parts(subject, option), steps=1)
            found.append(option)
    if not found:
        wrong("one option at least to train on a CPU with AdamW", "all refuse it")
    return found


def untriggered_changes_no_weights(subject: Subject) -> None:
    """If a plugin changed no gradient, step or rate, the weights are bit-identical to those without it."""
    from stabletrain.testing.toy import fit

    with TemporaryDirectory() as folder:
        bare = fit(Path(folder), watch=False)
        watched = fit(Path(folder))
        for option in subject.options:
            done = train(Path(folder), parts(subject, option))
            if done.stopped:
                wrong(f"{choice(option)} not to stop a healthy training", f"it was stopped: {done.stopped}")
            if _changed_something(done) or done.rates != watched.rates or len(done.outcomes) != len(watched.outcomes):
                continue
            if found := difference(bare.weights, done.weights):
                wrong(f"{choice(option)}, which never triggered, to leave the weights bit-identical", found)


def callback_order_does_not_matter(subject: Subject) -> None:
    """With two other plugins and faults, the first, middle and last position give the same weights and states."""
    from stabletrain import ClipNorm, SkipNonFinite

    faults = {**SPIKES, 20: math.nan, 80: math.inf}
    with TemporaryDirectory() as folder:
        results = []
        for position in range(3):
            made = parts(subject, subject.plain_option())
            others = [SkipNonFinite(name="beside_skip"), ClipNorm(name="beside_clip")]
            callbacks: list[Any] = [*others[:position], *made.callbacks, *others[position:]]
            done = train(Path(folder), made, callbacks=callbacks, faults=faults)
            states = dict(zip([_key(each, others) for each in callbacks], done.states, strict=True))
            results.append(
                {
                    "weights": done.weights,
                    "optimizer state": done.optimizer,
                    "plugin states": states if has_repeatable_state(subject) else None,
                    "outcomes": done.outcomes,
                    "end": done.stopped,
                }
            )
        for position, result in enumerate(results[1:], 1):
            for what, expected in results[0].items():
                if found := difference(expected, result[what]):
                    wrong(
                        "the position in the list of callbacks not to matter",
                        f"different {what} at position {position} than at position 0: {found}",
                    )


def second_fit_equals_first(subject: Subject) -> None:
    """A second fit with the same object and a new Trainer equals the first."""
    with TemporaryDirectory() as folder:
        for option in subject.representatives():
            made = parts(subject, option)
            first = train(Path(folder), made, faults=SPIKES)
            second = train(Path(folder), made, faults=SPIKES)
            for one, other, what in (
                (first.weights, second.weights, "weights"),
                (first.states, second.states, "state") if has_repeatable_state(subject) else (None, None, "state"),
                (first.outcomes, second.outcomes, "outcomes"),
            ):
                if found := difference(one, other):
                    wrong(f"{choice(option)} to start from scratch in a new Trainer", f"different {what}: {found}")


def handles_nonfinite_losses(subject: Subject) -> None:
    """A NaN or infinite loss raises no exception; with `SkipNonFinite`, weights and states stay finite."""
    from stabletrain import SkipNonFinite

    with TemporaryDirectory() as folder:
        for at in ({0: math.nan}, {1: math.nan, 40: math.inf}, {95: math.nan}, {30: -math.inf, 31: math.nan}):
            option = subject.plain_option()
            case = f"with losses times {at} ({choice(option)})"
            alone = parts(subject, option)
            made = parts(subject, option)
            skip = SkipNonFinite(name="beside_skip")
            try:
                train(Path(folder), alone, faults=at)
                done = train(Path(folder), made, callbacks=[*made.callbacks, skip], faults=at)
            except Exception as error:
                wrong(f"no exception {case}", f"{type(error).__name__}: {error}")
            if done.stopped:
                wrong(f"training to continue {case}, with SkipNonFinite", f"it was stopped: {done.stopped}")
            for what, value in (("weights", done.weights), ("plugin states", done.states)):
                if bad_values := [each for each in nonfinite_numbers(value) if not each.endswith("inf")]:
                    wrong(f"finite {what} {case}, with SkipNonFinite", bad_values[0])


def has_repeatable_state(subject: Subject) -> bool:
    """Whether two equal runs must end with equal states; a callback's state may contain the run's id or the time."""
    return subject.plugin.kind != "callback"


def _changed_something(done: Fitted) -> bool:
    return any(
        each.clipped or each.skipped or each.overflow or each.transformed_norm != each.grad_norm
        for each in done.outcomes
    )


def _key(callback: Any, others: list[Any]) -> str:
    return str(callback.name) if callback in others else "plugin"

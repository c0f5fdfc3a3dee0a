"""``stabletrain replay``: run a rule, or the default stack, over recorded losses and gradient norms."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stabletrain.cli.recorded import read
from stabletrain.config import discovery
from stabletrain.config.discovery import Option, PluginInfo, content
from stabletrain.config.problems import suggestion
from stabletrain.config.yaml_file import parse_yaml
from stabletrain.core.events import Event, Request
from stabletrain.core.joint_replay import Snapshots, replay_together
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule, replay
from stabletrain.errors import UserError


def replay_file(name: str, source: str, arguments: Sequence[str] = (), run: str | None = None) -> str:
    """Return the events of a rule over a recorded series, and a summary.

    Args:
        name: a plugin that is a rule, or one of its config options.
        source: a CSV file, or a run's folder, id or name; see `stabletrain.cli.recorded.read`.
        arguments: ``key=value``; they override the option's values.
        run: of a file with several runs.

    Raises:
        UserError: if there is no such rule, an argument is invalid, or the series cannot be read.
    """
    rule = make_rule(name, arguments)
    series = read(source, run)
    report = _Report()
    for step in replay(rule, series.pairs):
        report.add(step.outcome, step.events)
        for request in step.requests:
            report.add_request(step.outcome, request)
    return report.text(rule.label, series.note)


def replay_stack(source: str, choices: Sequence[str] = (), run: str | None = None) -> str:
    """Return the events of the default stack over a recorded series, joined as the guard joins it, and a summary.

    Args:
        source: as in `replay_file`.
        choices: ``SLOT=OPTION``, such as ``clip=norm`` or ``plugins/clip=norm``.
        run: of a file with several runs.

    Raises:
        UserError: if there is no such slot or option, or the series cannot be read.
    """
    given = [choice.partition("=") for choice in choices]
    for slot, equals, option in given:
        if not equals or not option:
            raise UserError(f"replay --stack: expected SLOT=OPTION, such as clip=norm, got {slot!r}")
    series = read(source, run)
    from stabletrain.config.build import default_callbacks

    stack = default_callbacks(**{slot.removeprefix(f"{discovery.SLOTS}/"): option for slot, _, option in given})
    rules = [callback for callback in stack if isinstance(callback, Rule)]
    others = [type(callback).__name__ for callback in stack if not isinstance(callback, Rule)]
    report = _Report()
    for step in replay_together(rules, series.pairs, _snapshots(rules)):
        report.add(step.outcome, step.events)
        if step.request is not None:
            report.add_request(step.outcome, step.request)
        if step.back_to is not None:
            report.add_rollback(step.outcome, step.back_to)
        if step.accepted:
            report.add_accepted(step.outcome)
        if step.ends:
            report.lines.append(f"step {step.outcome.step}: the run would stop here: {step.ends}")
    labels = ", ".join(rule.label for rule in rules)
    notes = [series.note, f"not replayed: {', '.join(others)}" if others else ""]
    if report.counts["rollback"]:
        notes.append("the recorded steps follow, whatever a run would have recorded after a rollback")
    return report.text(labels, "; ".join(filter(None, notes)))


class _Report:
    """Lines for events, and counts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self._steps = self._clipped = self._skipped = 0

    def add(self, outcome: Outcome, events: Sequence[Event]) -> None:
        self._steps += 1
        self._skipped += outcome.skipped
        self._clipped += outcome.clipped
        for event in events:
            self.counts[event.kind] += 1
            self.lines.append(f"step {outcome.step}: {event.kind}: {event.reason}")

    def add_request(self, outcome: Outcome, request: Request) -> None:
        kind = request.kind.name.lower()
        self.counts[f"request {kind}"] += 1
        self.lines.append(f"step {outcome.step}: requests {kind}: {request.reason}")

    def add_rollback(self, outcome: Outcome, back_to: int) -> None:
        self.counts["rollback"] += 1
        undone = outcome.step + 1 - back_to
        self.lines.append(f"step {outcome.step}: rollback: {undone} steps, to the snapshot before step {back_to}")

    def add_accepted(self, outcome: Outcome) -> None:
        self.counts["accept"] += 1
        self.lines.append(f"step {outcome.step}: accept: the level came again after going back, and is learned")

    def text(self, label: str, note: str) -> str:
        """The lines, and a summary with the notes."""
        clipped, skipped, steps = self._clipped, self._skipped, self._steps
        shares = f"{clipped} clipped ({clipped / steps:.2%}), {skipped} skipped ({skipped / steps:.2%})"
        events = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.counts.items())) or "no events"
        summary = f"{label}: {steps} steps, {shares}; {events}"
        return "\n".join([*self.lines, summary, *([f"note: {note}"] if note else [])])


def _snapshots(rules: Sequence[Rule[Any]]) -> Snapshots | None:
    """The arguments of the rule that has snapshots; None: there is none."""
    for rule in rules:
        arguments = rule.arguments()
        if set(Snapshots._fields) <= arguments.keys():
            return Snapshots(**{name: arguments[name] for name in Snapshots._fields})
    return None


def make_rule(name: str, arguments: Sequence[str] = ()) -> Rule[Any]:
    """Build the rule of a plugin with the arguments of an option, overridden by the given ones.

    Args:
        name: a plugin or one of its options.
        arguments: ``key=value``, values as in YAML.

    Raises:
        UserError: if there is no such rule, or an argument is invalid.
    """
    plugin, option = _find(name)
    rule_class = _rule_class(plugin)
    node = content(option) if option else {}
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    preset = str(node.get("_target_", "")).rpartition(".")[2]
    build = getattr(rule_class, preset, rule_class) if preset else rule_class
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"replay: expected key=value, got {argument!r}")
        parameters = inspect.signature(build).parameters
        if key not in parameters:
            raise UserError(f"replay: {plugin.name} has no argument {key!r}{suggestion(key, parameters)}")
        values[key] = _number(parse_yaml(f"value: {text}", Path(argument))["value"])
    from stabletrain.config.types import mismatch
    from stabletrain.config.validate import hints_of

    hints = hints_of(build)
    for key, value in values.items():
        problem = mismatch(value, hints.get(key, object))
        if problem:
            raise UserError(f"replay: {key}: {problem}")
    rule: Rule[Any] = build(**values)
    return rule


def _find(name: str) -> tuple[PluginInfo, Option | None]:
    """The plugin, and the option if ``name`` is an option; None if it is the plugin, which means the defaults."""
    plugins = discovery.plugins()
    rules = {plugin.name: plugin for plugin in plugins.values() if plugin.kind == "rule" and plugin.options}
    if name in rules:
        return rules[name], None
    for plugin in rules.values():
        for option in plugin.options:
            if name in (option.name, f"{option.group}/{option.name}", f"{option.group}={option.name}"):
                return plugin, option
    if name in plugins:
        raise UserError(f"replay: expected one of the rules {', '.join(rules)}; got {name}, a {plugins[name].kind}")
    raise UserError(f"replay: there is no rule {name!r}{suggestion(name, rules)}")


def _rule_class(plugin: PluginInfo) -> type[Rule[Any]]:
    module = import_module(f"{plugin.package}.rule")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"replay: expected one rule in {module.__name__}, got {len(found)}")
    return found[0]


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as a string
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value

"""``stabletrain replay``: run a rule over recorded losses and gradient norms, without training."""

from __future__ import annotations

import csv
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stabletrain.config import discovery
from stabletrain.config.discovery import Option, PluginInfo, content
from stabletrain.config.problems import suggestion
from stabletrain.config.yaml_file import parse_yaml
from stabletrain.core.metric_names import find, full_name
from stabletrain.core.rule import Rule, replay
from stabletrain.errors import UserError

COLUMNS = ("loss", "grad_norm")


def replay_file(name: str, file: Path, arguments: Sequence[str] = ()) -> str:
    """Return the events of a rule over a recorded series, and a summary.

    Args:
        name: a plugin that is a rule, or one of its config options.
        file: CSV with the columns ``loss`` (nats) and ``grad_norm``, one row for each attempted step.
        arguments: ``key=value``; they override the option's values.

    Raises:
        UserError: if there is no such rule, an argument is invalid, or the file cannot be read.
    """
    rule = make_rule(name, arguments)
    lines: list[str] = []
    counts: Counter[str] = Counter()
    steps = clipped = skipped = 0
    for step in replay(rule, read_series(file)):
        steps += 1
        outcome = step.outcome
        skipped += outcome.skipped
        clipped += not outcome.skipped and outcome.applied_norm < outcome.grad_norm
        for event in step.events:
            counts[event.kind] += 1
            lines.append(f"step {outcome.step}: {event.kind}: {event.reason}")
        for request in step.requests:
            counts[f"request {request.kind}"] += 1
            lines.append(f"step {outcome.step}: requests {request.kind}: {request.reason}")
    if not steps:
        raise UserError(f"replay: expected one row for each attempted step, got {file} with a header and no rows")
    shares = f"{clipped} clipped ({clipped / steps:.2%}), {skipped} skipped ({skipped / steps:.2%})"
    events = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())) or "no events"
    return "\n".join([*lines, f"{rule.label}: {steps} steps, {shares}; {events}"])


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


def read_series(file: Path) -> Iterator[tuple[float, float]]:
    """Yield pairs of loss and gradient norm from a CSV file.

    Args:
        file: with the columns ``loss`` and ``grad_norm``, or ``stability/loss`` and ``stability/grad_norm``; non-finite
            values are written ``nan`` and ``inf``.

    Raises:
        UserError: if the file cannot be read or a line has no two numbers; the message names the file and the line.
    """
    try:
        if file.exists() and not file.is_file():  # a named pipe or a device has no end
            raise UserError(f"replay: expected a CSV file, got {file}, which is none; name a file")
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            columns = {name: find(full_name(name), rows.fieldnames or ()) for name in COLUMNS}
            missing = [name for name, column in columns.items() if column is None]
            if missing:
                raise UserError(
                    f"replay: {file} lacks the column {' and '.join(missing)}; expected {', '.join(COLUMNS)}, "
                    f"got {', '.join(rows.fieldnames or ()) or 'an empty file'}"
                )
            for row in rows:
                try:
                    loss, grad_norm = (float(row[columns[name] or name]) for name in COLUMNS)
                    if grad_norm < 0:
                        raise ValueError("a norm is not negative")
                except (TypeError, ValueError):
                    values = ", ".join(f"{name}={row[column or name]!r}" for name, column in columns.items())
                    raise UserError(
                        f"replay: {file}, line {rows.line_num}: expected two numbers, grad_norm >= 0, got {values}"
                    ) from None
                yield loss, grad_norm
    except (OSError, ValueError, csv.Error) as error:  # ValueError: no UTF-8, or a null character in the name
        if isinstance(error, UserError):
            raise
        raise UserError(f"replay: {file} cannot be read ({error}); expected a CSV file") from None


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

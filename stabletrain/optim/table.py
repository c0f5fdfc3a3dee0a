"""The parameter groups of an optimizer as a table: what decays, at which rate, with how many bits of state."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from stabletrain.optim.kinds import plain_name

logger = logging.getLogger("stabletrain")

ARTIFACT = "parameter_groups.txt"
"""The table's name among a run's artifacts."""

_COLUMNS = ("group", "tensors", "elements", "decay", "rate", "state bits", "for example")
_EXAMPLES = 3
_BITS_IN_NAME = re.compile(r"(?:(\d+)bit|fp(\d+))", re.IGNORECASE)
_SMALLEST = 4096
"""Elements below which bitsandbytes keeps 32 bits, unless its argument says otherwise."""


def group_table(module: nn.Module, optimizer: Optimizer) -> str:
    """Return the groups of an optimizer as aligned text, one line for each group and one for what is not trained.

    The bits are those of the optimizer's state, per element of a moment: read from it if it has one already, and from
    the optimizer's arguments before the first step.

    Args:
        module: the module, for the parameters' names.
        optimizer: its optimizer.
    """
    names = {id(each): plain_name(name) for name, each in module.named_parameters()}
    rows = [_COLUMNS]
    for index, group in enumerate(optimizer.param_groups):
        parameters = group["params"]
        listed = [names.get(id(each), "?") for each in parameters]
        more = ", ..." if len(listed) > _EXAMPLES else ""
        rows.append(
            (
                str(group.get("kind", index)),
                str(len(parameters)),
                f"{sum(each.numel() for each in parameters):,}",
                _number(group.get("weight_decay", 0.0)),
                _number(group.get("lr")),
                "/".join(str(bits) for bits in sorted({_bits(optimizer, group, each) for each in parameters}) if bits)
                or "-",
                ", ".join(listed[:_EXAMPLES]) + more,
            )
        )
    in_groups = {id(each) for group in optimizer.param_groups for each in group["params"]}
    rest = {id(each): each for each in module.parameters() if id(each) not in in_groups}
    if rest:
        listed = [names[key] for key in rest]
        frozen = not any(each.requires_grad for each in rest.values())
        elements = f"{sum(each.numel() for each in rest.values()):,}"
        what = "frozen" if frozen else "not trained"
        more = ", ..." if len(listed) > _EXAMPLES else ""
        rows.append((what, str(len(rest)), elements, "-", "-", "-", ", ".join(listed[:_EXAMPLES]) + more))
    return _aligned(rows)


@rank_zero_only
def log_table(module: nn.Module, optimizer: Optimizer, note: str = "") -> None:
    """Print the table, and write it to the run's artifacts, on one process.

    Args:
        module: the module; in a fit, every logger of its Trainer with a method ``log_text_artifact`` (our
            `MLflowLogger`) gets the table, as `ARTIFACT`.
        optimizer: its optimizer.
        note: one more sentence for the first line.
    """
    title = f"parameter groups of {type(optimizer).__name__}{note and f' ({note})'}"
    table = group_table(module, optimizer)
    logger.info("%s\n%s", title, table)
    try:
        trainer: Any = module.trainer
    except (AttributeError, RuntimeError):  # no LightningModule, or not in a Trainer
        return
    for each in getattr(trainer, "loggers", ()):
        write = getattr(each, "log_text_artifact", None)
        if callable(write):
            write(f"{title}\n{table}\n", ARTIFACT)


def _bits(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> int:
    """Bits of an element of the parameter's state; 0: it has none."""
    if isinstance(optimizer, SGD) and not group.get("momentum"):
        return 0
    state = optimizer.state.get(parameter) or {}
    plain = [each for each in state.values() if type(each) in (Tensor, nn.Parameter, DTensor)]
    moments = [each for each in plain if each.shape == parameter.shape]
    if moments:
        return int(8 * min(each.element_size() for each in moments))
    arguments = getattr(optimizer, "args", None)
    bits = group.get("optim_bits", getattr(arguments, "optim_bits", None))
    named = _BITS_IN_NAME.search(type(optimizer).__name__)
    if bits is None and named is not None:
        bits = int(named[1] or named[2])
    full = 8 * parameter.element_size()
    smallest = getattr(arguments, "min_8bit_size", _SMALLEST)
    return full if bits is None or (bits < full and parameter.numel() < smallest) else int(bits)


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    numeric = range(1, len(_COLUMNS) - 1)
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in numeric else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

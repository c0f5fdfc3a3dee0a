"""One message in place of a traceback when a checkpoint belongs to another model or optimizer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy

from stabletrain.errors import UserError
from stabletrain.runtime.records.run_files import RUN_YAML

_MISMATCH_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError)
_OF_PARAMETERS_SHAPE = frozenset({"exp_avg", "momentum_buffer"})


def explain_mismatch(strategy: Strategy, path: str) -> None:
    """Wrap the two loading methods of a strategy: they raise a `UserError` if the checkpoint does not fit.

    Loading comes before the first step, so nothing has been trained or written then.

    Args:
        strategy: of the Trainer that resumes.
        path: of the checkpoint, for the message.
    """
    load_model, load_optimizers = strategy.load_model_state_dict, strategy.load_optimizer_state_dict

    def load_model_or_explain(*args: Any, **kwargs: Any) -> None:
        try:
            load_model(*args, **kwargs)
        except UserError:
            raise
        except _MISMATCH_ERRORS as error:
            raise _mismatch("model", path, _first_line(error)) from error

    def load_optimizers_or_explain(*args: Any, **kwargs: Any) -> None:
        try:
            load_optimizers(*args, **kwargs)
        except UserError:
            raise
        except _MISMATCH_ERRORS as error:
            raise _mismatch("optimizer", path, _first_line(error)) from error
        # torch replaces the options of the groups without a check: SGD then fails at its first step
        for optimizer in strategy.optimizers:
            for option in getattr(optimizer, "defaults", {}):
                if any(option not in group for group in optimizer.param_groups):
                    name = type(optimizer).__name__
                    raise _mismatch("optimizer", path, f"it has no {option!r}, which {name} needs")
            for parameter, state in optimizer.state.items():
                for name in _OF_PARAMETERS_SHAPE & state.keys():
                    found, expected = getattr(state[name], "shape", None), getattr(parameter, "shape", None)
                    if state[name] is not None and found != expected:
                        raise _mismatch("optimizer", path, f"its {name!r} has another shape than its parameter")

    strategy.load_model_state_dict = load_model_or_explain  # type: ignore[method-assign]
    strategy.load_optimizer_state_dict = load_optimizers_or_explain  # type: ignore[method-assign]


def _mismatch(what: str, path: str, problem: str) -> UserError:
    return UserError(
        f"resume: {path} is the checkpoint of another {what}: {problem}. Use the {what} that it was saved with "
        f"(config key {what}; see {RUN_YAML} in its run's folder), or start from scratch (resume=null). The checkpoint "
        "is unchanged"
    )


def _first_line(error: BaseException) -> str:
    """The first mismatch in torch's message, and how many more there are."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first, *more = [line.strip().rstrip(".") for line in str(error).splitlines()] or [type(error).__name__]
    if more:
        first, *more = more
    return f"{first} (and {len(more)} more)" if more else first

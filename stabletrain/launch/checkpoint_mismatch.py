"""Going on from the checkpoint of another model or optimizer: a mistake, which is said in one message."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy

from stabletrain.errors import UserError

_DOES_NOT_FIT = (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError)


def explain_misfits(strategy: Strategy, path: str) -> None:
    """Let a strategy say what does not fit when it loads a checkpoint, before anything is trained or written.

    Args:
        strategy: of the Trainer that is to go on.
        path: of the checkpoint, for the message.

    Raises:
        UserError: later, from loading.
    """
    load_model, load_optimizers = strategy.load_model_state_dict, strategy.load_optimizer_state_dict

    def model(*args: Any, **kwargs: Any) -> None:
        try:
            load_model(*args, **kwargs)
        except _DOES_NOT_FIT as error:
            raise _other("model", path, _first(error)) from error

    def optimizers(*args: Any, **kwargs: Any) -> None:
        try:
            load_optimizers(*args, **kwargs)
        except _DOES_NOT_FIT as error:
            raise _other("optimizer", path, _first(error)) from error
        for optimizer in strategy.optimizers:  # torch takes over another's options without a word
            for option in getattr(optimizer, "defaults", {}):
                if any(option not in group for group in optimizer.param_groups):
                    name = type(optimizer).__name__
                    raise _other("optimizer", path, f"it has no {option!r}, which {name} needs")

    strategy.load_model_state_dict = model  # type: ignore[method-assign]
    strategy.load_optimizer_state_dict = optimizers  # type: ignore[method-assign]


def _other(what: str, path: str, problem: str) -> UserError:
    return UserError(
        f"resume: {path} is the checkpoint of another {what}: {problem}. Go on with the {what} that it was made with "
        f"(config key {what}; see run.yaml in its run's folder), or begin anew (resume=null). The checkpoint is as it "
        "was"
    )


def _first(error: BaseException) -> str:
    """The first thing that does not fit, in torch's words, and how many more there are."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first, *more = [line.strip().rstrip(".") for line in str(error).splitlines()] or [type(error).__name__]
    if more:
        first, *more = more
    return f"{first} (and {len(more)} more)" if more else first

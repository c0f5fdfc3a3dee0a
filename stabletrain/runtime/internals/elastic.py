"""torchrun's patience with workers that do not end after another one has failed: no option of it changes that."""

from __future__ import annotations

import signal

from torch.distributed.elastic.multiprocessing.api import PContext

_original = PContext.close


def kill_after(seconds: int) -> None:
    """Let torchrun kill the workers that have not ended some seconds after another one has failed; torch waits 30 s.

    ``--shutdown-timeout`` holds only after a signal to torchrun itself, when the workers may still save; so that is
    left alone.

    Args:
        seconds: at least 1.
    """

    def close(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        after_failure = death_sig is None  # a signal to torchrun is passed on
        _original(self, death_sig, min(timeout, seconds) if after_failure else timeout)

    PContext.close = close  # type: ignore[method-assign]

"""torchrun's patience after a failure."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, PContext, SubprocessContext

from stabletrain.runtime.internals import elastic


def test_only_the_wait_after_a_failure_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: torch closes its workers by another method; a preempted run gets less time to save."""
    waits: list[int] = []
    monkeypatch.setattr(elastic, "_original", lambda self, death_sig, timeout: waits.append(timeout))
    monkeypatch.setattr(PContext, "close", PContext.close)  # restored afterwards
    elastic.kill_after(15)
    for kind in (SubprocessContext, MultiprocessContext):
        context = object.__new__(kind)
        context.close()
        context.close(signal.SIGTERM, 30)
        context.close(timeout=5)
    assert waits == [15, 30, 5] * 2

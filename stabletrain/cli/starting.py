"""How a command ends that starts workers: signals and failures before training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def starting() -> Iterator[None]:
    """Ctrl-C exits with 130 and SIGTERM with 143, after one line; a failure before training with 1, after its message.

    Raises:
        typer.Exit: with that code.
    """
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {signum: signal.signal(signum, _end) for signum in handled}
    from stabletrain.launch.start_up import StartFailed, StartInterrupted

    try:
        yield
    except StartInterrupted as error:
        # another signal while Python shuts down, where it restores the system's handlers, must not change the exit code
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        raise typer.Exit(error.result.exit_code) from None
    except StartFailed as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"\n{signal.Signals(signum).name}: ended\n".encode())
    raise SystemExit(128 + signum)

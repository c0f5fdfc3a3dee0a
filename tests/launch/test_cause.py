"""What an exception means: every kind that can end a process."""

import errno
import signal
from collections.abc import Callable

import pytest
import torch

from stabletrain.errors import UserError
from stabletrain.launch.bounded import MAX_MESSAGE
from stabletrain.launch.cause import MAX_TRACEBACK, cause_of, traceback_text
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.runtime.stop import TrainingStopped


class Broken(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no text")


class DistBackendError(RuntimeError):
    """Named as that of torch."""


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17579."
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5"


def raised(make: Callable[[], BaseException], during: BaseException | None = None) -> BaseException:
    try:
        if during is None:
            raise make()
        try:
            raise during
        except BaseException:
            raise make()  # noqa: B904
    except BaseException as error:
        return error


SAME_GPU = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, invalid usage (run with NCCL_DEBUG="
    "WARN for details), NCCL version 2.27.5\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
)


@pytest.mark.parametrize(
    ("error", "end", "show", "lost", "message"),
    [
        (lambda: RuntimeError("a bug"), "failed", "traceback", False, "RuntimeError: a bug"),
        (lambda: MemoryError(), "failed", "traceback", False, "MemoryError"),
        (lambda: RecursionError("too deep"), "failed", "traceback", False, "RecursionError"),
        (lambda: GeneratorExit(), "failed", "traceback", False, "GeneratorExit"),
        (lambda: StopIteration(), "failed", "traceback", False, "StopIteration"),
        (lambda: Broken(), "failed", "traceback", False, "cannot be shown"),
        (lambda: RuntimeError("x" * 5_000_000), "failed", "traceback", False, "[...]"),
        (lambda: RuntimeError("\udc80 \x1b[2J \x9b"), "failed", "traceback", False, r"\udc80 \x1b[2J \x9b"),
        (lambda: RuntimeError("Caught it in process 0.\nTrace\n\nKeyError: 3\n"), "failed", "traceback", False,
         "Caught it in process 0. ... KeyError: 3"),
        (lambda: DistBackendError(SAME_GPU), "failed", "message", False, "rank 0 and rank 1 use the same GPU (PCI "),
        (lambda: SystemExit(0), "failed", "message", False, "sys.exit(0) was called in "),
        (lambda: SystemExit(), "failed", "message", False, "sys.exit() was called in "),
        (lambda: SystemExit("text"), "failed", "message", False, "sys.exit('text') was called in "),
        (lambda: SystemExit(Unprintable()), "failed", "message", False, "sys.exit(...) was called"),
        (lambda: Terminated(143), "terminated", "nothing", False, "SIGTERM"),
        (lambda: KeyboardInterrupt(), "interrupted", "nothing", False, "KeyboardInterrupt"),
        (lambda: Interrupted(signal.SIGINT), "interrupted", "nothing", False, "SIGINT"),
        (lambda: Interrupted(signal.SIGTERM), "terminated", "nothing", False, "SIGTERM"),
        (lambda: Interrupted(signal.SIGHUP), "terminated", "nothing", False, "SIGHUP"),
        (lambda: TrainingStopped("skip_nonfinite", "4 in a row"), "stopped", "message", False, "4 in a row"),
        (lambda: UserError("data.path: missing"), "failed", "message", False, "data.path: missing"),
        (lambda: OSError(errno.ENOSPC, "No space left on device", "/run/last.ckpt"), "failed", "message", False,
         "No space left on device for /run/last.ckpt; free"),
        (lambda: OSError(errno.EDQUOT, "Quota exceeded"), "failed", "message", False, "Quota exceeded in "),
        (lambda: FileNotFoundError(errno.ENOENT, "No such file"), "failed", "traceback", False, "FileNotFoundError"),
        (lambda: RuntimeError(GLOO), "failed", "traceback", True, "Connection closed by peer"),
        (lambda: RuntimeError(NCCL), "failed", "traceback", True, "NCCL"),
        (lambda: DistBackendError("anything"), "failed", "traceback", True, "anything"),
        (lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), "failed", "traceback", True, "Broken pipe"),
        (lambda: ConnectionResetError(errno.ECONNRESET, "reset"), "failed", "traceback", True, "reset"),
        (lambda: RuntimeError("the NCCL version is 2.27"), "failed", "traceback", False, "NCCL version"),
    ],
)  # fmt: skip
def test_causes(error: Callable[[], BaseException], end: str, show: str, lost: bool, message: str) -> None:
    """Bugs: SystemExit(0) is a success; a message of megabytes or with terminal escapes; a lost peer is a bug."""
    cause = cause_of(raised(error), started=True)
    assert (cause.result.end, cause.show, cause.lost_peer) == (end, show, lost)
    assert message in cause.result.message
    assert len(cause.result.message) <= MAX_MESSAGE
    assert cause.result.message.isprintable()


def test_a_mistake_before_the_first_batch_refuses_the_run() -> None:
    """Bug: the same exit code before and during training."""
    assert cause_of(UserError("x"), started=False).result.end == "refused"


@pytest.mark.parametrize("outer", [ImportError, RuntimeError, SystemExit, UserError])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_hidden_by_another_exception(outer: type[BaseException], signum: signal.Signals) -> None:
    """Bug: a signal during an import or in somebody's ``except`` is reported as an ImportError, and failed."""
    cause = cause_of(raised(lambda: outer("partially initialized"), during=Interrupted(signum)), started=True)
    assert cause.result.end == ("interrupted" if signum == signal.SIGINT else "terminated")


def test_lightning_turns_a_keyboard_interrupt_into_a_system_exit() -> None:
    """Bug: Ctrl-C that reached Lightning as KeyboardInterrupt is sys.exit(1), so failed."""
    assert cause_of(raised(lambda: SystemExit(1), during=KeyboardInterrupt()), started=True).result.end == "interrupted"


def test_a_lost_peer_is_seen_behind_another_exception() -> None:
    """Bug: the user's code that wraps a collective's error makes a consequence look like a cause."""
    assert cause_of(raised(lambda: ValueError("x"), during=RuntimeError(GLOO)), started=True).lost_peer


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), "connection"),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv"), "timeout"),
        (RuntimeError("Application timeout caused pair closure"), "timeout"),
        (DistBackendError("wait timeout after 300000ms, keys: /x"), "timeout"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4"), "different"),
        (ConnectionResetError("reset"), "perhaps"),
        (TimeoutError("the user's own server"), ""),
    ],
)
def test_how_a_peer_was_lost(error: Exception, lost: str) -> None:
    """Bugs: a wait in vain looks like a process that has died; the user's own lost connection, like another rank's."""
    assert cause_of(raised(lambda: error), started=True).lost == lost


def test_the_place_is_in_the_users_own_code() -> None:
    """Bug: the place of a process that waited is a line of Lightning or torch, so that nobody finds the branch."""
    broken = raised(lambda: torch.zeros(2)[5] and None)  # type: ignore[arg-type, return-value]
    assert cause_of(broken, started=True).place.startswith(f"{__file__}, line ")
    in_torch = raised(lambda: RuntimeError())
    in_torch.__traceback__ = None
    assert cause_of(in_torch, started=True).place == ""


def test_tracebacks_are_bounded_and_never_fail() -> None:
    """Bug: megabytes on the terminal; an exception whose methods fail hides the traceback."""
    assert len(traceback_text(raised(lambda: RuntimeError("x" * 5_000_000)))) <= MAX_TRACEBACK
    assert "Broken" in traceback_text(raised(Broken))
    deep = raised(lambda: RuntimeError("end"))
    deep.__context__ = deep
    assert "end" in traceback_text(deep)

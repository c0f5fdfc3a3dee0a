"""``python -m stabletrain.launch.torchrun ...``: torchrun, which also tells the launcher how its workers died.

torchrun's own report of a failed worker is long and comes after a traceback or message that says more; for a worker
that was killed it is the only report. Here its exit codes go to the launcher, which prints one line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from stabletrain.launch.imports import importing
from stabletrain.launch.rank_ends import write_exit_codes

with importing("torch"):
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from stabletrain.runtime.internals.elastic import kill_after

_ENDS_WITHIN = 15
"""Seconds that a worker has to end when another one has failed. One that is stopped, or hangs, ends at no signal, and
the run is restarted only when it is gone."""


def main(argv: Sequence[str]) -> int:
    """Run torchrun and return its exit code.

    Args:
        argv: torchrun's arguments.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    kill_after(_ENDS_WITHIN)
    try:
        run(parse_args(list(argv)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        write_exit_codes({rank: failure.exitcode for rank, failure in error.failures.items()})
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

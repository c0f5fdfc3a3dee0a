"""The worker's log file, and what it prints."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import warnings
from pathlib import Path

from stabletrain.launch.streams import LogFile, tolerate_broken_output

logger = logging.getLogger("stabletrain")

_LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric")
_MANY = 100_000
"""Records that are kept until the file's path is known."""


class WorkerLog:
    """Writes log records to a file, and those of stabletrain to the terminal as bare messages, too.

    Output to a closed terminal is dropped.
    """

    def __init__(self) -> None:
        self._early: logging.handlers.MemoryHandler | None = None

    def start(self) -> None:
        """Keep records until the file is known. Call it before Lightning is imported, which looks for handlers."""
        tolerate_broken_output()
        self._early = logging.handlers.MemoryHandler(_MANY, flushLevel=logging.CRITICAL + 1)
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._early)
            logging.getLogger(name).addFilter(_is_no_advertisement)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("stabletrain").addHandler(terminal)
        logging.getLogger("stabletrain").setLevel(logging.INFO)
        # a deprecated call of torch's pytree inside Lightning, which users cannot change
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
        )

    def to(self, path: Path) -> None:
        """Write to a file from now on, and the records that were kept.

        A file that cannot be opened is one line; the run goes on without it.

        Args:
            path: the log file.
        """
        if self._early is None:
            self.start()
        assert self._early is not None
        try:
            file: logging.Handler = LogFile(path)
        except OSError as error:
            reason = error.strerror or error
            logger.warning("%s cannot be written (%s); the run goes on without it", path, reason)
            file = logging.NullHandler()
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._early)
            logging.getLogger(name).addHandler(file)
        self._early = None


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()

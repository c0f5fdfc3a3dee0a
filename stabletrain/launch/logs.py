"""The log of a worker: files with everything, and what the user should see on the terminal."""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import sys
import warnings
from pathlib import Path

from stabletrain.launch.streams import tolerate_broken_output
from stabletrain.runtime.records.event_log import END
from stabletrain.terminal import Prefixed

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
        _add(self._early)
        for name in (*_LOGGERS, "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).addFilter(_is_no_advertisement)
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(Prefixed())
        logger.addHandler(terminal)
        logger.setLevel(logging.INFO)
        END.disabled = True
        # a deprecated call of torch's pytree inside Lightning, which users cannot change
        warnings.filterwarnings(
            "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
        )

    def to(self, *paths: Path) -> None:
        """Write to files from now on, and the records that were kept.

        A file that cannot be opened is one line; the run goes on without it. If the process crashes, Python writes
        where it was into the last one.

        Args:
            paths: the log files; their folders are made.
        """
        if self._early is None:
            self.start()
        assert self._early is not None
        early, self._early = self._early, None
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(early)
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = LogFile(path)
            except OSError as error:
                logger.warning("%s cannot be written (%s); the run goes on without it", path, error.strerror or error)
                continue
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            for record in early.buffer:
                file.handle(record)
            _add(file)
            if path == paths[-1] and file.stream is not None and not faulthandler.is_enabled():
                faulthandler.enable(file.stream)
        early.buffer.clear()


def _add(handler: logging.Handler) -> None:
    """Add a handler to the root and to those loggers that do not pass their records on, so that each arrives once."""
    for name in _LOGGERS:
        if not name or not logging.getLogger(name).propagate:
            logging.getLogger(name).addHandler(handler)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


class LogFile(logging.FileHandler):
    """A log file on a disk that may be full: the first record that cannot be written is one line on the terminal.

    Args:
        path: of the file, to which records are appended.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say the first time that records are lost; logging's own way is a traceback for each record."""
        if not self._has_failed and sys.stderr is not None:
            self._has_failed = True
            sys.stderr.write(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]}); log records are lost\n")

    def flush(self) -> None:
        """Flush; a failure is handled like that of a record."""
        try:
            super().flush()
        except OSError:
            self.handleError(logging.makeLogRecord({}))

    def close(self) -> None:
        """Close the file; what cannot be written is lost."""
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))

"""The log of a worker: a file with everything, and what the user should see on the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from stabletrain.launch.streams import tolerate_broken_output

logger = logging.getLogger("stabletrain")


def log_to(path: Path) -> None:
    """Log records and warnings to a file, and those of stabletrain to the terminal as bare messages, too.

    A file that cannot be opened is one line; the run goes on without it. Output to a closed terminal is dropped.

    Args:
        path: the log file.
    """
    tolerate_broken_output()
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("stabletrain").addHandler(terminal)
    logging.getLogger("stabletrain").setLevel(logging.INFO)
    try:
        file: logging.Handler = LogFile(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the run goes on without it", path, error.strerror or error)
        file = logging.NullHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addHandler(file)
        logging.getLogger(name).addFilter(_is_no_advertisement)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # a deprecated call of torch's pytree inside Lightning, which users cannot change
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )


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

"""Messages of stabletrain on a terminal: prefixed, also where a script has not configured logging."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from stabletrain import settings

NAME = "stabletrain"


class Prefixed(logging.Formatter):
    """Puts ``stabletrain:`` before the messages of stabletrain's loggers."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        text = super().format(record)
        return f"{NAME}: {text}" if record.name.partition(".")[0] == NAME else text


class LastResort(logging.StreamHandler[Any]):
    """Prints to the standard error as long as nothing else handles the records, as ``logging.lastResort`` does."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(Prefixed())

    @property
    def stream(self) -> TextIO:
        """The standard error of this moment, which a test or a notebook may have replaced."""
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, unless a handler that is not ours gets it."""
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(not isinstance(each, LastResort) for each in logger.handlers):
                return
            logger = logger.parent if logger.propagate else None
        super().emit(record)


def _name_settings(record: logging.LogRecord) -> bool:
    """Name the settings in a message as its reader knows them."""
    text = record.getMessage()
    if (worded := settings.worded(text)) != text:
        record.msg, record.args = worded, ()
    return True


def install() -> None:
    """Let messages of stabletrain reach the terminal of a script with their prefix; a second call does nothing."""
    logger = logging.getLogger(NAME)
    logger.addFilter(_name_settings)
    if not any(isinstance(each, LastResort) for each in logger.handlers):
        logger.addHandler(LastResort())


@contextmanager
def quiet() -> Iterator[None]:
    """Neither log records nor warnings in this block, as where the run itself will show them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

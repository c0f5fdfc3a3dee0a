"""How a plugin or callback ends a run."""


class TrainingStopped(Exception):
    """Raised when a plugin stops the run; existing checkpoints are not changed.

    It is an exception and not ``trainer.should_stop``, because after ``should_stop`` a script would continue, and save
    or test the failed model. The exit code of the command line is then 3.

    Args:
        plugin: name of the plugin that requested the stop.
        reason: one sentence that contains the number.
    """

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(f"{plugin} stopped the run: {reason}")
        self.plugin = plugin
        self.reason = reason

    def shorten(self) -> None:
        """Drop the frames of Lightning and stabletrain, which a decision has nothing to do with, from the traceback.

        What remains are the frames that the exception passes from here on: the script's call of ``Trainer.fit``.
        """
        self.__traceback__ = None
        self.__suppress_context__ = True

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.plugin, self.reason)


class EndReached(Exception):
    """Raised on all ranks when a run has come to the end that it was given, before the Trainer's own end.

    It is an exception since ``trainer.should_stop`` has no effect before ``min_steps`` and ``min_epochs``, and runs one
    more validation. The exit code of the command line is 0.

    Args:
        reason: one sentence that contains the number.
        checkpoint: path of the checkpoint that was saved at the end; None if none was.
    """

    def __init__(self, reason: str, checkpoint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.checkpoint = checkpoint

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (self.reason, self.checkpoint)

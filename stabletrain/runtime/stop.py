"""How a plugin ends a run."""


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

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.plugin, self.reason)

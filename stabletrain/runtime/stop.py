"""How a plugin ends a run."""


class TrainingStopped(Exception):
    """A plugin ended the run on purpose; checkpoints written so far are left alone.

    It is an exception, not ``trainer.should_stop``: a script must not go on to save or test a model that was given
    up. The command line turns it into exit code 3.

    Args:
        plugin: name of the plugin that asked for the stop.
        reason: one sentence with the number in it.
    """

    def __init__(self, plugin: str, reason: str) -> None:
        super().__init__(f"{plugin} stopped the run: {reason}")
        self.plugin = plugin
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.plugin, self.reason)

"""What loggers say about a run that a signal has ended."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from torch.utils.data import DataLoader

from stabletrain import SaveCheckpoints
from stabletrain.runtime.checkpoints.preemption import EXIT_CODE
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer


class Recorder(MLFlowLogger):
    """Lightning's MLFlowLogger with a store that only notes the final status."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self._initialized, self._run_id, self._checkpoint_callback = True, "1", None
        self._prefix, self._log_model = "", False

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(
            get_run=lambda run_id: True,
            set_terminated=lambda run_id, status: self.statuses.append(status),
            log_batch=lambda **_: None,
        )

    @property
    def save_dir(self) -> str | None:
        return None

    @property
    def name(self) -> str | None:
        return None

    def log_hyperparams(self, params: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None: ...


class RaiseAt(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(Terminated(EXIT_CODE), "KILLED"), (Interrupted(15), "KILLED"), (RuntimeError("a bug"), "FAILED")],
)
def test_lightnings_mlflow_logger_calls_an_interrupted_run_killed(
    error: BaseException, status: str, tmp_path: Path
) -> None:
    """Bugs: SIGTERM in a script with SaveCheckpoints leaves FAILED; a bug or the next fit is called KILLED, too."""
    logger = Recorder()
    saver = SaveCheckpoints(tmp_path / "ours")
    loggers = [logger, CSVLogger(tmp_path)]
    trainer = quiet_trainer(RaiseAt(error), saver, logger=loggers, max_epochs=1, default_root_dir=tmp_path)
    data = DataLoader(ToyBatches(steps=6), batch_size=None)
    with pytest.raises(type(error)):
        trainer.fit(ToyModule(), data)
    assert logger.statuses == [status]
    assert "finalize" not in vars(logger)
    logger.finalize("failed")
    assert logger.statuses == [status, "FAILED"]

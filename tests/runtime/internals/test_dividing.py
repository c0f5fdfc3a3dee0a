"""The attributes by which a divided state is collected and restored, and which part of a DTensor a rank holds."""

from pathlib import Path
from typing import Any

import dtensor_parts
import pytest
from lightning.pytorch import Trainer
from rank_pool import on_ranks

from stabletrain.runtime.internals import dividing


def test_what_is_replaced_exists_and_is_put_back() -> None:
    """Bug: a new Lightning has renamed a method, which is then never called; this test names it."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    strategy, connector = trainer.strategy, trainer._checkpoint_connector

    def nothing(*_: Any) -> Any:
        return None

    for install, owner, name in [
        (lambda: dividing.around_reading(trainer, nothing), strategy, "load_checkpoint"),
        (lambda: dividing.around_weights(trainer, nothing), strategy, "load_model_state_dict"),
        (lambda: dividing.before_optimizers(trainer, nothing), connector, "restore_optimizers_and_schedulers"),
    ]:
        assert callable(getattr(type(owner), name))
        undo = install()
        assert name in vars(owner)
        undo()
        assert name not in vars(owner)
    with dividing.collecting_states(trainer, lambda: {"a": 1}, nothing):
        assert strategy.lightning_module_state_dict() == {"a": 1}
        assert "optimizer_state" in vars(strategy)
    assert not {"lightning_module_state_dict", "optimizer_state"} & vars(strategy).keys()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_the_held_indices_are_torchs(tmp_path: Path, size: int) -> None:
    """Bugs: rows cut with strides or twice taken for one block; an empty part; copies on meshes side by side."""
    assert on_ranks(dtensor_parts.check, size, tmp_path) == [[]] * size

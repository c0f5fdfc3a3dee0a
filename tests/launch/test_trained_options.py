"""Every option of `precision` and `plugins/accumulate` trains a recipe with its whole stack."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from stabletrain.config.compose import compose
from stabletrain.config.discovery import groups
from stabletrain.config.validate import check_keys
from stabletrain.launch.assemble import build_parts
from stabletrain.runtime.signal_watch import SignalWatch
from stabletrain.testing.toy import quiet

SMALL = (
    "model.layers=1 model.width=32 model.heads=2 model.context=16 data.context=16 data.batch_size=8 logger=none "
    "data.validation_windows=8 model.sample_length=0 trainer.max_steps=200 trainer.val_check_interval=100 "
    "trainer.enable_progress_bar=false plugins/checkpoints=none trainer.enable_checkpointing=false"
)
OPTIONS = [
    *(f"precision={each}" for each in sorted(groups()["precision"])),
    *(f"plugins/accumulate={each}" for each in sorted(groups()["plugins/accumulate"])),
]
NEEDED = {
    "precision=bf16_true": "precision.allow_stalling=true",
    "precision=fp8": "precision.emulate=true",
    "plugins/accumulate=auto": "plugins.accumulate.pieces=2",
    "plugins/accumulate=fixed": "plugins.accumulate.micro_batches=2",
    "plugins/accumulate=mean": "trainer.accumulate_grad_batches=2",
    "plugins/accumulate=scheduled": "plugins.accumulate.schedule={0:1,150:2}",
    "plugins/accumulate=token_weighted": "plugins.accumulate.count=1 trainer.accumulate_grad_batches=2",
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_trains_char_gpt_for_200_steps(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: an option that only a toy can be trained with; one that a plugin of the recipe fails with."""
    if option == "precision=fp8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    words = [*SMALL.split(), option, f"run_dir={tmp_path / 'run'}", *NEEDED.get(option, "").split()]
    composed = compose("char_gpt", words)
    assert check_keys(composed) == []
    threads = torch.get_num_threads()
    try:
        with quiet():
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            parts = build_parts(composed.config, SignalWatch())
            assert parts.trainer is not None
            assert parts.model is not None
            parts.trainer.fit(parts.model, datamodule=parts.data)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert parts.trainer.global_step == 200
    assert parts.trainer.callback_metrics["stability/loss"] < (4.4 if option == "precision=bf16_true" else 3.6)

"""The benchmark of a GPU runs to its end on the CPU, so that the one run on a GPU is not lost to a mistake in it."""

import threading
from pathlib import Path

import gpu
import pytest


def test_the_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    """Bugs: a part that fails, a row that is missing, a figure of a rehearsal that is written to a page."""
    before = gpu.PAGE.read_bytes() if gpu.PAGE.exists() else None
    threads = threading.active_count()
    text = gpu.main(["--rehearse"])
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    for row in (
        "tiny MLP, default stack |", "tiny MLP, default stack without rollback |", "one self.log", "gradient_clip_val",
        "each step: peer: clip_grad_norm_", "each step: peer: NaN check", "each step: peer: ZClip",
        "over clip_grad_norm_ and fused AdamW", "device memory of the default stack", "plain copy from the device",
        "training waits", "beside the next steps", "| restore |", "durable checkpoint", "default stack over bare",
        "default stack without rollback over bare",
    ):  # fmt: skip
        assert sum(row in each for each in rows) == 1, row
    assert "a rehearsal on the CPU, whose figures mean nothing" in text
    assert (gpu.PAGE.read_bytes() if gpu.PAGE.exists() else None) == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("arguments", [["--rehearse", "--write"], []])
def test_a_rehearsal_is_not_written_and_a_gpu_is_needed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: figures of a CPU on the page of a GPU."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert not gpu.PAGE.exists()

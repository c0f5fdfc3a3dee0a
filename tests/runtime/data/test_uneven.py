"""Ranks with different numbers of batches."""

from pathlib import Path

from rank_pool import on_ranks
from uneven_on_two_ranks import cases


def test_uneven_loaders_are_refused_before_the_first_batch(tmp_path: Path) -> None:
    """Bugs: one rank ends well, the other waits for it and dies; ranks in different epochs; a run that was never in
    danger is refused."""
    first, second = on_ranks(cases, 2, tmp_path)
    refused = "expected as many batches in an epoch on every rank, got rank 0: 6, rank 1: 7."
    for case in ("one epoch", "max_steps over several epochs", "max_steps, but validation at other batches", "fsdp2"):
        for steps, message in (first[case], second[case]):
            assert steps == 0, case
            assert message.startswith(f"train_dataloader: {refused}"), case
            assert "Trainer(limit_train_batches=6)" in message
    for steps, message in (first["reloaded"], second["reloaded"]):
        assert (steps, refused in message) == (6, True)
    assert first["max_steps within the first"] == second["max_steps within the first"] == (3, "")
    assert first["limited"] == second["limited"] == (6, "")
    assert first["without a length"] == second["without a length"] == (3, "")
    assert first["validation"] == second["validation"] == (2, "")
    for case in ("validation with buffers", "validation with shards"):
        for _, message in (first[case], second[case]):
            assert message.startswith("val_dataloader: "), case
            assert "rank 0: 3, rank 1: 4" in message

"""The rest of an epoch after a resume with another number of processes."""

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rank_pool import on_ranks
from worlds import train_all

GLOBAL, AFTER = 8, 2
"""Samples in a batch of all ranks together; the number of batches before the checkpoint, minus one."""
KINDS = [("in order", 64), ("shuffled", 64), ("shuffled", 62), ("generator", 64), ("workers", 64)]


def run(folder: Path, size: int, cases: list[Any]) -> list[Any]:
    """For each case what the ranks saw, all together by epoch, and rank 0's warnings."""
    results = on_ranks(train_all, size, folder, size, cases)
    found = []
    for of_ranks in zip(*results, strict=True):
        seen = [each[0] for each in of_ranks]
        together = {
            epoch: [sorted(chain.from_iterable(rank[epoch][i] for rank in seen)) for i in range(len(seen[0][epoch]))]
            for epoch in seen[0]
        }
        found.append((together, of_ranks[0][1]))
    return found


_SLOW = [pytest.param(sizes, KINDS, marks=pytest.mark.slow) for sizes in ((2, 1), (1, 2), (2, 4), (2, 1, 2), (1, 2, 1))]


@pytest.mark.parametrize(("sizes", "kinds"), [((1, 2), KINDS[1:3]), *_SLOW])
def test_every_sample_comes_exactly_once(sizes: tuple[int, ...], kinds: list[tuple[str, int]], tmp_path: Path) -> None:
    """Bugs: the new ranks go on with another order, so that samples come twice or never; a second resume within the
    same epoch takes the new ranks' own order; the padding of uneven ranks counts as samples."""
    resume: list[Path | None] = [None] * len(kinds)
    before: list[list[list[int]]] = [[] for _ in kinds]
    reference: list[Any] = []
    for part, size in enumerate(sizes):
        folder = tmp_path / str(part)
        folder.mkdir()
        after = AFTER + 2 * part
        saves = [{after: folder / f"{i}.ckpt"} for i in range(len(kinds))]
        cases = [(samples, GLOBAL // size, kind, resume[i], saves[i]) for i, (kind, samples) in enumerate(kinds)]
        for i, (seen, warned) in enumerate(run(folder, size, cases)):
            rest = seen[0]
            if part == 0:
                reference.append(rest)
            else:
                assert "random numbers differ" in warned[0]
                assert len(warned) == 1, warned
                of_all = Counter(chain(*before[i], *rest))
                assert set(of_all) == set(range(kinds[i][1])), kinds[i]
                padded = -kinds[i][1] % size
                assert sum(of_all.values()) == kinds[i][1] + padded
                if not padded:  # the same samples in every batch, too
                    assert [*before[i], *rest] == reference[i][:8]
            assert sorted(set(chain(*seen[1]))) == list(range(kinds[i][1]))
            done = after + 1 - len(before[i])
            before[i] += rest[:done]
            resume[i] = saves[i][after]


@pytest.mark.slow
def test_as_many_ranks_that_read_other_batches(tmp_path: Path) -> None:
    """Bug: a run of two ranks cannot go on with tensor parallelism, or back: its ranks all read the whole batch."""
    kinds, saved = KINDS[1:3], {}
    parts = []
    for after, trained_by in ((1, "ddp"), (3, "tp"), (5, "ddp")):
        folder = tmp_path / str(after)
        folder.mkdir()
        batch, before = GLOBAL // (2 if trained_by == "ddp" else 1), dict(saved)
        saved = {i: folder / f"{i}.ckpt" for i in range(len(kinds))}
        cases = [(n, batch, kind, before.get(i), {after: saved[i]}, trained_by) for i, (kind, n) in enumerate(kinds)]
        parts.append((trained_by, on_ranks(train_all, 2, folder, 2, cases)))
    for i, (_, samples) in enumerate(kinds):
        trained = []
        for part, (trained_by, (mine, theirs)) in enumerate(parts):
            of_mine, of_theirs = mine[i][0][0], theirs[i][0][0]
            if trained_by == "tp":
                assert of_mine == of_theirs
                of_theirs = []
            until = 2 if part < 2 else None
            trained += [*chain(*of_mine[:until]), *chain(*of_theirs[:until])]
        assert Counter(trained) == Counter(range(samples))


@pytest.mark.slow
def test_what_cannot_be_dealt_out_is_said(tmp_path: Path) -> None:
    """Bug: another global batch, whose position is another sample, resumes without a word."""
    (tmp_path / "first").mkdir()
    run(tmp_path / "first", 2, [(64, 4, "shuffled", None, {2: tmp_path / "a.ckpt"})])
    ((_, warned),) = run(tmp_path, 1, [(64, 4, "shuffled", tmp_path / "a.ckpt", {})])
    assert "all ranks together trained on 8 samples in a batch (2 x 4), and now on 4 (1 x 4)" in warned[1]

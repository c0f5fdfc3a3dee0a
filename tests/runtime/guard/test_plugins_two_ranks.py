"""Plugins on two ranks that train together, with gradients averaged (DDP) and parameters sharded (FSDP2)."""

from pathlib import Path

import pytest
from fits import assert_same
from plugins_on_ranks import checkpointed, noise, refused, swapped
from rank_pool import on_ranks

KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


@KINDS
def test_a_swapped_optimizer_has_the_same_groups_on_all_ranks(kind: str, tmp_path: Path) -> None:
    """Bugs: sharded parameters, or a rank with an empty shard, get other groups; another bit than with the same
    optimizer of the module's own, before or after a dropped step."""
    ends = on_ranks(swapped, 2, tmp_path, kind)
    for groups, mine, theirs in ends:
        assert groups == [(2, 35, 0.1), (1, 5, 0.0), (3, 11, 0.0)]
        assert_same(mine, theirs)
    assert_same(ends[0][1], ends[1][1])


def test_the_noise_scale_of_two_ranks_is_that_of_two_micro_batches(tmp_path: Path) -> None:
    """Bugs: norms of single ranks are read after the average over ranks; a step that only one rank spoilt is part of
    the averages of the other."""
    one, two = on_ranks(noise, 2, tmp_path, "ddp")
    assert one == two
    (alone,) = on_ranks(noise, 1, tmp_path, None)
    assert one == pytest.approx(alone, rel=1e-4)


@KINDS
def test_checkpointed_activations_change_no_bit(kind: str, tmp_path: Path) -> None:
    """Bugs: the second forward pass runs without its gathered parameters; dropout's masks, or a rank's, differ."""
    for without, with_them in on_ranks(checkpointed, 2, tmp_path, kind):
        assert_same(without, with_them)


@KINDS
@pytest.mark.parametrize(
    ("which", "says"), [("idle", "Idle.step() has changed neither"), ("in backward", "net.0.weight was changed")]
)
def test_an_optimizer_that_steps_elsewhere_is_refused_on_all_ranks(
    kind: str, which: str, says: str, tmp_path: Path
) -> None:
    """Bugs: sharded parameters hide the change; one rank raises, and the other waits for it."""
    assert all(says in each for each in on_ranks(refused, 2, tmp_path, kind, which, limit=60.0))

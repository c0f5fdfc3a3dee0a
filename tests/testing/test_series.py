"""Series are what their names say, and the same in every process."""

import math

from stabletrain.testing import series


def test_series_are_seeded() -> None:
    # catches the use of a global generator
    assert series.rough(200) == series.rough(200) != series.rough(200, seed=1)


def test_faults_change_their_steps_only() -> None:
    """Bug: a fault changes other steps, or has another size than asked for."""
    calm = series.calm(50)
    spiked = series.spike(calm, at=7, norm=10.0)
    assert [t for t in range(50) if spiked[t] != calm[t]] == [7]
    assert spiked[7] == (calm[7][0], calm[7][1] * 10.0)
    bad = series.nonfinite(calm, at=[3], norm=None)
    assert math.isnan(bad[3][0])
    assert bad[3][1] == calm[3][1]
    shifted = series.level_shift(calm, at=20, factor=3.0)
    assert shifted[:20] == calm[:20]
    assert all(after[1] == 3.0 * before[1] for before, after in zip(calm[20:], shifted[20:], strict=True))

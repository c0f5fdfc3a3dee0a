"""Nodes of different software versions, compared by all ranks before the first step."""

from pathlib import Path

import pytest
import versions_on_ranks
from rank_pool import on_ranks

from stabletrain.launch.versions import own_versions


@pytest.mark.parametrize("same_versions", [True, False])
def test_all_ranks_refuse_other_software_alike(tmp_path: Path, same_versions: bool) -> None:
    """Bugs: one rank refuses and the others wait for it; the versions or the node are not named; the key is ignored."""
    ours = own_versions()["torch"]
    first, second = on_ranks(versions_on_ranks.compare, 2, tmp_path, {"torch": "1.0", "numpy": "0.9"}, same_versions)
    if same_versions:
        assert first == second
        assert f"torch: {ours} on a, 1.0 on b" in first
        assert "launch.same_versions=false" in first
    else:
        assert second == ""
        assert f"torch: {ours} on a, 1.0 on b" in first
        assert "numpy" in first
        assert "refused" not in first

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stabletrain.config import discovery

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution of plugins made of the given files, as pip would leave it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(package: str, files: dict[str, str], distribution: str | None = None) -> Path:
        name = distribution or package
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[stabletrain.plugins]\n{name} = {package}\n")
        for relative, text in {"__init__.py": "", **files}.items():
            path = site / package / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        discovery.clear_cache()
        return site

    discovery.clear_cache()
    yield make
    monkeypatch.undo()
    discovery.clear_cache()

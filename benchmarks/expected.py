"""Run recipes unchanged, and write their final metrics to recipes/expected/<recipe>.json.

python benchmarks/expected.py char_gpt digits_cnn
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parents[1] / "recipes" / "expected"
SKIPPED = "stability/skipped"
PACKAGES = ("torch", "lightning", "torchmetrics", "numpy")


def run(recipe: str, folder: Path) -> dict[str, Any]:
    """Run a recipe from the command line, and return its result.json."""
    command = [str(Path(sys.executable).with_name("stabletrain")), "train", recipe, "logger=none", f"run_dir={folder}"]
    subprocess.run(command, check=True, cwd=folder.parent)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def surroundings() -> dict[str, Any]:
    """Return the hardware and versions on which the bits of a result depend."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()} | {
        name: version(name) for name in PACKAGES
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    for recipe in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as temporary:
            result = run(recipe, Path(temporary) / "run")
        kept = {key: value for key, value in result["metrics"].items() if key.startswith("val/")}
        record = {
            "recipe": recipe,
            "command": f"python benchmarks/expected.py {recipe}",
            "seed": 0,
            "steps": result["steps"],
            "seconds": round(result["seconds"], 1),
            "threads": result["threads"],
            "metrics": kept | {SKIPPED: result["metrics"][SKIPPED]},
            "surroundings": surroundings(),
        }
        target = EXPECTED / f"{recipe}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{target}: {record['metrics']} in {record['seconds']} s")


if __name__ == "__main__":
    main()

"""What stabletrain costs on a GPU: ratios and differences, each to a baseline in the same run.

    python benchmarks/gpu.py               print the table (about 3 minutes on a data-centre card)
    python benchmarks/gpu.py --write       also write benchmarks/results/gpu.md
    python benchmarks/gpu.py --rehearse    the same code on the CPU with tiny sizes; nothing is written

The GPT has 124 M parameters, and its batch takes about half of the card's memory. Cases of it are fits that take turns
in threads of one process; those of the tiny network are processes that take turns. Medians over rounds are reported,
with the smallest and the largest. `make gpu` runs this after the tests of a GPU; neither needs a network, Hydra or
MLflow.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA before a fork

import torch
from gpu_suite import copies, launches, steps
from gpu_suite.place import REHEARSAL, Place
from gpu_suite.training import batch_size
from machine import measured
from overhead_suite.tables import Row, table

PAGE = Path(__file__).parent / "results" / "gpu.md"


def rows_of(place: Place, show: Callable[[str], None]) -> list[Row]:
    """The whole table, part by part.

    Args:
        place: the device and the sizes.
        show: called with what each part took.
    """
    rows: list[Row] = []
    began = time.perf_counter()

    def add(name: str, more: list[Row]) -> None:
        rows.extend(more)
        show(f"{name}: {time.perf_counter() - began:.0f} s since the start")

    add("tiny network", steps.bound_by_host(place))  # first: it forks, which it must not once CUDA is in use
    torch.manual_seed(0)
    add("launches", launches.launches(place))
    add("update", steps.update(place))
    batch = batch_size(place)
    add("memory", steps.memory(place, batch))
    add("copies", copies.copies(place, batch))
    add("whole steps", steps.whole_steps(place, batch))
    return rows


def page(rows: list[Row], place: Place, command: str) -> str:
    """The result page."""
    return f"# On a GPU\n\n{measured()}; {place.card()}.\n\n    {command}\n\n{table(rows)}\n"


def main(arguments: list[str] | None = None) -> str:
    """Measure, print the page, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu.md")
    parser.add_argument("--rehearse", action="store_true", help="run everything on the CPU with tiny sizes")
    options = parser.parse_args(arguments)
    if options.write and options.rehearse:
        parser.error("--write and --rehearse exclude each other: the figures of a rehearsal mean nothing")
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA device here; --rehearse runs the same code on the CPU")
    place = REHEARSAL if options.rehearse else Place()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "stabletrain")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = rows_of(place, lambda text: print(text, file=sys.stderr, flush=True))
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
    text = page(rows, place, "python benchmarks/gpu.py" + " --write" * options.write)
    print(text)
    if options.write:
        PAGE.write_text(text)
    return text


if __name__ == "__main__":
    main()

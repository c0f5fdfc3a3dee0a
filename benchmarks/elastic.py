"""Kill or stop a rank of a run under torchrun, let the launcher restart it, and compare its end bit for bit.

    python benchmarks/elastic.py                 20 kills and 5 stops of one rank, and 8 of other kinds
    python benchmarks/elastic.py --write         also write benchmarks/results/elastic.md
    python benchmarks/elastic.py --only stop     trials of one kind only
    python benchmarks/elastic.py --at-most 5     at most 5 trials now; the next call goes on

A trial is a run of 60 steps of a small GPT with the default plugins, dropout, two micro-batches per step, a validation
every 20 steps and a checkpoint every 5, on 2 and on 4 processes, with ddp and with fsdp2; step, rank and moment are
random. Each trial is a line in `benchmarks/results/elastic.jsonl`; a further call runs those that
are missing (`--again`: all).

Compared with `torch.equal` is the last checkpoint: weights and optimizer state, and apart from them random numbers,
counters and the state of every plugin. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from elastic_suite.trial import STEPS, TIMEOUT, Harm, Setup, TooLate, Trial, run_harmed, run_whole
from machine import measured

RESULTS = Path(__file__).parent / "results" / "elastic.md"
SETUPS = tuple(Setup(strategy, processes) for processes in (2, 4) for strategy in ("ddp", "fsdp2"))
COUNTS = {"kill": 20, "stop": 5, "all": 4, "torchrun": 2, "again": 2}
"""Kind of `Harm` -> trials; the setups take turns."""
WORDS = {
    "kill": "SIGKILL to one rank",
    "stop": "SIGSTOP to one rank",
    "all": "SIGKILL to all ranks",
    "torchrun": "SIGKILL to torchrun",
    "again": "SIGKILL to one rank, and to one that starts in the next attempt",
}


def trials(missing: Sequence[tuple[str, int]], folder: Path) -> Iterator[Trial]:
    """Run trials.

    Args:
        missing: kind and number of each.
        folder: for their runs.
    """
    for what, number in missing:
        setup = SETUPS[number % len(SETUPS)]
        whole = folder / f"whole-{setup.strategy}-{setup.processes}"
        if not whole.exists():
            run_whole(setup, whole)
        generator = random.Random(f"{what} {number}")
        for again in range(5):
            try:
                harm = Harm.drawn(what, setup, generator)
                yield run_harmed(setup, folder / f"{what}-{number}-{again}", harm, whole)
                break
            except TooLate:
                continue


def table(found: Sequence[Trial]) -> str:
    """Return the table of a page."""
    lines = [
        "| what happened | runs | trials | weights and optimizer identical | the whole checkpoint | attempts "
        "| steps lost, at most | seconds to the next step, median | at most | imports, median |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for what in COUNTS:
        for setup in SETUPS:
            own = [each for each in found if each.what == what and each.setup == setup.name]
            if own:
                seconds, imports = sorted(each.seconds for each in own), sorted(each.imports for each in own)
                cells = [
                    WORDS[what],
                    setup.name,
                    len(own),
                    f"{sum(not each.different for each in own)} of {len(own)}",
                    f"{sum(not each.different and not each.others for each in own)} of {len(own)}",
                    sum(each.attempts for each in own),
                    max(each.lost for each in own),
                    f"{seconds[len(seconds) // 2]:.1f}",
                    f"{seconds[-1]:.1f}",
                    f"{imports[len(imports) // 2]:.1f}",
                ]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _failures(found: Sequence[Trial]) -> str:
    """What was different, one example of each kind of run."""
    examples = {(each.setup, bool(each.different)): each for each in reversed(found) if each.different or each.others}
    texts = [
        f"{each.setup}, {WORDS[each.what]} at step {each.step}: `{(each.different or each.others)[0]}`"
        for each in examples.values()
    ]
    return f"What was different, an example of each kind: {'; '.join(texts)}." if texts else "Nothing was different."


def page(found: Sequence[Trial]) -> str:
    """Return the result page."""
    killed = [each for each in found if each.what == "kill"]
    stopped = [each for each in found if each.what == "stop"]
    same = [own and f"{sum(not each.different for each in own)} of {len(own)}" for own in (killed, stopped)]
    return f"""# Runs that lose a process, and go on

`python benchmarks/elastic.py --write`. {measured()}.
A run of {STEPS} steps (a small GPT, the default plugins, dropout, accumulation, validation, `plugins/resume=exactly
plugins/checkpoints=save` every 5 steps), `launch=torchrun launch.timeout={TIMEOUT}s`. Step, rank and moment are random.
The docstring of the script describes a trial.

After `kill -9` of a rank {same[0] or "no"} runs, and after SIGSTOP of a rank {same[1] or "no"}, ended with the weights
and the optimizer state of the undisturbed run. {_failures(found)}

{table(found)}

Seconds to the next step: from the signal to the first batch of the attempt that trains again, without the time in which
its processes import and build the run, which is in the last column. In it are the time until the other ranks notice
(`launch.timeout` for a stopped one), until all processes are gone, and until the checkpoint is loaded. Steps lost are
those that were made again.
"""


def main() -> int:
    """Run the trials that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", choices=list(COUNTS))
    parser.add_argument("--at-most", type=int)
    arguments = parser.parse_args()
    log = RESULTS.with_suffix(".jsonl")
    if arguments.again:
        log.unlink(missing_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    done = {(each.pop("kind"), each.pop("number")): Trial(**each) for each in map(json.loads, lines)}
    wanted = [(what, number) for what, count in COUNTS.items() for number in range(count)]
    missing = [key for key in wanted if key not in done and arguments.only in (None, key[0])][: arguments.at_most]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elastic-", ignore_cleanup_errors=True) as scratch:
        for key in missing:
            for trial in trials([key], Path(scratch)):
                done[key] = trial
                with log.open("a") as file:
                    file.write(json.dumps({"kind": key[0], "number": key[1], **asdict(trial)}) + "\n")
                print(f"{key[0]} {key[1]}: {trial}", flush=True)
    found = [done[key] for key in wanted if key in done]
    print(f"{table(found)}\n{time.monotonic() - began:.0f} s")
    if arguments.write:
        RESULTS.write_text(page(found), encoding="utf-8")
    return int(any(each.different or each.others for each in found))


if __name__ == "__main__":
    sys.exit(main())

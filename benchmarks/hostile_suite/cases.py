"""Configs and recipes that once ran code, died in the worker, or ended in a traceback."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from hostile_suite.recipes import recipe_with
from hostile_suite.trial import MARK, Trial, files, prepare, problems_of, run, stabletrain, trial

KIND = "inputs that once failed"

RECIPES = {
    "a class with an effect": {"plugins.clip.name": {"_target_": "torch.PyTorchFileWriter", "_args_": [MARK]}},
    "a function of a library": {
        "callbacks.x": {"_target_": "bitsandbytes.utils.execute_and_return", "command_string": f"touch {MARK}"}
    },
    "our own function": {
        "plugins.clip.name": {"_target_": "stabletrain.tracking.record.write_environment", "folder": MARK}
    },
    "resolved twice": {"plugins.clip.name": rf"\${{oc.create:{{_target_:psutil.Popen,args:[touch,{MARK}]}}}}"},
    "defaults: null": "defaults: null\n",
    "defaults: a number": "defaults: 1\n",
    "an integer as a key": "defaults: [train, _self_]\ntrainer: {1: 2}\n",
    "itself in its defaults": "defaults: [train, recipe, _self_]\n",
    "only a number": "1\n",
    "an anchor in itself": "defaults: [train, _self_]\na: &a [*a]\n",
}
"""A recipe's text, or the hostile value of one of its keys."""
LINES = (
    "trainer.max_steps=-5", "trainer.accelerator=gpu", "trainer.profiler=banana", "trainer.enable_checkpointing=false",
    "trainer.limit_train_batches=-1", "trainer.val_check_interval=-1", "trainer.accumulate_grad_batches=0",
    "trainer.gradient_clip_val=1.0", "strategy=fsdp", "optimizer.lr=nan", "model.width=-3 model.heads=3",
    "model.dropout=nan", "data.batch_size=0", "data.workers=-1", "resume=/", "launch.threads=100000",
    "-m seed=range(3,1)", "-m seed=range(1,10,0)", "plugins.clip=0", "plugins.clip=false",
    "schedule=cosine schedule.total=0", "+chaos=nan_grad chaos.rank=99", "plugins.spike.spill=/nonexistent/x",
    "~launch.threads",
)  # fmt: skip


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Run `stabletrain validate` for each; all must be refused with one message, and nothing may be written.

    Args:
        folder: for the files.
        seed: not used: all are listed.
        count: how many of them.
    """
    everything = [*RECIPES.items(), *((line, "") for line in LINES), ("a folder with modules in it", "shadow")]
    for number, (name, content) in enumerate(everything[:count]):
        place = prepare(folder / str(number), workload=False)
        if content == "shadow":
            yield _shadow(place)
            continue
        if content:
            text = content if isinstance(content, str) else recipe_with(*next(iter(content.items())))
            (place / "recipe.yaml").write_text(text)
        words = ["./recipe.yaml"] if content else ["char_gpt", "logger=none", *shlex.split(name)]
        before = files(place)
        ended = run(stabletrain("validate", *words), place)
        # a missing number of threads may also be replaced by the default
        problems = problems_of(ended, codes=(0, 2) if name.startswith("~") else (2,))
        if new := files(place) - before:
            problems.append(f"wrote {sorted(new)[:5]}")
        yield trial(KIND, name, problems, ended)


def _shadow(place: Path) -> Trial:
    """Modules in the current folder are imported by no command."""
    for module in ("xxhash", "yaml", "queue", "torch", "lightning", "sitecustomize", "mlflow", "psutil", "json"):
        (place / f"{module}.py").write_text(f"open({MARK!r}, 'w').write({module!r})\nraise ImportError({module!r})\n")
    words = ("digits_cnn", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "run_dir=run")
    for command in ("validate", "train"):
        ended = run(stabletrain(command, *words), place)
        problems = problems_of(ended, codes=(0,))
        if (place / MARK).exists():
            problems.append(f"{command} imported {(place / MARK).read_text()}")
        if problems:
            return trial(KIND, "a folder with modules in it", problems, ended)
    return Trial(KIND, "a folder with modules in it")

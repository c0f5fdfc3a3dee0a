"""Recipes and run.yamls that try to run code, to write files, or to hang the reader."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hostile_suite.trial import MARK, Trial, files, prepare, problems_of, run, stabletrain, trial

KIND = "hostile recipes and run.yamls"

_NODES: dict[str, Any] = {
    "a process": {"_target_": "psutil.Popen", "args": ["touch", MARK]},
    "a shell": {"_target_": "os.system", "command": f"touch {MARK}"},
    "a shell by another name": {"_target_": "torch.os.system", "command": f"touch {MARK}"},
    "bitsandbytes' shell": {"_target_": "bitsandbytes.utils.execute_and_return", "command_string": f"touch {MARK}"},
    "our environment file": {"_target_": "stabletrain.tracking.record.write_environment", "folder": MARK},
    "our removal": {"_target_": "stabletrain.runtime.checkpoints.durable.discard", "path": "precious"},
    "our launcher": {"_target_": "stabletrain.launch.process.run_process", "command": ["touch", MARK]},
    "torch's file writer": {"_target_": "torch.PyTorchFileWriter", "_args_": [MARK]},
    "torch's allocator": {"_target_": "torch.cuda.memory.CUDAPluggableAllocator", "path_to_so_file": "./x.so"},
    "torch.load": {"_target_": "torch.load", "f": "x.pt", "weights_only": False},
    "a checkpoint's loader": {
        "_target_": "lightning.pytorch.LightningModule.load_from_checkpoint",
        "checkpoint_path": "x",
    },
    "a partial": {"_target_": "functools.partial", "_args_": ["os.system"], "_partial_": True},
    "hydra": {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", "command": f"touch {MARK}"}},
    "eval": {"_target_": "builtins.eval", "_args_": [f"open('{MARK}', 'w')"]},
    "a module of this folder": {"_target_": "evil.Thing"},
    "the metric of another place": {"_target_": "torchmetrics.MeanMetric"},
}
_TEXTS = {
    "resolved twice": r"\${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}",
    "resolved three times": r"\\\${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}",
    "created": "${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}",
    "the environment": "${oc.env:HOME}",
    "decoded": "${oc.decode:'${oc.env:PATH}'}",
    "an unknown resolver": "${shell:touch PWNED}",
}
_PLACES = (
    "plugins.clip.name", "plugins.clip", "plugins.spike.spill", "callbacks.x", "callbacks.x.on_fit_start", "model",
    "data", "optimizer", "optimizer.betas", "schedule", "chaos", "logger", "logger.tracking_uri", "trainer.profiler",
    "trainer.plugins", "trainer.max_steps", "strategy.strategy", "precision.plugins", "guard.mode", "guard.events",
    "launch.sbatch.account", "launch.threads", "seed", "resume", "run_dir", "unknown.key",
)  # fmt: skip
_CLASSES = {
    "callbacks.x.on_fit_start": "lightning.pytorch.callbacks.LambdaCallback",
    "plugins.clip.name": "stabletrain.ClipZScore",
    "plugins.spike.spill": "stabletrain.Rollback",
    "logger.tracking_uri": "stabletrain.tracking.MLflowLogger",
}
"""The class whose argument a place is."""
_TEXT_FILES = {
    "a tag that calls": "!!python/object/apply:os.system ['touch PWNED']\n",
    "a tag in a value": "defaults: [train, _self_]\nseed: !!python/object/apply:os.system ['touch PWNED']\n",
    "brackets": "a: " + "[" * 2000 + "]" * 2000 + "\n",
    "an alias bomb": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "an anchor in itself": "defaults: [train, _self_]\na: &a [*a]\n",
    "another search path": "defaults: [train, _self_]\nhydra: {searchpath: ['pkg://evil']}\n",
    "hydra's own output": "defaults: [train, override hydra/job_logging: none, _self_]\n",
    "a file outside": "defaults: [train, ../../../../../../etc/passwd, _self_]\n",
    "a file outside as an option": "defaults: [train, {override model: ../../../secret}, _self_]\n",
    "a pickle by extension": "\x80\x04cos\nsystem\n",
}  # fmt: skip


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Try ``count`` recipes and run.yamls: `validate` and `train` of a recipe, and the worker of a run.yaml.

    Args:
        folder: for the files.
        seed: of the choice of contents and places.
        count: how many files; every content and every place is among them if there are enough.
    """
    generator = random.Random(seed)
    cases = [(name, "", text) for name, text in _TEXT_FILES.items()]
    contents = [*_NODES.items(), *_TEXTS.items()]
    generator.shuffle(contents)
    places = list(_PLACES)
    generator.shuffle(places)
    for index in range(max(0, count - len(cases))):
        name, content = contents[index % len(contents)]
        cases.append((name, places[index % len(places)], content))
    yield _ordinary(folder / "ordinary")
    for number, (name, place, content) in enumerate(cases[: count - 1]):
        yield _try(folder / str(number), name, place, content, as_run_yaml=number % 3 == 2)


def _ordinary(folder: Path) -> Trial:
    """Train a run.yaml with nothing hostile in it: the others differ from it at one key only."""
    prepare(folder, workload=False)
    (folder / "run").mkdir()
    file = folder / "run" / "run.yaml"
    file.write_text(run_yaml_with("seed", 1, folder / "run"))
    ended = run([sys.executable, "-P", "-m", "stabletrain.worker", str(file)], folder)
    return trial(KIND, "nothing hostile", problems_of(ended, codes=(0,)), ended)


def _try(folder: Path, name: str, place: str, content: object, *, as_run_yaml: bool) -> Trial:
    prepare(folder, workload=False)
    (folder / "evil.py").write_text(f"open({MARK!r}, 'w')\n")
    (folder / "precious").mkdir()
    (folder / "precious" / "data").write_text("must stay")
    hostile = folder / ("run/run.yaml" if as_run_yaml else "hostile.yaml")
    hostile.parent.mkdir(exist_ok=True)
    text = str(content)
    if place:
        text = run_yaml_with(place, content, folder / "run") if as_run_yaml else recipe_with(place, content)
    hostile.write_text(text)
    before = files(folder)
    worker = [sys.executable, "-P", "-m", "stabletrain.worker", str(hostile)]
    commands = [worker] if as_run_yaml else [stabletrain(word, "./hostile.yaml") for word in ("validate", "train")]
    for command in commands:
        ended = run(command, folder)
        problems = problems_of(ended, codes=(2,))
        new = {path for path in files(folder) - before if path.split("/")[0] != "run"}
        if lost := before - files(folder):
            problems.append(f"removed {sorted(lost)}")
        if new:
            problems.append(f"wrote {sorted(new)[:5]}")
        if problems:
            what = "run.yaml" if as_run_yaml else f"stabletrain {command[4]}"
            return trial(KIND, f"{name} at {place or 'the whole file'} ({what})", problems, ended)
    return Trial(KIND, f"{name} at {place or 'the whole file'}")


def recipe_with(place: str, content: object) -> str:
    """Return a recipe that is right but for the content at one key."""
    options = [{"override model": "digits_cnn"}, {"override data": "digits"}, {"override logger": "none"}]
    config = {"defaults": ["train", *options, "_self_"], "trainer": {"max_steps": 1, "accelerator": "cpu"}}
    return _with(config, place, content)


def run_yaml_with(place: str, content: object, run_dir: Path) -> str:
    """Return a run.yaml that is right but for the content at one key."""
    config = {
        "recipe": "hostile",
        "seed": 0,
        "run_dir": str(run_dir),
        "resume": None,
        "model": {"_target_": "stabletrain.workloads.DigitsCNN"},
        "data": {"_target_": "stabletrain.workloads.DigitsData"},
        "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1},
        "schedule": None,
        "plugins": {},
        "guard": None,
        "callbacks": {},
        "chaos": None,
        "precision": {"precision": "32-true"},
        "strategy": {"strategy": "auto"},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "num_nodes": 1},
        "logger": None,
        "launch": {"kind": "local", "processes": 1, "nodes": 1, "threads": 1},
        "trust": [],
        "choices": {},
    }
    return _with(config, place, content)


def _with(config: dict[str, Any], place: str, content: object) -> str:
    *parents, last = place.split(".")
    node = config
    for parent in parents:
        below = node.get(parent)
        node[parent] = below if isinstance(below, dict) else {}
        node = node[parent]
    if place in _CLASSES:
        node["_target_"] = _CLASSES[place]
    node[last] = [content] if last == "plugins" and parents else content
    return yaml.safe_dump(config, sort_keys=False)

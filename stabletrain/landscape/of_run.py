"""The landscape of a recorded run: from its folder to the result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger

from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.validate import check_signatures
from stabletrain.errors import UserError
from stabletrain.landscape.checkpoints import checkpoint_paths
from stabletrain.landscape.results import Landscape
from stabletrain.landscape.study import Options, Say, Studied, Study
from stabletrain.launch.assemble import build_data, build_model, override_optimizer
from stabletrain.launch.bounded import one_message
from stabletrain.launch.checks import quiet
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.runtime import rng
from stabletrain.runtime.records.run_files import LANDSCAPE, RUN_YAML

_TRAINER = ("max_steps", "max_epochs", "limit_train_batches", "overfit_batches")
"""Arguments of the run's Trainer that say what it trains on, and how long, as its schedulers may ask."""


def find(wanted: str) -> RecordedRun:
    """Return the run that a word names, of which the folder is on this machine.

    Args:
        wanted: its folder, id, the beginning of an id, or its name.

    Raises:
        UserError: if there is none.
    """
    run = find_run(wanted, command="landscape")
    if run.folder is None:
        raise UserError(
            f"landscape: the folder of {one_message(run.name, 200)} is not on this machine, and its checkpoints are "
            "there; copy it, and name the folder"
        )
    return run


def landscape_of(
    run: RecordedRun, options: Options, say: Say, *, most: int = 20, trust: Iterable[str] = ()
) -> Landscape:
    """Compute the landscape of a run. Nothing is trained, and nothing in the run's folder is changed.

    Args:
        run: from `find`.
        options: what to compute.
        say: gets lines of text on the way; what it will cost comes first.
        most: checkpoints that are used at most, evenly spaced, >= 1.
        trust: packages from which the config may build objects.

    Raises:
        UserError: if the run has no checkpoint, or one of another model, or its config has mistakes.
    """
    assert run.folder is not None
    paths = checkpoint_paths(run.folder)
    config = _config(run, tuple(trust))
    accelerator = "cuda" if torch.cuda.is_available() and config["accelerator"] != "cpu" else "cpu"
    study = Study(one_message(run.name, 200), paths, options, say, most=most)
    with quiet(), rng.preserved(), tempfile.TemporaryDirectory() as scratch, suppress(Studied):
        seed_everything(config["seed"], workers=True, verbose=False)
        module, data = build_model(config), build_data(config)
        if config.get("optimizer"):
            override_optimizer(module, config["optimizer"], config.get("param_groups") or {})
        trainer = Trainer(
            **config["trainer"],
            accelerator=accelerator,
            devices=1,
            callbacks=[study],
            logger=DummyLogger(),
            default_root_dir=scratch,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
    if study.result is None:
        raise UserError("landscape: the training loader of the run has no batch, so there is no loss (config key data)")
    return study.result


def _config(run: RecordedRun, trust: tuple[str, ...]) -> dict[str, Any]:
    """The part of run.yaml that says what is trained on what; how and where is left out: one process, in fp32."""
    config = run.config()
    name = one_message(run.name, 200)
    if config is None:
        raise UserError(f"landscape: {name} has no {RUN_YAML}: it was not started by stabletrain train")
    needed = ("seed", "model", "data", "trainer")
    problems = [Problem(key, f"the {RUN_YAML} of {name} lacks it") for key in needed if config.get(key) is None]
    if not problems:
        seed, trainer = config["seed"], config["trainer"]
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            problems.append(Problem("seed", f"expected 0 to 2**32 - 1, got {seed!r:.100}"))
        given: Mapping[str, Any] = trainer if isinstance(trainer, Mapping) else {}
        config = {key: config.get(key) for key in ("seed", "model", "data", "optimizer", "param_groups")}
        config["trainer"] = {key: given[key] for key in _TRAINER if key in given}
        problems += check_signatures(config, trust)
        config["accelerator"] = given.get("accelerator")
    if problems:
        raise ConfigError(problems)
    return config


def folder_of(run: RecordedRun) -> Path:
    """Where the result of a run is written: ``landscape/`` in its folder."""
    assert run.folder is not None
    return run.folder / LANDSCAPE

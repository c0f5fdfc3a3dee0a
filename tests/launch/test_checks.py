"""What is found before a run is opened, by building it: each mistake with its key, and nothing that is none."""

import importlib.util
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything

from stabletrain.config.compose import compose
from stabletrain.config.validate import check_keys
from stabletrain.launch.assemble import build_parts
from stabletrain.launch.checks import ConstructorBug, check_and_build, check_config, problem_of
from stabletrain.runtime.signal_watch import SignalWatch

TINY = str(Path(__file__).parent / "tiny.yaml")
DDP = "lightning.pytorch.strategies.DDPStrategy"
MIXED = "lightning.pytorch.plugins.precision.MixedPrecision"
TORCHAO = importlib.util.find_spec("torchao") is not None
LSF = "lightning.pytorch.plugins.environments.LSFEnvironment"
EARLY = "callbacks.{0}._target_=lightning.pytorch.callbacks.EarlyStopping callbacks.{0}.monitor=x"


@pytest.fixture(autouse=True)
def own_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("STABLETRAIN_TRUST", "tiny_workload")


def found(recipe: str, overrides: str) -> list[tuple[str, str]]:
    composed = compose(recipe, overrides.split())
    problems = check_keys(composed) or check_config(composed.config)
    return [(problem.key, problem.text) for problem in problems]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        ("trainer.max_steps=-5", "trainer.max_steps", "-5"),
        ("plugins.spike.spill=/nonexistent/x", "plugins.spike.spill", "cannot write to /nonexistent/x"),
        ("trainer.max_epochs=-5", "trainer.max_epochs", "-5"),
        ("trainer.max_time=soon", "trainer.max_time", "DD:HH:MM:SS"),
        pytest.param(
            "trainer.accelerator=gpu",
            "trainer.accelerator",
            "gpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it has one"),
        ),
        ("trainer.accelerator=banana", "trainer.accelerator", "banana"),
        ("trainer.profiler=banana", "trainer.profiler", "simple"),
        ("trainer.limit_train_batches=-1", "trainer.limit_train_batches", "-1"),
        ("trainer.limit_train_batches=nan", "trainer.limit_train_batches", "nan"),
        ("trainer.val_check_interval=-1", "trainer.val_check_interval", "-1"),
        ("trainer.gradient_clip_algorithm=banana", "trainer.gradient_clip_algorithm", "banana"),
        ("trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val", "ClipZScore"),
        ("trainer.enable_checkpointing=false callbacks.a._target_=lightning.pytorch.callbacks.ModelCheckpoint",
         "trainer.enable_checkpointing", "ModelCheckpoint"),
        ("strategy.strategy=banana", "strategy.strategy", "banana"),
        ("strategy.strategy=ddp_spawn", "strategy.strategy", "use strategy=ddp"),
        ("strategy.strategy=deepspeed", "strategy.strategy", "pip install -U deepspeed"),
        ("strategy=ddp_static launch.processes=2 plugins/accumulate=fixed plugins.accumulate.micro_batches=2",
         "plugins", "static_graph=True"),
        ("strategy=ddp launch.processes=2 trainer.sync_batchnorm=true", "trainer.sync_batchnorm", "for GPUs only"),
        ("precision.precision=transformer-engine", "precision.precision", "transformer_engine"),
        (f"precision.precision=16-mixed precision.plugins={{_target_:{MIXED},precision:bf16-mixed,device:cpu}}",
         "precision.precision", "together with precision.plugins"),
        ("precision=fp16_mixed precision.min_scale=-1", "precision.min_scale", "> 0"),
        ("precision=fp16_mixed precision.emulate=true", "precision.emulate", "no effect with fp16_mixed"),
        ("precision=bf16_mixed precision.keep_fp32=[net.haed]", "precision.keep_fp32", "'net.haed' is neither"),
        pytest.param(
            "precision=fp8", "precision.emulate", "expected a GPU of compute capability 8.9",
            marks=pytest.mark.skipif(not TORCHAO, reason="torchao is not installed"),
        ),
        ("optimizer=sgd precision=bf16_true", "precision.allow_stalling", "SGD: parameters are bfloat16"),
        ("precision=fp16_mixed guard.mode=device optimizer=adamw", "guard.mode", "GradScaler"),
        ("optimizer=adamw optimizer.lr=nan", "optimizer.lr", "nan"),
        ("optimizer=adamw optimizer.betas=[2,3]", "optimizer", "beta"),
        ("optimizer.fused=true optimizer.foreach=true", "optimizer", "fused"),
        ("plugins.clip.decay=-1", "plugins.clip.decay", "(0, 1)"),
        ("plugins/accumulate=fixed plugins.accumulate.target_samples=100", "plugins.accumulate.target_samples",
         "expected a multiple of 64, the samples in one micro-batch of all ranks, got 100. Nearest: 64 or 128"),
        ("plugins/accumulate=fixed plugins.accumulate.target_tokens=640 plugins.accumulate.tokens_per_sample=8 "
         "plugins.accumulate.samples_per_batch=7", "plugins.accumulate.target_tokens", "a multiple of 56"),
        ("plugins/accumulate=scheduled plugins.accumulate.schedule={0:64,9:65} plugins.accumulate.unit=samples",
         "plugins.accumulate.schedule", "a multiple of 64, the samples in one micro-batch of all ranks, got 65"),
        ("plugins/accumulate=fixed plugins.accumulate.target_samples=192 launch.processes=2 strategy=ddp",
         "plugins.accumulate.target_samples", "a multiple of 128"),
        (f"{EARLY.format('a')} callbacks.a.mode=banana", "callbacks.a.mode", "min, max"),
        (f"{EARLY.format('a')} {EARLY.format('b')}", "callbacks.a", "together with callbacks.b"),
        ("logger._target_=lightning.pytorch.loggers.CometLogger", "logger._target_", "comet"),
        (f"strategy.strategy={{_target_:{DDP},cluster_environment:{{_target_:{LSF}}}}}", "strategy.strategy", "LSB_"),
    ],
)  # fmt: skip
def test_a_mistake_that_only_building_shows_has_its_key(overrides: str, key: str, words: str) -> None:
    """Bug: the config is accepted, a run is opened, and its worker dies in a constructor."""
    problems = found("digits_cnn", overrides)
    assert [each for each, _ in problems] == [key], problems
    assert words in problems[0][1]


def test_mistakes_in_several_parts_are_found_together() -> None:
    """Bug: the user learns of one mistake per attempt."""
    overrides = "trainer.max_time=soon trainer.profiler=banana plugins.clip.decay=-1 data.batch_size=0"
    keys = {key for key, _ in found("digits_cnn", overrides)}
    assert keys == {"trainer.max_time", "trainer.profiler", "plugins.clip.decay", "data.batch_size"}


@pytest.mark.parametrize(
    "overrides",
    [
        "", "optimizer.fused=true", "optimizer=sgd", "precision=bf16_mixed", "precision=fp16_mixed", "strategy=ddp",
        "strategy=ddp_static launch.processes=2", "strategy=ddp_zero1 launch.processes=2",
        "precision=fp16_mixed precision.keep_fp32=[BatchNorm2d] precision.fall_back=bf16",
        "precision=bf16_true precision.allow_stalling=true optimizer=sgd", "precision=tf32", "precision=fp64",
        "launch.processes=2", "launch=torchrun", "plugins/checkpoints=save",
        "trainer.limit_train_batches=1.0", "trainer.val_check_interval=0.5", "schedule=cosine",
        "chaos=nan_grad chaos.at_step=1", "plugins/accumulate=fixed plugins.accumulate.target_samples=128",
        "plugins/accumulate=scheduled plugins.accumulate.tokens_per_sample=8 "
        "plugins.accumulate.schedule={0:1,1e9tok:8}",
        "launch=slurm trainer.accelerator=gpu launch.processes=8 launch.nodes=4 strategy.strategy=fsdp",
    ],
)  # fmt: skip
def test_what_can_be_built_is_accepted(overrides: str) -> None:
    """Bugs: a correct config is refused; a batch job is refused because the login node has no such device."""
    assert found("digits_cnn", overrides) == []


class ReadsItsWeights(LightningModule):
    """Cannot be built on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.ones(3).sum())


class HasABug(LightningModule):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size < 0:
            raise ValueError(f"size must not be negative, got {size}")
        self.table = {}["missing"]  # type: ignore[var-annotated]


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tiny_workload

    for kind in (ReadsItsWeights, HasABug):
        monkeypatch.setattr(kind, "__module__", "tiny_workload")
        monkeypatch.setattr(tiny_workload, kind.__name__, kind, raising=False)
    monkeypatch.setenv("STABLETRAIN_TRUST", f"tiny_workload,{__name__}")
    return tiny_workload


def test_a_module_that_needs_real_tensors_is_accepted(workload: Any) -> None:
    """Bug: a module that reads its own weights while it is built is refused, since meta tensors have no values."""
    assert found(TINY, "model._target_=tiny_workload.ReadsItsWeights") == []


def test_a_bug_in_the_users_constructor_keeps_its_traceback(workload: Any) -> None:
    """Bugs: a bug of the user's becomes one line without a place; a value that is refused becomes a traceback."""
    with pytest.raises(ConstructorBug, match=r"(?s)Traceback.*test_checks.*KeyError: 'missing'"):
        found(TINY, "model._target_=tiny_workload.HasABug")
    problems = found(TINY, "model._target_=tiny_workload.HasABug model.size=-3")
    assert problems == [("model.size", "size must not be negative, got -3")]


def test_the_random_generators_are_as_after_building_alone(config: dict[str, Any]) -> None:
    """Bug: a check draws random numbers, so that a run has other results than the same run before."""
    config["optimizer"] = {"_target_": "torch.optim.AdamW", "_partial_": True}
    config["plugins"] = {"clip": {"_target_": "stabletrain.ClipNorm"}}
    states = []
    for build in (build_parts, lambda config, watch: check_and_build(config, watch)[0]):
        seed_everything(99)
        run = build(config, SignalWatch())
        assert run is not None
        states.append((torch.get_rng_state(), np.random.rand(), random.random(), run.model.layer.weight.detach()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1:3] == states[1][1:3]
    assert torch.equal(states[0][3], states[1][3])


def test_a_check_prints_and_logs_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Bug: `validate` prints what belongs to a run, once for each attempt to find the argument."""
    with caplog.at_level(logging.INFO):
        assert found("digits_cnn", "trainer.max_steps=-5")
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize(
    ("message", "node", "key"),
    [
        ("model.width: expected a multiple of 4, got 3", {"width": 3}, "model.width"),
        ("width must be > 0, got -3", {"width": -3, "heads": 2}, "model.width"),
        ("Invalid number: -3", {"width": -3, "heads": 2}, "model.width"),
        ("Invalid number: 2", {"width": 2, "heads": 2}, "model"),
        ("clip: decay is wrong (config key plugins.clip.decay)", {}, "plugins.clip.decay"),
        ("notes: not a key", {}, "model"),
        ("clip_norm: plugins.clip.max_norm: expected > 0, got 2", {"width": 2}, "plugins.clip.max_norm"),
        ("", {}, "model"),
    ],
)
def test_the_key_comes_from_the_message(message: str, node: dict[str, Any], key: str) -> None:
    """Bug: a message about one argument names only its object, or a wrong argument."""
    assert problem_of(ValueError(message), "model", node).key == key

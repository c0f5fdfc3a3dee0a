"""The settings of torch and of a Trainer that can change a result, as they are in this process."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def torch_settings() -> dict[str, Any]:
    """Return versions, threads, and the flags of precision and determinism; None for one that cannot be read.

    torch refuses to say a precision by its old name once it was set by its new one.
    """
    import torch

    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    found: dict[str, Callable[[], Any]] = {
        "version": lambda: torch.__version__,
        "lightning": lambda: importlib.metadata.version("lightning"),
        "cuda": lambda: torch.version.cuda,
        "cudnn": lambda: cudnn.version(),
        "threads": torch.get_num_threads,
        "interop_threads": torch.get_num_interop_threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability,
        "mkldnn": lambda: mkldnn.enabled,
        "default_dtype": lambda: str(torch.get_default_dtype()),
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "cuda_matmul_fp32_precision": lambda: cuda.matmul.fp32_precision,
        "cudnn_conv_fp32_precision": lambda: cudnn.conv.fp32_precision,
        "mkldnn_matmul_fp32_precision": lambda: mkldnn.matmul.fp32_precision,
        "fp16_reduced_precision_reduction": lambda: cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduced_precision_reduction": lambda: cuda.matmul.allow_bf16_reduced_precision_reduction,
        "attention_kernels": lambda: [
            name for name in ("cudnn", "flash", "math", "mem_efficient") if getattr(cuda, f"{name}_sdp_enabled")()
        ],
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled,
        "cudnn_deterministic": lambda: cudnn.deterministic,
        "cudnn_benchmark": lambda: cudnn.benchmark,
    }
    flags = {"optimize": sys.flags.optimize, "hash_randomization": sys.flags.hash_randomization}
    return {name: _value(read) for name, read in found.items()} | {"python_flags": flags}


def trainer_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the number of processes, the hardware type, strategy, precision, and whether the module is compiled.

    Args:
        trainer: built; its module is known once a fit has begun.
    """
    from stabletrain.runtime.internals.compiled import is_compiled

    module = trainer.lightning_module
    return {
        "world_size": trainer.world_size,
        "nodes": trainer.num_nodes,
        "accelerator": type(trainer.accelerator).__name__,
        "hardware": _value(lambda: _hardware(trainer)),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "compiled": None if module is None else is_compiled(module),
    }


def _hardware(trainer: Trainer) -> str:
    import torch

    device = trainer.strategy.root_device
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return device.type if device.type != "cpu" else f"cpu {platform.machine()}"


def _value(read: Callable[[], Any]) -> Any:
    with suppress(Exception):  # of another version of torch, or of settings that contradict each other
        return read()
    return None

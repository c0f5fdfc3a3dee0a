"""The environment of a run: versions, hardware, settings that change bits, and the state of the user's code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from stabletrain.tracking.git import git_state

# only these variables: the whole environment contains passwords, tokens, user and host names
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "KMP_AFFINITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "PYTHONHASHSEED",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)


def environment() -> dict[str, Any]:
    """Return the properties of this process that can change a result; no secrets, no user or host names."""
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "torch": _torch(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Return the version of every installed distribution, by name."""
    found = {(dist.metadata["Name"] or ""): dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found, key=str.lower) if name}


def write_environment(folder: str | Path, *, code: str | Path | None = None) -> list[Path]:
    """Write ``environment.json``, ``requirements.txt``, ``git.json`` and, for changed code, ``git.diff``.

    Args:
        folder: the folder to write to; made if missing.
        code: folder of the user's code; None: the current folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, record = git_state(code or Path.cwd()), environment()
    diff = state.pop("diff")
    texts = {
        "environment.json": json.dumps(record, indent=2) + "\n",
        "requirements.txt": "".join(f"{name}=={version}\n" for name, version in record["packages"].items()),
        "git.json": json.dumps(state, indent=2) + "\n",
    }
    if diff:
        texts["git.diff"] = diff + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _cpu() -> dict[str, Any]:
    import psutil

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "logical": os.cpu_count(),
        "usable": usable,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _gpus() -> list[dict[str, str]]:
    # nvidia-smi instead of torch.cuda, which would create a context and allocate memory on every device
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 2]
    return [{"name": name, "memory": memory, "driver": driver} for name, memory, driver in rows]


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "python_flags": {"optimize": sys.flags.optimize, "hash_randomization": sys.flags.hash_randomization},
    }

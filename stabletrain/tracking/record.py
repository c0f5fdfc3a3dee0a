"""The environment of a run: versions, hardware, settings that change bits, and the state of the user's code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.tracking.git_record import git_record, write_git
from stabletrain.tracking.json_files import as_json, write_texts
from stabletrain.tracking.torch_settings import torch_settings, trainer_settings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# only these variables: the whole environment contains passwords, tokens, user and host names
_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_DYNAMIC",
    "OMP_PROC_BIND",
    "OMP_SCHEDULE",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "OPENBLAS_NUM_THREADS",
    "KMP_AFFINITY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
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


def environment(trainer: Trainer | None = None) -> dict[str, Any]:
    """Return the properties of this process that can change a result; no secrets, no user or host names.

    Args:
        trainer: of the training; None: there is none yet, and ``training`` is missing.
    """
    return {
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": _cpu(),
        "gpus": _gpus(),
        **current_settings(trainer),
        "packages": packages(),
    }


def current_settings(trainer: Trainer | None = None) -> dict[str, Any]:
    """Return the part of `environment` that code can change until training begins.

    Args:
        trainer: see `environment`.
    """
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    training = {} if trainer is None else {"training": trainer_settings(trainer)}
    return {"torch": torch_settings(), "variables": variables, **training}


def node_entry(record: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return what may differ between the nodes of a run, without names of hosts.

    Args:
        record: of one process of the node, from `environment`.
        rank: of that process.
    """
    torch = {name: record["torch"][name] for name in ("version", "cuda", "cudnn", "threads", "cpu_capability")}
    same = {name: record[name] for name in ("python", "platform", "cpu", "gpus", "variables")}
    return {"rank": rank, **same, "torch": torch}


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
    return [*write_process(folder, environment()), *write_git(folder, git_record(code or Path.cwd()))]


def write_process(folder: str | Path, record: Mapping[str, Any]) -> list[Path]:
    """Write ``environment.json`` and ``requirements.txt``.

    Args:
        folder: the folder to write to; made if missing.
        record: from `environment`.
    """
    requirements = "".join(f"{name}=={version}\n" for name, version in record["packages"].items())
    return write_texts(folder, {"environment.json": as_json(record), "requirements.txt": requirements})


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

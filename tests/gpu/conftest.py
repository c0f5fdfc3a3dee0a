"""Each test runs on CUDA where there is a device, and on the CPU, where its twin shows that it is a working test."""

import os
from collections.abc import Iterator

import pytest
import torch
from places import CPU, CUDA, Place

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: sums in the same order

NO_CUDA = "no CUDA device here: on a machine with one, `make gpu`"


@pytest.fixture(
    params=[
        pytest.param(CPU, id="cpu"),
        pytest.param(
            CUDA, id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)]
        ),
    ]
)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The device of a test; on CUDA with deterministic algorithms."""
    found: Place = request.param
    if found is CPU:
        yield found
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield found
    finally:
        torch.use_deterministic_algorithms(False)

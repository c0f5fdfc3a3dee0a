"""What a module computes must not depend on being observed: compiled code, and torch's kernels for inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_WITH_KERNELS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Within it, compiled modules and functions run as they were written; nothing is compiled or forgotten.

    A hook or a mode would become part of the compiled code, or raise. With the inductor backend the last bits may
    differ from those of compiled code.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


def with_inference_kernel(module: nn.Module) -> str | None:
    """The name of a part for which torch may use a kernel that it does not use while a function mode is open.

    A transformer layer of torch in evaluation mode, without gradients, is one fused kernel; observed, it runs step by
    step, and the last bits differ. None: there is no such part.
    """
    parts = module.named_modules()
    return next((name for name, each in parts if isinstance(each, _WITH_KERNELS) and not each.training), None)

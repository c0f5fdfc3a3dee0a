"""State in 8 bits, as bitsandbytes and torchao keep it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch
from state_bits import ADAMW, of
from torch import nn

from stabletrain.runtime.internals import quantized_state as quantized
from stabletrain.runtime.internals.block_codes import BLOCK, decoded, encoded


def matrix(elements: int = 5000) -> nn.Parameter:
    return nn.Parameter(torch.randn(elements, generator=torch.Generator().manual_seed(0)))


def stepped(optimizer: Any) -> Any:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_bitsandbytes_state_is_widened_as_bitsandbytes_does(name: str) -> None:
    """Bugs: a release changes blocks, tables or names; the last block, which is shorter, has the scale of another."""
    functional = pytest.importorskip("bitsandbytes.functional")
    optimizer = stepped(of(f"bitsandbytes.optim.{name}")([matrix()]))
    assert quantized.is_bitsandbytes(optimizer)
    assert not quantized.is_torchao(optimizer)
    saved = optimizer.state_dict()
    found = quantized.bitsandbytes_entries(saved, expected=False)
    assert found is not None
    for key, wide in quantized.widened(found[0]).items():
        number = key.removeprefix("state")
        rows = 2 if wide.ndim == 2 else 1
        codes = found[0][key].view(rows, -1)
        scales = found[0][f"absmax{number}"].view(rows, -1)
        table = found[0][f"qmap{number}"]
        theirs = [
            functional.dequantize_blockwise(one, absmax=two, code=table, blocksize=BLOCK)
            for one, two in zip(codes, scales, strict=True)
        ]
        assert torch.equal(wide.view(rows, -1), torch.stack(theirs))
        assert wide.isfinite().all()
    found[0]["absmax1"] = found[0]["absmax1"][..., :-1]
    with pytest.raises(ValueError, match="5000 elements has 19 scales"):
        quantized.widened(found[0])


def test_decoded_values_are_encoded_as_they_were() -> None:
    """Bugs: the scale of a block with a negative extreme grows by 0.7 %, of others a code is a neighbour's; NaN, Inf, a
    block of zeros or a short last block changes others; a tensor that was not decoded is encoded otherwise."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        table = functional.create_dynamic_map(signed=signed)
        for seed in range(20):
            x = torch.randn(256 * 20 + seed, generator=torch.Generator().manual_seed(seed))
            x = x if signed else x.square()
            x[256:512] = 0.0
            x[512:768] *= (torch.arange(256) % 50 == 0).float()
            codes, scales = encoded(x, table)
            theirs, state = functional.quantize_blockwise(x, code=table, blocksize=BLOCK)
            whole = slice(3, 20)  # the last block has so few elements that it may be a decoded one
            assert torch.equal(codes[768 : 256 * 20], theirs[768 : 256 * 20])
            assert torch.equal(scales[whole], state.absmax[whole])
            values = decoded(codes, table, scales)
            again, same = encoded(values, table)
            assert torch.equal(again, codes)
            assert torch.equal(decoded(again, table, same), values)
            for place, value in ((768, float("nan")), (1024, float("inf")), (len(x) - 1, -float("inf"))):
                values[place] = value
                others = torch.arange(len(x)) // BLOCK != place // BLOCK
                values = torch.where(others, decoded(codes, table, scales), values)
                broken, _ = encoded(values, table)
                assert torch.equal(broken[others], codes[others])


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamWFp8", "Adam8bit"])
def test_torchaos_state_is_widened_and_made(kind: str) -> None:
    """Bug: a release of torchao renames what is used of it."""
    pytest.importorskip("torchao")
    p = matrix(4096)
    optimizer = of(f"torchao.optim.{kind}", **ADAMW)([p])
    assert quantized.is_torchao(optimizer)
    assert quantized.is_decoupled(optimizer) == ("W" in kind)
    buffer = quantized.torchao_buffer(optimizer, p, True)
    buffer.copy_(p.detach())
    wide = quantized.plain(buffer)
    assert type(wide) is torch.Tensor
    assert wide.dtype is torch.float32
    assert (wide - p).norm() <= 0.05 * p.norm()
    kinds = quantized.torchao_kinds({"state": {0: {"exp_avg": buffer}}})
    assert quantized.torchao_widens(kinds)
    assert kinds


def test_a_class_that_a_file_names_is_imported_only_if_it_is_torchaos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a name in a file decides what is imported."""
    imported: list[str] = []
    monkeypatch.setattr(importlib, "import_module", imported.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, "torchao.optim", raising=False)
    for name in ("os.system", "torchao.optim.evil.Other", "torchao.OptimState8bit", "torchao_optim.OptimState8bit"):
        assert not quantized.import_known(name)
    assert quantized.import_known("torchao.optim.subclass_8bit.OptimState8bit")
    assert imported == ["torchao.optim"]

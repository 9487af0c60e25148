"""LoopMDM.packed: the same model, projections laid out for the processor, everything else shared."""

from __future__ import annotations

import pytest
import torch

import loopmdm
from loopmdm.errors import InputError
from loopmdm.ops.linear import pack

from .helpers import ids, live, tiny

FP32, BF16 = torch.float32, torch.bfloat16
PACKS = pack(torch.zeros(1, 1)) is not None


@pytest.mark.parametrize("dtype", [None, BF16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "dit"])
def test_the_same_model(family: str, dtype: torch.dtype | None) -> None:
    model = live(tiny(family))
    tokens = ids(2, 9)
    packed = model.packed(dtype)
    allowed = {None: 1e-5, BF16: 0.03, torch.float64: 1e-5}[dtype]
    with torch.no_grad():
        for S in (1, 3):
            want, got = model.hidden(tokens, num_loops=S), packed.hidden(tokens, num_loops=S)
            assert got.dtype == (dtype or FP32)
            assert (got.float() - want).norm() <= allowed * want.norm()
    assert packed.embed.weight is model.embed.weight
    assert packed.layers[0].mlp.up.weight.is_meta == (PACKS and dtype != torch.float64)


def test_its_weights_are_those_it_was_made_of() -> None:
    model = live(tiny())
    tokens, packed = ids(2, 9), model.packed()
    with torch.no_grad():
        before = packed.hidden(tokens)
        for layer in model.layers:
            layer.mlp.down.weight.mul_(3)
        assert torch.equal(packed.hidden(tokens), before)
        assert not torch.allclose(model.packed().hidden(tokens), before, rtol=1e-2)


def test_generate_and_what_is_refused(tmp_path) -> None:
    model = live(tiny())
    packed = model.packed()
    a, b = (loopmdm.generate(m, max_new_tokens=8, steps=4, policy="confidence").tokens for m in (model, packed))
    assert torch.equal(a, b)
    if PACKS:
        with pytest.raises(InputError, match="packed for inference"):
            packed.save_pretrained(tmp_path / "out")
        with pytest.raises(InputError, match="no backward|packed weights"):
            packed(ids(2, 9)).logits.sum().backward()

"""LoopMDM.packed: the same model, projections laid out for the processor, everything else shared."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

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


@pytest.mark.skipif(not PACKS, reason="no packed product here")
def test_hooks_run_and_change_nothing() -> None:
    model = live(tiny())
    packed, tokens, calls = model.packed(), ids(2, 9), []
    packed.layers[0].mlp.up.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        want = model.hidden(tokens)
        torch.testing.assert_close(packed.hidden(tokens), want, rtol=1e-4, atol=1e-5)
        anywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            torch.testing.assert_close(packed.hidden(tokens), want, rtol=1e-4, atol=1e-5)
        finally:
            anywhere.remove()
    assert calls == [1, 1]


@pytest.mark.skipif(not PACKS, reason="no packed product here")
def test_nothing_reads_weights_that_are_not_there() -> None:
    model = live(tiny())
    packed = model.packed()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "mlp" in name}
    for wrong in (
        packed.relooped,
        packed.fused,
        packed.packed,
        packed.state_dict,
        lambda: packed.load_state_dict(state, strict=False),
        lambda: packed.layers[0].mlp.bfloat16(),
        lambda: copy.deepcopy(packed),
        lambda: pickle.dumps(packed),
    ):
        with pytest.raises(InputError, match="packed for inference"):
            wrong()


@pytest.mark.skipif(not PACKS, reason="no packed product here")
def test_no_rows_autocast_and_compile() -> None:
    model = live(tiny())
    packed, tokens = model.packed(BF16), ids(2, 9)
    with torch.no_grad():
        nowhere = torch.zeros_like(tokens, dtype=torch.bool)
        assert packed.hidden(tokens, rows=nowhere).abs().max() == 0
        want = packed.hidden(tokens)
        with torch.autocast("cpu", dtype=BF16):
            assert (packed.hidden(tokens) - want).norm() <= 0.02 * want.norm()
        mlp, x = packed.layers[0].mlp, torch.ones(1, 32, dtype=BF16)
        torch.testing.assert_close(torch.compile(mlp)(x), mlp(x), rtol=0.02, atol=0.02)


def test_generate_and_what_is_refused(tmp_path) -> None:
    model = live(tiny())
    packed = model.packed()
    a, b = (loopmdm.generate(m, max_new_tokens=8, steps=4, policy="confidence").tokens for m in (model, packed))
    assert torch.equal(a, b)
    if PACKS:
        with pytest.raises(InputError, match="packed for inference"):
            packed.save_pretrained(tmp_path / "out")
        with pytest.raises(InputError, match=r"packed weights.*no backward"):
            packed(ids(2, 9)).logits.sum().backward()

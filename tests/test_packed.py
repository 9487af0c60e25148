"""LoopMDM.packed: the same model, projections laid out for the processor, everything else shared."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import loopmdm
from loopmdm.errors import InputError
from loopmdm.model import packed as model_packed
from loopmdm.model.block import Context
from loopmdm.model.packed import PackedBlock
from loopmdm.ops.linear import Panels, pack

from .helpers import ids, live, tiny

FP32, BF16 = torch.float32, torch.bfloat16
PACKS = pack(torch.zeros(1, 1)) is not None
ours = pytest.mark.skipif(
    not isinstance(pack(torch.zeros(1, 1).bfloat16()), Panels), reason="no bf16 products of ours here"
)


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
        for dtype, copy_of in ((BF16, packed), (FP32, model.packed())):
            mlp, x = copy_of.layers[0].mlp, torch.ones(1, 32, dtype=dtype)
            torch.testing.assert_close(torch.compile(mlp)(x), mlp(x), rtol=0.02, atol=0.02)
        block, x = packed.layers[0], torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
        context = Context(model._rope(torch.arange(9)))
        torch.testing.assert_close(torch.compile(block)(x, context), block(x, context), rtol=0.05, atol=0.05)


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


@pytest.fixture
def visits(monkeypatch):
    """Layers of each call that was made at once, or None where the layers were called one by one."""
    calls, original = [], model_packed.through

    def through(given, *rest, **more):
        out = original(given, *rest, **more)
        calls.append(None if out is None else len(given))
        return out

    monkeypatch.setattr(model_packed, "through", through)
    return calls


def far(packed, model, tokens, **kwargs):
    """Distance of its hidden states from the model's, over their size."""
    with torch.no_grad():
        want = model.hidden(tokens, **kwargs)
        return float((packed.hidden(tokens, **kwargs).float() - want).norm() / want.norm())


CONFIGS = {
    "llama": {},
    "dit": {"backbone": "dit"},
    "relu2": {"hidden_act": "relu2", "intermediate_size": 67},
    "anchored": {"boundary": "anchored"},
    "interleaved": {"rope_layout": "interleaved", "rope_dtype": "input", "qkv_bias": True, "attention_out_bias": True},
    "fp32 stream": {"residual_in_fp32": True},
    "dit, fp32 stream": {"backbone": "dit", "residual_in_fp32": True},
    "learned positions": {"positions": "learned"},
}


@ours
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_go_through_in_one_call(name, visits, monkeypatch):
    """prelude, S visits of the loop, coda; no further from float64 than the same copy layer by layer."""
    config, errors = tiny(**CONFIGS[name]), {True: 0.0, False: 0.0}
    for seed in range(3):
        model, tokens = live(config, seed), ids(3, 21, seed=seed)
        packed, real = model.packed(BF16), torch.arange(21) < torch.tensor([21, 5, 13])[:, None]
        assert all(type(layer) is PackedBlock for layer in packed.layers)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            want = exact.hidden(tokens, real, num_loops=3)[real]
            for together in errors:
                visits.clear()
                with monkeypatch.context() as patch:
                    if not together:
                        patch.setattr(model_packed, "through", lambda *_, **__: None)
                    got = packed.hidden(tokens, real, num_loops=3)[real]
                if together:
                    assert visits == ([1, 2, 2, 2, 1] if name == "anchored" else [1, 6, 1])
                errors[together] += float((got - want).norm() / want.norm())
    assert errors[True] <= 1.2 * errors[False] and errors[True] < 0.09


@ours
@pytest.mark.parametrize("backbone", ["llama", "dit"])
def test_one_call_is_layer_by_layer(backbone, visits):
    """The same bits as one call a layer; positions that are asked for alone, and an S of each sequence."""
    model = live(tiny(backbone))
    packed, tokens = model.packed(BF16), ids(3, 21)
    rows = torch.zeros(3, 21, dtype=torch.bool)
    rows[0, [2, 3, 20]], rows[2, 0] = True, True
    with torch.no_grad():
        want = packed.hidden(tokens, num_loops=3)
        several = torch.tensor([1, 3, 2])
        each = [packed.hidden(tokens[i : i + 1], num_loops=int(several[i])) for i in range(3)]
        visits.clear()
        assert torch.equal(packed.hidden(tokens, num_loops=3, rows=rows)[rows], want[rows])
        assert visits == [1, 6, 1]
        visits.clear()
        assert torch.equal(packed.hidden(tokens, num_loops=several), torch.cat(each))
        assert visits and None not in visits
        visits.clear()
        handles = [layer.register_forward_hook(lambda *_: None) for layer in packed.layers]
        assert torch.equal(packed.hidden(tokens, num_loops=3), want)
        assert visits == [1] * 8  # hooks of a layer run, and each layer is one call
        for handle in handles:
            handle.remove()


@ours
@pytest.mark.parametrize("policy", ["confidence", "ancestral", "threshold:0.5"])
@pytest.mark.parametrize("backbone", ["llama", "dit"])
def test_tokens_do_not_depend_on_the_batch(backbone, policy):
    """Not even by rounding: a sequence alone has the tokens that it has among others of other lengths."""
    packed = live(tiny(backbone, positions="both"), head_scale=3.0).packed(BF16)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [], [9, 9, 9]]
    options = {"max_new_tokens": 30, "steps": 12, "policy": policy, "num_loops": 3}
    for seed in (0, 100):
        together = loopmdm.generate(packed, prompts, seed=seed, **options).sequences()
        alone = [loopmdm.generate(packed, [p], seed=seed + i, **options).sequences()[0] for i, p in enumerate(prompts)]
        assert together == alone


@ours
def test_what_was_added_to_a_layer_is_called(visits):
    """Hooks on attention, MLP, norms and projections; modules that were put in the place of theirs."""
    model, tokens, seen = live(tiny()), ids(2, 9), []
    for path in ("attn", "mlp", "attn_norm", "mlp_norm", "attn.qkv", "attn.out", "mlp.up", "mlp.down"):
        packed = model.packed(BF16)
        module = packed.layers[1].get_submodule(path)
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        visits.clear(), seen.clear()
        assert far(packed, model, tokens, num_loops=2) < 0.03
        assert len(seen) == 2 and visits.count(1) == 2 + 2, path  # prelude and coda, and the loop's other layer twice
        handle.remove()
        visits.clear(), seen.clear()
        assert far(packed, model, tokens, num_loops=2) < 0.03
        assert visits == [1, 4, 1] and not seen

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x, *rest):
            seen.append(1)
            return self.base(x, *rest)

    for path in ("attn", "mlp"):
        packed = model.packed(BF16)
        setattr(packed.layers[1], path, Wrapped(getattr(packed.layers[1], path)))
        seen.clear()
        if path == "mlp":  # a Block asks it for the dtype of its products
            packed.layers[1].mlp.up = packed.layers[1].mlp.base.up
        assert far(packed, model, tokens, num_loops=2) < 0.03
        assert len(seen) == 2


@ours
def test_layers_that_are_not_taken_at_once(visits):
    """Dropout in training, a conditioning of each sequence, norms of q and k, gelu without tanh, widths off 16."""
    tokens = ids(2, 9)
    for changes in ({"qk_norm": "before_rope"}, {"qk_norm": "after_rope"}, {"hidden_act": "gelu"}, {"hidden_size": 40}):
        model = live(tiny(**changes))
        packed = model.packed(BF16)
        assert not any(isinstance(layer, PackedBlock) for layer in packed.layers)
        assert far(packed, model, tokens) < 0.03 and not visits
    for dtype in (None, torch.float64):
        assert not any(isinstance(layer, PackedBlock) for layer in live(tiny()).packed(dtype).layers)
    model = live(tiny("dit", time_conditioning=True))
    packed = model.packed(BF16)
    assert far(packed, model, tokens, sigma=torch.tensor([0.3, 2.0])) < 0.03 and visits == []
    assert far(packed, model, tokens, sigma=torch.tensor([0.7])) < 0.03 and set(visits) == {1, 6}
    model = live(tiny(dropout=0.5))
    packed = model.packed(BF16)
    visits.clear()
    with torch.no_grad():
        packed.train()
        drops = packed.hidden(tokens)
        assert visits == []
        packed.eval()
        assert far(packed, model, tokens) < 0.03 and visits == [1, 6, 1]
    assert (drops.float() - model.hidden(tokens)).norm() > 0.1 * drops.norm()

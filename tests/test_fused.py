"""The fused plan is the model: in float64 to the last digits, in fp32 and bf16 no further from the truth than it."""

import copy
import math

import pytest
import torch
from torch import nn

import loopmdm
from loopmdm.diffusion import likelihood
from loopmdm.errors import InputError
from loopmdm.model import fused as module
from loopmdm.model import fused_layers
from loopmdm.model.denoiser import Denoiser
from loopmdm.model.depth import Depth, RelativeChange
from loopmdm.model.fused import Fused, why_not
from loopmdm.model.lm import LoopMDM

from .helpers import ids, live, randomize_, tiny

VARIANTS = {
    "llama": ("llama", {}),
    "dit": ("dit", {}),
    "anchored": ("llama", {"boundary": "anchored"}),
    "anchored dit": ("dit", {"boundary": "anchored"}),
    "qwen": ("llama", {"qk_norm": "before_rope", "qkv_bias": True}),
    "norm after": ("llama", {"qk_norm": "after_rope"}),
    "interleaved": ("llama", {"rope_layout": "interleaved", "rope_sign": -1}),
    "layer norm": ("llama", {"norm": "layernorm", "norm_bias": True, "hidden_act": "relu2", "mlp_bias": True}),
    "biases": ("llama", {"mlp_bias": True, "attention_out_bias": True, "hidden_act": "gelu", "norm_bias": True}),
    "learned": ("dit", {"positions": "learned", "norm_weight": False, "tie_word_embeddings": True}),
    "both": ("llama", {"positions": "both", "residual_in_fp32": False}),
    "modulated": ("llama", {"modulation": "adaln", "cond_dim": 5, "norm_bias": True, "positions": "none"}),
    "timed": ("dit", {"time_conditioning": True}),
    "timed rms": ("llama", {"modulation": "adaln", "time_conditioning": True, "cond_dim": 5, "norm_bias": True}),
    "timed anchored": ("dit", {"time_conditioning": True, "boundary": "anchored", "norm_weight": False}),
    "odd heads": ("llama", {"positions": "none", "head_dim": 5}),
}
B, T = 8, 9
LOOPS = (1, 4, 12, 24)
F64 = torch.float64


def layouts(batch=B, length=T):
    """Inputs beside the ids: padding on either side or of a whole row, packed documents, both."""
    place = torch.arange(length)[None]
    lengths = 1 + torch.arange(batch)[:, None] % length
    real = place < lengths
    real[1], real[2] = True, real[6].flip(0)
    documents = (place * (1 + torch.arange(batch)[:, None])) // (2 * length) + 7
    empty = real.clone()
    empty[0] = False
    return {
        "plain": {},
        "padded": {"attention_mask": real},
        "a row of padding": {"attention_mask": empty.long()},
        "packed": {"document_ids": documents},
        "packed, padded": {"document_ids": documents.int(), "attention_mask": real},
    }


LAYOUTS = layouts()


def noise(config, batch):
    """A noise level for each sequence, where the model takes one."""
    return {"sigma": torch.linspace(0.2, 3.0, batch)} if config.time_conditioning else {}


def before_the_norm(model, monkeypatch, *args, **kwargs):
    """The residual stream that the final norm reads, in float64, less its mean where a layer norm reads it."""
    found = []
    with monkeypatch.context() as patch:
        if isinstance(model, Fused):
            original = module.residual_norm
            patch.setattr(module, "residual_norm", lambda x, *a, **k: found.append(x) or original(x, *a, **k))
        else:
            handle = model.final_norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        with torch.no_grad():
            model.hidden(*args, **kwargs)
    if not isinstance(model, Fused):
        handle.remove()
    return centred(found[-1].double(), model.config)


def centred(x, config):
    return x - x.mean(-1, keepdim=True) if config.norm == "layernorm" else x


@pytest.mark.parametrize(
    "name, layout",
    [(name, "plain") for name in VARIANTS]
    + [
        (name, layout)
        for name in ("dit", "anchored", "learned", "both", "timed")
        for layout in LAYOUTS
        if layout != "plain"
    ],
)
def test_it_is_the_model_in_float64(name, layout, monkeypatch):
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes), dtype=F64)
    plan, tokens, inputs = model.fused(), ids(B, T), LAYOUTS[layout] | noise(model.config, B)
    with torch.no_grad():
        for S in (1, 4, torch.arange(B) % 5 + 1):
            want = model.hidden(tokens, num_loops=S, **inputs)
            got = plan.hidden(tokens, num_loops=S, **inputs)
            assert got.dtype == F64
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        assert torch.equal(plan.hidden(tokens, **inputs), plan.hidden(tokens, num_loops=3, **inputs))
    if layout == "plain":
        streams = [before_the_norm(m, monkeypatch, tokens, num_loops=24, **inputs) for m in (plan, model)]
        torch.testing.assert_close(*streams, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "name, mean",
    [(name, mean) for name in ("llama", "dit", "qwen", "layer norm") for mean in (0, 1, 10, 100)]
    + [("interleaved", 1), ("anchored", 1), ("timed", 1), ("timed", 100)],
)
def test_errors_relative_to_the_branch(name, mean, monkeypatch):
    """fp32 under 1e-5; bf16, in the mean over models, within 1.2x of the bf16 model's own error.

    Single models scatter by 2x either way: the rounding of a weight is the same at every visit.
    """
    backbone, changes = VARIANTS[name]
    ratios = []
    for seed in range(5):
        model = randomize_(LoopMDM(tiny(backbone, **changes)), seed).eval()
        with torch.no_grad():
            model.embed.weight += mean
        truth, half = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
        plans, tokens = [model.fused(dtype) for dtype in (torch.float32, torch.bfloat16)], ids(2, 11)
        for S in LOOPS if seed == 0 else (4,):
            inputs = {"num_loops": S, **noise(model.config, 2)}
            want = before_the_norm(truth, monkeypatch, tokens, **inputs)
            branch = (want - centred(truth.embed(tokens).detach(), model.config)).norm()
            full, ours, torchs = (
                (before_the_norm(m, monkeypatch, tokens, **inputs) - want).norm() / branch for m in (*plans, half)
            )
            assert full < 1e-5
            ratios.append(math.log(float(ours / torchs)))
    assert math.exp(sum(ratios) / len(ratios)) < 1.2


@pytest.mark.parametrize(
    "name, mean",
    [("llama", mean) for mean in (0, 1, 10, 100)]
    + [("qwen", 0), ("qwen", 10), ("dit", 1), ("dit", 100), ("timed", 10)],
)
def test_a_model_stored_in_16_bits(name, mean, monkeypatch):
    """At every S within 1.2x of its own error, in the mean over models: no gain is rounded into a weight."""
    backbone, changes = VARIANTS[name]
    ratios, tokens = {S: [] for S in LOOPS}, ids(2, 11)
    for seed in range(2):
        half = randomize_(LoopMDM(tiny(backbone, **changes)), seed)
        with torch.no_grad():
            half.embed.weight += mean
        half = half.eval().bfloat16()
        plan, truth = half.fused(), copy.deepcopy(half).double()
        for S in LOOPS:
            inputs = {"num_loops": S, **noise(half.config, 2)}
            want = before_the_norm(truth, monkeypatch, tokens, **inputs)
            ours, torchs = ((before_the_norm(m, monkeypatch, tokens, **inputs) - want).norm() for m in (plan, half))
            ratios[S].append(math.log(float(ours / torchs)))
    assert max(math.exp(sum(logs) / len(logs)) for logs in ratios.values()) < 1.2


def test_a_16_bit_stream():
    """Without `residual_in_fp32` the stream has the operands' dtype, and no copy."""
    model = live(tiny("dit", residual_in_fp32=False))
    tokens = ids(4, T)
    with torch.no_grad():
        want = copy.deepcopy(model).double().hidden(tokens, num_loops=4)
        errors = [
            (m.hidden(tokens, num_loops=4).double() - want).norm()
            for m in (model.fused(torch.bfloat16), copy.deepcopy(model).bfloat16())
        ]
        assert model.fused(torch.bfloat16)._enter(tokens, torch.arange(T), None, False).x.dtype == torch.bfloat16
    assert errors[0] < 1.2 * errors[1]


def test_dtypes():
    """Hidden states are in the head's dtype whatever the plan multiplies in."""
    model = live(tiny("dit"))
    assert model.fused().dtype == torch.float32 and model.fused(torch.bfloat16).dtype == torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    assert half.fused().dtype == torch.bfloat16
    for m in (model, half):
        assert m.fused(torch.bfloat16).hidden(ids(2, 5)).dtype == m.lm_head.weight.dtype
    with pytest.raises(InputError, match="floating"):
        model.fused(torch.int8)


@pytest.mark.parametrize("name", ["llama", "dit", "anchored", "learned"])
def test_a_new_plan_has_the_new_weights(name):
    """An average copied in by `.data.copy_` moves no version counter; nothing is remembered from the last plan."""
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes), dtype=F64)
    tokens = ids(2, T)
    with torch.no_grad():
        before = model.fused().hidden(tokens, num_loops=3)
        for seed in (5, 6):
            other = live(tiny(backbone, **changes), seed=seed, dtype=F64)
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data.copy_(theirs)
            want = other.hidden(tokens, num_loops=3)
            got = model.fused().hidden(tokens, num_loops=3)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
            assert (before - want).abs().max() > 0.1
            before = got


class Recorder:
    """What the plan's ops are called with, in place of them: (name, rows) and all that a kernel is compiled for."""

    def __init__(self, monkeypatch):
        self.calls, self.compiled = [], []
        for name in ("norm_linear", "attention", "linear_residual", "loop_boundary"):
            monkeypatch.setattr(fused_layers, name, self.wrap(name, getattr(fused_layers, name)))

    def wrap(self, name, op):
        def call(*args, **kwargs):
            self.calls.append((name, len(args[0])))
            self.compiled.append((name, *map(self.constant, args), *((k, self.constant(v)) for k, v in kwargs.items())))
            return op(*args, **kwargs)

        return call

    def constant(self, value):
        if isinstance(value, torch.Tensor):
            return (value.dtype, *value.shape)
        return tuple(map(self.constant, value)) if isinstance(value, tuple) else value

    def names(self):
        return [name for name, _ in self.calls]


@pytest.mark.parametrize("boundary", ["plain", "anchored"])
def test_launches_do_not_depend_on_s(boundary, monkeypatch):
    """Five a layer and one to enter; between visits none, or one if anchored: the same ones for any S."""
    plan = live(tiny(boundary=boundary)).fused()
    seen = []
    for S in (2, 3, 24):
        record = Recorder(monkeypatch)
        plan.hidden(ids(2, T), num_loops=S)
        layers = 4 + 2 * (S - 1)
        assert len(record.calls) == 5 * layers + 1 + (S - 1) * (boundary == "anchored")
        projected = ["norm_linear", "linear_residual"]
        assert record.names()[:6] == ["loop_boundary", "norm_linear", "attention", "linear_residual", *projected]
        seen.append(set(record.compiled))
        monkeypatch.undo()
    assert seen[0] == seen[1] == seen[2]


class Scatter:
    """An exit rule that spreads and judges each sequence by what the model itself would show it."""

    over = "sequence"

    def __call__(self, h_prev, h, k, positions):
        both = torch.stack((h_prev, h))
        real = both if positions is None else both * positions[..., None]
        return (real.sum((0, 2, 3)) * 3.1).frac().abs() < 0.25


class Measure:
    """No exit: keeps each sequence's relative change at visit 3."""

    def __init__(self, over):
        self.over, self.found = over, None

    def __call__(self, h_prev, h, k, positions):
        if k == 3:
            weight = torch.ones_like(h[..., :1]) if positions is None else positions[..., None]
            self.found = (weight * (h - h_prev)).flatten(1).norm(dim=1) / (weight * h).flatten(1).norm(dim=1)
        return torch.zeros(len(h), dtype=torch.bool)


def half_leave(model, tokens, inputs, over, min_loops):
    """RelativeChange with the tau at which half of the sequences leave after visit 3 at the latest."""
    measure = Measure(over)
    model.hidden(tokens, num_loops=Depth(5, measure), **inputs)
    return RelativeChange(float(measure.found.nanmedian()) * 1.001, min_loops, over)


RULES = {
    "own": lambda *_: Scatter(),
    "change": lambda *given: half_leave(*given, "sequence", 1),
    "masked": lambda *given: half_leave(*given, "masked", 3),
    "never": lambda *_: RelativeChange(0.0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name, layout",
    [
        (n, layout)
        for n in ("llama", "dit", "anchored", "anchored dit")
        for layout in ("plain", "padded", "packed, padded")
    ]
    + [("timed", "padded"), ("timed anchored", "plain")],
)
def test_exits_are_the_model_s(name, layout, rule, monkeypatch):
    """The same visits, the same states; and sequences that left cost nothing.

    The embedding has a mean: rules see it, and a centred stream has lost it.
    """
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes), dtype=F64)
    inputs, tokens = layouts(16)[layout] | noise(model.config, 16), ids(16, T)
    limit = torch.arange(16) % 4 + 7
    with torch.no_grad():
        model.embed.weight += 3
        exits = RULES[rule](model, tokens, inputs)
        theirs, ours = Depth(limit, exits), Depth(limit, exits)
        want = model.hidden(tokens, num_loops=theirs, **inputs)
        record = Recorder(monkeypatch)
        got = model.fused().hidden(tokens, num_loops=ours, **inputs)
    assert torch.equal(ours.visits, theirs.visits) and ours.visits.dtype == torch.int64
    assert len(ours.visits.unique()) > 1
    assert rule == "never" or (ours.visits < limit).sum() > 4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    rows = sum(n for op, n in record.calls if op == "attention")
    assert rows == 2 * 16 + 2 * int(ours.visits.sum())


def test_what_an_anchored_exit_launches(monkeypatch):
    """The sums of an exit come out of the launch that opens the next visit."""
    plan = live(tiny(boundary="anchored")).fused()
    record = Recorder(monkeypatch)
    plan.hidden(ids(2, T), num_loops=Depth(6, RelativeChange(1e-9, 1)))
    assert record.names().count("loop_boundary") == 1 + 5


def test_depth_of_a_fixed_s():
    plan = live(tiny()).fused()
    depth = Depth(5)
    assert torch.equal(plan.hidden(ids(3, T), num_loops=depth), plan.hidden(ids(3, T), num_loops=5))
    assert depth.visits.tolist() == [5, 5, 5] and depth.outputs == []
    for request in (Depth(2, every=True), Depth(2, checkpoint=True), Depth(2, backprop_loops=1)):
        with pytest.raises(InputError, match="training"):
            plan.hidden(ids(3, T), num_loops=request)


def test_further_looped_blocks():
    config = tiny(num_hidden_layers=7, boundary="anchored").replace(also=((4, 1), (6, 1)))
    model = live(config, dtype=F64)
    tokens, plan = ids(5, T), model.fused()
    with torch.no_grad():
        for S in (1, 3, torch.tensor([2, 5, 1, 4, 3])):
            want = model.hidden(tokens, num_loops=S)
            torch.testing.assert_close(plan.hidden(tokens, num_loops=S), want, rtol=0, atol=1e-11)
    with pytest.raises(InputError, match="one looped block"):
        plan.hidden(tokens, num_loops=Depth(3, RelativeChange(0.1)))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", ["llama", "dit", "timed"])
def test_it_serves_as_a_denoiser(name, dtype):
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes), dtype=dtype)
    plan = model.fused()
    assert isinstance(plan, Denoiser) and plan.takes_depth
    names = ("mask_id", "pad_id", "vocab_size", "max_length", "suppressed_ids", "logit_shift", "max_loops")
    assert all(getattr(plan, name) == getattr(model, name) for name in names)
    assert plan.head() == model.head() and plan.forward_flops(9, 2.5) == model.forward_flops(9, 2.5)
    prompts = [[1, 2, 3], [4]]
    options = {"max_new_tokens": 6, "steps": 4, "temperature": 0.0, "num_loops": 3}
    a, b = (loopmdm.generate(m, prompts, **options) for m in (plan, model))
    assert torch.equal(a.tokens, b.tokens) and a.flops == b.flops
    early = {**options, "early_exit": RelativeChange(0.3, 1)}
    a, b = (loopmdm.generate(m, prompts, **early) for m in (plan, model))
    assert torch.equal(a.tokens, b.tokens) and a.loops_per_step == b.loops_per_step
    bounds = [likelihood(m, ids(3, T, masks=0.0), num_loops=2, samples=2).per_sample for m in (plan, model)]
    torch.testing.assert_close(*bounds, rtol=1e-5, atol=1e-5)


def test_no_gradients_and_no_dropout():
    model = live(tiny(dropout=0.5)).train()
    plan = model.fused()
    out = plan.hidden(ids(2, T))
    assert not out.requires_grad and torch.equal(out, plan.hidden(ids(2, T)))
    with torch.no_grad():
        torch.testing.assert_close(out, model.eval().hidden(ids(2, T)), rtol=0, atol=1e-5)


def test_boundary_modules_put_in_by_hand():
    """An `Anchored` is known wherever it comes from, any other callable is not."""
    model = live(tiny(boundary="anchored"), dtype=F64)
    own = LoopMDM(model.config, model.loop.boundary).double().eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model.hidden(ids(2, T), num_loops=3)
        torch.testing.assert_close(own.fused().hidden(ids(2, T), num_loops=3), want, rtol=0, atol=1e-11)
    assert "callable" in why_not(model.relooped(boundary=lambda x, x0, k: x + x0))


def test_what_cannot_be_fused():
    assert why_not(live(tiny())) is None
    refused = {
        "have biases": tiny(qk_norm="before_rope", norm_bias=True),
        "odd head_dim": tiny(qk_norm="before_rope", head_dim=5, positions="none"),
    }
    for words, config in refused.items():
        model = LoopMDM(config)
        with pytest.raises(InputError, match=f"cannot be fused: .*{words}"):
            model.fused()

    class Adapted(nn.Linear):
        pass

    model = live(tiny())
    model.layers[2].attn.out = Adapted(32, 32, bias=False)
    assert "merge adapters" in why_not(model)


def test_bad_input():
    plan = live(tiny()).fused()
    tokens = ids(2, 6)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    again = torch.tensor([[3, 3, 4, 4, 4, 4], [3, 3, 4, 4, 3, 3]])
    with pytest.raises(InputError, match="hole"):
        plan.hidden(tokens, holes)
    with pytest.raises(InputError, match="row 1"):
        plan.hidden(tokens, document_ids=again)
    plan.hidden(tokens, torch.tensor([[1, 1, 0, 0, 1, 1]] * 2), document_ids=torch.tensor([[3, 3, 0, 0, 4, 4]] * 2))
    plan.hidden(tokens, torch.tensor([[1, 1, 0, 0, 1, 0]] * 2), document_ids=torch.tensor([[3, 3, 3, 3, 4, 3]] * 2))
    with pytest.raises(InputError, match="vocabulary"):
        plan.hidden(tokens + 11)
    with pytest.raises(InputError, match="max_position"):
        plan.hidden(ids(1, 65))
    with pytest.raises(InputError, match="num_loops"):
        plan.hidden(tokens, num_loops=0)
    with pytest.raises(InputError, match="impl 'tritn'"):
        live(tiny()).fused(impl="tritn").hidden(tokens)


def test_sigma():
    """One for all sequences, or one for each."""
    model = live(tiny("dit", time_conditioning=True), dtype=F64)
    plan, tokens = model.fused(), ids(3, T)
    with torch.no_grad():
        for sigma in (0.7, torch.tensor([0.7]), torch.tensor([0.1, 0.7, 4.0])):
            want = model.hidden(tokens, num_loops=2, sigma=sigma)
            torch.testing.assert_close(plan.hidden(tokens, num_loops=2, sigma=sigma), want, rtol=0, atol=1e-11)
    with pytest.raises(InputError, match="pass sigma"):
        plan.hidden(tokens)
    with pytest.raises(InputError, match="sigma holds 2 numbers; it must be one, or one for each of 3"):
        plan.hidden(tokens, sigma=torch.ones(2))


def test_modulation_is_worked_out_once_a_pass(monkeypatch):
    plan = live(tiny("dit", time_conditioning=True)).fused()
    record, calls = Recorder(monkeypatch), []
    original = module.conditioned
    monkeypatch.setattr(module, "conditioned", lambda *args: calls.append(1) or original(*args))
    plan.hidden(ids(2, T), num_loops=9, sigma=torch.ones(2))
    assert len(calls) == 4 and len(record.calls) == 1 + 5 * (2 + 2 * 9)


@pytest.mark.parametrize("name", ["llama", "anchored dit"])
def test_cublas_on_a_cpu_is_torch(name):
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes))
    assert torch.equal(*(model.fused(torch.bfloat16, impl).hidden(ids(2, T)) for impl in ("cublas", "torch")))


def test_attention_by_name(monkeypatch):
    """Another impl for attention; the ones that pack get packed spans, also after sequences have left."""
    model = live(tiny(), dtype=F64)
    packs, plan = [], model.fused(attention_impl="varlen")
    original = fused_layers.attention

    def attention(qkv, H, G, spans, impl):
        assert impl == "varlen"
        packs.append((len(qkv), spans.cu_seqlens is not None and int(spans.cu_seqlens[-1]) == qkv.shape[0] * T))
        return original(qkv, H, G, spans, impl="torch")

    monkeypatch.setattr(fused_layers, "attention", attention)
    inputs, S = LAYOUTS["packed, padded"], torch.arange(B) % 3 + 1
    got = plan.hidden(ids(B, T), num_loops=S, **inputs)
    with torch.no_grad():
        torch.testing.assert_close(got, model.hidden(ids(B, T), num_loops=S, **inputs), rtol=0, atol=1e-11)
    assert len({n for n, _ in packs}) == 3 and all(ok for _, ok in packs)


@pytest.mark.parametrize("name", ["llama", "timed anchored"])
@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0), (1, 1), (3, 64)])
def test_odd_sizes(batch, length, name):
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes), dtype=F64)
    inputs = noise(model.config, batch)
    with torch.no_grad():
        for S in (2, torch.full((batch,), 2)):
            want = model.hidden(ids(batch, length), num_loops=S, **inputs)
            got = model.fused().hidden(ids(batch, length), num_loops=S, **inputs)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "timed"])
def test_autocast_changes_nothing(name):
    backbone, changes = VARIANTS[name]
    model = live(tiny(backbone, **changes))
    plan, tokens, inputs = model.fused(), ids(2, T), noise(model.config, 2)
    want = plan.hidden(tokens, num_loops=3, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan.hidden(tokens, num_loops=3, **inputs), want)

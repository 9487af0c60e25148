"""The block in all its variants, padding, packing, precision and dropout."""

import math

import pytest
import torch

from loopmdm.diffusion import nelbo
from loopmdm.errors import InputError
from loopmdm.model.block import Block, Context
from loopmdm.model.denoiser import Denoiser, logits_at
from loopmdm.model.lm import LoopMDM
from loopmdm.ops.rotate import rope_table, rotate

from .helpers import BACKBONES, assert_live, ids, live, randomize_, tiny


def norm_formula(x, weight, bias, kind, eps):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rotate_formula(vector, position, config):
    """One head vector at one position, pair by pair, as complex multiplication in Python floats."""
    hd, out = len(vector), list(vector)
    for pair in range(hd // 2):
        i, j = (pair, pair + hd // 2) if config.rope_layout == "half" else (2 * pair, 2 * pair + 1)
        angle = config.rope_sign * position * config.rope_theta ** (-2 * pair / hd)
        z = complex(vector[i], vector[j]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[j] = z.real, z.imag
    return out


def activation_formula(h, name):
    if name == "swiglu":
        gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
        return gate / (1 + torch.exp(-gate)) * up
    if name == "relu2":
        return torch.where(h > 0, h * h, 0.0)
    if name == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return h * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


def block_formula(block, config, x, positions=None, visible=None, cond=None):
    """One layer in float64, one head and one query at a time; returns [B, T, D]."""
    w = dict(block.named_parameters())
    H, G, hd = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, T, D = x.shape

    def linear(name, y):
        y = torch.einsum("...i,oi->...o", y, w[name + ".weight"])
        return y + w[name + ".bias"] if name + ".bias" in w else y

    def norm(name, y, kind=config.norm):
        return norm_formula(y, w.get(name + ".weight"), w.get(name + ".bias"), kind, config.norm_eps)

    six = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    if config.modulation == "adaln":
        vector = linear("modulation", cond)[:, None, :]  # [B, 1, 6 D]
        six = [vector[..., n * D : (n + 1) * D] for n in range(6)]

    h = norm("attn_norm", x) * (1 + six[1]) + six[0]
    qkv = linear("attn.qkv", h).view(B, T, H + 2 * G, hd)
    qk, v = [qkv[:, :, n] for n in range(H + G)], [qkv[:, :, H + G + n] for n in range(G)]
    for n, vectors in enumerate(qk):
        name = "attn.q_norm" if n < H else "attn.k_norm"
        if config.qk_norm == "before_rope":
            vectors = norm(name, vectors, "rmsnorm")
        if config.positions in ("rope", "both"):
            rows = [[rotate_formula(vectors[b, t].tolist(), positions[t], config) for t in range(T)] for b in range(B)]
            vectors = torch.tensor(rows, dtype=torch.float64)
        if config.qk_norm == "after_rope":
            vectors = norm(name, vectors, "rmsnorm")
        qk[n] = vectors
    heads = []
    for n in range(H):
        group = n // (H // G)
        scores = qk[n] @ qk[H + group].transpose(1, 2) / math.sqrt(hd)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        weight = torch.exp(scores - scores.amax(-1, keepdim=True))
        heads.append(weight / weight.sum(-1, keepdim=True) @ v[group])
    x = x + six[2] * linear("attn.out", torch.cat(heads, -1))
    h = norm("mlp_norm", x) * (1 + six[4]) + six[3]
    return x + six[5] * linear("mlp.down", activation_formula(linear("mlp.up", h), config.hidden_act))


VARIANTS = {
    "llama": {},
    "dit": {"backbone": "dit"},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_tanh"},
    "relu2": {"hidden_act": "relu2"},
    "rmsnorm, no weight": {"norm_weight": False},
    "rmsnorm, bias": {"norm_bias": True},
    "layernorm": {"norm": "layernorm"},
    "layernorm, no weight": {"norm": "layernorm", "norm_weight": False},
    "layernorm, bias": {"norm": "layernorm", "norm_bias": True, "norm_weight": True},
    "layernorm, bias alone": {"norm": "layernorm", "norm_bias": True, "norm_weight": False},
    "large eps": {"norm_eps": 0.3},
    "qk_norm before": {"qk_norm": "before_rope"},
    "qk_norm after": {"qk_norm": "after_rope"},
    "qk_norm with bias, no rope": {"qk_norm": "before_rope", "norm_bias": True, "positions": "none"},
    "interleaved": {"rope_layout": "interleaved"},
    "backwards": {"rope_sign": -1},
    "interleaved backwards": {"rope_layout": "interleaved", "rope_sign": -1},
    "theta": {"rope_theta": 100.0},
    "rope in the input dtype": {"rope_dtype": "input"},
    "no positions": {"positions": "none"},
    "one group": {"num_key_value_heads": 1},
    "all groups": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 6},
    "qkv bias": {"qkv_bias": True},
    "out bias": {"attention_out_bias": True},
    "mlp bias": {"mlp_bias": True},
    "dit, all biases, qk_norm": {
        "backbone": "dit",
        "norm_bias": True,
        "qkv_bias": True,
        "attention_out_bias": True,
        "qk_norm": "after_rope",
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_block_against_its_formula(name):
    config = tiny(**VARIANTS[name])
    block = randomize_(Block(config)).double()
    for key, parameter in block.named_parameters():
        assert parameter.std() > 0, key
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    positions = [3, 0, 7, 1, 12]  # order must not matter, only the numbers
    visible = torch.rand(2, 5, 5) < 0.6
    visible |= torch.eye(5).bool()
    cond = torch.randn(2, config.cond_dim, dtype=torch.float64) if config.modulation == "adaln" else None
    rope = None
    if config.positions == "rope":
        rope = rope_table(torch.tensor(positions), config.head_dim, config.rope_theta, config.rope_sign)
    with torch.no_grad():
        for mask in (None, visible):
            context = Context(rope, None if mask is None else mask[:, None], cond)
            want = block_formula(block, config, x, positions, mask, cond)
            got = block(x, context)
            assert (got - x).abs().max() > 0.1
            torch.testing.assert_close(got, want, rtol=0, atol=3e-6)  # rope tables are fp32


def test_variants_differ():
    """No option is ignored: under the same weights, each changes the output."""
    outputs = {}
    x = torch.randn(2, 5, 32)
    for name, changes in VARIANTS.items():
        config = tiny(**changes)
        block = randomize_(Block(config), seed=3)
        rope = None
        if config.positions == "rope":
            rope = rope_table(torch.arange(5), config.head_dim, config.rope_theta, config.rope_sign)
        cond = torch.ones(1, 12) if config.modulation == "adaln" else None
        with torch.no_grad():
            outputs[name] = block(x, Context(rope=rope, cond=cond))
    del outputs["rope in the input dtype"]  # in fp32 it is the same
    names = list(outputs)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert (outputs[a] - outputs[b]).abs().max() > 1e-4, (a, b)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotation_dtype(layout):
    """ "float32" rounds once at the end; "input" computes in bf16, and the two differ."""
    x = torch.randn(2, 9, 3, 8).bfloat16()
    table = rope_table(torch.arange(9) * 50, 8, 10000.0)
    exact = rotate(x.double(), table, layout, "float32")
    wide, narrow = (rotate(x, table, layout, dtype) for dtype in ("float32", "input"))
    assert wide.dtype == narrow.dtype == torch.bfloat16
    assert torch.equal(wide, exact.bfloat16())
    short = [part.bfloat16().repeat_interleave(1, 0)[:, None] for part in table]
    if layout == "half":
        a, b = x[..., :4], x[..., 4:]
        want = torch.cat([a * short[0] - b * short[1], b * short[0] + a * short[1]], -1)
    else:
        a, b = x[..., ::2], x[..., 1::2]
        want = torch.stack([a * short[0] - b * short[1], b * short[0] + a * short[1]], -1).reshape(x.shape)
    assert torch.equal(narrow, want) and not torch.equal(narrow, wide)


@pytest.mark.parametrize("positions", ["rope", "learned", "both", "none"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_whole_model_against_the_formula(backbone, positions):
    config = tiny(backbone, positions=positions, norm_eps=0.01, max_position_embeddings=9)
    model = live(config, dtype=torch.float64)
    tokens = ids(2, 9)
    w = dict(model.named_parameters())
    assert ("position_embed.weight" in w) == (positions in ("learned", "both"))
    with torch.no_grad():
        x, cond = w["embed.weight"][tokens], None
        if "position_embed.weight" in w:
            x = x + w["position_embed.weight"]
        if backbone == "dit":
            wave = torch.tensor([[1.0] * 128 + [0.0] * 128], dtype=torch.float64)
            h = wave @ w["sigma_embed.inner.weight"].T + w["sigma_embed.inner.bias"]
            h = h * torch.sigmoid(h) @ w["sigma_embed.outer.weight"].T + w["sigma_embed.outer.bias"]
            cond = h * torch.sigmoid(h)
        for layer in (*model.prelude, *model.loop.layers, *model.loop.layers, *model.coda):
            x = block_formula(layer, config, x, range(9), None, cond)
        x = norm_formula(x, w["final_norm.weight"], None, config.norm, 0.01)
        if backbone == "dit":
            final = cond @ w["final_modulation.weight"].T + w["final_modulation.bias"]
            x = x * (1 + final[:, None, 32:]) + final[:, None, :32]
        want = x @ w["lm_head.weight"].T + w.get("lm_head.bias", 0.0)
        out = model(tokens, num_loops=2)
    torch.testing.assert_close(out.hidden, x, rtol=0, atol=2e-5)
    torch.testing.assert_close(out.logits[..., :10], want[..., :10], rtol=0, atol=2e-5)
    assert (out.logits[..., 10] == -math.inf).all()


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_positions_matter_only_where_there_are_any(positions):
    tokens = torch.tensor([[1, 2, 3, 3, 2, 1]])
    with torch.no_grad():
        placed = live(tiny(positions=positions), dtype=torch.float64).hidden(tokens)
        bag = live(tiny(positions="none"), dtype=torch.float64).hidden(tokens)
    assert not torch.allclose(placed, placed.flip(1), atol=1e-3)
    torch.testing.assert_close(bag, bag.flip(1))


def test_sigma():
    """Read with time_conditioning and only then; a scalar serves every sequence; missing is an error."""
    model = live(tiny("dit", time_conditioning=True), dtype=torch.float64)
    tokens = ids(2, 6)
    with torch.no_grad():
        both = model.hidden(tokens, None, 2, torch.tensor([0.1, 2.0]))
        for row, sigma in enumerate((0.1, 2.0)):
            alone = model.hidden(tokens[row : row + 1], None, 2, torch.tensor(sigma))
            torch.testing.assert_close(both[row : row + 1], alone)
        half = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128) * 2.0
        embed = model.sigma_embed
        h = embed.inner(torch.cat((half.cos(), half.sin()))[None])
        want = embed.outer(h * torch.sigmoid(h))
        torch.testing.assert_close(embed(torch.tensor([2.0])), want, rtol=0, atol=1e-6)
    assert (both[0] - model.hidden(tokens, None, 2, torch.tensor([0.5, 2.0]))[0]).abs().max() > 1e-3
    with pytest.raises(InputError, match="conditioned on time; pass sigma"):
        model(tokens)
    for wrong in (math.inf, math.nan):
        with pytest.raises(
            InputError, match="sigma is not finite; where it is infinite at t = 1, give the noise schedule"
        ):
            model(tokens, sigma=torch.tensor([0.1, wrong]))
    constant = live(tiny("dit"))
    assert torch.equal(constant.hidden(tokens), constant.hidden(tokens, sigma=torch.tensor(3.0)))


# Padding and packing


@pytest.mark.parametrize("positions", ["rope", "both"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_changes_nothing(backbone, positions):
    model = live(tiny(backbone, boundary="anchored", positions=positions))
    tokens = ids(3, 7)
    pad = torch.full((3, 4), 5)  # an ordinary id: only the mask may say that it is padding
    with torch.no_grad():
        want = model(tokens, num_loops=3)
        for side in ("left", "right", "both"):
            parts = {"left": (pad, tokens), "right": (tokens, pad), "both": (pad, tokens, pad)}[side]
            real = torch.cat([torch.ones_like(p) if p is tokens else torch.zeros_like(p) for p in parts], 1)
            for mask in (real, real.bool()):
                got = model(torch.cat(parts, 1), mask, num_loops=3)
                keep = real.bool()
                torch.testing.assert_close(got.hidden[keep].view(3, 7, -1), want.hidden, rtol=0, atol=1e-5)
                torch.testing.assert_close(got.logits[keep].view(3, 7, -1), want.logits, rtol=0, atol=1e-5)
                assert (got.hidden[~keep] == 0).all()
        assert (model(torch.cat((tokens, pad), 1)).hidden[:, :7] - want.hidden).abs().max() > 1e-3


def test_rows_of_different_lengths():
    model = live(tiny(boundary="anchored"), dtype=torch.float64)
    tokens = ids(4, 8)
    lengths = [8, 3, 1, 5]
    real = torch.arange(8)[None] < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        got = model.hidden(tokens, real)
        for row, n in enumerate(lengths):
            torch.testing.assert_close(got[row, :n], model.hidden(tokens[row : row + 1, :n])[0])


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_row_of_padding_alone(backbone, documents):
    model = live(tiny(backbone, boundary="anchored")).train()
    tokens, real = ids(3, 6), torch.ones(3, 6).long()
    real[1] = 0
    ids_ = {"document_ids": torch.zeros(3, 6).long()} if documents else {}
    hidden = model.hidden(tokens, real, 3, **ids_)
    assert (hidden[1] == 0).all() and hidden.isfinite().all()
    hidden.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert name.startswith("lm_head") or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("positions", ["rope", "both"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_packed_documents_equal_separate_ones(backbone, positions):
    model = live(tiny(backbone, boundary="anchored", positions=positions), dtype=torch.float64)
    rows = [[5, 3, 4], [1, 9, 2]]
    tokens = ids(2, 12)
    packed = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(r)) for r in rows])
    real = torch.ones(2, 12).bool()
    real[1, 9:] = False  # padding cuts into the second document: 1 + 8 real tokens
    with torch.no_grad():
        got = model.hidden(tokens, None, 3, document_ids=packed)
        padded = model.hidden(tokens, real, 3, document_ids=packed)
        for row, lengths in enumerate(rows):
            start = 0
            for n in lengths:
                alone = model.hidden(tokens[row : row + 1, start : start + n], None, 3)[0]
                torch.testing.assert_close(got[row, start : start + n], alone)
                start += n
        assert (padded[1, 9:] == 0).all()
        torch.testing.assert_close(padded[1, :1], model.hidden(tokens[1:, :1], None, 3)[0])
        torch.testing.assert_close(padded[1, 1:9], model.hidden(tokens[1:, 1:9], None, 3)[0])
        other = tokens.clone()
        other[:, :1] = (other[:, :1] + 1) % 10  # inside the first document of each row
        changed = model.hidden(other, None, 3, document_ids=packed)
    assert not torch.equal(got[0, :5], changed[0, :5]) and torch.equal(got[0, 5:], changed[0, 5:])
    assert not torch.equal(got[1, :1], changed[1, :1]) and torch.equal(got[1, 1:], changed[1, 1:])


def test_padding_is_no_document():
    """Whatever id a document has, padding stays out of it."""
    model = live(tiny(), dtype=torch.float64)
    tokens = ids(1, 8)
    real = torch.arange(8)[None] < 5
    documents = torch.full((1, 8), -1)
    with torch.no_grad():
        got = model.hidden(tokens, real, 2, document_ids=documents)
        torch.testing.assert_close(got[:, :5], model.hidden(tokens[:, :5], None, 2))


# Precision and dropout


@pytest.mark.parametrize("boundary", ["plain", "anchored"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_parameters(backbone, boundary):
    """The stream stays fp32 by default; the error is that of bf16 (2^-9 a rounding, a few dozen of them)."""
    errors = {}
    tokens = ids(4, 16)
    for wide in (True, False):
        model = live(tiny(backbone, boundary=boundary, residual_in_fp32=wide))
        with torch.no_grad():
            want = model.hidden(tokens)
            streams, half = [], model.bfloat16()
            layer = half.loop.layers[0]
            layer.register_forward_hook(lambda _, args, out, s=streams: s.append((args[0].dtype, out.dtype)))
            got = half(tokens)
        stream = torch.float32 if wide else torch.bfloat16
        assert set(streams) == {(stream, stream)} and len(streams) == 3
        assert got.hidden.dtype == torch.bfloat16 and got.logits.dtype == torch.float32
        errors[wide] = ((got.hidden.float() - want).norm() / want.norm()).item()
        assert 1e-4 < errors[wide] < 0.06
    assert errors[True] < errors[False]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_autocast(backbone):
    model = live(tiny(backbone, boundary="anchored")).train()
    tokens = ids(4, 16)
    want = model(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens)
    assert out.logits.dtype == torch.float32
    error = (out.logits[..., :10] - want[..., :10]).norm() / want[..., :10].norm()
    assert 1e-4 < error < 0.06
    out.logits[..., :10].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_dropout(backbone):
    """On in training, fresh at every visit, unbiased; off in evaluation."""
    config = tiny(backbone, dropout=0.5, max_loops=2)
    model, tokens = live(config), ids(2, 9)
    plain = live(tiny(backbone, max_loops=2))
    with torch.no_grad():
        assert torch.equal(model.hidden(tokens), plain.hidden(tokens))
        model.train()
        assert not torch.equal(model.hidden(tokens), model.hidden(tokens))

        layer, context = model.loop.layers[0], model.loop._default_context(torch.zeros(1, 9, 32))
        x = torch.randn(1, 9, 32)
        calls = []
        model.loop.layers[0].attn.out.register_forward_hook(lambda *_: calls.append(torch.get_rng_state().clone()))
        model.loop(x, 3)
        states = {bytes(s.numpy().tobytes()) for s in calls}
        assert len(calls) == len(states) == 3, "two visits dropped the same units"

        draws = torch.stack([layer(x, context) for _ in range(3)])
        assert (draws[0] != draws[1]).float().mean() > 0.5
        kept = layer._drop(torch.ones(20000))
        assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(kept.mean().item() - 1) < 0.03


def test_dropout_drops_both_branches():
    config = tiny("llama", dropout=0.999999)
    block = randomize_(Block(config)).train()
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        torch.testing.assert_close(block(x, Context()), x)
        assert (block.eval()(x, Context()) - x).abs().max() > 0.1


# What a new model is, and what the guard is for


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_new_model_is_the_identity_and_can_learn(backbone):
    model = LoopMDM(tiny(backbone, boundary="plain"))
    with pytest.raises(AssertionError):
        assert_live(model)
    x = torch.randn(2, 5, 32)
    context = model.loop._default_context(x)
    if backbone == "dit":
        context = context._replace(cond=torch.randn(1, 12))
    with torch.no_grad():
        assert torch.equal(model.loop(x, 5, context), x)
        assert (model(ids(2, 5)).logits[..., :10] == 0).all()
    # Every block's zeros have a gradient, so nothing is stuck at the identity.
    block = Block(model.config)
    block(x, context).mul(torch.randn(2, 5, 32)).sum().backward()
    zeros = [p for p in block.parameters() if p.dim() == 2 and not p.any()]
    assert zeros and all(p.grad.abs().max() > 0 for p in zeros)


def test_the_guard_sees_a_dead_block():
    model = live(tiny())
    torch.nn.init.zeros_(model.coda[0].attn.out.weight)
    with pytest.raises(AssertionError, match="constant"):
        assert_live(model)
    torch.nn.init.normal_(model.coda[0].attn.out.weight, std=1e-9)
    torch.nn.init.normal_(model.coda[0].mlp.down.weight, std=1e-9)
    with pytest.raises(AssertionError, match="returns its input"):
        assert_live(model)


def test_initialisation_without_zeros():
    model = LoopMDM(tiny(zero_init_output=False, initializer_range=0.5, hidden_size=64, vocab_size=500))
    assert all(p.any() for name, p in model.named_parameters() if "lm_head" not in name)
    assert abs(model.embed.weight.std().item() - 0.5) < 0.02
    assert abs(model.coda[0].attn.out.weight.std().item() - 1 / 8) < 0.01


# Inputs and the Denoiser's face


def test_input_errors():
    model = LoopMDM(tiny())
    tokens = ids(2, 5)
    for bad, words in [
        (tokens.float(), "expected integers"),
        (tokens[0], r"\[5\]; expected integers \[B, T\]"),
        (tokens + 9, "outside the vocabulary of 11"),
        (tokens - 11, "token id -.* outside the vocabulary"),
        (torch.zeros(1, 65).long(), "65 tokens are more than max_position_embeddings = 64"),
    ]:
        with pytest.raises(InputError, match=words):
            model(bad)
    with pytest.raises(InputError, match=r"attention_mask is \[2, 4\], input_ids is \[2, 5\]"):
        model(tokens, torch.ones(2, 4))
    with pytest.raises(InputError, match="attention_mask is a list; it must be a tensor"):
        model(tokens, attention_mask=[[1] * 5] * 2)
    with pytest.raises(InputError, match=r"document_ids is \[2, 4\]"):
        model(tokens, document_ids=torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_is_refused(dtype):
    """0 on real tokens and -inf on padding: as booleans that would be the mask turned round."""
    model, tokens = live(tiny()), ids(2, 5, masks=0)
    additive = torch.zeros(2, 5, dtype=dtype).masked_fill(torch.arange(5) > 2, -math.inf)
    for call in (model, lambda x, mask: nelbo(model, x, attention_mask=mask), model.fused().hidden):
        with pytest.raises(InputError, match=r"attention_mask is torch\.\w+; it must be bool or 0/1 integers"):
            call(tokens, additive)


def test_int32_ids_and_no_rows():
    model = live(tiny())
    tokens = ids(2, 5)
    assert torch.equal(model.hidden(tokens.int()), model.hidden(tokens))
    assert model.hidden(tokens[:0]).shape == (0, 5, 32)


def test_logits_at_reads_the_rows_it_is_given():
    model = live(tiny("dit"))
    assert isinstance(model, Denoiser)
    tokens = ids(3, 6)
    rows = tokens == 10
    with torch.no_grad():
        out = model(tokens)
        picked = logits_at(model, out.hidden, rows)
        torch.testing.assert_close(picked, out.logits[rows])
        assert picked.dtype == torch.float32 and (picked[:, 10] == -math.inf).all()
        model.suppressed_ids = (10, 0, 3)
        assert (logits_at(model, out.hidden, rows).isinf().sum(-1) == 3).all()
        model.logit_shift = 1
        rows = torch.ones_like(rows)
        shifted = logits_at(model, out.hidden, rows).view(3, 6, 11)
        torch.testing.assert_close(shifted[:, 1:, 4], out.logits[:, :-1, 4])
        torch.testing.assert_close(shifted[:, 0, 4], out.logits[:, 0, 4])
        double = logits_at(model.double(), out.hidden.double(), rows)
        assert double.dtype == torch.float64

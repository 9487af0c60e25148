"""Every family's layer against an independent plain implementation: logits, gradients, padding, samples, keys."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import loopmdm
from loopmdm.adapters import as_denoiser, dream, duo, families, llada, mdlm, smdm
from loopmdm.adapters.family import layer_names
from loopmdm.adapters.patching import recognise
from loopmdm.config import LoopConfig
from loopmdm.errors import InputError
from loopmdm.model.lm import LoopMDM

from . import peer_layers as peers

NAMES = list(peers.FAMILIES)


def some_ids(batch=3, length=9, seed=1):
    return torch.randint(0, peers.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def pair(name, seed=0, **changes):
    """(plain model, patched copy)."""
    model = peers.drawn(name, seed, **changes)
    return model, loopmdm.patch(copy.deepcopy(model))


def first_layer(model):
    return next(module for module in model.modules() if recognise(module))


def test_the_package_finds_its_adapters():
    code = "import loopmdm; assert callable(loopmdm.adapters.as_denoiser)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def blocks_change_something(model, ids):
    """A fixture whose layers return what they get would pass every test."""
    gaps = []
    layers = [m for m in model.modules() if type(m).__name__ in {b for f in families().values() for b in f.blocks}]
    hooks = [
        layer.register_forward_hook(lambda m, a, k, out: gaps.append((a, k, out)), with_kwargs=True) for layer in layers
    ]
    with torch.no_grad():
        peers.logits(model, ids)
    for hook in hooks:
        hook.remove()
    assert len(gaps) == peers.LAYERS
    for args, kwargs, out in gaps:
        x = args[0] if args else kwargs["hidden_states"]
        out = out[0] if isinstance(out, tuple) else out
        assert (out - x).norm() > 0.1 * x.norm()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name):
    ids = some_ids()
    model, patched = pair(name)
    blocks_change_something(model, ids)
    sigmas = [None]
    if name == "mdlm":  # constant and per-sequence modulation
        sigmas += [torch.tensor([0.3, 1.0, 2.0])]
    for sigma in sigmas:
        results = []
        for which in (model, patched):
            which.zero_grad()
            out = peers.logits(which, ids, sigma=sigma)
            F.cross_entropy(out.flatten(0, 1), ids.flatten() % out.shape[-1]).backward()
            results.append((out.detach(), [p.grad.clone() for p in which.parameters()]))
        (want, gradients), (got, mine) = results
        assert (want - got).abs().max() < 1e-5
        for (parameter, _), a, b in zip(model.named_parameters(), gradients, mine, strict=True):
            assert (a - b).abs().max() < 1e-5, parameter
        with torch.no_grad():  # without gradients rows of one conditioning are folded
            assert (peers.logits(patched, ids, sigma=sigma) - want).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_error_in_bf16(name):
    """At most 1.2 times the plain peer's distance from float64, under autocast and (but for MDLM) with bf16 weights."""
    ids, errors = some_ids(8, 24), {"autocast": [0.0, 0.0], "weights": [0.0, 0.0]}
    with torch.no_grad():
        for seed in range(3):
            models = pair(name, seed)
            exact = peers.logits(copy.deepcopy(models[0]).double(), ids, sigma=torch.zeros(8, dtype=torch.float64))
            for i, model in enumerate(models):
                with torch.autocast("cpu", torch.bfloat16):
                    errors["autocast"][i] += float((peers.logits(model, ids) - exact).square().mean())
                if name != "mdlm":
                    narrow = copy.deepcopy(model).bfloat16()
                    errors["weights"][i] += float((peers.logits(narrow, ids) - exact).square().mean())
    for kind, (theirs, ours) in errors.items():
        assert ours <= 1.2**2 * theirs, (kind, (ours / theirs) ** 0.5)
    assert errors["autocast"][0] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    """A padded sequence's hidden states are those of the sequence alone."""
    _, patched = pair(name)
    denoiser, ids = as_denoiser(patched), some_ids(3, 12)
    real = torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    real = real.flip(-1) if side == "left" else real
    with torch.no_grad():
        together = denoiser.hidden(ids, real)
        for row in range(3):
            alone = denoiser.hidden(ids[row][real[row]][None])[0]
            assert (together[row][real[row]] - alone).abs().max() < 1e-5
        assert (together[~real] == 0).all()
        changed = denoiser.hidden(ids.where(real, (ids + 1) % peers.VOCAB), real)
    assert torch.equal(changed, together)


def test_llada_padding_is_ignored_on_request():
    """The plain LLaDA drops its mask; patched it is honoured, and with ignore_padding dropped as there."""
    model, patched = pair("llada")
    ids, real = some_ids(2, 10), torch.ones(2, 10)
    real[1, 6:] = 0
    with torch.no_grad():
        ignoring = peers.logits(model, ids, real)
        assert torch.equal(ignoring, peers.logits(model, ids))
        honoured = peers.logits(patched, ids, real)
        assert (honoured[1, :6] - peers.logits(patched, ids[1:, :6])[0]).abs().max() < 1e-5
        assert (honoured[0] - ignoring[0]).abs().max() < 1e-5, "the causal part of LLaDA's bias must not be read"
        assert (honoured[1, :6] - ignoring[1, :6]).abs().max() > 1e-3
        loopmdm.patch(patched, ignore_padding=True)
        assert (peers.logits(patched, ids, real) - ignoring).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["full", "none", "bool", "additive"])
def test_dream_masks(kind):
    model, patched = pair("dream")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(1, 7, 8, generator=torch.Generator().manual_seed(1))
    angle[..., 4:] = angle[..., :4]
    hide = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.4
    hide[..., 0] = False
    mask = {"full": "full", "none": None, "bool": ~hide, "additive": -1e9 * hide.float()}[kind]
    outs = []
    for m in (model, patched):
        with torch.no_grad():
            out = m.model.layers[0](x, attention_mask=mask, position_embeddings=(angle.cos(), angle.sin()))
        assert isinstance(out, tuple) and len(out) == 1
        outs.append(out[0])
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def test_causality_is_what_the_attention_says_in_each_call():
    """A Qwen layer's `is_causal` is set and unset by diffusion code at any time; without a mask it decides."""
    model, patched = pair("qwen3")
    theirs, ours = first_layer(model), first_layer(patched)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    rope = (torch.ones(1, 7, 16), torch.zeros(1, 7, 16))
    tril = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        full, causal = (theirs(x, attention_mask=mask, position_embeddings=rope) for mask in (None, tril))
        for flag, want, other in ((True, causal, full), (False, full, causal)):
            ours.self_attn.is_causal = flag
            got, told = (ours(x, position_embeddings=rope, **kw) for kw in ({}, {"is_causal": not flag}))
            assert (got - want).abs().max() < 1e-5 < 1e-2 < (got - other).abs().max()
            assert (told - other).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_hooks_that_do_not_run_are_named(name):
    """Those on a layer and on its projections run; a warning names the others."""
    model, ids, ran = peers.drawn(name), some_ids(), set()
    layer = first_layer(model)
    paths = dict(layer.named_modules())
    for path, part in paths.items():
        part.register_forward_hook(lambda *_, path=path: ran.add(path))
    loopmdm.patch(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peers.logits(model, ids)
    named = [str(warning.message).split()[3] for warning in told]
    assert sorted([*named, *ran]) == sorted(paths) and "" in ran
    assert all(isinstance(paths[path], nn.Linear) for path in ran - {""})
    assert not any(isinstance(paths[path], nn.Linear) for path in named)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_kind_of_hook_is_named(kind):
    layer = first_layer(model := loopmdm.patch(peers.drawn("llada")))
    peers.logits(model, some_ids())
    getattr(layer.ff_norm, f"register_{kind}_hook")(lambda *_: None)
    with pytest.warns(UserWarning, match="the hooks on ff_norm do not run"):
        peers.logits(model, some_ids())


class Narrow(nn.Module):
    """A projection that stores its weight in eight bits and computes in its input's dtype."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        assert x.dtype in (torch.float32, torch.bfloat16)
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("name", ["llada", "smdm"])
def test_a_dtype_that_only_stores_is_not_computed_in(name):
    model = peers.drawn(name)
    layer = first_layer(model)
    path = families()[name].layout(layer).qkv[0]
    layer.set_submodule(path, Narrow(layer.get_submodule(path).weight))
    with torch.no_grad():
        want = peers.logits(model, some_ids())
        assert (peers.logits(loopmdm.patch(model), some_ids()) - want).abs().max() < 1e-5


def greedy(model, prompt, new, shift):
    """The most confident token first, one a step, on the model's own logits: each codebase's greedy sampling."""
    mask = peers.VOCAB - 1
    ids = torch.cat((prompt, torch.full((len(prompt), new), mask)), 1)
    for _ in range(new):
        out = peers.logits(model, ids)
        out = torch.cat((out[:, :1], out[:, :-1]), 1) if shift else out
        p = out.softmax(-1)
        confidence, token = p.max(-1)
        confidence = confidence.masked_fill(ids != mask, -1)
        at = confidence.argmax(-1, keepdim=True)
        ids = ids.scatter(1, at, token.gather(1, at))
    return ids


@pytest.mark.parametrize(
    ("name", "compat"), [("llada", "llada"), ("dream", "dream"), ("qwen3", "dream"), ("smdm", "smdm")]
)
def test_greedy_samples_of_20_prompts(name, compat):
    """`compat` on the patched model gives what it gives on the plain one; so does a plain greedy loop for LLaDA."""
    model, patched = pair(name)
    compat = "dream" if name == "qwen3" else name
    prompts, options = some_ids(20, 6) % (peers.VOCAB - 1), {"max_new_tokens": 8, "steps": 8, "temperature": 0.0}
    if compat == "dream":
        options["policy"] = "maskgit_plus"
    with torch.no_grad():
        wanted = loopmdm.generate(as_denoiser(model), prompts, compat=compat, **options).tokens
        got = loopmdm.generate(as_denoiser(patched), prompts, compat=compat, **options).tokens
        assert torch.equal(wanted, got)
        if name == "llada":
            assert torch.equal(got, greedy(model, prompts, 8, shift=0))
    assert len(got[:, 6:].unique()) > 3


def test_mdlm_samples_of_20_seeds():
    """MDLM has no greedy rule: its cached ancestral one, noise and all."""
    model, patched = pair("mdlm")
    for seed in range(20):
        options = {"max_new_tokens": 10, "steps": 5, "compat": "mdlm", "seed": seed}
        plain = loopmdm.generate(as_denoiser(model), **options).tokens
        assert torch.equal(plain, loopmdm.generate(as_denoiser(patched), **options).tokens)


def own_layers():
    mdlm_args, c = (32, 4, 8), torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
    rotary = peers.Rotary(8)(torch.empty(1, 9, 1))
    ns = peers.llada().config
    dn, sn = peers.dream().config, peers.smdm().config
    qn = peers.qwen3().config
    angle = torch.rand(1, 9, 16, generator=torch.Generator().manual_seed(4))
    wide = torch.cat((angle[..., :8], angle[..., :8]), -1)
    half = torch.cat((angle[..., :4], angle[..., :4]), -1)
    rope = (angle[0, :, :4].cos().bfloat16(), angle[0, :, :4].sin().bfloat16())
    return {
        "mdlm": (peers.DDiTBlock(*mdlm_args, dropout=0.0), mdlm.DDiTBlock(*mdlm_args, dropout=0.0), (rotary, c), {}),
        "duo": (
            peers.DDiTBlock(*mdlm_args, dropout=0.0),
            duo.DDiTBlock(32, 4, True, cond_dim=8, dropout=0.0),
            (rotary,),
            {"c": c},
        ),
        "llada": (peers.LLaDALlamaBlock(0, ns, {}), llada.LLaDALlamaBlock(0, ns, {}), (), {"attention_bias": None}),
        "dream": (
            peers.DreamDecoderLayer(dn, 0),
            dream.DreamDecoderLayer(dn, 0),
            (),
            {"position_embeddings": (half.cos(), half.sin())},
        ),
        "qwen3": (
            peers.DreamDecoderLayer(qn, 0),
            dream.DreamDecoderLayer(qn, 0),
            (),
            {"position_embeddings": (wide.cos(), wide.sin()), "attention_mask": "full"},
        ),
        "smdm": (peers.Block(sn), smdm.Block(sn), (rope,), {}),
    }


@pytest.mark.parametrize("name", ["mdlm", "duo", "llada", "dream", "qwen3", "smdm"])
def test_layer_classes(name):
    """Our class takes the peer's state dict, strictly and back, and computes the same; num_loops visits it again."""
    theirs, ours, args, kwargs = own_layers()[name]
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.5))
    assert list(ours.state_dict()) and set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 9, 32, generator=rng)
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    with torch.no_grad():
        want, got = theirs(x, *args, **kwargs), ours(x, *args, **kwargs)
        assert type(want) is type(got)
        assert (first(want) - first(got)).abs().max() < 1e-5 < (first(want) - x).abs().max()
        ours.num_loops = 3
        for _ in range(2):
            want = theirs(first(want), *args, **kwargs)
        assert (first(want) - first(ours(x, *args, **kwargs))).abs().max() < 3e-5


def test_duo_without_adaln():
    block = duo.DDiTBlock(dim=32, n_heads=4, adaLN=False)
    assert not any("adaLN" in key for key in block.state_dict())
    x, rotary = torch.randn(2, 5, 32), peers.Rotary(8)(torch.empty(1, 5, 1))
    full = peers.DDiTBlock(32, 4, 8, dropout=0.0)
    torch.nn.init.zeros_(full.adaLN_modulation.weight)
    full.adaLN_modulation.bias.data = torch.tensor([0.0, 0, 1, 0, 0, 1]).repeat_interleave(32)
    full.load_state_dict(block.state_dict(), strict=False)
    assert (block.eval()(x, rotary) - full(x, rotary, torch.zeros(1, 8))).abs().max() < 1e-5


def test_our_dit_takes_mdlms_checkpoint():
    model = peers.drawn("mdlm")
    ours = mdlm.DIT({"model": vars(model.config.model)}, peers.VOCAB).eval()
    state = {f"backbone.{key}": tensor for key, tensor in model.state_dict().items()}
    ours.load_state_dict(families()["mdlm"].stripped(state))
    ids = some_ids()
    with torch.no_grad():
        for sigma in (torch.zeros(1), torch.tensor([0.1, 0.5, 2.0])):
            assert (ours(ids, sigma) - model(ids, sigma)).abs().max() < 1e-5
    assert "ours by construction" in loopmdm.report(ours) and loopmdm.patch(ours) is ours


@pytest.mark.parametrize("name", NAMES)
def test_tensors_map_both_ways(name):
    """to_ours loads into a LoopMDM that computes the same; to_theirs gives the state dict back bit for bit."""
    model = peers.drawn(name)
    family = families()["dream" if name == "qwen3" else name]
    settings = vars(model.config)
    if name == "mdlm":
        settings = {"model": vars(model.config.model), "vocab_size": peers.VOCAB}
    if name == "qwen3":
        settings = {**settings, "model_type": "qwen3"}
    config = family.to_config(settings)
    assert family.to_config(family.from_config(config)) == config
    state = model.state_dict()
    for loop in (config.loop, LoopConfig(start=0, length=1, max_loops=1, also=((2, 1),))):
        config = config.replace(loop=loop)
        ours = LoopMDM(config)
        ours.load_state_dict(family.to_ours(state, config))
        back = family.to_theirs(ours.state_dict(), config)
        assert set(back) == {key for key in state if not key.endswith("inv_freq")}
        assert all(torch.equal(back[key], state[key]) for key in back)
        assert set(layer_names(config)) <= {".".join(key.split(".")[:-2]) for key in ours.state_dict()} | {
            ".".join(key.split(".")[:-3]) for key in ours.state_dict()
        }
        with torch.no_grad():
            hidden = ours.eval().hidden(some_ids(), num_loops=1)
            got = F.linear(hidden, *ours.head())[..., : peers.VOCAB - family.extra_rows]
            gap = (got - peers.logits(model, some_ids())).abs().max()
        assert gap < (0.05 if name == "smdm" else 1e-5), "SMDM rounds its rotary table to bf16"


def test_a_tensor_that_nobody_knows_is_refused():
    model, family = peers.drawn("llada"), families()["llada"]
    config = family.to_config(vars(model.config))
    state = model.state_dict()
    with pytest.raises(InputError, match="odd, which its layout"):
        family.to_ours({**state, "model.transformer.odd": torch.zeros(1)}, config)
    del state["model.transformer.blocks.0.k_proj.weight"]
    with pytest.raises(InputError, match=r"has model.transformer.blocks.0.q_proj.weight but not .*k_proj"):
        family.to_ours(state, config)

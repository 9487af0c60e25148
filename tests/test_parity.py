"""check_parity names the place where a model was built wrongly."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loopmdm.adapters import convert, patch
from loopmdm.adapters.parity import LOOK_AT, check_parity
from loopmdm.errors import InputError
from loopmdm.model.lm import LoopMDM

from . import peer_layers
from .helpers import ids, live, randomize_, tiny

D, H, G, WIDTH, V, L = 32, 4, 2, 40, 11, 3
HD = D // H


class Peer(nn.Module):
    """A model of the Dream kind, written plainly; each keyword breaks one thing."""

    def __init__(self, **wrong):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, D)
        self.model.layers = nn.ModuleList(PeerLayer(**wrong) for _ in range(L))
        self.model.norm = RMS(D, wrong.get("final_eps", 1e-6))
        self.lm_head = nn.Linear(D, V, bias=False)
        self.scale = wrong.get("scale", 1.0)

    def forward(self, tokens):
        x = self.model.embed_tokens(tokens) * self.scale
        for layer in self.model.layers:
            (x,) = layer(hidden_states=x, use_cache=False)
        return self.lm_head(self.model.norm(x)), None


class RMS(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class PeerLayer(nn.Module):
    def __init__(self, **wrong):
        super().__init__()
        self.wrong = wrong
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, rows in (("q", H), ("k", G), ("v", G)):
            setattr(self.self_attn, f"{name}_proj", nn.Linear(D, rows * HD))
        self.self_attn.o_proj = nn.Linear(D, D, bias=False)
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(D, WIDTH, bias=False), nn.Linear(D, WIDTH, bias=False)
        self.mlp.down_proj = nn.Linear(WIDTH, D, bias=False)
        self.input_layernorm = RMS(D, wrong.get("eps", 1e-6))
        self.post_attention_layernorm = RMS(D, wrong.get("mlp_eps", 1e-6))

    def forward(self, hidden_states, use_cache):
        x, wrong, a = hidden_states, self.wrong, self.self_attn
        h = self.input_layernorm(x)
        q, k, v = (part(h).unflatten(-1, (-1, HD)).transpose(1, 2) for part in (a.q_proj, a.k_proj, a.v_proj))
        step = torch.arange(x.shape[1])[:, None] * wrong.get("sign", 1)
        angle = step * wrong.get("theta", 10000.0) ** (-torch.arange(0, HD, 2) / HD)
        q, k = (self.rotate(u, angle) for u in (q, k))
        k, v = (u.repeat_interleave(H // G, dim=1) for u in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(HD)
        if wrong.get("causal"):
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        x = x + a.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        gate, up = self.mlp.gate_proj(h), self.mlp.up_proj(h)
        if wrong.get("swapped"):
            gate, up = up, gate
        y = (F.gelu if wrong.get("gelu") else F.silu)(gate) * up
        return (x * wrong.get("residual", 1.0) + self.mlp.down_proj(y),)

    def rotate(self, u, angle):
        cos, sin = angle.cos(), angle.sin()
        if self.wrong.get("interleaved"):
            a, b = u[..., 0::2], u[..., 1::2]
            return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        a, b = u.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


CONFIG = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "intermediate_size": WIDTH,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def gains(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMS):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(5)))
    return model


@pytest.fixture(scope="module")
def peer():
    return gains(randomize_(Peer(), seed=1)).eval()


def ours_of(peer):
    family = convert.family("dream")
    config = family.to_config(CONFIG).replace(logit_shift=1)
    model = LoopMDM(config).eval()
    model.load_state_dict(family.to_ours(peer.state_dict(), config))
    return model


def broken(peer, **wrong):
    twin = Peer(**wrong).eval()
    twin.load_state_dict(peer.state_dict())
    return twin


TOKENS = ids(2, 9)


def test_a_right_model_is_equal(peer, capsys):
    for ours in (ours_of(peer), broken(peer)):
        result = check_parity(peer, ours, TOKENS)
        assert result.equal and result.first is None and result.logits < 5e-6
        assert max(place.own for place in result.places) < 5e-6 and len(result.places) == 3 + 9 * L
        printed = capsys.readouterr().out.splitlines()
        assert printed[-1] == "equal within 5.0e-06" and len(printed) == 2 + 3 + L
    tight = check_parity(broken(peer).double(), ours_of(peer).double(), TOKENS, tolerance=3e-7, show=False)
    assert tight.equal and capsys.readouterr().out == ""  # the angles are fp32 in both


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"scale": 1.01}, "embeddings"),
        ({"eps": 1e-5}, "layer 0: norm before attention"),
        ({"sign": -1}, "layer 0: attention"),
        ({"theta": 9000.0}, "layer 0: attention"),
        ({"interleaved": True}, "layer 0: attention"),
        ({"causal": True}, "layer 0: attention"),
        ({"mlp_eps": 1e-5}, "layer 0: norm before the MLP"),
        ({"swapped": True}, "layer 0: activation"),
        ({"gelu": True}, "layer 0: activation"),
        ({"residual": 1.001}, "layer 0: output"),
        ({"final_eps": 1e-4}, "final norm"),
    ],
)
def test_a_wrong_model_is_named_at_the_place(peer, capsys, wrong, place):
    """Whichever of the two is wrong, a plain module or ours."""
    for pair in ((peer, broken(peer, **wrong)), (broken(peer, **wrong), ours_of(peer))):
        result = check_parity(*pair, TOKENS)
        assert result.first == place and not result.equal
        printed = capsys.readouterr().out
        assert f"they first differ at '{place}'; look at: {LOOK_AT[place.rpartition(': ')[2]]}" in printed
        assert printed.count("<- first difference") == 1


def with_weights(peer, change):
    twin = broken(peer)
    with torch.no_grad():
        change(twin)
    return twin


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.model.layers[1].self_attn.k_proj.bias.zero_(), "layer 1: qkv projection"),
        (lambda m: m.model.layers[2].self_attn.o_proj.weight.mul_(1.001), "layer 2: output projection"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight[3].zero_(), "layer 1: MLP's first projection"),
        (lambda m: m.model.layers[2].mlp.down_proj.weight[0].zero_(), "layer 2: MLP's last projection"),
        (lambda m: m.model.layers[1].input_layernorm.weight.mul_(1.001), "layer 1: norm before attention"),
        (lambda m: m.model.norm.weight.fill_(1.0), "final norm"),
        (lambda m: m.lm_head.weight[4].zero_(), "logits"),
    ],
)
def test_wrong_weights_are_named_at_their_layer(peer, change, place):
    for pair in ((peer, with_weights(peer, change)), (peer, ours_of(with_weights(peer, change)))):
        assert check_parity(*pair, TOKENS, show=False).first == place


def test_one_fault_is_not_blamed_on_the_layers_behind_it(peer):
    """The errors as run stay large after layer 0; by itself no other layer is at fault."""
    wrong = with_weights(peer, lambda m: m.model.layers[0].self_attn.q_proj.weight.mul_(1.1))
    result = check_parity(peer, wrong, TOKENS, show=False)
    later = [p for p in result.places if p.name.startswith(("layer 1", "layer 2", "final", "logits"))]
    assert len(later) == 20 and all(p.error > 1e-4 and p.own < 5e-6 for p in later)
    faulty = [p.name for p in result.places if p.own > 5e-6]
    assert faulty == [p.name for p in result.places if p.name.startswith("layer 0")][1:]
    last = with_weights(peer, lambda m: m.model.layers[2].self_attn.q_proj.weight.mul_(1.1))
    final, logits = check_parity(peer, last, TOKENS, show=False).places[-2:]
    assert min(final.error, logits.error) > 1e-4 and max(final.own, logits.own) < 5e-6


def test_two_loopmdms_with_modulation(capsys):
    """DiT: the projections of the conditioning are no stage; a looped model is compared at S = 1."""
    a, config = live(tiny("dit")), tiny("dit")
    b = LoopMDM(config).eval()
    b.load_state_dict(a.state_dict())
    assert check_parity(a, b, TOKENS, show=False).equal
    with torch.no_grad():
        b.layers[2].modulation.bias[5].add_(0.1)
    result = check_parity(a, b, TOKENS, show=False)
    assert result.first == "layer 2: norm before attention"
    assert "layer 2: activation" in [place.name for place in result.places]


@pytest.mark.parametrize("name", peer_layers.FAMILIES)
def test_patched_models_are_checked_against_their_originals(name):
    peer, call = peer_layers.drawn(name), lambda m, x: peer_layers.logits(m, x)
    ours = patch(copy.deepcopy(peer))
    tokens = ids(2, 9, peer_layers.VOCAB)
    result = check_parity(peer, ours, tokens, peer_call=call, ours_call=call, show=False)
    assert result.equal and len(result.places) >= 9 * peer_layers.LAYERS, str(result)
    with torch.no_grad():
        dict(ours.named_parameters())[
            {
                "mdlm": "blocks.2.mlp.0.bias",
                "llada": "model.transformer.blocks.2.up_proj.weight",
                "smdm": "transformer.h.2.mlp.swiglu.w2.weight",
            }.get(name, "model.layers.2.mlp.up_proj.weight")
        ][3].add_(0.1)
    result = check_parity(peer, ours, tokens, peer_call=call, ours_call=call, show=False)
    assert result.first == "layer 2: MLP's first projection", str(result)


def test_logits_compare_where_both_have_them(peer):
    """A head without the mask's row, and a mask that is suppressed by -1e6."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = broken(peer)

        def forward(self, tokens):
            logits = self.inner(tokens)[0]
            logits[..., 2] = -1e6
            return logits[..., :-1]

    assert check_parity(Cut().eval(), ours_of(peer), TOKENS, show=False).equal


def test_models_are_left_as_they_were(peer):
    ours = ours_of(peer).train()
    check_parity(peer, ours, TOKENS, show=False)
    assert ours.training and not peer.training
    for module in (*peer.modules(), *ours.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    broken_call = {"ours_call": lambda m, x: (m(x), 1 / 0)}
    with pytest.raises(ZeroDivisionError):
        check_parity(peer, ours, TOKENS, **broken_call)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*peer.modules(), *ours.modules()))


def test_refusals(peer):
    with pytest.raises(InputError, match="Linear has no ModuleList of layers"):
        check_parity(nn.Linear(2, 2), peer, TOKENS)
    with pytest.raises(InputError, match="the peer has 3 layers and ours 4"):
        check_parity(peer, live(tiny()), TOKENS)
    with pytest.raises(InputError, match="of the peer 0 of 3 layers ran in order"):
        check_parity(peer, peer, TOKENS, peer_call=lambda m, x: m.lm_head(m.model.embed_tokens(x)))
    result = check_parity(peer, peer, TOKENS, peer_layers=peer.model.layers[:2], ours_layers=peer.model.layers[:2])
    assert result.equal

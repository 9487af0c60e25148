"""The four codebases' models in plain torch: class names, parameter names, signatures and arithmetic as theirs.

Written from the facts of those codebases, with no part of loopmdm: what `patch` must recognise and be equal to.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def namespace(**fields):
    return SimpleNamespace(**fields)


def turned(x, cos, sin):
    """x [..., hd] by tables [..., hd/2], half-split."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q, k, v, mask=None):
    """[B, H, N, hd] each, written out; a query without a key gets 0."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(-1).nan_to_num().to(v.dtype) @ v


# --- MDLM -------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight, self.dim = nn.Parameter(torch.ones(dim)), dim

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return F.layer_norm(wide, [self.dim]) * self.weight


class DDiTBlock(nn.Module):
    def __init__(self, dim, n_heads, cond_dim, mlp_ratio=4, dropout=0.1):
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.dropout1 = nn.Dropout(dropout)
        self.norm2 = LayerNorm(dim)
        wide = mlp_ratio * dim
        self.mlp = nn.Sequential(nn.Linear(dim, wide), nn.GELU(approximate="tanh"), nn.Linear(wide, dim))
        self.dropout2 = nn.Dropout(dropout)
        self.dropout = dropout
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)

    def forward(self, x, rotary_cos_sin, c, seqlens=None):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        drop = lambda y: F.dropout(y, self.dropout, self.training)  # noqa: E731
        h = self.norm1(x) * (1 + parts[1]) + parts[0]
        B, N, D = h.shape
        q, k, v = (u.view(B, N, self.n_heads, -1) for u in self.attn_qkv(h).chunk(3, -1))
        half = rotary_cos_sin[0].shape[-1] // 2
        cos, sin = (table[0, :, 0, 0, :half].to(q.dtype)[:, None] for table in rotary_cos_sin)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        y = attend(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2).reshape(B, N, D)
        x = x + parts[2] * drop(self.attn_out(y))
        h = self.norm2(x) * (1 + parts[4]) + parts[3]
        return x + parts[5] * drop(self.mlp(h))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
        angle = t[:, None].float() * freqs
        return self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(self.mlp[0].weight.dtype))


class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(0, dim, 2).float() / dim))

    def forward(self, x):
        freqs = torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq.float())
        emb = torch.cat((freqs, freqs), -1)
        cos, sin = (u[None, :, None, None, :].repeat(1, 1, 3, 1, 1) for u in (emb.cos(), emb.sin()))
        cos[:, :, 2], sin[:, :, 2] = 1.0, 0.0
        return cos, sin


class EmbeddingLayer(nn.Module):
    def __init__(self, dim, vocab):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, x):
        return self.embedding[x]


class DDitFinalLayer(nn.Module):
    def __init__(self, dim, vocab, cond):
        super().__init__()
        self.norm_final = LayerNorm(dim)
        self.linear = nn.Linear(dim, vocab)
        self.adaLN_modulation = nn.Linear(cond, 2 * dim)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DIT(nn.Module):
    def __init__(self, config, vocab_size):
        super().__init__()
        m = config.model
        self.config, self.vocab_size = config, vocab_size
        self.vocab_embed = EmbeddingLayer(m.hidden_size, vocab_size)
        self.sigma_map = TimestepEmbedder(m.cond_dim)
        self.rotary_emb = Rotary(m.hidden_size // m.n_heads)
        self.blocks = nn.ModuleList(
            DDiTBlock(m.hidden_size, m.n_heads, m.cond_dim, dropout=m.dropout) for _ in range(m.n_blocks)
        )
        self.output_layer = DDitFinalLayer(m.hidden_size, vocab_size, m.cond_dim)

    def forward(self, indices, sigma):
        x = self.vocab_embed(indices)
        c = F.silu(self.sigma_map(sigma))
        rotary = self.rotary_emb(x)
        for block in self.blocks:
            x = block(x, rotary, c, seqlens=None)
        return self.output_layer(x, c)


# --- LLaDA ------------------------------------------------------------------------------------------------------------


class RMSLayerNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, layer_id, config, cache):
        super().__init__()
        self.config, D, W = config, config.d_model, config.mlp_hidden_size
        kv = D // config.n_heads * config.n_kv_heads
        bias = config.include_qkv_bias
        self.attn_norm, self.ff_norm = RMSLayerNorm(D, config.rms_norm_eps), RMSLayerNorm(D, config.rms_norm_eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n, bias=bias) for n in (D, kv, kv))
        self.attn_out = nn.Linear(D, D, bias=False)
        self.ff_proj, self.up_proj = nn.Linear(D, W, bias=False), nn.Linear(D, W, bias=False)
        self.ff_out = nn.Linear(W, D, bias=False)

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        B, N, D = x.shape
        H, G = self.config.n_heads, self.config.n_kv_heads
        h = self.attn_norm(x)
        q, k, v = (p(h).view(B, N, -1, D // H).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        hd = D // H
        freqs = torch.outer(torch.arange(N).float(), self.config.rope_theta ** (-torch.arange(0, hd, 2).float() / hd))
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k = (turned(u.to(wide), freqs.cos().to(wide), freqs.sin().to(wide)).to(u.dtype) for u in (q, k))
        k, v = (u.repeat_interleave(H // G, dim=1) for u in (k, v))
        x = x + self.attn_out(attend(q, k, v).transpose(1, 2).reshape(B, N, D))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)), None


class LLaDAModelLM(nn.Module):
    """With the padding mask turned into a causal bias, which its blocks ignore."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.d_model
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, D),
                "blocks": nn.ModuleList(LLaDALlamaBlock(i, config, {}) for i in range(config.n_layers)),
                "ln_f": RMSLayerNorm(D, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.model.transformer["ff_out"] = nn.Linear(D, config.embedding_size, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        parts = self.model.transformer
        x, bias = parts["wte"](input_ids), None
        if attention_mask is not None:
            N, low = input_ids.shape[1], torch.finfo(torch.float32).min
            bias = torch.full((N, N), low).triu(1)[None, None] + (1.0 - attention_mask.float())[:, None, None] * low
            bias = bias.clamp(min=low)
        for block in parts["blocks"]:
            x, _ = block(x, attention_bias=bias, layer_past=None, use_cache=use_cache)
        x = parts["ln_f"](x)
        return F.linear(x, parts["wte"].weight) if self.config.weight_tying else parts["ff_out"](x)


# --- Dream, Qwen2, Qwen3 ----------------------------------------------------------------------------------------------


class DreamRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class DreamSdpaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, H, G, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_heads, self.num_key_value_heads, self.head_dim = H, G, hd
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n * hd, bias=not config.qk_norm) for n in (H, G, G))
        self.o_proj = nn.Linear(H * hd, D, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = DreamRMSNorm(hd), DreamRMSNorm(hd)
        self.is_causal, self.attention_dropout = False, 0.0

    def forward(self, x, mask, position_embeddings):
        B, N, _ = x.shape
        q, k, v = (p(x).view(B, N, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        half = self.head_dim // 2
        cos, sin = (u[:, None, :, :half] for u in position_embeddings)
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        k, v = (u.repeat_interleave(self.num_heads // self.num_key_value_heads, dim=1) for u in (k, v))
        y = attend(q, k, v, mask if isinstance(mask, torch.Tensor) else None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DreamMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, W = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, W, bias=False), nn.Linear(D, W, bias=False)
        self.down_proj, self.act_fn = nn.Linear(W, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn, self.mlp = DreamSdpaAttention(config), DreamMLP(config)
        self.input_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        cache_position=None,
        position_embeddings=None,
        **kwargs,
    ):
        x = hidden_states
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, position_embeddings)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Qwen3DecoderLayer(DreamDecoderLayer):
    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None, **kw
    ) -> torch.Tensor:
        return super().forward(hidden_states, attention_mask, position_embeddings=position_embeddings)[0]


class DreamModel(nn.Module):
    def __init__(self, config, layer=DreamDecoderLayer):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask="full", use_cache=False, past_key_values=None):
        x = self.model.embed_tokens(input_ids)
        ids = torch.arange(input_ids.shape[1])[None]
        hd = self.config.head_dim
        freqs = ids[..., None].float() * self.config.rope_theta ** (-torch.arange(0, hd, 2).float() / hd)
        emb = torch.cat((freqs, freqs), -1)
        rope = (emb.cos().to(x.dtype), emb.sin().to(x.dtype))
        if isinstance(attention_mask, torch.Tensor):
            real = attention_mask.bool()
            attention_mask = real[:, None, :, None] & real[:, None, None, :]
        for layer in self.model.layers:
            out = layer(
                x,
                attention_mask=attention_mask,
                position_ids=ids,
                past_key_value=past_key_values,
                use_cache=use_cache,
                position_embeddings=rope,
            )
            x = out[0] if isinstance(out, tuple) else out
        return self.lm_head(self.model.norm(x))


# --- SMDM -------------------------------------------------------------------------------------------------------------


class FusedRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.to(wide.dtype)).to(
            x.dtype
        )


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.config = config
        self.attn = nn.Linear(config.n_embd, rows, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rope):
        B, N, D = x.shape
        H, G, hd = self.config.n_head, self.config.n_query_groups, self.config.head_size
        qkv = self.attn(x).view(B, N, G, H // G + 2, hd)
        q, k, v = qkv[..., :-2, :].reshape(B, N, H, hd), qkv[..., -2, :], qkv[..., -1, :]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (u[:, None].to(wide) for u in rope)
        q, k = (turned(u.to(wide), cos, sin).to(u.dtype) for u in (q, k))
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))
        k, v = (u.repeat_interleave(H // G, dim=1) for u in (k, v))
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(B, N, D))


class SwiGLU(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(width, dim, bias=False)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class LLaMAMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.swiglu = SwiGLU(config.n_embd, config.intermediate_size)

    def forward(self, x):
        return self.swiglu(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = (FusedRMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn, self.mlp, self.config = SelfAttention(config), LLaMAMLP(config), config

    def forward(self, x, rope):
        x = x + self.attn(self.norm_1(x), rope)
        return x + self.mlp(self.norm_2(x))


class TransEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size + 1, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": FusedRMSNorm(config.n_embd, config.norm_eps),
            }
        )

    def forward(self, idx):
        N, hd = idx.shape[1], self.config.head_size
        freqs = torch.outer(torch.arange(N).float(), 10000 ** (-torch.arange(0, hd, 2).float() / hd))
        x = self.transformer["wte"](idx)
        for block in self.transformer["h"]:
            x = block(x, (freqs.cos().bfloat16(), freqs.sin().bfloat16()))
        return self.lm_head(self.transformer["ln_f"](x))


# --- small models of each ---------------------------------------------------------------------------------------------

VOCAB, LAYERS = 17, 4


def mdlm(**changes):
    fields = {
        "hidden_size": 32,
        "n_heads": 4,
        "n_blocks": LAYERS,
        "cond_dim": 8,
        "dropout": 0.0,
        "length": 64,
        **changes,
    }
    return DIT(namespace(model=namespace(**fields), time_conditioning=False), VOCAB)


def llada(**changes):
    fields = {
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": LAYERS,
        "mlp_hidden_size": 48,
        "rms_norm_eps": 1e-5,
        "include_bias": False,
        "include_qkv_bias": False,
        "rope": True,
        "rope_theta": 5000.0,
        "embedding_size": VOCAB,
        "mask_token_id": VOCAB - 1,
        "weight_tying": False,
        **changes,
    }
    return LLaDAModelLM(namespace(**fields))


def dream(layer=DreamDecoderLayer, **changes):
    fields = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "mask_token_id": VOCAB - 1,
        "qk_norm": False,
        **changes,
    }
    return DreamModel(namespace(**fields), layer)


def qwen3():
    return dream(Qwen3DecoderLayer, qk_norm=True, head_dim=16)


def smdm(**changes):
    fields = {
        "n_embd": 32,
        "n_head": 4,
        "n_query_groups": 2,
        "head_size": 8,
        "n_layer": LAYERS,
        "intermediate_size": 48,
        "norm_eps": 1e-5,
        "padded_vocab_size": VOCAB - 1,
        "block_size": 64,
        "bias": False,
        **changes,
    }
    return TransEncoder(namespace(**fields))


FAMILIES = {"mdlm": mdlm, "llada": llada, "dream": dream, "qwen3": qwen3, "smdm": smdm}


def drawn(name, seed=0, scale=1.0, **changes):
    """A small model of a family with every parameter drawn: gains near 1, biases, gates and the head included."""
    model = FAMILIES[name](**changes).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.dim() == 1 and parameter_name.endswith("weight"):
                p.copy_(0.5 + torch.rand(p.shape, generator=rng))
            elif p.dim() == 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(
                    noise if "embed" in parameter_name or "wte" in parameter_name else scale * noise / p.shape[1] ** 0.5
                )
    return model


def logits(model, ids, mask=None, sigma=None):
    """The whole model as its users call it."""
    if type(model).__name__ == "DIT":
        return model(ids, torch.zeros(len(ids)) if sigma is None else sigma)
    if type(model).__name__ == "TransEncoder":
        return model(ids)
    return model(ids) if mask is None else model(ids, attention_mask=mask)

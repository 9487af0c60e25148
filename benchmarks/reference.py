"""What every ratio is measured against: masked diffusion models and samplers as their authors write them, unfused.

Plain eager PyTorch, one operation after the other. `LlamaLayer` follows LLaDA's and SMDM's layer, `DiTLayer` MDLM's
(also DUO's, ReMDM's, SEDD's), time conditioning off, which is their default; `low_confidence` follows LLaDA's generate
and `ancestral` MDLM's cached ancestral sampler: logits at every position, noise in float64 over the whole vocabulary, a
Python loop over rows where the authors have one. Only the loop over layers (S visits) is added. tests/test_reference.py
holds models and samplers against ours in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.config import ModelConfig
from loopmdm.model.lm import LoopMDM

Rope = tuple[Tensor, Tensor]


def rope_table(length: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(torch.arange(length, device=device).float(), inverse)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def turn(x: Tensor, rope: Rope) -> Tensor:
    """x [B, H, T, hd] rotated in at least fp32, halves against each other."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, dim=-1)
    return (wide * rope[0] + torch.cat((-b, a), dim=-1) * rope[1]).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(wide, x.shape[-1:], eps=self.eps) * self.weight


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


class LlamaLayer(nn.Module):
    """RMSNorm, q, k and v apart, SwiGLU with gate and up apart, no biases; the stream in the weights' dtype."""

    def __init__(self, weights: dict[str, Tensor], c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = c.num_attention_heads, c.num_key_value_heads or 0, c.head_dim or 0
        sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        q, k, v = weights["attn.qkv.weight"].split(sizes)
        self.q_proj, self.k_proj, self.v_proj = linear(q), linear(k), linear(v)
        self.attn_out = linear(weights["attn.out.weight"])
        gate, up = weights["mlp.up.weight"].chunk(2)
        self.ff_proj, self.up_proj, self.ff_out = linear(gate), linear(up), linear(weights["mlp.down.weight"])
        self.attn_norm = RMSNorm(weights["attn_norm.weight"], c.norm_eps)
        self.ff_norm = RMSNorm(weights["mlp_norm.weight"], c.norm_eps)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        B, T, _ = x.shape
        h = self.attn_norm(x)
        q = self.q_proj(h).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(B, T, self.groups, self.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(B, T, self.groups, self.head_dim).transpose(1, 2)
        q, k = turn(q, rope), turn(k, rope)
        if self.groups != self.heads:
            k, v = (u.repeat_interleave(self.heads // self.groups, dim=1) for u in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn_out(y.transpose(1, 2).reshape(B, T, -1))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class DiTLayer(nn.Module):
    """Layer norm without bias, six adaLN modulations computed anew in every layer and pass, GELU; an fp32 stream."""

    def __init__(self, weights: dict[str, Tensor], c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.attn_qkv, self.attn_out = linear(weights["attn.qkv.weight"]), linear(weights["attn.out.weight"])
        self.up = linear(weights["mlp.up.weight"], weights["mlp.up.bias"])
        self.down = linear(weights["mlp.down.weight"], weights["mlp.down.bias"])
        self.adaLN = linear(weights["modulation.weight"], weights["modulation.bias"])
        self.norm1 = LayerNorm(weights["attn_norm.weight"], c.norm_eps)
        self.norm2 = LayerNorm(weights["mlp_norm.weight"], c.norm_eps)

    def forward(self, x: Tensor, rope: Rope, cond: Tensor) -> Tensor:
        B, T, _ = x.shape
        dtype = self.up.weight.dtype  # of the products, as autocast has it
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN(cond)[:, None].chunk(6, dim=2)
        h = (self.norm1(x) * (1 + scale_a) + shift_a).to(dtype)
        q, k, v = self.attn_qkv(h).view(B, T, 3, self.heads, -1).unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(turn(q, rope), turn(k, rope), v)
        x = x + gate_a * self.attn_out(y.transpose(1, 2).reshape(B, T, -1))
        h = (self.norm2(x) * (1 + scale_m) + shift_m).to(dtype)
        return x + gate_m * self.down(F.gelu(self.up(h), approximate="tanh"))


class Reference(nn.Module):
    """A masked diffusion LM in plain torch with the weights of a `LoopMDM`: logits at every position.

    Of the models' variants it has what the two families publish: no padding, no per-head norms, plain loop boundary
    (`anchored`: the boundary's norm between two visits).
    """

    def __init__(self, model: LoopMDM) -> None:
        super().__init__()
        c = self.config = model.config
        self.mask_id, self.passes = model.mask_id, 0
        make = DiTLayer if c.modulation == "adaln" else LlamaLayer
        layers = [{key: w.detach().clone() for key, w in layer.state_dict().items()} for layer in model.layers]
        self.layers = nn.ModuleList(make(weights, c) for weights in layers)
        self.embed = nn.Parameter(model.embed.weight.detach().clone())
        norm = LayerNorm if c.norm == "layernorm" else RMSNorm
        self.final_norm = norm(model.final_norm.weight.detach().clone(), c.norm_eps)
        self.lm_head = linear(*(None if w is None else w.detach().clone() for w in model.head()))  # type: ignore[arg-type]
        boundary = model.looped_blocks[0].boundary
        self.boundary = RMSNorm(boundary.weight.detach().clone(), c.norm_eps) if boundary is not None else None
        self.cond = self.final_modulation = None
        if c.modulation == "adaln":
            with torch.no_grad():
                self.cond = nn.Parameter(model._condition(None, model.embed.weight.device).clone())
            if getattr(model, "final_modulation", None) is not None:
                final = model.final_modulation
                self.final_modulation = linear(final.weight.detach().clone(), final.bias.detach().clone())

    def hidden(self, ids: Tensor, num_loops: int) -> Tensor:
        """ids [B, T] -> what the head reads [B, T, D]."""
        c = self.config
        rope = rope_table(ids.shape[1], c.head_dim or 0, c.rope_theta, ids.device)
        x = F.embedding(ids, self.embed)
        if c.modulation == "adaln":
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, last = c.loop.start, c.loop.start + c.loop.length
        for layer in self.layers[:first]:
            x = self._layer(layer, x, rope)
        x0 = x
        for visit in range(num_loops):
            if visit and self.boundary is not None:
                x = self.boundary(x + x0)
            for layer in self.layers[first:last]:
                x = self._layer(layer, x, rope)
        for layer in self.layers[last:]:
            x = self._layer(layer, x, rope)
        h = self.final_norm(x)
        if self.final_modulation is not None:
            shift, scale = self.final_modulation(self.cond)[:, None].chunk(2, dim=2)
            h = h * (1 + scale) + shift
        return h.to(self.lm_head.weight.dtype)

    def forward(self, ids: Tensor, num_loops: int) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; counted in `passes`."""
        self.passes += 1
        return self.lm_head(self.hidden(ids, num_loops))

    def _layer(self, layer: nn.Module, x: Tensor, rope: Rope) -> Tensor:
        return layer(x, rope) if self.cond is None else layer(x, rope, self.cond)


def gumbel_argmax(logits: Tensor, temperature: float) -> Tensor:
    """LLaDA's: exp(logits) over (-log u) to the temperature, in float64 at every position."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.float64)
    noise = (-torch.log(torch.rand_like(wide, dtype=torch.float64))) ** temperature
    return (wide.exp() / noise).argmax(-1)


@torch.no_grad()
def low_confidence(
    model: Reference, ids: Tensor, steps: int, temperature: float, num_loops: int, mask_may_win: bool = False
) -> Tensor:
    """LLaDA's generate, one block, remasking "low_confidence": in each step the most confident predictions stay.

    With `mask_may_win` a prediction may be the mask, as in LLaDA's code: then masks are left in the text.
    """
    x = ids.clone()
    left = (x == model.mask_id).sum(-1)
    counts = left[:, None] // steps + (torch.arange(steps, device=x.device) < left[:, None] % steps)
    for step in range(steps):
        masked = x == model.mask_id
        logits = model(x, num_loops)
        if not mask_may_win:
            logits[..., model.mask_id] = -torch.inf
        x0 = gumbel_argmax(logits, temperature)
        p = F.softmax(logits, dim=-1)
        x0_p = torch.gather(p, -1, x0[..., None])[..., 0]
        x0 = torch.where(masked, x0, x)
        confidence = torch.where(masked, x0_p, -torch.inf)
        transfer = torch.zeros_like(masked)
        for row in range(len(x)):
            transfer[row, confidence[row].topk(int(counts[row, step])).indices] = True
        x[transfer] = x0[transfer]
    return x


@torch.no_grad()
def ancestral(model: Reference, ids: Tensor, steps: int, num_loops: int) -> Tensor:
    """MDLM's cached ancestral sampler: p(x0) of all positions is kept while nothing was revealed; last an arg-max."""
    x = ids.clone()
    times = torch.linspace(1, 1e-5, steps + 1, device=x.device)
    p_x0 = None
    for step in range(steps):
        # tensors of [B, 1, 1], so that 16-bit probabilities become fp32 here, as in MDLM's code
        t, s = (times[i].expand(len(x))[:, None, None] for i in (step, step + 1))
        if p_x0 is None:
            p_x0 = _subs(model, x, num_loops).exp()
        q = p_x0 * (t - s)
        q[..., model.mask_id] = s[..., 0]
        gumbel_norm = 1e-10 - (torch.rand_like(q) + 1e-10).log()
        drawn = (q / gumbel_norm).argmax(-1)
        new = torch.where(x == model.mask_id, drawn, x)
        if not torch.equal(new, x):
            p_x0 = None
        x = new
    return torch.where(x == model.mask_id, _subs(model, x, num_loops).argmax(-1), x)


def _subs(model: Reference, x: Tensor, num_loops: int) -> Tensor:
    """log p(x0) [B, T, V] with MDLM's SUBS rules: the mask never, a token that is there for certain."""
    logits = model(x, num_loops)
    logits[..., model.mask_id] += -1000000.0
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    there = x != model.mask_id
    logits[there] = -1000000.0
    logits[there, x[there]] = 0
    return logits

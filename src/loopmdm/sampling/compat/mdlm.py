"""MDLM's ancestral samplers "ddpm" and "ddpm_cache" (arXiv 2406.07524, section 4; kuleshov-group/mdlm diffusion.py).

t runs down linspace(1, 1e-5, steps + 1), s = t - dt. A masked position becomes id v with weight p(v) (t - s) and stays
masked with weight s; "ddpm" puts 1 - exp(-sigma) with sigma = -log(1 - 0.999 t) for t and s, the same up to rounding.
The draw is the arg-max of weight / (1e-10 - log(u + 1e-10)), u of the logits' dtype but at least fp32, at every
position and id. The prediction p has the mask at minus a million (SUBS); tokens never change. "ddpm_cache" keeps p
while the state is unchanged and the model has no time input. A last pass takes the arg-max of what is still masked.

Reproduced, and what `generate` does without `compat`:
- u in fp32 cannot be near enough to 0 or 1: it truncates the Gumbel noise, which lowers the temperature a little
  (arXiv 2409.02908). Ours draws from the cumulative distribution in float64.
- The grid ends at 1e-5 and leaves masks to an arg-max pass, biased and in one go. Ours reveals them by sampling.
- One changed row of a batch costs the cache of all. Ours runs the model only when something is to be revealed.
- "Unchanged" is `torch.allclose` on ids: from about id 100000 on it also means one of the neighbouring ids. Ours has no
  such cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .trace import Options, Trace, same_length

EPS = 1e-5
NOISE_EPS = 1e-3
NEGATIVE = -1e6


def sample(trace: Trace, options: Options) -> None:
    same_length(trace, "mdlm")
    cached = options.rule == "ddpm_cache"
    conditioned = bool(getattr(getattr(trace.model, "config", None), "time_conditioning", False))
    times = torch.linspace(1, EPS, options.steps + 1, device=trace.tokens.device)
    delta = (1 - EPS) / options.steps
    prediction: Tensor | None = None
    for step in range(options.steps):
        t = times[step].expand(len(trace.tokens))
        s = t - delta
        if prediction is None:
            prediction = _predict(trace, t).exp()
        stay, before = (s, t) if cached else (_move_chance(s), _move_chance(t))
        weights = prediction * (before - stay)[:, None, None]
        weights[:, :, trace.model.mask_id] = stay[:, None].to(weights.dtype)
        tokens = torch.where(trace.masked, _draw(weights), trace.tokens)
        if not cached or conditioned or not torch.allclose(tokens, trace.tokens):
            prediction = None
        trace.commit(tokens)
    trace.commit(_predict(trace, times[-1].expand(len(trace.tokens))).argmax(-1))


def _sigma(t: Tensor) -> Tensor:
    return -torch.log1p(-(1 - NOISE_EPS) * t)


def _move_chance(t: Tensor) -> Tensor:
    return 1 - torch.exp(-_sigma(t))


def _predict(trace: Trace, t: Tensor) -> Tensor:
    """Log-probabilities of the clean token [B, T, V] at time t [B]: SUBS."""
    logits = trace.logits(sigma=_sigma(t))
    logits[:, :, trace.model.mask_id] += NEGATIVE
    logits = logits - logits.logsumexp(-1, keepdim=True)
    known = torch.full_like(logits, NEGATIVE).scatter(-1, trace.tokens[..., None], 0.0)
    return torch.where(trace.masked[..., None], logits, known)


def _draw(weights: Tensor) -> Tensor:
    return (weights / (1e-10 - (torch.rand_like(weights) + 1e-10).log())).argmax(-1)

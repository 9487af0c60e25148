"""Dream's diffusion_generate (arXiv 2508.15487; HKUNLP/Dream generation_utils.py).

t runs down linspace(1, 1e-3, steps + 1) in fp32. "origin" reveals each mask with chance 1 - s / t. The others reveal
int(masks / B * (1 - s / t)) positions of every row, int(masks / B) in the last step, by confidence: the probability of
the token ("maskgit_plus"), the gap between the two largest ("topk_margin"), or minus the entropy with 1e-10 added
inside the logarithm ("entropy"); all after temperature, top-p and top-k, in the logits' dtype. Top-p keeps the ids up
to and with the one that brings the sum above p (rounded to that dtype too); top-k keeps what equals the k-th. With
`alg_temp` the positions are drawn from softmax(confidence / alg_temp) without replacement. Tokens: `Categorical` over
the probabilities, or their largest at temperature 0. Padding is on the left, and masked.

Reproduced, and what `generate` does without `compat`:
- The count is rounded down: with as many steps as masks the first step reveals nothing and the last ones catch up. Ours
  spreads n masks as n // S and the remainder.
- The count is a mean over the batch. A row with fewer masks than that gives up tokens that it had, even of the prompt:
  they turn into masks. Ours counts in each row.
- The mask id is not suppressed: it may be revealed, and then stays masked. Ours never proposes it.
- Where `Categorical` refuses its input (half precision may not sum to 1), all tokens of that step are arg-max.
  Ours samples in float64.
- Confidence is read after temperature and filters, of which top-p comes first. Ours reads the model's own distribution,
  and filters by top-k first.
- Equal confidences fall as `torch.topk` has it. Ours: to the lower position.
- All steps run, also once nothing is masked. Ours stops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical

from .trace import Options, Trace

EPS = 1e-3


def sample(trace: Trace, options: Options) -> None:
    times = torch.linspace(1, EPS, options.steps + 1, device=trace.tokens.device)
    for step in range(options.steps):
        last = step == options.steps - 1
        share = torch.ones_like(times[0]) if last else 1 - times[step + 1] / times[step]
        masked = trace.masked
        logits = trace.logits(honour_padding=True)
        if options.rule == "origin":
            trace.commit(_origin(trace, options, logits[masked], masked, share))
            continue
        proposal, confidence = _propose(logits[masked], options)
        # No masked_scatter: its counterpart by index is what the peer writes where a row runs out of masks.
        filled = torch.full_like(trace.tokens, trace.model.mask_id)
        filled[masked] = proposal
        ranked = torch.full(masked.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
        ranked[masked] = confidence
        count = int(masked.sum() / len(masked) * share)
        tokens = trace.tokens
        if count:
            chosen = _positions(ranked, count, options.alg_temp)
            tokens = tokens.scatter(1, chosen, filled.gather(1, chosen))
        trace.commit(tokens)


def _origin(trace: Trace, options: Options, logits: Tensor, masked: Tensor, share: Tensor) -> Tensor:
    move = torch.rand(len(logits), device=logits.device) < share
    proposal = torch.full((len(logits),), trace.model.mask_id, device=logits.device)
    proposal[move] = _propose(logits[move], options)[0]
    return trace.tokens.masked_scatter(masked, proposal)


def _positions(ranked: Tensor, count: int, alg_temp: float) -> Tensor:
    """int64 [B, count] from confidences [B, T]."""
    if alg_temp == 0:
        return ranked.topk(count).indices
    return torch.multinomial((ranked / alg_temp).softmax(-1), count)


def _propose(logits: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """logits [N, V] -> tokens int64 [N] and confidences [N]."""
    if options.temperature > 0:
        logits = logits / options.temperature
    if options.top_p is not None:
        logits = _top_p(logits, options.top_p)
    if options.top_k is not None:
        kth = logits.topk(min(options.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, torch.finfo(logits.dtype).min)
    probs = logits.softmax(-1)
    confidence, tokens = probs.max(-1)
    if options.temperature > 0:
        try:
            tokens = Categorical(probs=probs, validate_args=True).sample()
            confidence = probs.gather(-1, tokens[:, None])[:, 0]
        except (ValueError, RuntimeError):
            pass
    if options.rule == "topk_margin":
        best = probs.sort(-1, descending=True).values
        confidence = best[:, 0] - best[:, 1]
    elif options.rule == "entropy":
        confidence = (probs * (probs + 1e-10).log()).sum(-1)
    return tokens, confidence


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    ranked, order = logits.sort(-1, descending=True)
    over = ranked.softmax(-1).cumsum(-1) > top_p
    drop = torch.zeros_like(over)
    drop[..., 1:] = over[..., :-1]
    return logits.masked_fill(drop.scatter(-1, order, drop), torch.finfo(logits.dtype).min)

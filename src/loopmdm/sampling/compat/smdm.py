"""SMDM's diff_sample (arXiv 2410.18514; ML-GSAI/SMDM eval/gen_model_answer.py).

t runs down linspace(1, 1e-5, steps + 1). "greddy" (their spelling; "greedy" here too) reveals the
int(masks * (1 - s / t)) most confident masks of the whole batch, all in the last step; confidence is the float64
softmax of the noiseless logits at the token. "origin" reveals each mask with chance 1 - s / t. Tokens: arg-max under
float64 Gumbel noise, drawn for masked (in "origin" for moving) rows only and also at temperature 0, where it has no
effect. The mask has an embedding and no logit, so its column is left out.

Reproduced, and what `generate` does without `compat`:
- Rows compete: an easy sequence is filled first, and a sequence depends on its neighbours. Ours counts in each row.
- The count is rounded down, so the last step reveals the most. Ours spreads the masks evenly.
- With guidance the unconditional half hides the whole prompt region by place, not by content. Ours hides the prompt's
  tokens.
- Equal confidences fall as `torch.topk` has it. Ours: to the lower position.
- All steps run, also once nothing is masked. Ours stops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .trace import Options, Trace, gumbel, pick, same_length

EPS = 1e-5


def sample(trace: Trace, options: Options) -> None:
    same_length(trace, "smdm")
    mask_id = trace.model.mask_id
    prompt = (torch.arange(trace.tokens.shape[1], device=trace.tokens.device) < trace.start).expand_as(trace.tokens)
    times = torch.linspace(1, EPS, options.steps + 1, device=trace.tokens.device)
    for step in range(options.steps):
        last = step == options.steps - 1
        share = torch.ones_like(times[0]) if last else 1 - times[step + 1] / times[step]
        masked = trace.masked
        logits = trace.guided(prompt, options.cfg_scale)[masked]
        vocabulary = torch.arange(logits.shape[-1], device=logits.device)
        vocabulary = vocabulary[vocabulary != mask_id]
        logits = logits[:, vocabulary]
        revealed = torch.full((len(logits),), mask_id, device=logits.device)
        if options.rule == "origin":
            move = torch.rand(len(logits), device=logits.device) < share
            revealed[move] = vocabulary[gumbel(logits[move], options.temperature).argmax(-1)]
        else:
            _greedy(logits, vocabulary, share, options.temperature, revealed)
        trace.commit(trace.tokens.masked_scatter(masked, revealed))


def _greedy(logits: Tensor, vocabulary: Tensor, share: Tensor, temperature: float, revealed: Tensor) -> None:
    """Write the most confident tokens of all masked rows [N, V] into revealed [N]."""
    proposal = gumbel(logits, temperature).argmax(-1)
    confidence = pick(logits.double(), proposal)
    best = confidence.topk(int(torch.tensor(len(logits), device=share.device) * share)).indices
    revealed[best] = vocabulary[proposal[best]]

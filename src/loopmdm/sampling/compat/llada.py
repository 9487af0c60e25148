"""LLaDA's generate (arXiv 2502.09992, algorithm 5; ML-GSAI/LLaDA generate.py, versions since June 2025).

Blocks from left to right; each has n masks and steps / blocks steps, of which a step reveals n // S, one more in the
first n % S. Tokens: arg-max of the logits under float64 Gumbel noise over the vocabulary at every position, none at
temperature 0. Order: "low_confidence", the softmax of the noiseless logits in their own dtype (float64 before June
2025) at the token; or "random", one uniform number a position. Positions behind the block never win.

Reproduced, and what `generate` does without `compat`:
- The mask id is not suppressed. Where it wins, the position counts as revealed and stays masked, for good in the last
  step of its block unless a later block takes it. Ours never proposes it.
- Padding (on the left) is attended to like text. Ours masks it.
- Masks in the prompt compete with the block's without being counted, so that masks are left over. Ours counts them.
- Equal confidences fall as `torch.topk` has it. Ours: to the lower position.
- All steps run, also once nothing is masked. Ours stops.

Not reproduced: the error of `cfg_scale > 0` without an attention mask (as nothing reads that mask, none is passed),
and the two switches that ban the end tokens by hard-coded ids.
"""

from __future__ import annotations

import torch

from ...errors import InputError
from .trace import Options, Trace, gumbel, pick


def sample(trace: Trace, options: Options) -> None:
    length = trace.tokens.shape[1] - trace.start
    block = length if options.block_length is None else options.block_length
    if length < 1:
        raise InputError("compat='llada' fills new tokens behind the prompt; max_new_tokens must be at least 1")
    if length % block:
        raise InputError(f"compat='llada' cuts the {length} new tokens into equal blocks; block_length is {block}")
    blocks = length // block
    if options.steps % blocks:
        raise InputError(f"compat='llada' gives each of {blocks} blocks as many steps; steps is {options.steps}")
    prompt = ~trace.masked
    for end in range(trace.start + block, trace.start + length + 1, block):
        _block(trace, options, prompt, end, block, options.steps // blocks)


def _block(trace: Trace, options: Options, prompt: torch.Tensor, end: int, block: int, steps: int) -> None:
    count = trace.masked[:, end - block : end].sum(-1)
    for step in range(steps):
        logits = trace.guided(prompt, options.cfg_scale)
        noisy = logits if options.temperature == 0 else gumbel(logits, options.temperature)
        proposal = noisy.argmax(-1)
        if options.rule == "random":
            confidence = torch.rand(proposal.shape, device=proposal.device)
        else:
            confidence = pick(logits, proposal)
        masked = trace.masked
        confidence = confidence.masked_fill(~masked, -torch.inf)
        confidence[:, end:] = -torch.inf
        take = torch.zeros_like(masked)
        for row, k in enumerate((count // steps + (step < count % steps)).tolist()):
            take[row, confidence[row].topk(k).indices] = True
        trace.commit(torch.where(take & masked, proposal, trace.tokens))

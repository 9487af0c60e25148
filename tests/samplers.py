"""What the tests of sampling share: a model full of ties, every policy, and the noise of tokens in plain Python."""

import math

import torch

from loopmdm.sampling.policies import (
    Ancestral,
    Confidence,
    Entropy,
    EntropyBound,
    Factor,
    FirstHitting,
    LeftToRight,
    Margin,
    Random,
    Threshold,
)
from loopmdm.sampling.remask import P2, ReMDM

REVEALING = {
    "ancestral": Ancestral(),
    "first_hitting": FirstHitting(),
    "random": Random(),
    "left_to_right": LeftToRight(),
    "confidence": Confidence(),
    "margin": Margin(),
    "entropy": Entropy(),
    "threshold": Threshold(0.3),
    "factor": Factor(1.6),
    "eb": EntropyBound(1.5),
}
REMASKING = {
    "cap": ReMDM("cap", 0.3),
    "rescale": ReMDM("rescale", 0.4),
    "conf": ReMDM("conf"),
    "loop": ReMDM("loop", 0.3, t_on=0.7, t_off=0.3, alpha_on=0.5),
    "p2": P2(),
    "p2_eta": P2(0.5),
}
EVERY = REVEALING | REMASKING
"""Every policy, with settings at which a dozen tokens show them at work."""


PATTERNS = torch.tensor(
    [
        [0, 1, 2, 0, 0, 1, 2, 0],
        [2, 0, 1, 2, 0, 0, 2, 1],
        [1, 2, 0, 1, 1, 0, 1, 2],
        [0, 0, 1, 2, 2, 2, 1, 0],
        [1, 1, 2, 0, 0, 0, 0, 2],
        [2, 2, 0, 1, 0, 2, 2, 1],
        [0, 2, 2, 0, 2, 1, 1, 0],
    ]
)
"""Rows of logits in units of 1.5. No two hold as many zeros, ones and twos, not even without ids 2 and 7: the scores of
two positions are equal to the last bit where their rows are the same, and else far apart."""


class Coarse:
    """A Denoiser whose logits depend on the whole sequence and are one of a few rows, so that positions tie often.

    An integer hash of the ids and of position mod 4 chooses the row, so that a batch changes nothing; the head is the
    identity in float64.
    """

    vocab_size, mask_id, pad_id, max_length, max_loops = 8, 7, 0, None, 1

    def __init__(self, logit_shift=0, suppressed=()):
        self.logit_shift, self.suppressed_ids, self.calls = logit_shift, (self.mask_id, *suppressed), []

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        self.calls.append((input_ids.clone(), attention_mask, num_loops, sigma))
        column = torch.arange(input_ids.shape[1])
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        whole = (input_ids * (2 * column + 3) * real).sum(-1, keepdim=True)
        row = whole * 5 + (column % 4) * (whole + 3) + input_ids * 2
        return PATTERNS[row % 11 % len(PATTERNS)].double() * 1.5

    def head(self):
        return torch.eye(self.vocab_size, dtype=torch.float64), None

    def forward_flops(self, length, num_loops):
        return 100.0 * length * num_loops


GROUP, TOKEN = 11, 12  # streams of the noise contract


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011) on Python integers: four words."""
    low = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & low, (first >> 32) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def gumbel(seed, step, position, index, stream):
    """The contract's Gumbel number, in float64."""
    word = philox((index // 4, position, step, stream), (seed & (2**32 - 1), seed >> 32 & (2**32 - 1)))[index % 4]
    u = min(max((word + 0.5) * 2.0**-32, 2.0**-33), 1 - 2.0**-24)
    return -math.log(-math.log1p(-u))


def drawn(logits, temperature, seed, step, position):
    """The token that a row of logits gives at that place: the group of 128 ids first, then the id inside it."""
    if temperature == 0:
        return logits.index(max(logits))
    groups = [logits[a : a + 128] for a in range(0, len(logits), 128)]

    def level(group):
        return math.log(math.fsum(math.exp((x - max(logits)) / temperature) for x in group) or 5e-324)

    best = max(range(len(groups)), key=lambda g: (level(groups[g]) + gumbel(seed, step, position, g, GROUP), -g))
    keys = [
        x / temperature + gumbel(seed, step, position, v, TOKEN) for v, x in enumerate(groups[best], start=128 * best)
    ]
    return 128 * best + keys.index(max(keys))

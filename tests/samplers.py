"""What the tests of sampling share: a model full of ties, and every policy."""

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


class Coarse:
    """A Denoiser whose logits depend on the whole sequence and are 0, 1.5 or 3, so that positions tie often.

    An integer hash of the ids and of position mod 4 makes them, so that a batch changes nothing; the head is the
    identity in float64.
    """

    vocab_size, mask_id, pad_id, max_length, max_loops = 8, 7, 0, None, 1

    def __init__(self, logit_shift=0, suppressed=()):
        self.logit_shift, self.suppressed_ids, self.calls = logit_shift, (self.mask_id, *suppressed), []

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        self.calls.append((input_ids.clone(), attention_mask, num_loops, sigma))
        column, v = torch.arange(input_ids.shape[1]), torch.arange(self.vocab_size)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        whole = (input_ids * (2 * column + 3) * real).sum(-1)[:, None, None]
        place = column[:, None] % 4
        there = input_ids[..., None] * 3 + v * (place + 1)
        return ((whole * (v + 1) + place * 5 + there * v) % 11 // 4).double() * 1.5

    def head(self):
        return torch.eye(self.vocab_size, dtype=torch.float64), None

    def forward_flops(self, length, num_loops):
        return 100.0 * length * num_loops

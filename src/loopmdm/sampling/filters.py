"""Tokens from logits: suppression, temperature, top-k, top-p in this order, then one draw; and how sure the model was.

The scores (`judge`) are of the distribution after suppression alone: a policy's confidence does not depend on the
temperature or the filters, as in LLaDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, number, whole
from ..model.denoiser import Denoiser
from .prompts import check_ids, listed
from .state import Score


@dataclass(frozen=True)
class Filters:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the arg-max, of equal logits the lowest id.
        top_k: keep the k largest logits, of equal ones the lower ids; None keeps all.
        top_p: keep the fewest tokens, by falling probability and of equal ones the lower ids first, whose
            probabilities after temperature and top-k sum to at least p, in float64; at least one. None or 1 keeps all.

    Raises:
        InputError: temperature below 0 or not finite, top_k below 1, top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        number("temperature", self.temperature)
        if self.top_k is not None:
            whole("top_k", self.top_k)
        p = self.top_p
        if p is not None and not (isinstance(p, (int, float)) and 0 < p <= 1):
            raise InputError(f"top_p is {p!r}; it must be in (0, 1], or None to keep all tokens")

    def draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """One token a row, int64 [N].

        Args:
            logits: [N, V] in fp32 or float64, suppressed ids at -inf.
            noise: [N] in (0, 1); not read at temperature 0.

        The cumulative distribution, in float64 and in the order of the ids, is inverted: the first id whose cumulative
        probability is > noise times the total.

        Raises:
            InputError: logits with a NaN or infinity, of which no distribution can be made.
        """
        best = logits.argmax(-1, keepdim=True)
        largest = logits.gather(-1, best)
        if not bool(largest.isfinite().all()):
            raise InputError("the model's logits are not finite; its weights may be damaged, or its dtype too narrow")
        if self.temperature == 0:
            return best[:, 0]
        assert noise is not None
        logits = logits.double()
        # the largest becomes 0 before it is divided: no temperature is too small
        logits = (logits - largest) / self.temperature
        cumulative = self.restrict(logits).softmax(-1).cumsum(-1)
        level = noise.double() * cumulative[:, -1]
        return torch.searchsorted(cumulative, level[:, None], right=True)[:, 0]

    def restrict(self, logits: Tensor) -> Tensor:
        """Tempered logits float64 [N, V] -> the same with what top-k and top-p leave out at -inf."""
        p = 1.0 if self.top_p is None else self.top_p
        if self.top_k is None and p == 1:
            return logits
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked[:, self.top_k :] = -math.inf
        if p < 1:
            mass = ranked.softmax(-1).cumsum(-1)
            ranked[:, 1:].masked_fill_(mass[:, :-1] >= p, -math.inf)
        return torch.empty_like(logits).scatter_(-1, order, ranked)


def judge(logits: Tensor, tokens: Tensor, score: Score) -> Tensor:
    """fp32 [N], the score of each row's distribution: logits [N, V], suppressed ids at -inf; tokens int64 [N].

    Computed in the logits' dtype (fp32, or float64 for a float64 model) and rounded to fp32, in which positions are
    compared.
    """
    if score == "confidence":
        picked = logits.gather(-1, tokens[:, None])[:, 0]
        return (picked - logits.logsumexp(-1)).exp().float()
    p = logits.softmax(-1)
    if score == "entropy":
        return torch.special.entr(p).sum(-1).float()
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    return (first - second).float()


def also_suppressed(model: Denoiser, suppress: Sequence[int]) -> tuple[int, ...]:
    """The ids to suppress beyond the model's own: the caller's, and the mask in any case.

    Raises:
        InputError: an id outside the vocabulary, or no id left.
    """
    suppress = listed("suppress", suppress)
    check_ids("suppress", suppress, model)
    if len({*suppress, *model.suppressed_ids, model.mask_id}) >= model.vocab_size:
        raise InputError(f"suppress leaves none of the {model.vocab_size} ids to choose from")
    return tuple(sorted({*suppress, model.mask_id} - set(model.suppressed_ids)))

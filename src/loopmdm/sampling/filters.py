"""How tokens are drawn: suppression, temperature, top-k, top-p in this order, then one draw (`ops.head_stats`).

Scores are of the distribution after suppression alone: a policy's confidence does not depend on the temperature or
the filters, as in LLaDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError, number, whole
from ..model.denoiser import Denoiser
from .prompts import check_ids, listed


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

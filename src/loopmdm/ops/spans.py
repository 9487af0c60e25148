"""Which keys each query may look at: padding and packed documents, both as contiguous ranges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class Spans(NamedTuple):
    """Query i of sequence b attends to the keys first[b, i] <= j < last[b, i]; none where first >= last.

    Attributes:
        first, last: [B, T], int32 or int64.
        cu_seqlens: int32 [N + 1], where each run of tokens with one range begins in the B T tokens laid end to end, and
            B T itself: what kernels for sequences of varying length read. `packed` fills it in.
        longest: tokens of the longest run.
    """

    first: Tensor
    last: Tensor
    cu_seqlens: Tensor | None = None
    longest: int = 0

    def to(self, device: torch.device) -> Spans:
        ends = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return Spans(self.first.to(device), self.last.to(device), ends, self.longest)


def spans_of(
    attention_mask: Tensor | None = None, document_ids: Tensor | None = None, *, check: bool = True
) -> Spans | None:
    """The ranges that padding and packed documents leave to each query.

    A token attends to the real tokens of its own document, a document being a run of equal ids (an id that comes
    back later in a row is another document). Padding attends to nothing.

    Args:
        attention_mask: bool or 0/1 [B, T], True on real tokens; padding may be left, right or between documents.
        document_ids: integer [B, T].
        check: look for holes in the mask, which on CUDA waits for the device. torch.compile leaves it out.

    Returns:
        int32 spans, None where neither is given (every token attends to every token).

    Raises:
        InputError: shapes that differ, or padding inside a document, which no range can leave out.
    """
    given = [t for t in (attention_mask, document_ids) if t is not None]
    if not given:
        return None
    if given[0].ndim != 2 or any(t.shape != given[0].shape for t in given):
        raise InputError(f"attention_mask and document_ids are {[list(t.shape) for t in given]}; they must be [B, T]")
    real = torch.ones_like(given[0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    documents = torch.zeros_like(given[0], dtype=torch.int64) if document_ids is None else document_ids
    tokens = real.shape[1]
    steps = torch.arange(tokens, device=real.device, dtype=torch.int32)
    starts = torch.ones_like(real)
    starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | (real[:, 1:] != real[:, :-1])
    ends = torch.ones_like(real)
    ends[:, :-1] = starts[:, 1:]
    first = _latest(torch.where(starts, steps, 0))
    last = tokens - _latest(torch.where(ends, tokens - 1 - steps, 0).flip(1)).flip(1)
    if check and not torch.compiler.is_compiling():
        _check_holes(real, documents, starts, steps)
    return Spans(first, torch.where(real, last, first))


def packed(spans: Spans | tuple[Tensor, Tensor]) -> Spans:
    """`spans` with cu_seqlens and longest, for impl "varlen" and "flash_attn". Waits for the device: once a pass.

    Raises:
        InputError: spans that are no partition into runs: a token lies in its own span, and all of that shares it.
    """
    first, last = spans[:2]
    batch, tokens = first.shape
    steps = torch.arange(tokens, device=first.device)
    starts = torch.ones_like(first, dtype=torch.bool)
    starts[:, 1:] = (first[:, 1:] != first[:, :-1]) | (last[:, 1:] != last[:, :-1])
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    wrong = (first < last) & ((starts & (first != steps)) | (ends & (last != steps + 1)))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise InputError(
            f"token {i} of sequence {b} may look at [{int(first[b, i])}, {int(last[b, i])}), which are not the tokens "
            "that share its span: only a partition into runs can be packed; use impl='triton' or 'torch'"
        )
    where = torch.cat((starts.flatten().nonzero().flatten(), steps.new_full((1,), batch * tokens)))
    longest = int(where.diff().max()) if len(where) > 1 else 0
    return Spans(first, last, where.to(torch.int32), longest)


def _latest(marks: Tensor) -> Tensor:
    return marks.cummax(1).values


def _check_holes(real: Tensor, documents: Tensor, starts: Tensor, steps: Tensor) -> None:
    if real.numel() == 0:
        return
    before = _latest(torch.where(real, steps, -1)).roll(1, 1)  # the latest real token before each
    before[:, 0] = -1
    same = documents.gather(1, before.clamp(min=0).long()) == documents
    hole = real & starts & (before >= 0) & same
    if hole.any():
        b, i = hole.nonzero()[0].tolist()
        raise InputError(
            f"attention_mask has a hole: sequence {b} is padding before token {i} and real before that; padding must "
            "be left or right of a sequence or document"
        )

"""What sampling, training losses and evaluation need from a model: the Denoiser protocol.

A denoiser predicts the clean token at each position of a partly masked sequence. Its last hidden
state and its vocabulary projection are separate, so that callers run the head only on the rows
that they need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


@runtime_checkable
class Denoiser(Protocol):
    """LoopMDM is one; adapters make one of any other masked diffusion LM.

    Attributes:
        mask_id: id of [MASK].
        pad_id: id that fills positions outside a sequence.
        vocab_size: number of ids, the mask included.
        max_length: longest sequence, in tokens; None is unbounded.
        suppressed_ids: ids never predicted (the mask among them).
        logit_shift: 0 if the token at i is read at i; 1 if it is read at i - 1 (Dream), and the first of a sequence
            or document at itself.
        max_loops: the S that training saw at most, used when none is given; 1 for an unlooped model.
        takes_depth: optional. True where `hidden` also takes an S a sequence or a `model.depth.Depth`.
        takes_rows: optional. True where `hidden` also takes `rows`, bool [B, T]: where its output will be read;
            elsewhere it may be anything.

    `hidden` may take `document_ids` too (`LoopMDM.forward`), for losses and bounds of packed rows.
    """

    mask_id: int
    pad_id: int
    vocab_size: int
    max_length: int | None
    suppressed_ids: tuple[int, ...]
    logit_shift: int
    max_loops: int

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | None = None,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> the head's input [B, T, D], after the final norm.

        num_loops is S, None for `max_loops`; with `takes_depth` also integers [B] or a `Depth`.
        """
        ...

    def head(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, D], bias [V] or None)."""
        ...

    def forward_flops(self, length: int, num_loops: float) -> float:
        """FLOPs of one forward pass of one sequence of `length` tokens, head included; S may be a mean."""
        ...


def check_mask(attention_mask: Tensor) -> None:
    """InputError for a floating mask: an additive one, 0 and -inf, would be read the wrong way round."""
    if attention_mask.is_floating_point():
        raise InputError(
            f"attention_mask is {attention_mask.dtype}; it must be bool or 0/1 integers, 1 on real tokens (of an "
            "additive mask: mask == 0)"
        )


def document_numbers(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """int64 [B, T], equal numbers for the tokens of a document, -1 at padding; None: one document a row, no padding."""
    if document_ids is None:
        return None if attention_mask is None else attention_mask.bool().long() - 1
    numbers = 2 * document_ids.long()  # doubled, so that no document has padding's number
    return numbers if attention_mask is None else torch.where(attention_mask.bool(), numbers, -1)


def starts(numbers: Tensor) -> Tensor:
    """int64 [B, T], the column at which the document of each position starts, from `document_numbers`."""
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.where(first, torch.arange(numbers.shape[1], device=numbers.device), 0).cummax(-1).values


def rows_at(denoiser: Denoiser, hidden: Tensor, rows: Tensor, numbers: Tensor | None = None) -> Tensor:
    """What the head reads for the chosen positions; with a shift the first token of a document is read at itself.

    Args:
        hidden: [B, T, D] from `denoiser.hidden`.
        rows: bool [B, T], N of them True.
        numbers: `document_numbers` of the batch.

    Returns:
        [N, D], in row-major order of `rows`.
    """
    if not denoiser.logit_shift:
        return hidden[rows]
    batch, position = rows.nonzero(as_tuple=True)
    least = torch.zeros_like(position) if numbers is None else starts(numbers)[batch, position]
    return hidden[batch, torch.maximum(position - denoiser.logit_shift, least)]


def read_at(denoiser: Denoiser, rows: Tensor) -> Tensor:
    """bool [B, T], the positions whose hidden states `rows_at` reads for `rows`, with one document a row and no
    padding before it."""
    if not denoiser.logit_shift:
        return rows
    s = denoiser.logit_shift
    read = torch.zeros_like(rows)
    read[:, : rows.shape[1] - s] = rows[:, s:]
    read[:, 0] |= rows[:, :s].any(-1)
    return read


def few(rows: Tensor | None) -> Tensor | None:
    """rows bool [B, T] -> int64 [B, R], each sequence's own before some others of it; None if R is near T."""
    if rows is None or not rows.numel():
        return None
    most = int(rows.sum(-1).max())
    return None if 4 * most > 3 * rows.shape[1] else (~rows).byte().argsort(dim=-1, stable=True)[:, :most]


def spread(hidden: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """hidden [B, R, D] at the positions rows int64 [B, R] -> [B, T, D], elsewhere 0."""
    out = hidden.new_zeros(hidden.shape[0], tokens, hidden.shape[2])
    return out.scatter(1, rows[..., None].expand_as(hidden), hidden)


def logits_at(denoiser: Denoiser, hidden: Tensor, rows: Tensor) -> Tensor:
    """Logits of the chosen positions only.

    Args:
        hidden: [B, T, D] from `denoiser.hidden`.
        rows: bool [B, T], N of them True.

    Returns:
        [N, V] in fp32 (float64 if hidden is), in row-major order of `rows`, suppressed ids at -inf (SUBS,
        arXiv 2406.07524).
    """
    return suppress(F.linear(rows_at(denoiser, hidden, rows), *denoiser.head()), denoiser.suppressed_ids)


def suppress(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """logits [..., V] -> the same in at least fp32 with the columns `ids` at -inf."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if ids:
        logits.index_fill_(-1, torch.tensor(ids, device=logits.device), float("-inf"))
    return logits


@contextlib.contextmanager
def evaluating(model: Denoiser) -> Iterator[None]:
    """Evaluation mode for a while; each module then returns to the mode it had.

    A model with a context manager `held()` is told so that its weights stay as they are meanwhile.
    """
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, torch.nn.Module) else []
    for module, _ in modes[:1]:
        module.eval()
    held = getattr(model, "held", contextlib.nullcontext)
    try:
        with held():
            yield
    finally:
        for module, mode in modes:  # parents first, so that a child's own mode has the last word
            module.train(mode)

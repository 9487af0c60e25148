"""Prompts as the caller gives them -> one right-padded batch; and where a finished sequence ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, integer, shown, whole
from ..model.denoiser import Denoiser

Prompt = Tensor | Sequence[int] | Sequence[Sequence[int]] | None


def arrange(
    model: Denoiser, prompt: Prompt, max_new_tokens: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, then masks, then padding: (tokens int64 [B, T], lengths int64 [B], prompt lengths int64 [B])."""
    whole("max_new_tokens", max_new_tokens, 0)
    if prompt is None:
        rows: list[list[int]] = [[] for _ in range(whole("batch_size", batch_size))]
    else:
        dims = getattr(prompt, "ndim", None)  # of a tensor or an array
        if dims not in (None, 1, 2):
            raise InputError(f"prompt is {list(prompt.shape)}; expected ids [T] or [B, T]")  # type: ignore[union-attr]
        data = listed("prompt", prompt)
        nested = [isinstance(r, (list, tuple)) for r in data]
        if any(nested) and not all(nested):
            raise InputError("the prompt mixes ids and sequences; pass one sequence of ids or a list of sequences")
        several = any(nested) or dims == 2
        rows = [listed("prompt", r) for r in data] if several else [data]
    if not rows:
        raise InputError("the batch is empty")
    for row in rows:
        check_ids("the prompt", row, model)
    prompt_lengths = torch.tensor([len(r) for r in rows], device=device)
    lengths = prompt_lengths + max_new_tokens
    longest = int(lengths.max())
    if model.max_length is not None and longest > model.max_length:
        raise InputError(
            f"a prompt of {longest - max_new_tokens} tokens with {max_new_tokens} new ones is longer than the "
            f"model's {model.max_length}"
        )
    fill = [model.mask_id] * max_new_tokens
    padded = [[*row, *fill, *[model.pad_id] * (longest - len(row) - max_new_tokens)] for row in rows]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device).view(len(rows), longest)
    return tokens, lengths, prompt_lengths


def listed(name: str, given: object) -> list[Any]:
    """A list, tensor or array as a list, of Python's numbers where it held tensors or NumPy's."""
    found = _plain(given)
    if not isinstance(found, Iterable):
        raise InputError(f"{name} is {shown(given)}; it must be a list")
    return [_plain(x) for x in found]


def _plain(given: Any) -> Any:
    return given.tolist() if hasattr(given, "tolist") else given


def check_ids(name: str, ids: Iterable[Any], model: Denoiser) -> None:
    for token in ids:
        if not isinstance(token, int) or not 0 <= token < model.vocab_size:
            raise InputError(f"{name} holds {token!r}; ids must be whole numbers in 0..{model.vocab_size - 1}")


class Ends:
    """Early stop: a sequence is over once an EOS is there and everything before it is filled.

    Only generated positions behind the last given token count, so that no given token is ever cut off.

    Args:
        eos: id, or ids, that end a sequence.
        model: its vocabulary; the mask ends nothing.
        generated: bool [B, T], positions that were masked before the first step.
        given: bool [B, T], the other real positions.
    """

    def __init__(self, eos: int | Sequence[int], model: Denoiser, generated: Tensor, given: Tensor) -> None:
        ids = listed("eos_id", [eos] if integer(eos) is not None else eos)
        check_ids("eos_id", ids, model)
        if model.mask_id in ids:
            raise InputError(f"eos_id is {model.mask_id}, the mask; it must be an id that the model can predict")
        self.ids = torch.tensor(ids, dtype=torch.int64, device=generated.device)
        self.column = torch.arange(generated.shape[1], device=generated.device)
        last_given = torch.where(given, self.column, -1).max(-1, keepdim=True).values
        self.tail = generated & (self.column > last_given)

    def lengths(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """int64 [B], tokens up to and with the EOS of each sequence that is over; -1 of the others."""
        T = tokens.shape[1]
        first = torch.where(self.tail & torch.isin(tokens, self.ids), self.column, T).min(-1, keepdim=True).values
        over = (first < T) & ~(masked & (self.column < first)).any(-1, keepdim=True)
        return torch.where(over, first + 1, -1)[:, 0]

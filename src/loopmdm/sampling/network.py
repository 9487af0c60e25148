"""The model as a denoising step needs it: the head's input at some rows, loops that may differ, guidance, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import check_loops
from ..errors import InputError
from ..model.denoiser import Denoiser, read_at, rows_at
from ..model.depth import Depth, ExitRule
from .generation import Generation

Loops = int | Callable[[Tensor], Tensor]
"""S, or a callable from shares of masked tokens, float64 [N], to int64 [N]."""


class Network:
    """The model with its loops and guidance; counts what it does into `result`."""

    def __init__(self, model: Denoiser, num_loops: Loops, early_exit: ExitRule | None, cfg_scale: float) -> None:
        self.model, self.num_loops, self.early_exit, self.cfg_scale = model, num_loops, early_exit, cfg_scale
        self.result: Generation

    def hidden(self, tokens: Tensor, real: Tensor, given: Tensor, share: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """The head's input [rows.sum(), D] at `rows` of a batch; its loops go into `self.visits`.

        Args:
            tokens, real, given, rows: [N, T]; share: of masked tokens, [N]; sigma: noise level [N].
        """
        S = self._loops(share)
        padding = None if bool(real.all()) else real
        if self.cfg_scale:
            tokens = torch.cat((tokens, tokens.masked_fill(given, self.model.mask_id)))
            padding = padding if padding is None else padding.repeat(2, 1)
            sigma, S = sigma.repeat(2), S.repeat(2) if isinstance(S, Tensor) else S
        read = read_at(self.model, rows).repeat(len(tokens) // len(rows), 1)
        hidden, self.visits = self._hidden(tokens, padding, S, sigma, read)
        if self.cfg_scale:
            conditional, blind = (rows_at(self.model, half, rows) for half in hidden.chunk(2))
            hidden = guided(conditional, blind, self.cfg_scale)
        else:
            hidden = rows_at(self.model, hidden, rows)
        self._count(tokens.shape[1], len(hidden))
        return hidden

    def _loops(self, share: Tensor) -> int | Tensor:
        if isinstance(self.num_loops, int):
            return self.num_loops
        S = self.num_loops(share)
        if not isinstance(S, Tensor) or S.dtype != torch.int64 or S.shape != share.shape:
            raise InputError(f"num_loops gave {S!r}; it must return int64 [{len(share)}], an S for each sequence")
        low, high = (check_loops(int(x)) for x in S.aminmax())
        return low if low == high else S.to(share.device)

    def _hidden(
        self, tokens: Tensor, padding: Tensor | None, S: int | Tensor, sigma: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(hidden states [N, T, D] of which `read` bool [N, T] matter, loops int64 [N])."""
        some: dict[str, Any] = {"rows": read} if getattr(self.model, "takes_rows", False) else {}
        if isinstance(S, int) and self.early_exit is None:
            hidden = self.model.hidden(tokens, padding, S, sigma, **some)
            return hidden, torch.full_like(tokens[:, 0], S)
        if getattr(self.model, "takes_depth", False):
            depth = Depth(num_loops=S, early_exit=self.early_exit)
            hidden = self.model.hidden(tokens, padding, depth, sigma, **some)  # type: ignore[arg-type]
            assert depth.visits is not None
            return hidden, depth.visits
        assert isinstance(S, Tensor)  # a model of one S a pass: one pass for each
        parts = [(s == S).nonzero()[:, 0] for s in S.unique()]
        done = [
            self.model.hidden(tokens[i], None if padding is None else padding[i], int(S[i[0]]), sigma[i]) for i in parts
        ]
        back = torch.cat(parts).argsort()
        return torch.cat(done)[back], S

    def _count(self, width: int, rows: int) -> None:
        self.result.nfe += 1
        self.result.head_rows += rows
        self.result.loops_per_step.append(float(self.visits.double().mean()))
        for S, n in zip(*(x.tolist() for x in self.visits.unique(return_counts=True)), strict=True):
            self.result.flops += n * self.model.forward_flops(width, S)


def guided(conditional: Tensor, blind: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance blind + (scale + 1) (conditional - blind), computed in at least fp32."""
    wide = torch.promote_types(conditional.dtype, torch.float32)
    u, c = blind.to(wide), conditional.to(wide)
    return (u + (scale + 1) * (c - u)).to(conditional.dtype)

"""What the peers' samplers share: the run being recorded, its model calls, and Gumbel noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...model.denoiser import Denoiser


@dataclass(frozen=True)
class Options:
    """Settings of one run, already checked against what the peer takes.

    Attributes:
        rule: the peer's own name for how positions are chosen.
        alg_temp: Dream's temperature over positions; 0 takes the best.
        top_p, top_k: Dream's filters; None is off.
        block_length: LLaDA's; None is one block.
        cfg_scale: w of unconditional + (w + 1) (conditional - unconditional); 0 is off.
    """

    steps: int
    temperature: float
    rule: str
    alg_temp: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    block_length: int | None = None
    cfg_scale: float = 0.0


@dataclass
class Trace:
    """One run: calls the model as a peer does (head at every position) and writes down what happened.

    Sequences are padded on the left, as the peers pad them, so the new tokens of all rows start in one column.

    Attributes:
        tokens: int64 [B, T], the present state.
        pad: int64 [B], padding of each row.
        start: first column of the new tokens.
        loops: S of every pass.
        revealed_at: int64 [B, T], the last step that put a token where a mask was; -1 where none did.
        on_step: called with (step, tokens, revealed bool), all [B, T] padded on the right.
        nfe, rows, head_rows: passes, sequences in them, and rows through the head.
    """

    model: Denoiser
    tokens: Tensor
    pad: Tensor
    start: int
    loops: int
    on_step: Callable[[int, Tensor, Tensor], None] | None = None
    revealed_at: Tensor = field(init=False)
    step: int = 0
    nfe: int = 0
    rows: int = 0
    head_rows: int = 0

    def __post_init__(self) -> None:
        self.tokens = shift(self.tokens, self.pad)
        self.revealed_at = torch.full_like(self.tokens, -1)

    @property
    def masked(self) -> Tensor:
        """bool [B, T]."""
        return self.tokens == self.model.mask_id

    def logits(self, sigma: Tensor | None = None, honour_padding: bool = False) -> Tensor:
        """One pass over the present state: [B, T, V] in the head's dtype, no id suppressed."""
        real = None
        if honour_padding and bool(self.pad.any()):
            real = torch.arange(self.tokens.shape[1], device=self.pad.device) >= self.pad[:, None]
        return self._run(self.tokens, real, sigma)

    def guided(self, prompt: Tensor, scale: float) -> Tensor:
        """Logits with classifier-free guidance, both halves in one pass; the plain ones at scale 0.

        Args:
            prompt: bool [B, T], what the unconditional half sees as masks.
        """
        if scale <= 0:
            return self.logits()
        both = torch.cat((self.tokens, self.tokens.masked_fill(prompt, self.model.mask_id)))
        conditional, unconditional = self._run(both, None, None).chunk(2)
        return unconditional + (scale + 1) * (conditional - unconditional)

    def _run(self, ids: Tensor, real: Tensor | None, sigma: Tensor | None) -> Tensor:
        hidden = self.model.hidden(ids, real, self.loops, sigma)
        self.nfe += 1
        self.rows += len(ids)
        self.head_rows += ids.numel()
        logits = F.linear(hidden, *self.model.head())
        if n := self.model.logit_shift:  # token i is read at i - n; the first tokens have no such place
            logits = torch.cat((logits[:, :1].expand(-1, n, -1), logits[:, :-n]), dim=1)
        return logits

    def commit(self, tokens: Tensor) -> None:
        """The state after this step: int64 [B, T]."""
        masked = tokens == self.model.mask_id
        revealed = self.masked & ~masked
        self.revealed_at = self.revealed_at.masked_fill(revealed, self.step).masked_fill(masked, -1)
        self.tokens = tokens
        if self.on_step is not None:
            self.on_step(self.step, shift(tokens, -self.pad), shift(revealed, -self.pad))
        self.step += 1


def shift(x: Tensor, by: Tensor) -> Tensor:
    """Each row of x [B, T] rotated right by its own `by` [B]."""
    T = x.shape[1]
    return x.gather(1, (torch.arange(T, device=x.device) - by[:, None]) % max(T, 1))


def gumbel(logits: Tensor, temperature: float) -> Tensor:
    """exp(logits) / (-log u)^temperature in float64, u uniform of the logits' shape; its arg-max is a sample.

    Above logits of 709 the exponential is infinite, and then the lowest such id wins.
    """
    logits = logits.double()
    return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def pick(logits: Tensor, ids: Tensor) -> Tensor:
    """Softmax of logits [..., V] in their own dtype, read at ids [...]."""
    return logits.softmax(-1).gather(-1, ids[..., None])[..., 0]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's generator as after `torch.manual_seed(seed)`, and outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def same_length(trace: Trace, name: str) -> None:
    """Refuse a padded batch."""
    if bool(trace.pad.any()):
        raise InputError(f"compat={name!r} takes sequences of one length, as its sampler does; sample them one by one")

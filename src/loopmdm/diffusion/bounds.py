"""Measuring: upper bounds of -log p(x) by Monte Carlo, where they come from in t, and the score of a long text.

    time   mean over t in [T_MIN, 1] of  w(t) sum_i 1[x_t^i = MASK] CE_i         what `nelbo` trains on
    count  mean over l in {1..L} of  L/l sum_i 1[i masked] CE_i, l of L masked   LLaDA, arXiv 2502.09992, eq. 6

Integrated over all alpha in (0, 1) both are the same number, the any-order bound; count has the smaller variance, since
a time leaves the number of masks to chance. What T_MIN and eps cut off "time": it is the mean over the interval, so
about the fraction T_MIN at each end counts as if it were like the rest. "count" cuts nothing off.

Masks are functions of (seed, sequence index, sample): the same for every model and every S, so differences pair.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import check_loops
from ..errors import InputError, whole
from ..model.denoiser import Denoiser
from ..model.depth import Depth
from .loss import T_MIN, check_interval, one_of
from .montecarlo import count_draw, measure, ratio, time_draw
from .schedule import Schedule, build_schedule


@dataclass(frozen=True)
class Difference:
    """Paired difference in nats a token, and its standard error; float64, a scalar or [len(S)]."""

    mean: Tensor
    error: Tensor


@dataclass(frozen=True)
class Likelihood:
    """Upper bounds of -log p of N sequences; `shape` below is [] for one S and [len(S)] for several.

    Attributes:
        loops: the S measured.
        per_sample: nats of whole sequences, float64 [*shape, N, samples].
        tokens: counted tokens, int64 [N].
        bound: "time" or "count".
        visits: visits of the looped block, float64 [*shape, N, samples]: S, unless an exit rule stopped earlier.
    """

    loops: tuple[int, ...]
    per_sample: Tensor
    tokens: Tensor
    bound: str
    visits: Tensor

    @property
    def nats(self) -> Tensor:
        """Bound of each sequence, nats, float64 [*shape, N]."""
        return self.per_sample.mean(-1)

    @property
    def nats_per_token(self) -> Tensor:
        """All nats over all tokens, float64 [*shape]."""
        return ratio(self.nats, self.tokens)[0]

    @property
    def error(self) -> Tensor:
        """Standard error of `nats_per_token` over the sequences, as if they were independent; inf for one sequence.

        Their times are spread evenly, so the truth is a little smaller.
        """
        return ratio(self.nats, self.tokens)[1]

    @property
    def bits(self) -> Tensor:
        """Bits a token, float64 [*shape]."""
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> Tensor:
        """exp of nats a token, float64 [*shape]."""
        return self.nats_per_token.exp()

    def at(self, num_loops: int) -> Likelihood:
        """The part measured at one S."""
        if num_loops not in self.loops:
            raise InputError(f"S = {num_loops} was not measured; there are {', '.join(map(str, self.loops))}")
        if self.per_sample.dim() == 2:
            return self
        i = self.loops.index(num_loops)
        return dataclasses.replace(self, loops=(num_loops,), per_sample=self.per_sample[i], visits=self.visits[i])

    def difference(self, other: Likelihood) -> Difference:
        """self - other in nats a token, sequence by sequence; under one seed masks agree, so errors are small.

        Raises:
            InputError: other sequences, another bound, or several S that do not match.
        """
        if not torch.equal(self.tokens, other.tokens):
            raise InputError("a difference needs the same sequences on both sides; their token counts disagree")
        if self.bound != other.bound:
            raise InputError(
                f"a difference of a {self.bound!r} and a {other.bound!r} bound would compare two estimators"
            )
        if len(self.loops) > 1 and len(other.loops) > 1 and len(self.loops) != len(other.loops):
            raise InputError(f"{len(self.loops)} and {len(other.loops)} loop counts do not pair; choose one with at()")
        return Difference(*ratio(self.nats - other.nats, self.tokens))


@dataclass(frozen=True)
class TimeProfile:
    """Where the NELBO comes from: N sequences, each bin of t, each S.

    Attributes:
        edges: of the bins, float64 [bins + 1].
        loops: the S measured.
        nats: mean over t in the bin of w(t) sum CE, nats of whole sequences, float64 [bins, len(S), N].
        tokens: counted tokens, int64 [N].
        masked: masked tokens seen, float64 [bins, N], the mean over samples.
        masked_nats: their plain cross-entropy, nats, float64 [bins, len(S), N], the mean over samples.
    """

    edges: Tensor
    loops: tuple[int, ...]
    nats: Tensor
    tokens: Tensor
    masked: Tensor
    masked_nats: Tensor

    @property
    def nats_per_token(self) -> Tensor:
        """NELBO given t in the bin, nats a token, float64 [bins, len(S)]. What a depth schedule is solved from."""
        return ratio(self.nats, self.tokens)[0]

    @property
    def error(self) -> Tensor:
        """Standard error of `nats_per_token` over the sequences."""
        return ratio(self.nats, self.tokens)[1]

    @property
    def share(self) -> Tensor:
        """Width of each bin over the width of all, float64 [bins]."""
        return self.edges.diff() / (self.edges[-1] - self.edges[0])

    @property
    def contribution(self) -> Tensor:
        """What each bin adds to the NELBO over the whole of `edges`, nats a token, float64 [bins, len(S)]."""
        return self.nats_per_token * self.share[:, None]

    @property
    def masked_ce(self) -> Tensor:
        """Cross-entropy of a masked token, nats, float64 [bins, len(S)]; NaN where a bin masked nothing."""
        return self.masked_nats.sum(-1) / self.masked.sum(-1)[:, None]


def likelihood(
    model: Denoiser,
    sequences: Tensor,
    *,
    num_loops: int | Sequence[int] | None = None,
    bound: str = "time",
    samples: int = 1,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    schedule: Schedule | str = "linear",
    t_range: tuple[float, float] = (T_MIN, 1.0),
    depth: Depth | None = None,
    document_ids: Tensor | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch: int = 64,
) -> Likelihood:
    """Upper bound of -log p of each sequence, in evaluation mode and without gradients.

    With `maskable` it bounds -log p(maskable tokens | the rest). A time-conditioned model reads sigma(t); under "count"
    the t whose alpha is the share of clean tokens.

    Args:
        model: any Denoiser.
        sequences: clean integer ids [N, T], on any device.
        num_loops: S, or several of them, all shown the same masks; None is `model.max_loops`.
        bound: "time" or "count", see above.
        samples: K masks a sequence. Their times are (v_i + j) / K, j = 0..K-1, with v_i spread evenly over sequences;
            counts are spread in the same way, so that K >= L visits every count floor(K / L) times or once more.
        attention_mask: bool [N, T], True on real tokens; maskable: bool [N, T], tokens that are counted; None is all.
        schedule: a `Schedule`, or the name of one; t_range: interval of t under "time".
        depth: how the looped block is visited (an exit rule, say), as in `nelbo`.
        document_ids: integers [N, T] of packed rows, for models that take them; a row is one sequence all the same.
        seed: of the masks.
        index: global numbers of the sequences, int64 [N] (default 0..N-1): give them to split an evaluation.
        batch: rows of a forward pass.

    Raises:
        InputError: no sequences, an unknown bound or schedule, S or K < 1, ids that the model cannot predict, a depth
            or document_ids that it does not take.
    """
    one_of("bound", bound, ("time", "count"))
    schedule, interval = build_schedule(schedule), check_interval("t_range", t_range)
    loops = _loops(model, num_loops)
    whole("samples", samples)
    if bound == "count":
        draw = count_draw(schedule, seed, samples)
    else:
        edges = torch.tensor(interval, dtype=torch.float64)
        draw = time_draw(schedule, seed, samples, edges)
    seen = measure(
        model,
        sequences,
        loops,
        samples,
        draw,
        attention_mask,
        maskable,
        document_ids=document_ids,
        depth=depth,
        index=index,
        batch=batch,
    )
    nats, visits = (x if isinstance(num_loops, Iterable) else x[0] for x in (seen.weighted, seen.visits))
    return Likelihood(loops, nats, seen.tokens, bound, visits)


def nelbo_by_time(
    model: Denoiser,
    sequences: Tensor,
    loops: Sequence[int],
    edges: Sequence[float] | Tensor,
    *,
    samples: int = 1,
    attention_mask: Tensor | None = None,
    maskable: Tensor | None = None,
    schedule: Schedule | str = "linear",
    document_ids: Tensor | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch: int = 64,
) -> TimeProfile:
    """The "time" bound in bins of t, each with `samples` times a sequence spread evenly over it.

    Args:
        edges: of the bins, at least two, rising, in (0, 1]; for example `torch.linspace(T_MIN, 1, 11)`.
        The others as in `likelihood`; every S sees the same masks.

    Raises:
        InputError: edges that do not rise or leave (0, 1], and what `likelihood` refuses.
    """
    try:
        bounds = torch.as_tensor(edges, dtype=torch.float64).cpu()
    except (TypeError, ValueError):
        raise InputError(f"edges are {edges!r}; they must be numbers") from None
    if bounds.dim() != 1 or len(bounds) < 2 or not bool((bounds.diff() > 0).all()):
        raise InputError(f"edges are {bounds.tolist()}; bins of t need at least two, rising")
    check_interval("the span of edges", (float(bounds[0]), float(bounds[-1])))
    whole("samples", samples)
    draw, bins = time_draw(build_schedule(schedule), seed, samples, bounds), len(bounds) - 1
    loops = _loops(model, loops)
    seen = measure(
        model,
        sequences,
        loops,
        bins * samples,
        draw,
        attention_mask,
        maskable,
        document_ids=document_ids,
        depth=None,
        index=index,
        batch=batch,
    )

    def by_bin(values: Tensor) -> Tensor:  # [..., N, bins * samples] -> [bins, ..., N]
        return values.unflatten(-1, (bins, samples)).mean(-1).movedim(-1, 0)

    nats, masked, masked_nats = (by_bin(x) for x in (seen.weighted, seen.masked, seen.plain))
    return TimeProfile(bounds, loops, nats, seen.tokens, masked, masked_nats)


def rolling(
    model: Denoiser,
    ids: Tensor,
    *,
    window: int | None = None,
    context: int = 0,
    num_loops: int | Sequence[int] | None = None,
    bound: str = "time",
    samples: int = 1,
    schedule: Schedule | str = "linear",
    seed: int = 0,
    batch: int = 64,
) -> Likelihood:
    """Likelihood of a text longer than the model: windows side by side, each token scored exactly once.

    A window after the first begins with the `context` last tokens of the one before, unmasked and not counted, so it
    scores window - context new tokens. The last window may be short; it is padded on the right.

    Args:
        ids: clean integer ids [n].
        window: tokens of a window; None is `model.max_length`, or the whole text if that is unbounded.
        context: tokens given from the previous window, fewer than `window`.
        The others as in `likelihood`.

    Returns:
        One entry a window: `nats` [*shape, windows], `tokens` [windows], whose sum is n.

    Raises:
        InputError: no tokens, ids that are not [n], a window below 1 or above `max_length`, a context that leaves no
            room, and what `likelihood` refuses.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or not len(ids):
        got = list(ids.shape) if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
        raise InputError(f"ids is {got}; a text is a vector of at least one token")
    limit = model.max_length
    size = whole("window", window) if window is not None else (limit or len(ids))
    if limit is not None and size > limit:
        raise InputError(f"window is {size}; it must be at least 1 and at most the model's max_length, {limit}")
    if whole("context", context, 0) >= size:
        raise InputError(f"context is {context}; it must be at least 0 and below the window of {size}")
    if len(ids) <= size:
        size, context = len(ids), 0
    rows, real, counted = _windows(ids, size, context, model.pad_id)
    return likelihood(
        model,
        rows,
        num_loops=num_loops,
        bound=bound,
        samples=samples,
        attention_mask=None if bool(real.all()) else real,
        maskable=counted,
        schedule=schedule,
        seed=seed,
        batch=batch,
    )


def _loops(model: Denoiser, num_loops: int | Sequence[int] | None) -> tuple[int, ...]:
    if num_loops is None:
        num_loops = model.max_loops
    loops = list(num_loops) if isinstance(num_loops, Iterable) else [num_loops]
    if not loops:
        raise InputError("num_loops is empty; give at least one S")
    return tuple(check_loops(S) for S in loops)


def _windows(ids: Tensor, window: int, context: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [W, window] of a text, which positions are real, and which are scored."""
    starts = torch.arange(0, len(ids) - context, window - context, device=ids.device)
    place = starts[:, None] + torch.arange(window, device=ids.device)
    real = place < len(ids)
    fresh = (torch.arange(window, device=ids.device) >= context) | (starts[:, None] == 0)
    rows = ids[place.clamp(max=len(ids) - 1)].masked_fill(~real, pad_id)
    return rows, real, real & fresh

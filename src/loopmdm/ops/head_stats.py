"""head_stats: a token for each row and how sure the model was of it, without logits in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, number, whole
from .contract import Op, extension, interpreting
from .noise import GROUP, TOKEN, exp24, gumbel, gumbel_rows, log_fp32

SPAN = 128  # vocabulary ids in a group of the hierarchical draw; part of the noise contract
MOST_TOP_K = 64  # up to here top_k needs no more than the logits of this many groups
CHUNK = 1 << 23  # logits that the reference, and top_p without top_k, hold at a time
LARGEST = torch.finfo(torch.float32).max
INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadStats(NamedTuple):
    """What is known of each row's distribution, before temperature, top-k and top-p. N rows.

    A row without any id to choose from (all suppressed, or NaN), or at or beyond `count`, has token -1 unless a token
    was given to judge, -inf in `logit`, `top`, `second` and `lse`, and 0 in `dot`.

    Attributes:
        token: int64 [N], drawn, or the one given to judge.
        logit: fp32 [N], the token's logit; -inf if it is suppressed.
        top, second: fp32 [N], the two largest logits (equal where they tie).
        lse: fp32 [N], log-sum-exp of the logits at temperature 1, suppressed ids left out.
        dot: fp32 [N], sum of probability * logit.
    """

    token: Tensor
    logit: Tensor
    top: Tensor
    second: Tensor
    lse: Tensor
    dot: Tensor

    @property
    def confidence(self) -> Tensor:
        """fp32 [N], probability of the token; 0 where there is none."""
        return torch.where(self.logit > -INF, (self.logit - self.lse).exp(), 0.0)

    @property
    def margin(self) -> Tensor:
        """fp32 [N], probability of the likeliest token less that of the second."""
        gap = (self.top - self.lse).exp() - (self.second - self.lse).exp()
        return torch.where(self.lse > -INF, gap, 0.0)

    @property
    def entropy(self) -> Tensor:
        """fp32 [N], in nats."""
        return torch.where(self.lse > -INF, self.lse - self.dot, 0.0)


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen: the keywords of `head_stats`, checked, its tensors of rows contiguous."""

    temperature: float
    seeds: Tensor | None
    steps: Tensor | None
    positions: Tensor | None
    suppressed: tuple[int, ...]
    top_k: int | None
    top_p: float | None
    tokens: Tensor | None
    count: Tensor | None

    @property
    def scale(self) -> float:
        """1 / temperature, in the range of fp32."""
        return min(1 / self.temperature, LARGEST) if self.temperature else 1.0

    @property
    def noise(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.seeds is not None and self.steps is not None and self.positions is not None
        return self.seeds, self.steps, self.positions

    def rows(self, part: slice) -> Draw:
        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[part]

        return replace(
            self,
            seeds=cut(self.seeds),
            steps=cut(self.steps),
            positions=cut(self.positions),
            tokens=cut(self.tokens),
            count=None,
        )


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
    steps: Tensor | int = 0,
    positions: Tensor | None = None,
    suppressed: Sequence[int] = (),
    top_k: int | None = None,
    top_p: float | None = None,
    tokens: Tensor | None = None,
    count: Tensor | None = None,
    impl: str = "auto",
) -> HeadStats:
    """Draw a token for each row of final hidden states and judge it: what a denoising step needs of the head.

    logits = hidden @ weight.T + bias in fp32, never whole in memory ("torch" holds `CHUNK` of them). A NaN logit counts
    as -inf, +inf as the largest fp32 number.

    At temperature 0 the token is the largest logit (ties: the lower id). Else it is drawn in two stages by the
    Gumbel-max trick: with l = (logit - largest) / temperature, a group of 128 consecutive ids has the level
    L_g = log sum exp l over it, argmax L_g + gumbel(seed, step, position, g, GROUP) is the group and
    argmax l_v + gumbel(seed, step, position, v, TOKEN) in it the token (`ops/noise.py`; ties: the lower number). That
    is an exact draw, a function of the row's logits, seed, step and position alone, from V / 128 + 128 random numbers.
    The exponentials in L_g are summed as integers, so given the same logits every implementation draws the same
    token.

    Args:
        hidden: final normed hidden states [N, D].
        weight: [V, D] in hidden's dtype; bias: [V] floating, None for 0.
        temperature: logits are divided by it (1 / temperature is rounded to fp32).
        seeds: int64 [N], one a row; steps: int64 [N] or one number; positions: int64 [N], counted from the sequence's
            first real token. The noise's names; seeds and positions are needed unless temperature is 0.
        suppressed: ids that are never chosen and have no probability.
        top_k: draw among the k likeliest, ties to the lower id. Up to 64 it costs a second look at k groups a row;
            beyond, and for `top_p` alone, all logits of some rows at a time are computed with torch.
        top_p: then among the fewest likeliest whose probability, in float64, reaches top_p.
        tokens: int64 [N]; where >= 0, this token is judged instead of drawing one.
        count: int64 scalar tensor; rows at or beyond it are ignored. Not read by the host on a GPU.
        impl: "auto", "torch", "cpp" (CPU) or "triton".

    Returns:
        `HeadStats`. Not differentiable.

    Raises:
        InputError: a shape, dtype or range that does not fit, or an `impl` that cannot run here.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or not weight.numel():
        raise InputError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; they must be [N, D] and [V, D], D and V "
            "at least 1"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise InputError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one to the other's floating dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias is {list(bias.shape)}; weight has {len(weight)} rows, so it must be [{len(weight)}]")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != hidden.device:
            raise InputError(f"hidden is on {hidden.device} and {name} on {t.device}; move them to one device")
    draw = _checked(hidden, len(weight), temperature, seeds, steps, positions, suppressed, top_k, top_p, tokens, count)
    with torch.no_grad():
        return _run(hidden, weight, bias, draw, impl)


def logit_stats(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
    steps: Tensor | int = 0,
    positions: Tensor | None = None,
    suppressed: Sequence[int] = (),
    top_k: int | None = None,
    top_p: float | None = None,
    tokens: Tensor | None = None,
    count: Tensor | None = None,
    impl: str = "auto",
) -> HeadStats:
    """`head_stats` of logits that are there already.

    Args:
        logits: [N, V], floating; read as fp32. Rows may have any stride, also 0.
        impl: as for `head_stats`; all of them choose the same tokens.
        The others: as for `head_stats`.

    Raises:
        InputError: as `head_stats`.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise InputError(f"logits is {list(logits.shape)} {logits.dtype}; it must be [N, V] of a floating dtype")
    draw = _checked(
        logits, logits.shape[1], temperature, seeds, steps, positions, suppressed, top_k, top_p, tokens, count
    )
    with torch.no_grad():
        return _run(logits, None, None, draw, impl)


def _checked(
    x: Tensor,
    vocab: int,
    temperature: float,
    seeds: Tensor | None,
    steps: Tensor | int,
    positions: Tensor | None,
    suppressed: Sequence[int],
    top_k: int | None,
    top_p: float | None,
    tokens: Tensor | None,
    count: Tensor | None,
) -> Draw:
    number("temperature", temperature)
    n = len(x)
    if not isinstance(steps, Tensor):
        whole("steps", steps, 0)
        steps = torch.full((n,), steps, dtype=torch.int64, device=x.device)
    if temperature and (seeds is None or positions is None):
        raise InputError("at a temperature above 0 tokens are drawn; give seeds and positions, int64 one a row")
    for name, t in (("seeds", seeds), ("steps", steps), ("positions", positions), ("tokens", tokens)):
        if t is not None and (t.shape != (n,) or t.dtype != torch.int64 or t.device != x.device):
            raise InputError(
                f"{name} is {list(t.shape)} {t.dtype} on {t.device}; it must be int64 [{n}] on {x.device}, one a row"
            )
    if count is not None and (count.numel() != 1 or count.dtype != torch.int64 or count.device != x.device):
        raise InputError(
            f"count is {list(count.shape)} {count.dtype} on {count.device}; it must be one int64 on {x.device}"
        )
    if tokens is not None and tokens.device.type == "cpu" and n and int(tokens.max()) >= vocab:
        raise InputError(f"tokens holds {int(tokens.max())}; ids go up to {vocab - 1}, and below 0 none is judged")
    if top_k is not None:
        whole("top_k", top_k)
    if top_p is not None and not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
        raise InputError(f"top_p is {top_p!r}; it must be in (0, 1], or None to keep all tokens")
    ids = tuple(sorted(set(suppressed)))
    if ids and not 0 <= ids[0] <= ids[-1] < vocab:
        raise InputError(f"suppressed holds {ids[0] if ids[0] < 0 else ids[-1]}; ids go from 0 to {vocab - 1}")
    if top_k is not None and top_k >= vocab:
        top_k = None
    top_p = None if top_p == 1 else top_p
    if not temperature:
        seeds = positions = top_k = top_p = None

    def dense(t: Tensor | None) -> Tensor | None:  # kernels read one number behind the other
        return None if t is None else t.contiguous()

    noise = dense(seeds), dense(steps), dense(positions)
    return Draw(float(temperature), *noise, ids, top_k, top_p, dense(tokens), count)


@functools.cache
def _mask(suppressed: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """bool [V], True where suppressed. Cached, so that a step copies nothing; for good, because a graph reads it."""
    mask = torch.empty(vocab, dtype=torch.bool, device="cpu").zero_()
    mask[list(suppressed)] = True
    return mask.to(device)


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, draw: Draw, impl: str) -> HeadStats:
    """x: hidden states, or logits where there is no weight."""
    vocab = x.shape[1] if weight is None else len(weight)
    dim = 0 if weight is None else x.shape[1]
    chosen = OP.choose(impl, x.device, x.dtype, lambda which: _refuses(which, x), rows=len(x), vocab=vocab, dim=dim)
    if chosen.impl == "torch" or not len(x) or _needs_all_logits(draw):
        return _reference(x, weight, bias, draw)
    if chosen.impl == "triton":
        return grouped(Triton(x, weight, bias, draw, chosen.config), draw)
    return grouped(Cpp(x, weight, bias, draw), draw)


def _needs_all_logits(draw: Draw) -> bool:
    return (draw.top_k or 0) > MOST_TOP_K or (draw.top_k is None and draw.top_p is not None)


def _refuses(impl: str, x: Tensor) -> str | None:
    if impl == "cpp" and x.dtype not in (torch.float32, torch.bfloat16):
        return f"{x.dtype} is not for the CPU; use float32 or bfloat16"
    if impl == "triton" and x.dtype not in DTYPES:
        return f"{x.dtype} is not for the kernel; use float32, bfloat16 or float16"
    return None


# The reference: logits whole, a chunk of rows at a time.


def _chunks(n: int, vocab: int) -> Iterator[slice]:
    rows = max(1, CHUNK // vocab)
    return (slice(i, i + rows) for i in range(0, n, rows))


def _reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, draw: Draw) -> HeadStats:
    vocab = x.shape[1] if weight is None else len(weight)
    wide = None if weight is None else weight.float()
    parts = []
    for part in _chunks(len(x), vocab):
        logits = x[part].float()
        if wide is not None:
            logits = logits @ wide.T
            if bias is not None:
                logits += bias.float()
        parts.append(_stats(logits, draw.rows(part)))
    if not parts:
        parts = [_stats(x.new_zeros((0, vocab), dtype=torch.float32), draw)]
    stats = HeadStats(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return stats if draw.count is None else _ignore(stats, draw.count, draw.tokens)


def _ignore(stats: HeadStats, count: Tensor, tokens: Tensor | None) -> HeadStats:
    """Rows at or beyond count as if every id were suppressed."""
    real = torch.arange(len(stats.token), device=count.device) < count.reshape(())
    blank = (-1 if tokens is None else tokens.clamp(min=-1), -INF, -INF, -INF, -INF, 0.0)
    return HeadStats(*(torch.where(real, column, value) for column, value in zip(stats, blank, strict=True)))


def _stats(logits: Tensor, draw: Draw) -> HeadStats:
    """logits fp32 [n, V]."""
    x = torch.where(logits.isnan(), -INF, logits).clamp(max=LARGEST)
    if draw.suppressed:
        x = x.masked_fill(_mask(draw.suppressed, x.shape[1], x.device), -INF)
    padded = torch.nn.functional.pad(x, (0, max(0, 2 - x.shape[1])), value=-INF)
    top, second = padded.topk(2, dim=-1).values.unbind(-1)
    alive = top > -INF
    lse = x.logsumexp(-1)
    p = torch.where(x > -INF, (x - lse[:, None]).exp(), 0.0)
    dot = torch.where(alive, (p * x.clamp(min=-LARGEST)).sum(-1), 0.0)
    token = draw_token(_restrict(x, top, draw), top, draw) if draw.temperature else x.argmax(-1)
    token = torch.where(alive, token, -1)
    if draw.tokens is not None:
        token = torch.where(draw.tokens >= 0, draw.tokens, token)
    logit = torch.where(token >= 0, x.gather(-1, token.clamp(min=0)[:, None])[:, 0], -INF)
    return HeadStats(token, logit, top, second, lse, dot)


def _restrict(x: Tensor, top: Tensor, draw: Draw) -> Tensor:
    """x with what top-k and top-p leave out at -inf."""
    if draw.top_k is None and draw.top_p is None:
        return x
    ranked, order = x.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(x).scatter_(-1, order, _restrict_ranked(ranked, top, draw))


def _restrict_ranked(ranked: Tensor, top: Tensor, draw: Draw) -> Tensor:
    """The same for logits [n, k] in falling order."""
    ranked = ranked.clone()
    if draw.top_k is not None:
        ranked[:, draw.top_k :] = -INF
    if draw.top_p is not None:
        mass = ((ranked.double() - top[:, None]) / draw.temperature).softmax(-1).cumsum(-1)
        ranked[:, 1:].masked_fill_(mass[:, :-1] >= draw.top_p, -INF)
    return ranked


def tempered(x: Tensor, top: Tensor, scale: float) -> Tensor:
    """(x - top) / temperature, where x is -inf too."""
    return torch.where(x > -INF, (x - top[:, None]) * scale, -INF)


def levels(x: Tensor, top: Tensor, scale: float) -> Tensor:
    """Log-sum-exps of groups, fp32 [n, ceil(V / 128)], from logits fp32 [n, V] and the largest of each row."""
    groups = -(-x.shape[1] // SPAN)
    x = torch.nn.functional.pad(x, (0, groups * SPAN - x.shape[1]), value=-INF).unflatten(-1, (groups, SPAN))
    best = x.max(-1).values
    t = torch.where(x > -INF, (x - best[..., None]) * scale, -INF)
    return level_of(best, counts(t).sum(-1), top, scale)


def counts(t: Tensor) -> Tensor:
    """2^24 exp(t) rounded to integers, int64: their sum does not depend on its order."""
    return (exp24(t) + 0.5).to(torch.int64)


def level_of(best: Tensor, total: Tensor, top: Tensor, scale: float) -> Tensor:
    """A group's log-sum-exp: `best` its largest logit, `total` the sum of 2^24 exp((logit - best) / temperature)."""
    level = (best - top[:, None]) * scale + log_fp32(total.to(torch.float32) * 2.0**-24)
    return torch.where(best > -INF, level, -INF)


def draw_group(level: Tensor, draw: Draw, noise: str = "torch") -> Tensor:
    """int64 [n], the group: level fp32 [n, G]. noise: implementation of the noise."""
    first = torch.zeros_like(draw.noise[0])
    return (level + gumbel_rows(*draw.noise, first, level.shape[1], GROUP, noise)).argmax(-1)


def draw_token(x: Tensor, top: Tensor, draw: Draw) -> Tensor:
    """int64 [n], a token for each row of logits fp32 [n, V]; any number where all are -inf."""
    first = draw_group(levels(x, top, draw.scale), draw) * SPAN
    ids = first[:, None] + torch.arange(SPAN, device=x.device)
    inside = torch.where(ids < x.shape[1], x.gather(-1, ids.clamp(max=x.shape[1] - 1)), -INF)
    return _inside_token(inside, top, first, draw)


def _inside_token(x: Tensor, top: Tensor, first: Tensor, draw: Draw, noise: str = "torch") -> Tensor:
    """int64 [n], the token: x fp32 [n, 128], the logits of the group that starts at id first."""
    return first + (tempered(x, top, draw.scale) + gumbel_rows(*draw.noise, first, SPAN, TOKEN, noise)).argmax(-1)


# Without logits: statistics of groups of 128, then the logits of one group a row again.


class Groups(NamedTuple):
    """Of each row and group, [n, G], with d = logit - the largest of the group.

    Attributes:
        best: fp32, the largest.
        total: int32 whose bits are an unsigned number, the sum of `counts(d)`.
        dot: fp32, the sum of 2^24 exp(d) d.
        tempered: as total, of d / temperature; None where that is 1.
    """

    best: Tensor
    total: Tensor
    dot: Tensor
    tempered: Tensor | None


class Cpp:
    """csrc/head_cpu.cpp on rows of one problem."""

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, draw: Draw) -> None:
        self.native = extension()
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.weight = None if weight is None else weight.contiguous()
        self.bias = None if bias is None else bias.float().contiguous()
        self.suppressed = torch.tensor(draw.suppressed, dtype=torch.int64)
        self.vocab = x.shape[1] if weight is None else len(weight)
        self.scale = draw.scale

    def head(self, part: slice) -> Any:
        x, at = self.x[part], [0 if t is None else t.data_ptr() for t in (self.weight, self.bias, self.suppressed)]
        return self.native.Head(
            x=x.data_ptr(),
            weight=at[0],
            bias=at[1],
            suppressed=at[2],
            rows=len(x),
            vocab=self.vocab,
            dim=x.shape[1],
            stride=x.stride(0),
            n_suppressed=len(self.suppressed),
            is_bf16=x.dtype == torch.bfloat16,
        )

    def groups(self, part: slice) -> Groups:
        return self._groups(part)[0]

    def _groups(self, part: slice) -> tuple[Groups, Tensor, Tensor]:
        """And each group's second largest logit, fp32, and the largest one's place in it, int32."""
        shape = (part.stop - part.start, -(-self.vocab // SPAN))
        best, dot, second = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(3))
        total, at = (torch.empty(shape, dtype=torch.int32, device="cpu") for _ in range(2))
        tempered = torch.empty_like(total) if self.scale != 1 else None
        where = (0 if t is None else t.data_ptr() for t in (best, total, dot, tempered, second, at))
        self.native.head_groups_cpu(self.head(part), self.scale, *where, torch.get_num_threads())
        return Groups(best, total, dot, tempered), second, at

    def inside(self, part: slice, group: Tensor) -> Tensor:
        """fp32 [n, m, 128], the logits of groups int64 [n, m]."""
        out = torch.empty(*group.shape, SPAN, dtype=torch.float32, device="cpu")
        group = group.contiguous()
        self.native.head_inside_cpu(
            self.head(part), group.data_ptr(), out.data_ptr(), group.shape[1], torch.get_num_threads()
        )
        return out

    def rows(self, part: slice, draw: Draw) -> HeadStats:
        """What `_of_groups` does without top-k, in one call."""
        stats, second, at = self._groups(part)
        token = torch.empty(len(stats.best), dtype=torch.int64, device="cpu")
        values = torch.empty(5, len(token), dtype=torch.float32, device="cpu")
        tempered = stats.total if stats.tempered is None else stats.tempered
        noise = draw.noise if draw.temperature else (None,) * 3
        given = (stats.best, stats.total, stats.dot, tempered, second, at, *noise, draw.tokens, token, values)
        where = (0 if t is None else t.data_ptr() for t in given)
        self.native.head_rows_cpu(self.head(part), self.scale, *where, torch.get_num_threads())
        return HeadStats(token, *values)


class Triton:
    """kernels/head_stats.py on rows of one problem."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, draw: Draw, config: Mapping[str, int]
    ) -> None:
        # what is multiplied is read a row behind the other, logits with any stride between rows
        self.x = x if weight is None and x.stride(1) == 1 else x.contiguous()
        self.vocab = x.shape[1] if weight is None else len(weight)
        self.scale, self.config, self.count = draw.scale, config, draw.count
        mask = _mask(draw.suppressed, self.vocab, x.device).view(torch.int8) if draw.suppressed else None
        self.head = (None if weight is None else weight.contiguous(), bias if bias is None else bias.contiguous(), mask)
        # Triton's interpreter has no bf16 product, so it multiplies in fp32 there
        self.compute = "float32" if interpreting() else str(x.dtype).removeprefix("torch.")

    def groups(self, part: slice) -> Groups:
        from ..kernels import head_stats as kernel

        x, count = self.x[part], self.count
        shape = (len(x), -(-self.vocab // SPAN))
        best, dot = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
        total, tempered = (torch.empty(shape, dtype=torch.int32, device=x.device) for _ in range(2))
        warm = tempered if self.scale != 1 else None
        count = None if count is None else count.reshape(1) - part.start
        with torch.cuda.device_of(x):
            kernel.groups(
                x, *self.head, count, self.vocab, self.scale, best, total, dot, warm, self.config, self.compute
            )
        return Groups(best, total, dot, warm)

    def inside(self, part: slice, group: Tensor) -> Tensor:
        """fp32 [n, m, 128], the logits of groups int64 [n, m]."""
        from ..kernels import head_stats as kernel

        out = torch.empty(*group.shape, SPAN, dtype=torch.float32, device=group.device)
        with torch.cuda.device_of(self.x):
            kernel.inside(self.x[part], *self.head, self.vocab, group.contiguous(), out)
        return out

    def rows(self, part: slice, draw: Draw) -> HeadStats:
        """What `_of_groups` does without top-k, in one kernel."""
        from ..kernels import head_stats as kernel

        x, stats = self.x[part], self.groups(part)
        token = torch.empty(len(x), dtype=torch.int64, device=x.device)
        values = torch.empty(5, len(x), dtype=torch.float32, device=x.device)
        tempered = stats.total if stats.tempered is None else stats.tempered
        noise = draw.noise if draw.temperature else None
        count = None if self.count is None else self.count.reshape(1) - part.start
        statistics = (stats.best, stats.total, stats.dot, tempered)
        with torch.cuda.device_of(x):
            kernel.rows(x, *self.head, count, self.vocab, self.scale, statistics, noise, draw.tokens, token, values)
        return HeadStats(token, *values)


def grouped(head: Cpp | Triton, draw: Draw) -> HeadStats:
    """HeadStats from groups' statistics, some rows at a time."""
    n, groups = len(head.x), -(-head.vocab // SPAN)
    if draw.count is not None and isinstance(head, Cpp):
        n = min(n, max(0, int(draw.count)))
    each = max(1, CHUNK // 16 // max(groups, SPAN * (draw.top_k or 0)))
    parts = [_of_groups(head, slice(i, min(i + each, n)), draw) for i in range(0, n, each)]
    stats = HeadStats(*(torch.cat(column) for column in zip(*parts, strict=True))) if parts else None
    if draw.count is None:
        assert stats is not None
        return stats
    rest = len(head.x) - n
    empty = (torch.int64, *[torch.float32] * 5)
    tails = [torch.empty(rest, dtype=dtype, device=head.x.device) for dtype in empty]
    if stats is None:
        return _ignore(HeadStats(*tails), draw.count, draw.tokens)
    return _ignore(HeadStats(*map(torch.cat, zip(stats, tails, strict=True))), draw.count, draw.tokens)


def _of_groups(head: Cpp | Triton, part: slice, draw: Draw) -> HeadStats:
    draw = draw.rows(part)
    if draw.top_k is None:
        return head.rows(part, draw)
    best, total, dot, _ = head.groups(part)
    top, likeliest = best.max(-1)
    alive = top > -INF
    share = (best - top[:, None]).nan_to_num(-1e3).clamp(min=-1e3)  # NaN: no logit in the row
    mass = share.exp() * 2.0**-24
    total = total.to(torch.int64) & 0xFFFFFFFF
    z = (mass * total).sum(-1)
    mean = top + (mass * (share * total + dot)).sum(-1) / z
    lse = torch.where(alive, top + z.log(), -INF)
    mean = torch.where(alive, mean, 0.0)

    logits = head.inside(part, likeliest[:, None])[:, 0]
    others = best.scatter(-1, likeliest[:, None], -INF).max(-1).values
    second = torch.maximum(others, logits.topk(2, dim=-1).values[:, 1])
    ids, values = _likeliest(head, part, best, draw.top_k)
    token = _draw_among(ids, _restrict_ranked(values, top, draw), top, draw)
    logits = head.inside(part, (token // SPAN)[:, None])[:, 0]
    token = torch.where(alive, token, -1)
    if draw.tokens is not None:
        token = torch.where(draw.tokens >= 0, draw.tokens, token)
        logits = head.inside(part, torch.where(token >= 0, token // SPAN, 0)[:, None])[:, 0]
    logit = logits.gather(-1, (token % SPAN)[:, None])[:, 0]
    return HeadStats(token, torch.where(token >= 0, logit, -INF), top, second, lse, mean)


def _likeliest(head: Cpp | Triton, part: slice, best: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest ids int64 [n, k] and their logits, falling, equal ones by rising id.

    They lie in the k groups of largest logit (of equal ones the lower): each group before a token's own holds
    a token that goes before it.
    """
    n, groups = best.shape
    group = _ranked(best, torch.arange(groups, device=best.device).expand(n, -1), min(k, groups))[0]
    ids = (group[..., None] * SPAN + torch.arange(SPAN, device=best.device)).flatten(1)
    return _ranked(head.inside(part, group).flatten(1), ids, k)


def _ranked(x: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids, values) of the k largest of x [n, m], ties to the lower id: topk of keys that are never equal."""
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    at = ((order << 32) + (0xFFFFFFFF - ids)).topk(k, dim=-1).indices
    return ids.gather(-1, at), x.gather(-1, at)


def _draw_among(ids: Tensor, x: Tensor, top: Tensor, draw: Draw) -> Tensor:
    """What `draw_token` draws from a row that is -inf but for logits x [n, k] at ids [n, k]."""
    seeds, steps, positions = (t[:, None] for t in draw.noise)
    group = ids // SPAN
    same = group[:, :, None] == group[:, None, :]
    best = torch.where(same, x[:, None, :], -INF).max(-1).values
    t = torch.where(x > -INF, (x - best) * draw.scale, -INF)
    total = torch.where(same, counts(t)[:, None, :], 0).sum(-1)
    key = level_of(best, total, top, draw.scale) + gumbel(seeds, steps, positions, group, GROUP)
    chosen = _lowest_best(key, group)
    key = tempered(x, top, draw.scale) + gumbel(seeds, steps, positions, ids, TOKEN)
    return _lowest_best(torch.where(group == chosen[:, None], key, -INF), ids)


def _lowest_best(key: Tensor, number: Tensor) -> Tensor:
    """The number [n, k] of the largest key, of equal ones the lowest."""
    return torch.where(key == key.max(-1, keepdim=True).values, number, 2**62).min(-1).values


def _example(device: torch.device, dtype: torch.dtype, rng: torch.Generator, **options: Any) -> dict[str, Any]:
    """A vocabulary that no tile divides, every kind of row."""
    n, dim, vocab = 37, 72, 1061
    made: dict[str, Any] = {
        "hidden": torch.randn(n, dim, generator=rng).to(device, dtype),
        "weight": (torch.randn(vocab, dim, generator=rng) / 4).to(device, dtype),
        "bias": torch.randn(vocab, generator=rng).to(device),
        "seeds": torch.randint(-(2**62), 2**62, (n,), generator=rng).to(device),
        "positions": torch.arange(n, device=device),
        "steps": 3,
        "suppressed": (5, 1060),
    }
    return made | options


def _with(**options: Any) -> Any:
    return functools.partial(_example, **options)


def _greedy(
    device: torch.device,
    dtype: torch.dtype,
    rng: torch.Generator,
    rows: int = 4096,
    vocab: int = 131072,
    dim: int = 2048,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """A step's masked rows, the likeliest token of each."""
    hidden = torch.randn(rows, dim, generator=rng).to(device, dtype)
    weight = (torch.randn(vocab, dim, generator=rng) * (4 / dim**0.5)).to(device, dtype)
    made: dict[str, Any] = {"hidden": hidden, "weight": weight, "suppressed": (vocab - 1,), "temperature": temperature}
    made["seeds"] = torch.randint(-(2**62), 2**62, (rows,), generator=rng).to(device)
    return made | {"positions": torch.arange(rows, device=device), "steps": 3}


def _drawn(device: torch.device, dtype: torch.dtype, rng: torch.Generator, **size: int) -> dict[str, Any]:
    """A token drawn for each."""
    return _greedy(device, dtype, rng, **size, temperature=1.0)


_SIZES = ((16, 4096, 256), (64, 4096, 256), (64, 32768, 256), (64, 32768, 768))

OP = Op(
    name="head_stats",
    call=head_stats,
    examples=(
        _with(),
        _with(temperature=1.0, bias=None),
        _with(temperature=0.7),
        _with(temperature=1.3, top_k=20),
        _with(temperature=0.9, top_k=50, top_p=0.8),
    ),
    impls=("torch", "cpp", "triton"),
    dtypes=DTYPES,
    refuses=lambda impl, hidden, **_: _refuses(impl, hidden),
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5},
    problems=(_greedy, _drawn),
    sizes={
        "cpu": tuple({"rows": rows, "vocab": vocab, "dim": dim} for rows, vocab, dim in _SIZES),
        "cuda": tuple(
            {"rows": rows, "vocab": vocab, "dim": 2048} for rows in (64, 1024, 4096) for vocab in (32768, 131072)
        ),
    },
)

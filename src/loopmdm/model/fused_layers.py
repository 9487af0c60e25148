"""Folded layers and the loop over them: what the plans of a model and of a looped block share.

    norm_linear        normalise, q|k|v, per-head norms, rotation      one launch each; the residual stream is written
    attention          over spans of keys                              twice a layer, in fp32, beside a copy in the
    linear_residual    project, add to the stream                      projections' dtype and the sums that the next
    norm_linear        normalise, up, activation                       norm needs
    linear_residual    project, add to the stream

Between two visits of the looped block nothing is launched (plain), since the last linear_residual has left all that the
next norm_linear reads, or one `loop_boundary` (anchored, or where an exit rule compares two visits). The
launches of a visit do not depend on S.

A layer norm backbone runs on a stream without its mean, which no layer norm sees (`fold`). An anchored boundary and
exit rules do see it: only then it is carried along, one number a token, and the anchored boundary is no longer one
launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.attention import attention, packs
from ..ops.contract import unavailable
from ..ops.linear_residual import linear_residual
from ..ops.loop_boundary import FUSED_MAX_DIM, loop_boundary
from ..ops.norm_linear import Heads, norm_linear
from ..ops.residual_norm import residual_norm
from ..ops.spans import Spans, packed
from .block import Block
from .depth import Depth, RelativeChange, apart, stops
from .fold import Folded, fold
from .loop import Anchored, LoopedBlock

if TYPE_CHECKING:
    from ..config import ModelConfig

L = TypeVar("L", bound="Layers")
P = ParamSpec("P")


class Stream(NamedTuple):
    """The residual stream in the forms it is read in.

    Attributes:
        x: [B, T, D]; squares: its `square_sums`.
        copy: x times the gain of the norm that reads it next, in the projections' dtype.
        mean: [B, T], what a centred stream lacks, where something needs it.
    """

    x: Tensor
    copy: Tensor
    squares: Tensor
    mean: Tensor | None = None

    def whole(self) -> Tensor:
        return self.x if self.mean is None else (self.x + self.mean[..., None]).to(self.x.dtype)


class Shared(NamedTuple):
    """What every layer of one pass shares: rotary tables [T, hd/2] or [B, T, hd/2], spans, an exit rule's positions."""

    rope: tuple[Tensor, Tensor] | None
    spans: Spans | None
    positions: Tensor | None

    def take(self, rows: Tensor, pack: bool) -> Shared:
        rope, spans = self.rope, self.spans
        if rope is not None and rope[0].dim() == 3:
            rope = (rope[0][rows], rope[1][rows])
        if spans is not None:
            spans = Spans(spans.first[rows], spans.last[rows])
            spans = packed(spans) if pack else spans
        return Shared(rope, spans, None if self.positions is None else self.positions[rows])


class Run(NamedTuple):
    """Consecutive layers; `looped` ones are visited S times, with an anchored boundary where gain and eps are given.

    `after`: gain of the first norm behind them, None for 1 or where no copy is read.
    """

    layers: list[Folded]
    looped: bool = False
    gain: Tensor | None = None
    eps: float | None = None
    after: Tensor | None = None

    @property
    def again(self) -> Tensor | None:
        """The same behind a visit that is not known to be the last; an anchored boundary makes its own copy."""
        return self.layers[0].attn_gain if self.eps is None else self.after

    def take(self, rows: Tensor) -> Run:
        """For some of the sequences, where there are vectors of each one's own."""
        layers, after = [f.take(rows) for f in self.layers], self.after
        return self._replace(layers=layers, after=after[rows] if after is not None and after.dim() == 2 else after)


def layers_why_not(config: ModelConfig, layers: Iterable[Block], blocks: Iterable[LoopedBlock]) -> str | None:
    """Why layers cannot run through the fused ops, or None; `blocks`: the looped blocks that they lie in."""
    if any(block.boundary is not None and type(block.boundary) is not Anchored for block in blocks):
        return "its loop boundary is a callable of your own"
    if config.qk_norm != "none" and config.norm_bias:
        return "its per-head norms have biases (qk_norm with norm_bias)"
    if config.qk_norm != "none" and (config.head_dim or 0) % 2:
        return f"its per-head norms are over an odd head_dim, {config.head_dim}"
    for layer in layers:
        if any(type(m) is not nn.Linear for m in (layer.attn.qkv, layer.attn.out, layer.mlp.up, layer.mlp.down)):
            return "a projection is no plain nn.Linear; merge adapters and undo quantisation first"
    return None


def check_inference(depth: Depth) -> None:
    """Refuse what only a backward pass has a use for."""
    if depth.every or depth.checkpoint or depth.backprop_loops is not None:
        raise InputError("every, backprop_loops and checkpoint are for training; use them with the model itself")


class Layers:
    """Folded layers and how a stream passes through them.

    Args:
        weight: any of the layers': where they lie, and their dtype.
        dtype, impl, attention_impl: as those of `Fused`.

    Raises:
        InputError: a dtype that is none.
    """

    def __init__(
        self,
        config: ModelConfig,
        weight: Tensor,
        dtype: torch.dtype | None,
        impl: str,
        attention_impl: str | None,
    ) -> None:
        self.config, self.impl = config, impl
        self.attention_impl = attention_impl or ("auto" if impl == "cublas" else impl)
        self.norm_impl, self._weight = impl, weight
        if impl == "cublas":
            wide = config.hidden_size > FUSED_MAX_DIM
            self.norm_impl = "torch" if wide or unavailable("triton", weight.device) else "triton"
        self.dtype = dtype or weight.dtype
        if not self.dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}; it must be floating point")

    def _fold(self, part: nn.Module, cond: Tensor | None) -> Run:
        paired = self.config.rope_layout == "half" and self.config.positions in ("rope", "both")
        folded = [fold(layer, cond, self.dtype, paired) for layer in blocks_of(part)]
        if not isinstance(part, LoopedBlock):
            return Run(folded)
        if part.boundary is None:
            return Run(folded, True)
        assert isinstance(part.boundary, Anchored)
        return Run(folded, True, part.boundary.weight.detach().clone(), part.boundary.eps)

    def _centre(self, x: Tensor, gain: Tensor | None, keep: bool) -> Stream:
        """Open a stream with x for a norm of that gain.

        In a layer norm backbone it is without its mean; `keep` the mean beside it.
        """
        mean = None
        if self.config.norm == "layernorm":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = wide.mean(-1, keepdim=True)
            x = (wide - mean).to(x.dtype)
        return self._open(x, gain, mean[..., 0] if keep and mean is not None else None)

    def _open(self, x: Tensor, gain: Tensor | None, mean: Tensor | None) -> Stream:
        """x with a copy for a norm of that gain."""
        return Stream(*loop_boundary(x, copy_gain=gain, dtype=self.dtype, impl=self.norm_impl)[:3], mean)

    def _visit(self, run: Run, stream: Stream, shared: Shared, after: Tensor | None) -> Stream:
        """Once through a run's layers; `after` is the gain of the norm that comes next."""
        c = self.config
        H, G, hd = c.num_attention_heads, c.num_key_value_heads or 0, c.head_dim or 0
        cos, sin = (None, None) if shared.rope is None else (t.flatten(0, -2) for t in shared.rope)
        for f, behind in zip(run.layers, (*(f.attn_gain for f in run.layers[1:]), after), strict=True):
            heads = None
            if cos is not None or f.q_gain is not None:
                heads = Heads(H, G, hd, cos, sin, f.q_gain, f.k_gain, c.qk_norm == "before_rope")
            qkv = norm_linear(
                stream.copy, stream.squares, f.qkv, f.qkv_bias, eps=c.norm_eps, heads=heads, impl=self.impl
            )
            y = attention(qkv.unflatten(-1, (-1, hd)), H, G, shared.spans, impl=self.attention_impl)
            stream = self._add(y, f.out, f.out_bias, f.out_gate, stream, f.mlp_gain, f.out_mean, f.out_shift)
            h = norm_linear(
                stream.copy, stream.squares, f.up, f.up_bias, eps=c.norm_eps, act=c.hidden_act, impl=self.impl
            )
            stream = self._add(h, f.down, f.down_bias, f.down_gate, stream, behind, f.down_mean, f.down_shift)
        return stream

    def _add(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        stream: Stream,
        gain: Tensor | None,
        mean: Tensor | None,
        shift: Tensor | None,
    ) -> Stream:
        after = less = None
        if mean is not None and shift is not None and (stream.mean is not None or gate is not None):
            added = (h @ mean[..., None])[..., 0] + shift[:, None]
            less = None if gate is None else added
            after = None if stream.mean is None else stream.mean + added
        out = linear_residual(h, weight, bias, stream.x, gate=gate, less=less, copy_gain=gain, impl=self.impl)
        return Stream(*out, after)

    def _packs(self, batch: int, tokens: int) -> bool:
        """Whether attention wants its spans packed."""
        weight, head_dim = self._weight, self.config.head_dim or 0
        return packs(self.attention_impl, weight.device, self.dtype, head_dim=head_dim, tokens=tokens, batch=batch)

    def _loop(self, run: Run, stream: Stream, shared: Shared, loops: int | Tensor, depth: Depth) -> Stream:
        """All visits of a looped run; `depth.visits` is filled in."""
        walk = _Walk(self, run, stream, shared, depth)
        if isinstance(loops, Tensor):
            parts, visits = apart(walk, loops)
            depth.visits = visits.to(stream.x.device)
            return Stream(*parts)  # type: ignore[arg-type]
        for k in range(1, loops + 1):
            walk.visit(k, last=k == loops)
        depth.visits = torch.full((len(stream.x),), loops, device=stream.x.device)
        return walk.stream


class _Walk:
    """The sequences of one pass that are still in a looped run; a `depth.Walk`.

    stream is where they are after a visit, and opened, if there is one, where the next begins.
    """

    def __init__(self, plan: Layers, run: Run, stream: Stream, shared: Shared, depth: Depth) -> None:
        self.plan, self.run, self.shared, self.rule = plan, run, shared, depth.early_exit
        self.stream = self.previous = stream
        self.start = None if run.eps is None else stream
        self.opened: Stream | None = None

    def visit(self, k: int, last: bool = False) -> None:
        if self.rule is not None:
            self.previous = self.stream
        opened, self.opened = self.opened, None
        if opened is None:
            opened = self._boundary(None)[0] if k > 1 else self.stream
        self.stream = self.plan._visit(self.run, opened, self.shared, self.run.after if last else self.run.again)

    def stops(self, k: int) -> Tensor | None:
        rule = self.rule
        if rule is None:
            return None
        if type(rule) is not RelativeChange:
            return stops(rule, self.previous.whole(), self.stream.whole(), k, self.shared.positions)
        if rule.tau == 0 or k < rule.min_loops:
            return None
        self.opened, sums = self._boundary(self.previous)
        if self.shared.positions is not None:
            sums = sums.masked_fill(~self.shared.positions[..., None], 0.0)
        change, size = sums.sum(1).sqrt().unbind(-1)
        return rule.small(change, size).cpu()

    def keep(self, rows: Tensor) -> None:
        rows = rows.to(self.stream.x.device)
        pack = self.shared.spans is not None and self.shared.spans.cu_seqlens is not None
        self.shared = self.shared.take(rows, pack)
        self.run, self.stream = self.run.take(rows), _take(self.stream, rows)
        self.opened = None if self.opened is None else _take(self.opened, rows)
        self.start = None if self.start is None else _take(self.start, rows)

    def output(self, rows: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.stream if rows is None else _take(self.stream, rows.to(self.stream.x.device))

    def _boundary(self, previous: Stream | None) -> tuple[Stream, Tensor]:
        """Where the next visit begins; with `previous` also each token's sums of (h - previous)² and h², [N, T, 2]."""
        plan, run, s, start = self.plan, self.run, self.stream, self.start
        if start is None and previous is None:
            return s, s.squares
        before = None if previous is None else previous.x
        if start is not None and s.mean is None:
            eps = run.eps or 0.0
            first = run.layers[0].attn_gain
            out = loop_boundary(
                s.x, start.x, run.gain, before, copy_gain=first, eps=eps, dtype=plan.dtype, impl=plan.norm_impl
            )
            return Stream(out.out, out.copy, out.squares), out.change
        sums = s.squares if before is None else loop_boundary(s.x, previous=before, impl=plan.norm_impl).change
        if previous is not None and previous.mean is not None and s.mean is not None:
            means = torch.stack((s.mean - previous.mean, s.mean), dim=-1)
            sums = sums + plan.config.hidden_size * means.square()  # the stream's mean is orthogonal to the rest of it
        if start is None:
            return s, sums
        x = residual_norm(s.whole(), start.whole(), run.gain, kind="rmsnorm", eps=run.eps or 0.0, impl=plan.norm_impl)[
            1
        ]
        return plan._centre(x, run.layers[0].attn_gain, True), sums


def inference(run: Callable[Concatenate[L, P], Tensor]) -> Callable[Concatenate[L, P], Tensor]:
    """A pass of a plan: no gradients, and no autocast, which would give its ops dtypes that do not fit together."""

    @functools.wraps(run)
    def passed(plan: L, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.no_grad(), torch.autocast(plan._weight.device.type, enabled=False):
            return run(plan, *args, **kwargs)

    return passed


def _take(stream: Stream, rows: Tensor) -> Stream:
    x = stream.x[rows]
    copy = x if stream.copy is stream.x else stream.copy[rows]
    return Stream(x, copy, stream.squares[rows], None if stream.mean is None else stream.mean[rows])


def blocks_of(part: nn.Module) -> list[Block]:
    return list(part.layers) if isinstance(part, LoopedBlock) else [part]  # type: ignore[arg-type, list-item]

"""A LoopMDM for inference through the fused ops: five launches a layer, weights folded once.

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

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.attention import PACKING, attention
from ..ops.linear_residual import linear_residual
from ..ops.loop_boundary import loop_boundary
from ..ops.norm_linear import Heads, norm_linear
from ..ops.residual_norm import residual_norm
from ..ops.spans import Spans, packed, spans_of
from .block import Block
from .depth import Depth, RelativeChange, apart, planned, stops
from .fold import Folded, fold
from .loop import Anchored, LoopedBlock

if TYPE_CHECKING:
    from .lm import LoopMDM


class Stream(NamedTuple):
    """The residual stream in the forms it is read in.

    Attributes:
        x: [B, T, D]; copy: the same in the projections' dtype; squares: its `square_sums`.
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
    """Consecutive layers; `looped` ones are visited S times, with an anchored boundary where gain and eps are given."""

    layers: list[Folded]
    looped: bool = False
    gain: Tensor | None = None
    eps: float | None = None


def why_not(model: LoopMDM) -> str | None:
    """Why a model cannot run through the fused ops, or None."""
    config = model.config
    if config.time_conditioning:
        return "it is conditioned on time, so modulation differs from sequence to sequence and cannot be folded"
    if any(block.boundary is not None and type(block.boundary) is not Anchored for block in model.looped_blocks):
        return "its loop boundary is a callable of your own"
    if config.qk_norm != "none" and config.norm_bias:
        return "its per-head norms have biases (qk_norm with norm_bias)"
    if config.qk_norm != "none" and (config.head_dim or 0) % 2:
        return f"its per-head norms are over an odd head_dim, {config.head_dim}"
    for layer in model.layers:
        if any(type(m) is not nn.Linear for m in (layer.attn.qkv, layer.attn.out, layer.mlp.up, layer.mlp.down)):
            return "a projection is no plain nn.Linear; merge adapters and undo quantisation first"
    return None


class Fused:
    """A `Denoiser` that holds a model's folded weights and gives its hidden states, without gradients.

    It is the model as it was when this was made: weights are folded here, once, and never looked at again. After the
    weights changed (a training step, an average copied in) make a new one. Embeddings and head are the model's own
    tensors; the rest takes about as much memory again as the model's layers. Dropout is off.

    Results are the model's up to rounding, padding included (0). In 16 bits rotation, modulation and biases are applied
    in fp32, and so is the residual stream if the model has `residual_in_fp32`. Folded weights are rounded to `dtype`,
    the same way at every visit: fold fp32 weights where there are any. Weights that were 16-bit before are rounded a
    second time, which at large S can exceed the model's own error.

    For GPUs: on a CPU the model itself is faster.

    Args:
        model: any but what `why_not` names.
        dtype: of the projections' operands; the layers' by default. Hidden states have the head's dtype.
        impl: of every op: "auto", "torch" or "triton" (dtype bfloat16, float16 or float32).
        attention_impl: any name that `ops.attention` takes, instead of `impl`.

    Raises:
        InputError: a model that cannot be fused, a dtype that is none.
    """

    takes_depth = True

    def __init__(
        self,
        model: LoopMDM,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        attention_impl: str | None = None,
    ) -> None:
        reason = why_not(model)
        if reason is not None:
            raise InputError(f"this model cannot be fused: {reason}")
        self.config, self.impl, self.attention_impl = model.config, impl, attention_impl or impl
        self.dtype = dtype or model.layers[0].mlp.up.weight.dtype
        if not self.dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}; it must be floating point")
        self.mask_id, self.pad_id, self.vocab_size = model.mask_id, model.pad_id, model.vocab_size
        self.max_length, self.suppressed_ids, self.logit_shift = (
            model.max_length,
            model.suppressed_ids,
            model.logit_shift,
        )
        self.max_loops, self._model = model.max_loops, model
        with torch.no_grad():
            cond = model._condition(None, model.embed.weight.device)
            self._runs = [self._fold(part, cond) for part in model._parts()]
            self._final_gain, self._final_bias = _final(model, cond)

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | Tensor | Depth | None = None,
        sigma: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] -> the head's input [B, T, D] in its dtype; arguments as those of `LoopMDM.forward`.

        sigma is not read. A `Depth` may hold an S, one a sequence, and an exit rule; a change within rounding of tau
        may stop a sequence in one of model and plan and not in the other. On CUDA, padding and documents make this wait
        for the device to be checked; while a graph is captured they are not.

        Raises:
            InputError: as the model, and: a mask with holes in a sequence or document, a document that comes back
                later in its row, what only training has a use for (`every`, `backprop_loops`, `checkpoint`).
        """
        self._model._check(input_ids, attention_mask, document_ids)
        loops, depth = planned(num_loops, self.max_loops, len(input_ids))
        self._model._check_depth(depth)
        if depth.every or depth.checkpoint or depth.backprop_loops is not None:
            raise InputError("every, backprop_loops and checkpoint are for training; use them with the model itself")
        spans, positions = self._spans(input_ids, attention_mask, document_ids)
        watched = self._model._watched(depth, input_ids, attention_mask)
        shared = Shared(self._model._rope(positions), spans, watched)
        stream = self._enter(input_ids, positions, depth.early_exit is not None)
        for run in self._runs:
            if not run.looped:
                stream = self._visit(run, stream, shared)
                continue
            walk = _Walk(self, run, stream, shared, depth)
            if isinstance(loops, Tensor):
                parts, visits = apart(walk, loops)
                stream, depth.visits = Stream(*parts), visits.to(input_ids.device)  # type: ignore[arg-type]
            else:
                for k in range(1, loops + 1):
                    walk.visit(k)
                stream = walk.stream
        if isinstance(num_loops, Depth):
            num_loops.visits, num_loops.outputs = depth.visits, []
            if isinstance(loops, int):
                num_loops.visits = torch.full((len(input_ids),), loops, device=input_ids.device)
        weight = self._model.lm_head.weight
        gain, bias, norm = self._final_gain, self._final_bias, self._model.final_norm
        h = residual_norm(
            stream.x, None, gain, bias, kind=norm.kind, eps=norm.eps, out_dtype=weight.dtype, impl=self.impl
        )[1]
        return h if attention_mask is None else h * attention_mask.to(h.dtype)[..., None]

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._model.head()

    def forward_flops(self, length: int, num_loops: float) -> float:
        return self._model.forward_flops(length, num_loops)

    def _fold(self, part: nn.Module, cond: Tensor | None) -> Run:
        paired = self.config.rope_layout == "half" and self.config.positions in ("rope", "both")
        layers: Iterable[Block] = part.layers if isinstance(part, LoopedBlock) else [part]  # type: ignore[assignment, list-item]
        folded = [fold(layer, cond, self.dtype, paired) for layer in layers]
        if not isinstance(part, LoopedBlock):
            return Run(folded)
        if part.boundary is None:
            return Run(folded, True)
        assert isinstance(part.boundary, Anchored)
        return Run(folded, True, part.boundary.weight.detach().clone(), part.boundary.eps)

    def _spans(
        self, ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> tuple[Spans | None, Tensor]:
        """Spans, and positions [T] or [B, T]: how far a token is from the start of its span."""
        check = not (ids.is_cuda and torch.cuda.is_current_stream_capturing())
        spans = spans_of(attention_mask, document_ids, check=check)
        steps = torch.arange(ids.shape[1], device=ids.device)
        if spans is None:
            return None, steps
        if document_ids is not None and check:
            _check_documents(document_ids, attention_mask)
        return packed(spans) if self.attention_impl in PACKING else spans, steps - spans.first

    def _enter(self, ids: Tensor, positions: Tensor, exits: bool) -> Stream:
        x = self._model.embed(ids)
        if self.config.positions in ("learned", "both"):
            x = x + self._model.position_embed(positions)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = exits or any(run.eps is not None for run in self._runs)
        return self._centre(x if self.config.residual_in_fp32 else x.to(self.dtype), keep)

    def _centre(self, x: Tensor, keep: bool) -> Stream:
        """Open a stream with x, without its mean in a layer norm backbone; `keep` the mean beside it."""
        mean = None
        if self.config.norm == "layernorm":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = wide.mean(-1, keepdim=True)
            x = (wide - mean).to(x.dtype)
        return Stream(
            *loop_boundary(x, dtype=self.dtype, impl=self.impl)[:3],
            mean[..., 0] if keep and mean is not None else None,
        )

    def _visit(self, run: Run, stream: Stream, shared: Shared) -> Stream:
        """Once through a run's layers."""
        c = self.config
        H, G, hd = c.num_attention_heads, c.num_key_value_heads or 0, c.head_dim or 0
        cos, sin = (None, None) if shared.rope is None else (t.flatten(0, -2) for t in shared.rope)
        for f in run.layers:
            heads = None
            if cos is not None or f.q_gain is not None:
                heads = Heads(H, G, hd, cos, sin, f.q_gain, f.k_gain, c.qk_norm == "before_rope")
            qkv = norm_linear(
                stream.copy, stream.squares, f.qkv, f.qkv_bias, eps=c.norm_eps, heads=heads, impl=self.impl
            )
            y = attention(qkv.unflatten(-1, (-1, hd)), H, G, shared.spans, impl=self.attention_impl)
            stream = self._add(y, f.out, f.out_bias, stream, f.out_mean, f.out_shift)
            h = norm_linear(
                stream.copy, stream.squares, f.up, f.up_bias, eps=c.norm_eps, act=c.hidden_act, impl=self.impl
            )
            stream = self._add(h, f.down, f.down_bias, stream, f.down_mean, f.down_shift)
        return stream

    def _add(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream, mean: Tensor | None, shift: Tensor | None
    ) -> Stream:
        added = None
        if stream.mean is not None and mean is not None and shift is not None:
            added = stream.mean + F.linear(h, mean)[..., 0] + shift
        return Stream(*linear_residual(h, weight, bias, stream.x, impl=self.impl), added)


class _Walk:
    """The sequences of one pass that are still in a looped run; a `depth.Walk`.

    stream is where they are after a visit, and opened, if there is one, where the next begins.
    """

    def __init__(self, plan: Fused, run: Run, stream: Stream, shared: Shared, depth: Depth) -> None:
        self.plan, self.run, self.shared, self.rule = plan, run, shared, depth.early_exit
        self.stream = self.previous = stream
        self.start = None if run.eps is None else stream
        self.opened: Stream | None = None

    def visit(self, k: int) -> None:
        if self.rule is not None:
            self.previous = self.stream
        opened, self.opened = self.opened, None
        if opened is None:
            opened = self._boundary(None)[0] if k > 1 else self.stream
        self.stream = self.plan._visit(self.run, opened, self.shared)

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
        self.shared = self.shared.take(rows, self.plan.attention_impl in PACKING)
        self.stream = _take(self.stream, rows)
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
            out = loop_boundary(s.x, start.x, run.gain, before, eps=eps, dtype=plan.dtype, impl=plan.impl)
            return Stream(out.out, out.copy, out.squares), out.change
        sums = s.squares if before is None else loop_boundary(s.x, previous=before, impl=plan.impl).change
        if previous is not None and previous.mean is not None and s.mean is not None:
            means = torch.stack((s.mean - previous.mean, s.mean), dim=-1)
            sums = sums + plan.config.hidden_size * means.square()  # the stream's mean is orthogonal to the rest of it
        if start is None:
            return s, sums
        x = residual_norm(s.whole(), start.whole(), run.gain, kind="rmsnorm", eps=run.eps or 0.0, impl=plan.impl)[1]
        return plan._centre(x, True), sums


def _take(stream: Stream, rows: Tensor) -> Stream:
    x = stream.x[rows]
    copy = x if stream.copy is stream.x else stream.copy[rows]
    return Stream(x, copy, stream.squares[rows], None if stream.mean is None else stream.mean[rows])


def _final(model: LoopMDM, cond: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gain and bias of the final norm with its modulation in them."""
    norm = model.final_norm
    gain, bias = (None if p is None else p.detach().clone() for p in (norm.weight, norm.bias))
    if cond is None:
        return gain, bias
    shift, scale = model.final_modulation(cond)[0].to(torch.promote_types(cond.dtype, torch.float32)).chunk(2)
    gain = 1 + scale if gain is None else gain * (1 + scale)
    return gain, shift if bias is None else bias * (1 + scale) + shift


def _check_documents(documents: Tensor, attention_mask: Tensor | None) -> None:
    """Documents are runs: an id that comes back would be attended to by the model, and not here."""
    if not documents.numel():
        return
    real = torch.ones_like(documents, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    one = torch.where(real, 2 * documents.long(), -1)  # doubled, so that no document has padding's id
    runs = real[:, 0] + ((one[:, 1:] != one[:, :-1]) & real[:, 1:]).sum(1)
    ordered = one.sort(dim=1).values
    ids = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1) - (~real).any(1).long()
    if bool((runs != ids).any()):
        row = int((runs != ids).nonzero()[0])
        raise InputError(f"document_ids: an id comes back later in row {row}; a document is one run of equal ids")

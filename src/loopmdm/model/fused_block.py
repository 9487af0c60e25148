"""A looped block by itself through the fused ops: `LoopedBlock.forward` without gradients, five launches a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.spans import Spans, packed
from .block import Context
from .depth import Depth, planned
from .fused_layers import Layers, Shared, check_inference, inference, layers_why_not
from .loop import LoopedBlock


class FusedBlock(Layers):
    """A looped block with its weights folded, called as the block is.

    Weights are folded here, once; after they changed make a new one (`fused.Fused` says what are copies). No launch
    depends on S, so no S compiles anything anew, and a sequence that has left the batch takes no part in any. Results
    are the block's up to rounding. Dropout is off, and so is autocast: `dtype` takes its place.

    Args:
        block: one whose boundary is plain or `Anchored`, with plain `nn.Linear` projections.
        dtype: of the projections' operands; the layers' by default.
        impl, attention_impl: as those of `fused.Fused`.
        cond: [1, C], the conditioning that is folded in; zeros by default, as the block's own.

    Raises:
        InputError: a block that cannot be fused, a dtype that is none, a cond of another shape.
    """

    def __init__(
        self,
        block: LoopedBlock,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        attention_impl: str | None = None,
        cond: Tensor | None = None,
    ) -> None:
        config = block.config
        reason = layers_why_not(config, block.layers, [block])  # type: ignore[arg-type]
        if reason is not None:
            raise InputError(f"this looped block cannot be fused: {reason}")
        super().__init__(config, block.layers[0].mlp.up.weight, dtype, impl, attention_impl)  # type: ignore[union-attr, arg-type]
        if cond is not None and (config.modulation != "adaln" or cond.shape != (1, config.cond_dim)):
            raise InputError(
                f"cond is {list(cond.shape)}; it must be [1, {config.cond_dim}] for modulation 'adaln' and None without"
            )
        self._context = block._default_context
        with torch.no_grad():
            if config.modulation == "adaln" and cond is None:
                cond = block._default_context(self._weight.new_empty(1, 1, config.hidden_size)).cond
            self._run = self._fold(block, cond)

    @inference
    def __call__(
        self,
        x: Tensor,
        num_loops: int | Tensor | Depth | None = None,
        context: Context | None = None,
        spans: Spans | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D] in x's dtype.

        Args:
            num_loops: as in `LoopedBlock.forward`; a `Depth` may hold an S, one a sequence, and an exit rule.
            context: rotary table, and the positions that an exit rule looks at; None is positions 0..T-1. Its mask and
                cond must be None.
            spans: the keys of each query (`ops.spans.spans_of` makes them of padding and documents); None is all.
                Attention adds nothing to a query without a key, where the block lets padding look at real tokens.

        Raises:
            InputError: as the block, and a context with a mask or cond.
        """
        if context is not None and context.mask is not None:
            raise InputError("a fused looped block takes spans, not a mask; make them with ops.spans.spans_of")
        if context is not None and context.cond is not None:
            raise InputError("the conditioning of a fused looped block is folded in; give it to LoopedBlock.fused")
        loops, depth = planned(num_loops, self.config.loop.max_loops, len(x))
        check_inference(depth)
        context = self._context(x) if context is None else context
        ranges = None if spans is None else Spans(*spans)
        if ranges is not None and ranges.cu_seqlens is None and self._packs(*x.shape[:2]):
            ranges = packed(ranges)
        shared = Shared(context.rope, ranges, context.positions)
        stream = self._centre(x, self._run.layers[0].attn_gain, keep=True)
        stream = self._loop(self._run, stream, shared, loops, depth)
        if isinstance(num_loops, Depth):
            num_loops.visits, num_loops.outputs = depth.visits, []
        return stream.whole()

"""A copy of a model for inference: projections in another dtype and in the layout of the processor's product."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import native
from ..ops.layer import Around, Form, PackedLayer, Visit, through
from ..ops.linear import Packing, Panels, linear, pack, plain, room, unhooked
from .block import MLP, Attention, Block, Context, Norm

M = TypeVar("M", bound=nn.Module)
PACKED = "this model's weights are packed for inference; use the model that it was made from"


class Packed(nn.Linear):
    """An nn.Linear whose numbers are in `packed` alone; `weight` is a meta tensor that only tells shape and dtype.

    Raises:
        InputError: where it would be saved, loaded, copied, moved or cast, or needs a gradient.
    """

    packed: Packing

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, packed=self.packed)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(PACKED)

    __getstate__ = _save_to_state_dict = _load_from_state_dict = _apply = _refuse


class Recast(Generic[M]):
    """A copy of a module in which some nn.Linear compute in `dtype`; every other tensor is the same object.

    On a CPU with a product that takes weights in a layout of its own (`ops.linear.pack`) the projections that nothing
    was added to become `Packed`.

    Attributes:
        copy: the copy; for inference.

    Args:
        projections: what computes in `dtype`, packed where possible, each with the number of weights that lie side by
            side in it (gate and up: 2).
        unpacked: further ones, whose numbers someone else reads.
        dtype: None keeps each one's.
    """

    def __init__(
        self,
        model: M,
        projections: Iterable[tuple[nn.Linear, int]],
        unpacked: Iterable[nn.Linear] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        packs: list[tuple[Tensor, int, nn.Linear]] = []
        rooms: list[int] = []
        for module, parts in projections:
            sample = pack(module.weight[:1].to(dtype)) if plain(module) else None
            packable, ours = sample is not None, isinstance(sample, Panels)
            for p in module.parameters(recurse=False):
                meta = packable and p is module.weight
                memo[id(p)] = self._twin(p, dtype, meta)
            if packable:
                packs.append((module.weight, parts, module))
                rooms.append(room(module.weight, parts) if ours else 0)
        for module in unpacked:
            for p in module.parameters(recurse=False):
                memo[id(p)] = self._twin(p, dtype)
        self.copy: M = copy.deepcopy(model, memo)
        self._packs = [(weight, parts, memo[id(module)]) for weight, parts, module in packs]
        for *_, twin in self._packs:
            twin.__class__ = Packed
        together = native.on_huge_pages(torch.empty(sum(rooms), dtype=torch.int32))
        self._rooms = together.split(rooms)
        self.refresh()

    def _twin(self, p: Tensor, dtype: torch.dtype | None, meta: bool = False) -> nn.Parameter:
        twin = torch.empty_like(p, dtype=dtype, device="meta" if meta else None)
        native.on_huge_pages(twin)
        if not meta:
            self._pairs.append((p, twin))
        return nn.Parameter(twin, requires_grad=False)

    def refresh(self) -> None:
        """Read the model's present weights once more."""
        with torch.no_grad():
            for theirs, mine in self._pairs:
                mine.copy_(theirs)
            for (theirs, parts, module), words in zip(self._packs, self._rooms, strict=True):
                weight, before = theirs.to(module.weight.dtype), getattr(module, "packed", None)  # type: ignore[attr-defined]
                if isinstance(before, Panels):  # a `PackedLayer` knows where they lie
                    before.fill(weight)
                else:
                    module.packed = pack(weight, parts=parts, words=words)  # type: ignore[attr-defined]


class PackedBlock(Block):
    """A `Block` of `Packed` projections: several of them compute in one call what they can (`ops.layer`)."""

    whole: PackedLayer

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        visit = self._visit(context)
        out = None if visit is None else _through([visit], x, context, rows)
        return super().forward(x, context, rows) if out is None else out

    @staticmethod
    def together(layers: Sequence[nn.Module], x: Tensor, context: Context, rows: Tensor | None) -> Tensor | None:
        """The layers one after the other; None where they must be called."""
        found: dict[int, Visit | None] = {}
        for layer in layers:
            if id(layer) not in found:
                found[id(layer)] = layer._visit(context) if isinstance(layer, PackedBlock) and unhooked(layer) else None
        visits = [found[id(layer)] for layer in layers]
        return None if None in visits else _through(visits, x, context, rows)  # type: ignore[arg-type]

    def _visit(self, context: Context) -> Visit | None:
        attn, mlp, a, m, cond = self.attn, self.mlp, self.attn_norm, self.mlp_norm, context.cond
        kinds = ((attn, Attention), (mlp, MLP), (a, Norm), (m, Norm))
        if (self.dropout and self.training) or not all([type(p) is kind and unhooked(p) for p, kind in kinds]):
            return None
        around = Around(a.weight, a.bias, None, m.weight, m.bias, None)
        if self.modulation is not None:
            if cond is None or len(cond) > 1 or not plain(self.modulation):
                return None
            around = around.modulated(self.modulation(cond)[0].chunk(6))
        return Visit(self.whole, (attn.qkv, attn.out, mlp.up, mlp.down), around)


def _through(visits: Sequence[Visit], x: Tensor, context: Context, rows: Tensor | None) -> Tensor | None:
    query_rope, query_mask = context.queries(rows)
    return through(visits, x, context.rope, context.mask, query_rope=query_rope, query_mask=query_mask, rows=rows)


def at_once(blocks: Iterable[Block]) -> None:
    """Let the blocks of a packed model whose projections allow it be `PackedBlock`s."""
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        if attn.qk_order != "none":
            continue
        form = Form(
            attn.heads,
            attn.groups,
            attn.head_dim,
            mlp.act,
            block.attn_norm.kind,
            block.attn_norm.eps,
            attn.layout,
            attn.rope_dtype,
        )
        made = PackedLayer.of_modules(form, (attn.qkv,), attn.out, (mlp.up,), mlp.down)
        if made is not None:
            block.__class__, block.whole = PackedBlock, made  # type: ignore[assignment]

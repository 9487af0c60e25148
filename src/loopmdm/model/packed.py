"""A copy of a model for inference: projections in another dtype and in the layout of the processor's product."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.linear import linear, pack, plain

M = TypeVar("M", bound=nn.Module)
PACKED = "this model's weights are packed for inference; use the model that it was made from"


class Packed(nn.Linear):
    """An nn.Linear whose numbers are in `packed` alone; `weight` is a meta tensor that only tells shape and dtype.

    Raises:
        InputError: where it would be saved, loaded, copied, moved or cast, or needs a gradient.
    """

    packed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, packed=self.packed)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(PACKED)

    __getstate__ = _save_to_state_dict = _load_from_state_dict = _apply = _refuse


class Recast(Generic[M]):
    """A copy of a module in which some nn.Linear compute in `dtype`; every other tensor is the same object.

    On a CPU whose product takes weights in a layout of its own (`ops.linear.pack`) the projections that nothing was
    added to become `Packed`.

    Attributes:
        copy: the copy; for inference.

    Args:
        projections: what computes in `dtype`, packed where possible.
        unpacked: further ones, whose numbers someone else reads.
        dtype: None keeps each one's.
    """

    def __init__(
        self,
        model: M,
        projections: Iterable[nn.Linear],
        unpacked: Iterable[nn.Linear] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        packs: list[tuple[Tensor, nn.Linear]] = []
        for module in projections:
            packable = plain(module) and pack(module.weight[:1].to(dtype)) is not None
            for p in module.parameters(recurse=False):
                meta = packable and p is module.weight
                memo[id(p)] = self._twin(p, dtype, meta)
            if packable:
                packs.append((module.weight, module))
        for module in unpacked:
            for p in module.parameters(recurse=False):
                memo[id(p)] = self._twin(p, dtype)
        self.copy: M = copy.deepcopy(model, memo)
        self._packs = [(weight, memo[id(module)]) for weight, module in packs]
        for _, twin in self._packs:
            twin.__class__ = Packed
        self.refresh()

    def _twin(self, p: Tensor, dtype: torch.dtype | None, meta: bool = False) -> nn.Parameter:
        twin = torch.empty_like(p, dtype=dtype, device="meta" if meta else None)
        if not meta:
            self._pairs.append((p, twin))
        return nn.Parameter(twin, requires_grad=False)

    def refresh(self) -> None:
        """Read the model's present weights once more."""
        with torch.no_grad():
            for theirs, mine in self._pairs:
                mine.copy_(theirs)
            for theirs, module in self._packs:
                module.packed = pack(theirs.to(module.weight.dtype))  # type: ignore[attr-defined]

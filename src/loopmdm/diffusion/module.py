"""The loss as a module: what DistributedDataParallel and fully_shard can wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .loss import NELBO, nelbo


class NELBOLoss(nn.Module):
    """`nelbo` (or `sft`) as a forward pass, so that the hooks by which gradients and shards are exchanged see it.

        loss = DistributedDataParallel(NELBOLoss(model))               # or fully_shard(NELBOLoss(model))
        loss(tokens, index=index, global_batch=B, step=step).loss.backward()

    Where S = 1 may be drawn, DDP needs `find_unused_parameters=True` for an anchored boundary, which one visit does not
    use. Layers may be sharded one by one, each before the whole.

    Args:
        model: an nn.Module that is a `Denoiser`, kept as `model`; its parameters are this module's.
        function: `nelbo`, or what takes the same first two arguments (`sft`).
    """

    def __init__(self, model: nn.Module, function: Callable[..., NELBO] = nelbo) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, tokens: Tensor, *args: Any, **options: Any) -> NELBO:
        """The function's result for the model, tokens [B, T] and its options, of this process's sequences."""
        return self.function(self.model, tokens, *args, **options)

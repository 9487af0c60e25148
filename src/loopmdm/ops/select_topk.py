"""select_topk: which positions of a row are revealed next, by rank and with ties decided."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .contract import Op

_NAN, _INELIGIBLE = -(2**31) + 1, -(2**31)


def select_topk(keys: Tensor, eligible: Tensor, k: Tensor, *, impl: str = "auto") -> Tensor:
    """Pick, in every row, the `k` eligible positions with the largest key.

    The ranking step of every unmasking policy (MaskGIT, Chang et al. 2022, section 3.2; LLaDA, Nie et
    al. 2025, low-confidence remasking), written so that all implementations agree bit for bit. The
    order is total: larger keys first; NaN below -inf; -0.0 equal to +0.0; equal keys by lower index.
    NaN and -inf are still eligible, so they are picked when `k` asks for that many.

    Args:
        keys: [B, T] float32, the score of each position (confidence, margin, noise, ...).
        eligible: [B, T] bool, the positions that may be picked (usually the masked ones).
        k: [B] int64, how many to pick in each row: 0 or less picks none, more than there are picks all.
        impl: "auto", "torch", "cpp" (CPU) or "cuda". Strided inputs are copied to contiguous ones.

    Returns:
        [B, T] bool, True where picked. Row b has min(max(k[b], 0), eligible[b].sum()) of them. Not
        differentiable.

    Raises:
        InputError: a wrong dtype, shape or device, or an `impl` that cannot run here.
    """
    _check(keys, eligible, k)
    if impl == "torch":
        return _reference(keys, eligible, k)
    return _select_topk(keys, eligible, k, impl)


def _check(keys: Tensor, eligible: Tensor, k: Tensor) -> None:
    for name, x in (("keys", keys), ("eligible", eligible), ("k", k)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} is {x!r}; it must be a tensor")
    if keys.ndim != 2 or keys.dtype != torch.float32:
        raise InputError(f"keys is {_describe(keys)}; select_topk ranks a [B, T] float32 tensor, so use keys.float()")
    if eligible.shape != keys.shape or eligible.dtype != torch.bool:
        raise InputError(f"eligible is {_describe(eligible)}; it must be bool and {list(keys.shape)} like keys")
    if k.shape != keys.shape[:1] or k.dtype != torch.int64:
        raise InputError(f"k is {_describe(k)}; it must be int64 and [{keys.shape[0]}], one count for each row of keys")
    if not keys.device == eligible.device == k.device:
        raise InputError(
            f"keys is on {keys.device}, eligible on {eligible.device} and k on {k.device}; move them to one device"
        )


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def ranking(keys: Tensor, eligible: Tensor) -> Tensor:
    """int64 [B, T], the position at each rank; the eligible ones come first."""
    # One sortable integer a position, as in csrc/unmask.h: NaN and ineligible get the two lowest values.
    bits = torch.where(keys == 0, 0.0, keys).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = torch.where(keys.isnan(), _NAN, order)
    order = torch.where(eligible, order, _INELIGIBLE)
    return order.argsort(dim=1, descending=True, stable=True)


def _reference(keys: Tensor, eligible: Tensor, k: Tensor) -> Tensor:
    ranked = ranking(keys, eligible)
    take = torch.minimum(k, eligible.sum(1))
    picked = torch.arange(keys.shape[1], device=keys.device) < take[:, None]
    return torch.zeros_like(eligible).scatter(1, ranked, picked)


@torch.library.custom_op("loopmdm::select_topk", mutates_args=())
def _select_topk(keys: Tensor, eligible: Tensor, k: Tensor, impl: str) -> Tensor:
    rows, cols = keys.shape
    chosen = OP.choose(impl, keys.device, keys.dtype, rows=rows, cols=cols).impl
    if chosen == "torch" or keys.numel() == 0:
        return _reference(keys, eligible, k)
    native = importlib.import_module("loopmdm._C")

    keys, eligible, k = keys.contiguous(), eligible.contiguous(), k.contiguous()
    out = torch.empty_like(eligible)
    where = (keys.data_ptr(), eligible.data_ptr(), k.data_ptr(), out.data_ptr(), rows, cols)
    if chosen == "cpp":
        native.select_topk_cpu(*where, torch.get_num_threads())
    else:
        native.select_topk_cuda(*where, keys.device.index, torch.cuda.current_stream(keys.device).cuda_stream)
    return out


@_select_topk.register_fake
def _(keys: Tensor, eligible: Tensor, k: Tensor, impl: str) -> Tensor:
    return torch.empty_like(eligible, memory_format=torch.contiguous_format)


def _example(device: torch.device, dtype: torch.dtype, rng: torch.Generator) -> dict[str, Any]:
    """Coarse keys, so that ties decide, with NaN and infinities, and every kind of k."""
    keys = torch.randn(5, 1237, generator=rng, dtype=dtype).mul(4).round().div(4)
    for value in (float("nan"), float("inf"), float("-inf"), -0.0):
        keys[torch.rand(keys.shape, generator=rng) < 0.03] = value
    eligible = torch.rand(keys.shape, generator=rng) < 0.7
    k = torch.tensor([0, 1, 300, int(eligible[3].sum()) - 10, 5000])
    return {"keys": keys.to(device), "eligible": eligible.to(device), "k": k.to(device)}


def _denoising(
    device: torch.device, dtype: torch.dtype, rng: torch.Generator, rows: int = 256, cols: int = 16384
) -> dict[str, Any]:
    """Keys of a denoising step: most positions masked, up to a quarter of them revealed."""
    keys = torch.rand(rows, cols, generator=rng, dtype=dtype)
    eligible = torch.rand(keys.shape, generator=rng) < 0.7
    k = torch.randint(0, max(1, cols // 4), (rows,), generator=rng)
    return {"keys": keys.to(device), "eligible": eligible.to(device), "k": k.to(device)}


_SIZES = ((1, 256), (1, 4096), (8, 256), (8, 4096), (64, 256), (64, 4096), (256, 16384))

OP = Op(
    name="select_topk",
    call=select_topk,
    examples=(_example,),
    impls=("torch", "cpp", "cuda"),
    dtypes=(torch.float32,),
    tolerance={torch.float32: 0.0},
    problems=(_denoising,),
    sizes=dict.fromkeys(("cpu", "cuda"), tuple({"rows": rows, "cols": cols} for rows, cols in _SIZES)),
)

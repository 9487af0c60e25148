"""What a visit costs: n layers visited S times against n S distinct layers of the same weights, so the same FLOPs.

    pytest benchmarks/bench_depth.py --benchmark-only

Shared weights are read again from a cache where they fit one, distinct ones from memory. `benchmarks/traffic.py` counts
the bytes on a GPU.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from loopmdm.model.lm import LoopMDM

from .bench_block import DTYPE, ROWS, close, flops, inputs
from .frame import CUDA, DEVICE, race
from .sizes import block_config, drawn

LAYERS = 2
SIZES = ["tiny-llama", "paper-170m", *(["llama-1024"] if CUDA else [])]


@functools.cache
def models(size: str, loops: int) -> tuple[LoopMDM, LoopMDM]:
    """(looped, unlooped): the second has a copy of its own of the layers of each visit."""
    looped = copy.deepcopy(drawn(block_config(size, LAYERS, loops), DEVICE)).to(DTYPE)
    with torch.device("meta"):
        distinct = LoopMDM(block_config(size, LAYERS * loops, 1)).eval()
    distinct = distinct.to_empty(device=DEVICE).to(DTYPE)
    state = distinct.state_dict()
    for key, value in looped.state_dict().items():
        before, found, rest = key.partition("layers.")
        index, _, name = rest.partition(".")
        places = range(loops) if found else range(1)
        for visit in places:
            where = f"{before}layers.{int(index) + visit * LAYERS}.{name}" if found else key
            state[where].copy_(value)
    return looped, distinct


@pytest.mark.parametrize("loops", [1, 4, 12])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("arm", ["distinct layers", "looped"])
def test_depth(benchmark: Any, arm: str, size: str, loops: int) -> None:
    batch, length = ROWS["small"]
    benchmark.group = f"depth: {size}, {LAYERS * loops} layers applied, {batch} x {length}"
    benchmark.name = arm
    looped, distinct = models(size, loops)
    with torch.no_grad():
        race(
            benchmark,
            functools.partial(looped.hidden, num_loops=loops)
            if arm == "looped"
            else functools.partial(distinct.hidden, num_loops=1),
            functools.partial(distinct.hidden, num_loops=1) if arm == "looped" else None,
            inputs("small"),
            close,
            dtype=DTYPE,
            tokens=batch * length,
            flops=batch * flops(looped, length, loops),
            loops=loops,
            weight_bytes=sum(
                p.numel() * p.element_size() for p in (looped if arm == "looped" else distinct).parameters()
            ),
        )

"""The whole model, ids to hidden states: as it is written, compiled, and through the fused plan.

    pytest benchmarks/bench_fused.py --benchmark-only

Arms: "eager", the model; "compile", torch.compile(mode="max-autotune") of all of it, CUDA graphs included (CUDA only);
"fused", `model.fused()` with impl="triton" on CUDA (attention as the table has it) and "torch" elsewhere; "graph", the
same captured once (CUDA only), the fair rival of "compile"; "graph-cublas", that with impl="cublas". Arms must agree
with the model in fp32 before one is timed.
Weights are drawn, not fresh: a new model's blocks are the identity.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopmdm.config import LoopConfig, ModelConfig
from loopmdm.model.block import Norm
from loopmdm.model.lm import LoopMDM

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
OPERAND = torch.bfloat16 if CUDA else torch.float32
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="an arm for a CUDA device")
ARMS = ["eager", *(pytest.param(arm, marks=NEEDS_CUDA) for arm in ("compile", "graph", "graph-cublas")), "fused"]
VOCAB = 1024  # the head is not timed

ROWS = {128: (1, 128), 256: (2, 128), 1024: (1, 1024), 4096: (4, 1024), 65536: (64, 1024)}
SIZES = [(name, rows) for name in ("paper", "llama-512", "llama-1024", "llama-2048") for rows in ROWS]
SIZES = SIZES if CUDA else [("small-dit", 256), ("small-llama", 256)]


def config_of(name: str) -> ModelConfig:
    """`paper`: only the looped block of arXiv 2605.26106 (2 layers, S = 12); the llamas: 8 layers, 4 of them looped."""
    common: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 1024}
    dit = {"hidden_act": "gelu_tanh", "norm": "layernorm", "mlp_bias": True, "modulation": "adaln"}
    if name == "paper":
        loop = LoopConfig(start=0, length=2, max_loops=12)
        shape = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
        return ModelConfig(**common, **dit, **shape, loop=loop)
    kind, width = name.split("-")
    d = 128 if kind == "small" else int(width)
    loop = LoopConfig(start=1, length=2 if kind == "small" else 4, max_loops=4)
    shape = {"hidden_size": d, "num_attention_heads": d // 64, "intermediate_size": 64 * round(d * 8 / 3 / 64)}
    shape["num_hidden_layers"] = 4 if kind == "small" else 8
    return ModelConfig(**common, **(dit if width == "dit" else {}), **shape, loop=loop)


def drawn(config: ModelConfig) -> LoopMDM:
    """Gains about 1, small biases, matrices at fan-in."""
    model, rng = LoopMDM(config).eval(), torch.Generator().manual_seed(0)
    gains = {id(m.weight) for m in model.modules() if isinstance(m, Norm)}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            std = 0.1 if p.dim() == 1 else 1.0 if id(p) in tables else 1 / math.sqrt(p.shape[1])
            p.copy_(torch.randn(p.shape, generator=rng) * std + (id(p) in gains))
    return model.to(DEVICE)


def arm(name: str, model: LoopMDM, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """ids [B, T] -> hidden states, by one of the ways; `graph` is captured on a buffer like ids."""
    if name in ("eager", "compile"):
        half = copy.deepcopy(model).to(OPERAND)
        return torch.compile(half.hidden, mode="max-autotune", dynamic=False) if name == "compile" else half.hidden
    impls = {"impl": "cublas" if name == "graph-cublas" else "triton", "attention_impl": "auto"}
    impls = impls if CUDA else {"impl": "torch"}
    hidden = copy.deepcopy(model).to(OPERAND).fused(**impls).hidden
    if name == "fused":
        return hidden
    static, side, graph = ids.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        hidden(static)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out = hidden(static)

    def replay(ids: Tensor) -> Tensor:
        static.copy_(ids)
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("size, rows", SIZES)
def test_fused(benchmark: Any, size: str, rows: int, name: str) -> None:
    benchmark.group = f"model {size} {rows}"
    config, (batch, length) = config_of(size), ROWS[rows]
    model, rng = drawn(config), torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, VOCAB - 1, (batch, length), generator=rng).to(DEVICE) for _ in range(4)]
    with torch.no_grad():
        run = arm(name, model, inputs[0])
        for ids in inputs[:2]:
            got, want = run(ids).double(), torch.cat([model.hidden(row[None]) for row in ids]).double()
            assert (got - want).norm() <= (5e-2 if CUDA else 1e-5) * want.norm(), "the arm is wrong"
    del model
    turn = itertools.cycle(inputs)

    def once() -> None:
        with torch.no_grad():
            run(next(turn))
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=50 if CUDA else 10, warmup_rounds=10 if CUDA else 2)
    loops = config.loop.max_loops
    probe = LoopMDM(config).forward_flops(length, loops) - 2 * VOCAB * config.hidden_size * length
    benchmark.extra_info |= {"S": loops, "dtype": str(OPERAND), "FLOPs": batch * probe}
    if benchmark.stats:
        median = benchmark.stats["median"]
        benchmark.extra_info["tokens/s"] = round(rows / median)
        benchmark.extra_info["TFLOP/s"] = round(batch * probe / median / 1e12, 3)

"""First contact with a GPU, in order: does it run, is it right, can it be captured, does it wait for the host.

    pytest tests/gpu/test_first_contact.py -x -q        (about 90 s, most of it compiling)

Every op and every GPU implementation is found through `all_ops()`; a new op needs nothing here.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.model.depth import Depth, RelativeChange
from loopmdm.ops.attention import OP as ATTENTION
from loopmdm.ops.attention import attention
from loopmdm.ops.contract import IMPLS, Choice, Op, all_ops, unavailable
from loopmdm.ops.residual_norm import KINDS, residual_norm
from loopmdm.ops.spans import spans_of

from .. import oracle
from ..helpers import ids, live, tiny

if not torch.cuda.is_available():
    pytest.skip("first contact needs a CUDA device", allow_module_level=True)

GPU = torch.device("cuda", torch.cuda.current_device())
BF16, FP32 = torch.bfloat16, torch.float32
FUSED = [
    pytest.param(op, impl, id=f"{name}-{impl}")
    for name, op in all_ops().items()
    for impl in op.impls
    if impl in ("triton", "cuda") or impl not in IMPLS
]
TRITON_NORM = pytest.mark.skipif(unavailable("triton", GPU) is not None, reason=f"{unavailable('triton', GPU)}")


def ready(op: Op, impl: str) -> None:
    reason = op.unavailable(impl, GPU)
    if reason is not None:
        pytest.skip(f"{op.name}: {reason}")


def dtypes(op: Op, impl: str) -> list[torch.dtype]:
    """Those in which the implementation takes an example."""
    return [dtype for dtype in op.dtypes if op.taken(impl, GPU, dtype)]


def problems(op: Op, impl: str, seed: int) -> list[dict[str, Any]]:
    """Every example that the implementation takes, in every dtype."""
    return [
        e(GPU, dtype, torch.Generator().manual_seed(seed)) for dtype in op.dtypes for e in op.taken(impl, GPU, dtype)
    ]


def outputs(op: Op, impl: str, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    result = op.call(**kwargs, impl=impl)
    return result if isinstance(result, tuple) else (result,)


def copy_into(static: Any, fresh: Any) -> None:
    """Every tensor of an argument into its place in another one, also those inside tuples (`Heads`, `Spans`)."""
    if isinstance(fresh, Tensor):
        static.copy_(fresh)
    elif isinstance(fresh, tuple):
        for a, b in zip(static, fresh, strict=True):
            copy_into(a, b)


@pytest.fixture
def no_syncs() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, impl", FUSED)
def test_1_agrees_with_torch(op: Op, impl: str) -> None:
    ready(op, impl)
    assert dtypes(op, impl), "no example is taken"
    for dtype in dtypes(op, impl):
        for seed in range(3):
            gap = op.deviation(impl, GPU, dtype, seed)
            assert gap <= op.tolerance[dtype], f"{dtype}, seed {seed}: {gap:.2e}"


@pytest.mark.parametrize("op, impl", FUSED)
def test_2_same_bits_twice(op: Op, impl: str) -> None:
    ready(op, impl)
    for dtype in dtypes(op, impl):
        for a, b in zip(op.results(impl, GPU, dtype), op.results(impl, GPU, dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op, impl", FUSED)
def test_3_self_check_and_auto(op: Op, impl: str) -> None:
    ready(op, impl)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in dtypes(op, impl):
            assert op.verify(impl, GPU, dtype) is None
            assert op.deviation("auto", GPU, dtype) <= op.tolerance[dtype]


@pytest.mark.parametrize("op, impl", FUSED)
def test_4_never_waits_for_the_host(op: Op, impl: str, no_syncs: None) -> None:
    ready(op, impl)
    torch.cuda.set_sync_debug_mode("default")
    for kwargs in problems(op, impl, 0):
        outputs(op, impl, kwargs)  # compiles and loads
        torch.cuda.set_sync_debug_mode("error")
        outputs(op, impl, kwargs)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op, impl", FUSED)
def test_5_graph_capture_and_replay_on_new_inputs(op: Op, impl: str) -> None:
    ready(op, impl)
    for static, fresh in zip(problems(op, impl, 0), problems(op, impl, 1), strict=True):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            outputs(op, impl, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = outputs(op, impl, static)
        for name, value in fresh.items():
            copy_into(static[name], value)
        graph.replay()
        for a, b in zip(captured, outputs(op, impl, fresh), strict=True):
            assert torch.equal(a, b)


@TRITON_NORM
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream, other", [(FP32, BF16), (BF16, BF16), (FP32, FP32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 768), (4097, 1000), (65536, 768), (8192, 4096), (100003, 64)], ids=str)
def test_6_residual_norm_at_size(shape: tuple[int, int], stream: torch.dtype, other: torch.dtype, kind: str) -> None:
    rng = torch.Generator(device=GPU).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=GPU)

    inputs = {"x": (3 * draw(*shape) + 1).to(stream), "branch": draw(*shape).to(other)}
    inputs |= {"weight": draw(shape[1]).abs() + 0.5, "bias": draw(shape[1])}
    truth = functools.partial(oracle.residual_norm, kind=kind, eps=1e-5, stream=stream)
    ours, torchs = (
        oracle.errors(functools.partial(residual_norm, kind=kind, out_dtype=other, impl=impl), truth, inputs)
        for impl in ("triton", "torch")
    )
    for name, value in ours.items():
        assert value <= 1.2 * torchs[name] + 2e-6, f"{name}: {value:.2e}, torch {torchs[name]:.2e}"


@TRITON_NORM
def test_7_residual_norm_beyond_32_bit_offsets() -> None:
    rows, dim = (1 << 20) + 3, 2048
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("2³¹ elements need 24 GiB of free GPU memory")
    x = torch.randn(rows, dim, device=GPU, dtype=BF16)
    branch = torch.randn(rows, dim, device=GPU, dtype=BF16)
    with torch.no_grad():
        summed, normed = residual_norm(x, branch, impl="triton")
        want = residual_norm(x[-5:], branch[-5:], impl="torch")
    assert torch.equal(summed[-5:], want[0])
    torch.testing.assert_close(normed[-5:], want[1], rtol=1e-2, atol=1e-2)


@TRITON_NORM
def test_8_residual_norm_training_step_in_a_graph() -> None:
    """Forward and backward captured together, as a training step is; the sums of partial rows included."""
    x, branch = torch.randn(512, 768, device=GPU), torch.randn(512, 768, device=GPU, dtype=BF16)
    weight = torch.rand(768, device=GPU) + 0.5
    leaves = [t.requires_grad_() for t in (x, branch, weight)]

    def step() -> tuple[Tensor, ...]:
        summed, normed = residual_norm(*leaves, out_dtype=BF16, impl="triton")
        return torch.autograd.grad(summed.square().mean() + normed.float().square().mean(), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def half_of(tokens: int) -> tuple[Tensor, Tensor]:
    """Spans of two sequences: one padded on the left, one of four documents."""
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[0, : tokens // 3] = False
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    ids[1] = torch.arange(tokens) * 4 // tokens
    spans = spans_of(real, ids)
    assert spans is not None
    return spans.first.to(GPU), spans.last.to(GPU)


@TRITON_NORM
@pytest.mark.parametrize("spans", [False, True], ids=["all", "spans"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize("tokens, head_dim", [(1, 64), (128, 32), (129, 64), (1000, 128), (2048, 64)])
def test_9_attention_at_size(tokens: int, head_dim: int, dtype: torch.dtype, spans: bool) -> None:
    """Against float64, and no less accurate than torch."""
    qkv = torch.randn(2, tokens, 8, head_dim, device=GPU).to(dtype)
    ends = half_of(tokens) if spans else None
    with torch.no_grad():
        want = attention(qkv.double(), 4, 2, ends, impl="torch")
        ours, torchs = (oracle.error(attention(qkv, 4, 2, ends, impl=impl), want) for impl in ("triton", "torch"))
    assert ours <= 1.2 * torchs + 2e-6, f"{ours:.2e}, torch {torchs:.2e}"


@TRITON_NORM
def test_9_attention_compiles_once_for_every_length() -> None:
    from loopmdm.kernels.attention import attention_kernel

    def compiled() -> int:
        return len(attention_kernel.device_caches[GPU.index][0])

    with torch.no_grad(), ATTENTION.pinned(Choice("triton", {})):  # whatever tiles the table has for some lengths
        before = compiled()
        for batch, tokens in [(1, 129), (2, 144), (3, 1000), (16, 256), (1, 2048)]:
            attention(torch.randn(batch, tokens, 9, 64, device=GPU, dtype=BF16), 3, 3, impl="triton")
        assert compiled() == before + 1


@TRITON_NORM
def test_9_attention_beyond_32_bit_offsets() -> None:
    batch, tokens = 180, 4096
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("2³¹ elements need 16 GiB of free GPU memory")
    qkv = torch.randn(batch, tokens, 48, 64, device=GPU, dtype=BF16)
    with torch.no_grad():
        out = attention(qkv, 16, 16, impl="triton")[-1]
        want = attention(qkv[-1:], 16, 16, impl="torch")[0]
    torch.testing.assert_close(out, want, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("impl", [impl for impl in ATTENTION.impls if impl not in ("torch", "triton")])
def test_9_attention_gradients_of_libraries(impl: str) -> None:
    ready(ATTENTION, impl)
    for example in ATTENTION.taken(impl, GPU, BF16):
        kwargs = example(GPU, BF16, torch.Generator().manual_seed(0))
        kwargs["qkv"].requires_grad_()
        weight = torch.randn_like(attention(**kwargs, impl="torch"))
        grads = [
            torch.autograd.grad((attention(**kwargs, impl=which) * weight).sum(), kwargs["qkv"])[0]
            for which in (impl, "torch")
        ]
        assert oracle.error(grads[0], grads[1].double()) < 2e-2


PLANS = {
    "dit": ("dit", {}),
    "llama": ("llama", {"boundary": "anchored", "num_key_value_heads": 2, "qk_norm": "before_rope"}),
    "timed": ("dit", {"time_conditioning": True}),
}
PLAN_SIZE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 256}


@TRITON_NORM
@pytest.mark.parametrize("name", PLANS)
def test_10_fused_plan(name: str) -> None:
    """The whole model in bf16 through every kernel, no less accurate than in torch: plain, padded, with exits."""
    backbone, changes = PLANS[name]
    model = live(tiny(backbone, **PLAN_SIZE, **changes))
    truth, model = copy.deepcopy(model).double().to(GPU), model.to(GPU)
    tokens = ids(5, 200).to(GPU)
    real = (torch.arange(200) < torch.tensor([200, 150, 17, 1, 99])[:, None]).to(GPU)
    plans = [model.fused(BF16, impl) for impl in ("triton", "cublas", "torch")]
    sigma = torch.linspace(0.2, 3.0, 5).to(GPU)  # read by "timed" alone
    for S in (1, 4, torch.tensor([3, 1, 6, 2, 5])):
        for mask in (None, real):
            with torch.no_grad():
                want = truth.hidden(tokens, mask, S, sigma)
            *ours, torchs = (oracle.error(plan.hidden(tokens, mask, S, sigma), want) for plan in plans)
            assert max(ours) <= 1.2 * torchs + 1e-6, f"S = {S}: {ours}, torch {torchs:.2e}"
    depths = [Depth(6, RelativeChange(0.2, 1)) for _ in plans]
    for plan, depth in zip(plans, depths, strict=True):
        plan.hidden(tokens, real, depth, sigma)
        assert depth.visits is not None and depth.visits.device == tokens.device


@TRITON_NORM
@pytest.mark.parametrize("name", PLANS)
def test_11_fused_plan_in_a_graph(name: str, no_syncs: None) -> None:
    """One capture of a fixed-S pass, which never waits for the host, replayed on new ids and new padding."""
    torch.cuda.set_sync_debug_mode("default")
    backbone, changes = PLANS[name]
    plan = live(tiny(backbone, **PLAN_SIZE, **changes)).to(GPU).fused(BF16, "triton")
    static, fresh = (ids(3, 130, seed=seed).to(GPU) for seed in (1, 2))
    sigma = torch.linspace(0.2, 3.0, 3).to(GPU)
    lengths = torch.tensor([[130], [40], [77]])
    real, other = ((torch.arange(130) < n).to(GPU) for n in (lengths, lengths.flip(0)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plan.hidden(static, real, 4, sigma)
    torch.cuda.current_stream().wait_stream(side)
    want = plan.hidden(fresh, other, 4, sigma)
    plain = plan.hidden(fresh, None, 4, sigma)
    torch.cuda.set_sync_debug_mode("error")
    again = plan.hidden(fresh, None, 4, sigma)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan.hidden(static, real, 4, sigma)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, plain)
    static.copy_(fresh)
    real.copy_(other)
    graph.replay()
    assert torch.equal(captured, want)

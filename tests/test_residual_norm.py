"""residual_norm: torch's operations and C++ against the float64 oracle (the Triton kernel: tests/interpret)."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from loopmdm.errors import InputError
from loopmdm.ops import residual_norm as module
from loopmdm.ops.contract import extension
from loopmdm.ops.residual_norm import KINDS, OP, residual_norm

from . import oracle

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# root mean square error over that of the truth: about two roundings in the dtype
LIMIT = {FP64: 1e-14, FP32: 1e-6, FP16: 6e-4, BF16: 5e-3}
built = pytest.mark.skipif(extension() is None, reason="loopmdm._C is not built")
IMPLS = ["torch", pytest.param("cpp", marks=built)]
SHAPES = [(1, 1), (7, 3), (2, 5, 100), (3, 17, 63), (2, 252, 507), (4, 768), (0, 8)]


def problem(
    shape: tuple[int, ...], stream: torch.dtype, other: torch.dtype, without: str = "", mean: float = 0.0
) -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(len(shape) * shape[-1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    dim = shape[-1]
    made: dict[str, Tensor | None] = {
        "x": (draw(*shape) + mean).to(stream),
        "branch": draw(*shape).to(other),
        "weight": (draw(dim).abs() + 0.5).to(stream),
        "bias": draw(dim).to(stream),
    }
    return {name: None if name in without.split() else value for name, value in made.items()}


def errors(inputs: dict[str, Tensor | None], kind: str, eps: float = 1e-5, **options: object) -> dict[str, float]:
    ours = functools.partial(residual_norm, kind=kind, eps=eps, **options)  # type: ignore[arg-type]
    truth = functools.partial(oracle.residual_norm, kind=kind, eps=eps, stream=inputs["x"].dtype)  # type: ignore[union-attr]
    return oracle.errors(ours, truth, inputs)


def skip_unless(impl: str, *dtypes: torch.dtype) -> None:
    if impl == "cpp" and not {*dtypes} <= {FP32, BF16}:
        pytest.skip("torch's own")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, impl: str, kind: str) -> None:
    skip_unless(impl if shape[0] else "auto", dtype)
    for name, value in errors(problem(shape, dtype, dtype), kind, impl=impl if shape[0] else "auto").items():
        if kind == "layernorm" and shape[-1] == 1:
            continue  # one number's deviation from its own mean: the truth is 0
        # and its norm is its sign, so that dx is a difference of equals, which C++ rounds once more
        equals = impl == "cpp" and shape[-1] == 1 and name.startswith("d")
        assert value <= LIMIT[dtype] * (3 if equals else 1), f"{name}: {value:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", ["branch", "weight", "bias", "weight bias", "branch weight bias"])
@pytest.mark.parametrize(
    "dtype, impl",
    [(FP64, "torch"), (BF16, "torch"), pytest.param(FP32, "cpp", marks=built), pytest.param(BF16, "cpp", marks=built)],
)
def test_optional_inputs(dtype: torch.dtype, impl: str, without: str, kind: str) -> None:
    for name, value in errors(problem((3, 17, 63), dtype, dtype, without), kind, impl=impl).items():
        assert value <= LIMIT[dtype], f"{name}: {value:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "stream, other, out", [(FP32, BF16, BF16), (FP32, BF16, None), (BF16, FP32, FP32), (FP16, FP16, FP32)]
)
def test_mixed_dtypes(stream: torch.dtype, other: torch.dtype, out: torch.dtype | None, impl: str, kind: str) -> None:
    skip_unless(impl, stream, other, out or stream)
    inputs = problem((2, 31, 100), stream, other)
    got = errors(inputs, kind, out_dtype=out, impl=impl)
    coarsest = max(stream, other, out or stream, key=LIMIT.__getitem__)
    for name, value in got.items():
        assert value <= LIMIT[coarsest], f"{name}: {value:.1e}"
    # what never passes through 16 bits keeps fp32's accuracy
    if stream == FP32:
        assert got["out0"] <= LIMIT[FP32]
    if out == FP32:
        assert got["out1"] <= LIMIT[FP32]
    assert residual_norm(**inputs, kind=kind, out_dtype=out)[1].dtype == (out or stream)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mean", [0, 1, 10, 100])
def test_mean_that_dwarfs_the_spread(mean: float, impl: str, kind: str) -> None:
    """Condition number mean/std: fp32 may lose that many digits and no more."""
    got = errors(problem((5, 33, 128), FP32, FP32, mean=mean), kind, impl=impl)
    for name, value in got.items():
        assert value <= LIMIT[FP32] * max(1, mean), f"{name}: {value:.1e}"


def test_statistics_are_those_of_the_stored_sum() -> None:
    """In bf16 100 + 0.25 is stored as 100: the branch must vanish from normed as well."""
    x, branch = torch.full((1, 64), 100.0, dtype=BF16), torch.full((1, 64), 0.25, dtype=BF16)
    branch[:, ::2] *= -1
    summed, normed = residual_norm(x, branch, kind="layernorm", out_dtype=FP32)
    assert torch.equal(summed, x)
    assert torch.equal(normed, torch.zeros_like(normed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
def test_eps(eps: float, kind: str) -> None:
    inputs = problem((4, 9, 20), FP64, FP64)
    assert max(errors(inputs, kind, eps=eps).values()) < LIMIT[FP64]


def test_no_branch_returns_x_itself() -> None:
    x = torch.randn(3, 8)
    assert residual_norm(x, None)[0] is x


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, impl", [(FP64, "torch"), pytest.param(FP32, "cpp", marks=built)])
def test_one_output_used(dtype: torch.dtype, impl: str, kind: str, used: int) -> None:
    """An anchored loop boundary takes normed alone."""
    inputs = problem((3, 5, 24), dtype, dtype, "weight bias" if used == 0 else "")
    ours = functools.partial(residual_norm, kind=kind, impl=impl)
    truth = functools.partial(oracle.residual_norm, kind=kind, eps=1e-5, stream=dtype)
    got = oracle.errors(lambda **k: ours(**k)[used : used + 1], lambda **k: truth(**k)[used : used + 1], inputs)
    assert max(got.values()) < LIMIT[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("without", ["", "branch", "weight bias"])
def test_gradcheck(without: str, kind: str) -> None:
    inputs = {n: v if v is None else v.requires_grad_() for n, v in problem((2, 3, 7), FP64, FP64, without).items()}
    assert torch.autograd.gradcheck(functools.partial(residual_norm, kind=kind), tuple(inputs.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_inference_run_the_same_numbers(kind: str) -> None:
    """With gradients RMS norm takes another route on CPU."""
    inputs = problem((6, 50), FP32, FP32)
    with torch.no_grad():
        quiet = residual_norm(**inputs, kind=kind)  # type: ignore[arg-type]
    loud = residual_norm(**inputs, kind=kind)  # type: ignore[arg-type]
    for a, b in zip(quiet, loud, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_compiles_in_one_graph_for_any_row_count() -> None:
    torch.compiler.reset()
    traced = torch.compile(residual_norm, backend="eager", fullgraph=True, dynamic=True)
    weight = torch.rand(8) + 0.5
    for rows in (4, 5, 9):
        x, branch = torch.randn(rows, 8), torch.randn(rows, 8)
        for a, b in zip(traced(x, branch, weight), residual_norm(x, branch, weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(
    "without, stream, other, out",
    [
        ("", FP32, FP32, FP32),
        ("branch", FP32, FP32, BF16),
        ("weight bias", FP32, BF16, BF16),
        ("bias", BF16, FP32, FP32),
    ],
)
def test_fake_outputs_and_gradients(
    without: str, stream: torch.dtype, other: torch.dtype, out: torch.dtype, centre: bool
) -> None:
    """What torch.compile is told about the kernel. (opcheck runs the kernel: tests/interpret.)"""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = problem((2, 3, 8), stream, other, without).values()
        fakes = [v if v is None else mode.from_tensor(v).requires_grad_() for v in values]
        summed, normed, mean, rstd = module._forward_op(*fakes, centre, 1e-5, out, 0, 0)
        assert (normed.shape, normed.dtype) == ((2, 3, 8), out)
        assert summed.shape == ((0,) if "branch" in without else (2, 3, 8)) and summed.dtype == stream
        assert mean.numel() == 6 * centre and rstd.numel() == 6
        used = [normed] if "branch" in without else [summed, normed]
        leaves = [v for v in fakes if v is not None]
        grads = torch.autograd.grad(used, leaves, [torch.ones_like(o) for o in used])
        assert [(g.shape, g.dtype) for g in grads] == [(v.shape, v.dtype) for v in leaves]


GOOD = torch.zeros(2, 6)


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        ((torch.zeros(()), None), {}, r"x is \[\]; it must be \[\.\.\., D\]"),
        ((torch.zeros(3, 0), None), {}, r"x is \[3, 0\]"),
        ((torch.zeros(2, 6, dtype=torch.int64), None), {}, "x is torch.int64"),
        ((GOOD, None), {"out_dtype": torch.int8}, "out_dtype torch.int8; both must be floating point"),
        ((GOOD, torch.zeros(6)), {}, r"branch is \[6\] and x is \[2, 6\]"),
        ((GOOD, GOOD, torch.zeros(5)), {}, r"weight is \[5\]; for x \[2, 6\] it must be \[6\]"),
        ((GOOD, GOOD, None, torch.zeros(1, 6)), {}, r"bias is \[1, 6\]"),
        ((GOOD, GOOD), {"kind": "rms"}, "no kind 'rms'; did you mean 'rmsnorm'"),
        ((GOOD, GOOD), {"eps": -1.0}, "eps is -1.0; it must not be negative"),
        ((GOOD, GOOD), {"impl": "tritn"}, "no impl 'tritn'; did you mean 'triton'"),
    ],
)
def test_errors_say_what_to_do(args: tuple[Tensor, ...], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        residual_norm(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_import_loads_no_triton() -> None:
    code = "import sys, loopmdm.ops.residual_norm; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_self_check_agrees_with_itself() -> None:
    assert OP.deviation("torch", torch.device("cpu"), FP32) == 0.0


@built
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream, other", [(FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 3), (3, 17, 63), (4, 768), (2, 252, 507)], ids=str)
def test_cpp_against_torch(shape: tuple[int, ...], stream: torch.dtype, other: torch.dtype, kind: str) -> None:
    """The stored sum bit for bit; the norm within fp32's roundings, then one to its dtype."""
    for without in ("", "branch", "weight bias"):
        inputs = problem(shape, stream, other, without, mean=3.0)
        for out_dtype in (FP32, BF16):
            for weights in (FP32, BF16):
                for name in ("weight", "bias"):
                    inputs[name] = None if inputs[name] is None else inputs[name].to(weights)  # type: ignore[union-attr]
                got, want = (
                    residual_norm(**inputs, kind=kind, out_dtype=out_dtype, impl=impl)  # type: ignore[arg-type]
                    for impl in ("cpp", "torch")
                )
                assert torch.equal(got[0], want[0]) and got[1].dtype == out_dtype
                gap = (got[1].double() - want[1].double()).abs().max() / want[1].double().abs().max()
                assert float(gap) < (1e-5 if out_dtype == FP32 else 8e-3)


@built
def test_cpp_reads_heads_inside_a_projection() -> None:
    """No copy of the view is needed, and the bits are those of one; also over threads."""
    packed = torch.randn(2, 300, 12, 16, generator=torch.Generator().manual_seed(0))
    for x in (packed[:, :, 4:8], packed[:, :, 0], packed.transpose(1, 2), packed[:, ::2]):
        want = residual_norm(x.contiguous(), None, torch.ones(16), impl="cpp")[1]
        assert torch.equal(residual_norm(x, None, torch.ones(16), impl="cpp")[1], want)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        big = packed.repeat(4, 1, 1, 8)
        want = torch.cat([residual_norm(part, part, impl="cpp")[1] for part in big.split(1)])
        assert torch.equal(residual_norm(big, big, impl="cpp")[1], want)
    finally:
        torch.set_num_threads(before)


@built
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_gradients_of_heads_inside_a_projection(kind: str) -> None:
    """As of a copy; and the same bits whatever number of threads adds up the weight's."""
    rng = torch.Generator().manual_seed(0)
    packed, grad = torch.randn(2, 700, 12, 48, generator=rng), torch.randn(2, 700, 4, 48, generator=rng)
    weight, before, made = torch.rand(48, generator=rng, requires_grad=True), torch.get_num_threads(), []
    try:
        for threads, x in ((1, packed[:, :, 4:8]), (1, packed[:, :, 4:8].contiguous()), (3, packed[:, :, 4:8])):
            torch.set_num_threads(threads)
            x = x.detach().requires_grad_()
            made.append(
                torch.autograd.grad(residual_norm(x, None, weight, kind=kind, impl="cpp")[1], (x, weight), grad)
            )
    finally:
        torch.set_num_threads(before)
    for dx, dweight in made[1:]:
        assert torch.equal(dx, made[0][0]) and torch.equal(dweight, made[0][1])


@built
@pytest.mark.parametrize("kind", KINDS)
def test_cpp_gradients_can_be_differentiated_and_batched(kind: str) -> None:
    def second(impl: str) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in problem((3, 5, 24), FP32, FP32).values() if t is not None]
        x, branch, weight, bias = leaves
        outputs = residual_norm(x, branch, weight, bias, kind=kind, impl=impl)
        first = torch.autograd.grad(sum((o**2).sum() for o in outputs), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**3).sum() for g in first), leaves)]

    def formula() -> list[Tensor]:
        leaves = [t.double().requires_grad_() for t in problem((3, 5, 24), FP32, FP32).values() if t is not None]
        outputs = oracle.residual_norm(*leaves, kind=kind, eps=1e-5, stream=FP64)
        first = torch.autograd.grad(sum((o**2).sum() for o in outputs), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**3).sum() for g in first), leaves)]

    for impl in ("cpp", "torch"):
        for got, want in zip(second(impl), formula(), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    x = torch.randn(4, 6, requires_grad=True)
    normed = residual_norm(x, None, kind=kind, impl="cpp")[1]
    rows = torch.eye(24).view(24, 4, 6)
    (batched,) = torch.autograd.grad(normed, x, rows, is_grads_batched=True, retain_graph=True)
    each = torch.stack([torch.autograd.grad(normed, x, row, retain_graph=True)[0] for row in rows])
    torch.testing.assert_close(batched, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_gradients_where_one_input_comes_from_another(impl: str, kind: str) -> None:
    """A gain shared by two norms, one of the other's output; batched twice, the graph kept."""

    def both(norm: object, dtype: torch.dtype) -> list[Tensor]:
        x, branch, weight, bias = (t.to(dtype).requires_grad_() for t in problem((3, 5, 24), FP32, FP32).values())
        summed, normed = norm(x * 1.5, branch, weight, bias)  # type: ignore[operator]
        outputs = norm(normed * 0.5 + summed, x, weight, bias)  # type: ignore[operator]
        leaves = [x, branch, weight, bias]
        rows = [torch.stack([o.detach().roll(i, -1) for i in range(3)]) for o in outputs]
        kept = {"is_grads_batched": True, "retain_graph": True}
        torch.autograd.grad(outputs, leaves, rows, **kept)
        batched = torch.autograd.grad(outputs, leaves, rows, **kept)
        first = torch.autograd.grad(sum((o**2).sum() for o in outputs), leaves, create_graph=True)
        return [*batched, *first, *torch.autograd.grad(sum((g**3).sum() for g in first), leaves)]

    ours = functools.partial(residual_norm, kind=kind, impl=impl)
    truth = functools.partial(oracle.residual_norm, kind=kind, eps=1e-5, stream=FP64)
    for got, want in zip(both(ours, FP32), both(truth, FP64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms_and_tangents(kind: str) -> None:
    x, weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8)

    def loss(weight: Tensor) -> Tensor:
        return residual_norm(x, None, weight, kind=kind)[1].pow(2).sum()

    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), want)
    _, tangent = torch.func.jvp(loss, (weight,), (torch.ones(8),))
    torch.testing.assert_close(tangent, want.sum())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, torch.ones(8)))).tangent
    torch.testing.assert_close(tangent, want.sum())


@built
def test_cpp_flows_no_further_than_torch() -> None:
    """With a frozen stream the sum has no gradient."""
    x, branch, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8, requires_grad=True)
    for impl in ("cpp", "torch"):
        summed, normed = residual_norm(x, branch, weight, impl=impl)
        assert not summed.requires_grad and normed.requires_grad
        normed.sum().backward()


@built
def test_cpp_does_not_heed_default_dtypes_and_devices() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    want = torch.autograd.grad(residual_norm(x, None, weight, impl="cpp")[1].pow(2).sum(), (x, weight))
    try:
        torch.set_default_dtype(FP64)
        with torch.device("meta"):
            got = torch.autograd.grad(residual_norm(x, None, weight, impl="cpp")[1].pow(2).sum(), (x, weight))
    finally:
        torch.set_default_dtype(FP32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@built
def test_cpp_notices_what_was_changed_after_the_forward() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = x * 1.0
    normed = residual_norm(y, None, impl="cpp")[1]
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


@built
def test_cpp_says_what_it_does_not_take() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(InputError, match="bfloat16 and float32"):
        residual_norm(x.detach().double(), None, impl="cpp")
    with pytest.raises(InputError, match="out_dtype"):
        residual_norm(x.detach(), None, out_dtype=FP16, impl="cpp")

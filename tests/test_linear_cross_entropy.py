"""linear_cross_entropy: torch and chunked against the float64 oracle, under all that training does to them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm.diffusion import nelbo
from loopmdm.errors import InputError
from loopmdm.model.lm import LoopMDM
from loopmdm.ops import linear_cross_entropy as module
from loopmdm.ops.constants import constant
from loopmdm.ops.linear_cross_entropy import OP, linear_cross_entropy

from . import oracle
from .helpers import randomize_, tiny

CPU = torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NATIVE = module._unavailable("torch_native", CPU) is None
NEEDS_NATIVE = pytest.mark.skipif(not NATIVE, reason="torch 2.13 has it")
SHAPES = [(1, 1, 1), (7, 3, 5), (33, 24, 127), (100, 16, 1001)]
LEAVES = ("hidden", "weight", "bias", "weights")


def problem(shape: tuple[int, int, int], dtype: torch.dtype, without: str = "") -> dict[str, Any]:
    rows, dim, vocab = shape
    rng = torch.Generator().manual_seed(rows * vocab)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    made: dict[str, Any] = {
        "hidden": draw(rows, dim).to(dtype),
        "weight": (2 * draw(vocab, dim)).to(dtype),
        "targets": torch.randint(vocab, (rows,), generator=rng),
        "bias": draw(vocab).to(dtype),
        "weights": (draw(rows).abs() + 0.1).to(torch.promote_types(dtype, FP32)),
    }
    return {name: None if name in without.split() else value for name, value in made.items()}


def truth(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, weights: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """One row at a time."""
    allowed = torch.ones(len(weight), dtype=torch.bool)
    allowed[list(options.get("suppressed", ()))] = False
    nll = []
    for h, target in zip(hidden, targets, strict=True):
        logits = weight @ h if bias is None else weight @ h + bias
        nll.append(torch.logsumexp(logits[allowed], 0) - logits[target])
    each = torch.stack(nll)
    return (each if weights is None else each * weights).sum(), each.detach()


def errors(inputs: dict[str, Any], impl: str, **options: Any) -> dict[str, float]:
    """Of loss, nll and every gradient, over the root mean square of the truth."""

    def run(call: Any, wide: bool, **extra: Any) -> dict[str, Tensor]:
        leaves = {}
        for name in LEAVES:
            if inputs[name] is not None:
                value = inputs[name].double() if wide else inputs[name].clone()
                leaves[name] = value.detach().requires_grad_()
        loss, nll = call(**{**inputs, **leaves}, **options, **extra)
        assert not nll.requires_grad
        grads = torch.autograd.grad(loss * 1.7, list(leaves.values()))
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, name
        return {"loss": loss.detach(), "nll": nll, **dict(zip(leaves, grads, strict=True))}

    got = run(linear_cross_entropy, False, impl=impl)
    want = run(truth, True)
    return {name: oracle.error(got[name], want[name]) for name in want}


@pytest.mark.parametrize("without", ["", "bias", "weights", "bias weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "chunked"])
def test_loss_and_gradients(impl: str, shape: tuple[int, int, int], without: str) -> None:
    suppressed = tuple(i for i in (2, shape[2] - 1) if i < shape[2] and shape[2] > 4)
    inputs = problem(shape, FP32, without)
    inputs["targets"] = torch.where(torch.isin(inputs["targets"], torch.tensor(suppressed)), 0, inputs["targets"])
    for rows in (None, 1, 10):
        for name, value in errors(inputs, impl, suppressed=suppressed, chunk_rows=rows).items():
            assert value <= 2e-6, f"{name}: {value:.1e}"


@pytest.mark.parametrize("dtype", [FP64, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ["chunked", pytest.param("torch_native", marks=NEEDS_NATIVE)])
def test_as_accurate_as_torch(impl: str, dtype: torch.dtype) -> None:
    inputs = problem((300, 64, 1001), dtype)
    ours, torchs = (errors(inputs, which, chunk_rows=64) for which in (impl, "torch"))
    for name, value in ours.items():
        assert value <= (1.2 if impl == "chunked" else 5) * torchs[name] + 1e-14, f"{name}: {value:.1e}"


@NEEDS_NATIVE
@pytest.mark.parametrize("without", ["", "bias", "weights"])
def test_torchs_own(without: str) -> None:
    inputs = problem((33, 24, 127), FP32, without)
    inputs["targets"] %= 100
    for name, value in errors(inputs, "torch_native", suppressed=(101, 126)).items():
        assert value <= 5e-6, f"{name}: {value:.1e}"


def test_gradients_of_some() -> None:
    """Only what asks for a gradient gets one, and nothing is formed where nothing does."""
    inputs = problem((9, 6, 20), FP64)
    for names in ({"hidden"}, {"weight"}, {"bias"}, {"weights"}, {"hidden", "bias"}):
        leaves = {n: inputs[n].clone().requires_grad_(n in names) for n in LEAVES}
        linear_cross_entropy(**{**inputs, **leaves}, chunk_rows=4, impl="chunked")[0].backward()
        all_leaves = {n: inputs[n].clone().requires_grad_() for n in LEAVES}
        linear_cross_entropy(**{**inputs, **all_leaves}, impl="torch")[0].backward()
        for name, leaf in leaves.items():
            if name in names:
                torch.testing.assert_close(leaf.grad, all_leaves[name].grad)
            else:
                assert leaf.grad is None
    with torch.no_grad():
        loss, _ = linear_cross_entropy(**{**inputs, **all_leaves}, impl="chunked")
    assert not loss.requires_grad


@pytest.mark.parametrize("impl", ["torch", "chunked"])
def test_no_rows(impl: str) -> None:
    inputs = problem((7, 3, 5), FP32)
    leaves = {n: inputs[n][: 0 if n in ("hidden", "weights") else None].clone().requires_grad_() for n in LEAVES}
    loss, nll = linear_cross_entropy(**{**inputs, **leaves, "targets": inputs["targets"][:0]}, impl=impl)
    assert loss.item() == 0 and nll.shape == (0,)
    loss.backward()
    for leaf in leaves.values():
        assert leaf.grad is not None and leaf.grad.count_nonzero() == 0


def test_far_from_the_top() -> None:
    """A target whose probability is 0 in fp32 still has its logarithm; logits may be large."""
    weight = torch.tensor([[300.0], [100.0], [-400.0]])
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, nll = linear_cross_entropy(hidden, weight, torch.tensor([2, 0]), impl="chunked")
    assert nll.tolist() == [700.0, 700.0]
    loss.backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [700.0, -700.0]


def test_suppressed_ids_have_no_probability_and_no_gradient() -> None:
    inputs = problem((12, 6, 20), FP32)
    inputs["targets"] = inputs["targets"].clamp(5, 18)
    kept = [i for i in range(20) if i not in (3, 19)]
    weight, bias = inputs["weight"].requires_grad_(), inputs["bias"].requires_grad_()
    loss, nll = linear_cross_entropy(**inputs, suppressed=(3, 19), impl="chunked")
    shorter = {**inputs, "weight": weight[kept], "bias": bias[kept], "targets": inputs["targets"] - 1}
    torch.testing.assert_close(nll, linear_cross_entropy(**shorter, impl="torch")[1])
    loss.backward()
    for grad in (weight.grad, bias.grad):
        assert (
            grad is not None and grad[[3, 19]].count_nonzero() == 0 and grad[kept].count_nonzero() == grad[kept].numel()
        )
    infinite = {**inputs, "targets": torch.full((12,), 3)}
    for impl in ("torch", "chunked"):
        assert linear_cross_entropy(**infinite, suppressed=(3, 19), impl=impl)[1].isposinf().all()


@pytest.mark.parametrize("impl", ["torch", "chunked"])
def test_suppressed_ids_are_copied_to_the_device_once(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host in each call would make a GPU wait for it, and no graph could capture the step."""
    problem = {"weight": torch.randn(9, 4), "targets": torch.tensor([1, 2]), "suppressed": [3, 8], "impl": impl}
    before = linear_cross_entropy(torch.ones(2, 4), **problem)
    monkeypatch.setattr(torch, "tensor", None)
    after = linear_cross_entropy(torch.ones(2, 4), **problem)
    assert torch.equal(before[1], after[1])


def test_constants_outlive_where_they_were_made() -> None:
    """Neither a fake tensor nor one of inference mode comes back later."""
    with FakeTensorMode():
        constant((6, 1), torch.device("cpu"))
    with torch.inference_mode():
        assert constant((6, 1), torch.device("cpu")).tolist() == [6, 1]
    x = torch.ones(2, 9, requires_grad=True)
    x.mul(1).index_fill_(-1, constant([6, 1], torch.device("cpu")), 0.0).sum().backward()
    assert x.grad is not None and x.grad[0].tolist() == [1, 0, 1, 1, 1, 1, 0, 1, 1]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(rows=st.integers(1, 40), vocab=st.integers(2, 70), chunk=st.integers(1, 50), dim=st.integers(1, 9))
def test_chunks_change_nothing(rows: int, vocab: int, chunk: int, dim: int) -> None:
    inputs = problem((rows, dim, vocab), FP64)
    leaves = {n: inputs[n].requires_grad_() for n in LEAVES}

    def run(**options: Any) -> list[Tensor]:
        loss, nll = linear_cross_entropy(**inputs, **options)
        return [loss.detach(), nll, *torch.autograd.grad(loss, list(leaves.values()))]

    for a, b in zip(run(impl="chunked", chunk_rows=chunk), run(impl="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunks_are_about_equal_and_bounded() -> None:
    assert module._chunk_rows(2048, 32000, CPU, 0) == 512
    assert module._chunk_rows(600, 126464, CPU, 0) == 200
    assert module._chunk_rows(10, 126464, CPU, 0) == 10
    assert module._chunk_rows(1025, 7, CPU, 1024) == 513


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_are_never_whole() -> None:
    rows, dim, vocab, chunk = 64, 8, 500, 16
    for impl, most in (("chunked", chunk * vocab), ("torch", rows * vocab)):
        inputs = problem((rows, dim, vocab), FP32)
        for name in LEAVES:
            inputs[name].requires_grad_()
        args = [inputs[n] for n in ("hidden", "weight", "targets", "bias", "weights")]
        with Largest() as seen, torch.set_grad_enabled(impl == "torch"):
            if impl == "chunked":
                # the body of the op, which the mode does not look into
                module._chunked_op._init_fn(*args, [], [True] * 3, False, [chunk, 0, 0])  # type: ignore[attr-defined]
            else:
                linear_cross_entropy(*args, impl=impl)[0].backward()
        assert seen.elements == most


def test_used_twice_accumulated_and_scaled() -> None:
    """Gradients add over two backwards of one graph, over uses of one weight, and carry the scale of the loss."""
    inputs = problem((20, 6, 30), FP64)
    grads = {}
    for impl in ("torch", "chunked"):
        weight = inputs["weight"].clone().requires_grad_()
        hidden = torch.tanh(inputs["hidden"] + weight[:20])  # a tied embedding
        halves = (slice(None, 7), slice(7, None))
        total = torch.zeros((), dtype=FP64)
        for part in halves:
            loss, _ = linear_cross_entropy(
                hidden[part], weight, inputs["targets"][part], weights=inputs["weights"][part], impl=impl
            )
            total = total + 2.0**16 * loss
        total.backward(retain_graph=True)
        total.backward()
        grads[impl] = weight.grad
    torch.testing.assert_close(grads["chunked"], grads["torch"], rtol=1e-10, atol=1e-6)


def test_autocast() -> None:
    """The head is cast as F.linear casts it; its gradient is rounded once, to its own dtype."""
    inputs = problem((200, 32, 301), FP32)
    results = {}
    for impl in ("torch", "chunked"):
        leaves = {n: inputs[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")}
        with torch.autocast("cpu", torch.bfloat16):
            loss, nll = linear_cross_entropy(**{**inputs, **leaves}, chunk_rows=50, impl=impl)
        assert loss.dtype == nll.dtype == FP32
        loss.backward()
        results[impl] = [nll, *(leaf.grad for leaf in leaves.values())]
    exact = linear_cross_entropy(**inputs, impl="torch")[1].double()
    assert oracle.error(results["chunked"][0], exact) > 1e-5, "nothing was cast"
    for a, b in zip(results["chunked"], results["torch"], strict=True):
        assert a.dtype == b.dtype == FP32
        assert oracle.error(a, b.double()) < 8e-3


def test_double_backward() -> None:
    inputs = problem((5, 4, 9), FP64)
    hidden = inputs["hidden"].requires_grad_()

    def first(impl: str) -> Tensor:
        return torch.autograd.grad(linear_cross_entropy(**inputs, impl=impl)[0], hidden, create_graph=True)[0]

    assert torch.autograd.grad(first("torch").square().sum(), hidden)[0].count_nonzero()
    with pytest.raises(InputError, match="no second derivative"):
        first("chunked")


def test_gradcheck() -> None:
    inputs = problem((6, 4, 9), FP64)
    leaves = [inputs[n].requires_grad_() for n in LEAVES]

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, inputs["targets"], bias, weights, suppressed=(8,), chunk_rows=4, impl="chunked"
        )[0]

    inputs["targets"] %= 8
    assert torch.autograd.gradcheck(run, leaves)


def test_registration() -> None:
    inputs = problem((6, 4, 9), FP32)
    args = [inputs[n] for n in ("hidden", "weight", "targets", "bias", "weights")]
    for taken in ([True, True, True], [False, True, False], [False] * 3):
        for arg, asks in zip((args[0], args[1], args[3]), taken, strict=True):
            arg.requires_grad_(asks)
        module_args = (*args, [8], taken, False, [4, 0, 0])
        torch.library.opcheck(module._chunked_op, module_args, test_utils=("test_schema", "test_faketensor"))


def test_compiled() -> None:
    """One graph, several numbers of rows, gradients and all."""
    inputs = problem((20, 6, 30), FP32)
    weight, weights = inputs["weight"].requires_grad_(), inputs["weights"]

    def run(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return 3 * linear_cross_entropy(hidden, weight, targets, None, weights, chunk_rows=8, impl="chunked")[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (20, 13, 7):
        args = inputs["hidden"][:rows], inputs["targets"][:rows], weights[:rows]
        got, want = compiled(*args), run(*args)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, weight), torch.autograd.grad(want, weight))


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
def test_nelbo_is_the_same_by_every_impl(monkeypatch: pytest.MonkeyPatch, objective: str, average: str) -> None:
    """The loss, what is logged and every gradient of a model with a tied head and a bias."""
    tokens = torch.randint(10, (5, 12), generator=torch.Generator().manual_seed(3))
    answers = []
    for impl in ("torch", "chunked"):
        model = randomize_(LoopMDM(tiny("dit", tie_word_embeddings=True)))

        def forced(*args: Any, impl: str = impl, **options: Any) -> Any:
            return linear_cross_entropy(*args, impl=impl, **options)

        monkeypatch.setattr("loopmdm.diffusion.loss.linear_cross_entropy", forced)
        out = nelbo(model, tokens, num_loops=2, objective=objective, average=average, seed=1)
        out.loss.backward()
        answers.append([out.loss.detach(), out.nelbo, out.per_sequence, *(p.grad for p in model.parameters())])
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nelbo_of_nothing_masked() -> None:
    model = randomize_(LoopMDM(tiny()))
    tokens = torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(3))
    out = nelbo(model, tokens, mask=torch.zeros(2, 8, dtype=torch.bool), t=torch.tensor([0.5, 0.1]))
    assert out.loss.item() == 0 and out.masked_tokens == 0
    out.loss.backward()
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters())
    assert model.head()[0].grad is not None


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden is \[2, 3, 4\] float32; it must be \[N, D\]"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "floating point"),
        ({"weight": torch.zeros(5, 4)}, r"it must be \[V, 3\]"),
        ({"weight": torch.zeros(5, 3, dtype=BF16)}, "use torch.autocast"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets is \[3\] int64; it must be int64 \[2\]"),
        ({"targets": torch.tensor([0, 5])}, "targets reach from 0 to 5"),
        ({"targets": torch.tensor([-100, 4])}, "leave rows without a target out"),
        ({"bias": torch.zeros(4)}, r"bias is \[4\]"),
        ({"weights": torch.ones(2, dtype=torch.int64)}, "one factor a row"),
        ({"suppressed": (5,)}, "suppressed id 5 is outside"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"impl": "chunkd"}, "did you mean 'chunked'"),
        ({"impl": "liger"}, "impl='liger' cannot run here"),
        ({"impl": "cce"}, "impl='cce' cannot run here"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    good = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.tensor([0, 4])}
    assert linear_cross_entropy(**good)[0].item() == pytest.approx(2 * math.log(5))
    with pytest.raises(InputError, match=says):
        linear_cross_entropy(**{**good, **change})


def test_what_the_libraries_refuse() -> None:
    inputs = problem((6, 4, 9), BF16, "bias weights")
    names = ("hidden", "weight", "targets", "bias", "weights")

    def reason(impl: str, suppressed: tuple[int, ...] = (), **change: Any) -> str | None:
        return module._refuses(impl, *({**inputs, **change}[n] for n in names), suppressed)

    for impl in ("liger", "cce"):
        assert reason(impl) is None and reason(impl, (8, 7)) is None
        assert "cannot suppress ids (3, 8)" in (reason(impl, (3, 8)) or "")
        assert "no rows" in (reason(impl, targets=inputs["targets"][:0]) or "")
        assert "float64" in (reason(impl, hidden=inputs["hidden"].double()) or "")
    assert "float32" in (reason("cce", hidden=inputs["hidden"].float()) or "")
    assert "no bias" in (reason("cce", bias=torch.zeros(9, dtype=BF16)) or "")
    assert reason("liger", bias=torch.zeros(9, dtype=BF16)) is None
    assert "use impl='chunked'" in (reason("triton", hidden=inputs["hidden"].double()) or "")


def test_the_libraries_take_what_we_give_them() -> None:
    """Their signatures, as far as they are installed; a GPU runs them (tests/gpu)."""
    liger = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")
    given = inspect.signature(liger.LigerFusedLinearCrossEntropyFunction.forward).parameters
    assert tuple(given)[1 : len(module.LIGER_ARGUMENTS) + 1] == module.LIGER_ARGUMENTS
    cce = pytest.importorskip("cut_cross_entropy")
    assert {"reduction", "filter_eps"} <= set(inspect.signature(cce.linear_cross_entropy).parameters)


def test_self_check_passes() -> None:
    for impl in ("chunked", *(["torch_native"] if NATIVE else [])):
        for dtype in OP.dtypes:
            assert OP.deviation(impl, CPU, dtype) <= OP.tolerance[dtype]

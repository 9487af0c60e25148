"""compact against a list comprehension."""

import pytest
import torch

from loopmdm.errors import InputError
from loopmdm.ops.compact import OP, compact
from loopmdm.ops.contract import unavailable

DEVICE = {"torch": "cpu", "cpp": "cpu", "cuda": "cuda", "auto": "cpu"}
NO_GPU = pytest.mark.skipif(
    unavailable("cuda", torch.device("cuda")) is not None or not torch.cuda.is_available(),
    reason="compact impl=cuda needs a CUDA device and a CUDA build",
)
IMPLS = ["torch", "cpp", "auto", pytest.param("cuda", marks=NO_GPU)]


def check(mask, capacity, impl):
    got = compact(mask.to(DEVICE[impl]), capacity, impl=impl)
    room = max(mask.numel(), 1) if capacity is None else capacity
    want = [i for i, flag in enumerate(mask.flatten().tolist()) if flag][:room]
    assert got.total.tolist() == [len(want)]
    assert got.rows.tolist() == want + [-1] * (room - len(want))
    assert got.rows.dtype == got.total.dtype == torch.int64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (64, 65), (2, 513), (5, 1300)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_lists(shape, share, impl):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(shape[1])) < share
    for capacity in (None, 1, 7, mask.numel(), mask.numel() + 1000):
        check(mask, capacity, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_empty(impl):
    mask = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    check(mask.t(), None, impl)
    check(mask[:, ::3], 11, impl)
    for shape in ((0, 5), (3, 0)):
        check(torch.ones(shape).bool(), 4, impl)
        check(torch.ones(shape).bool(), None, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    for example in OP.examples:
        given = example(torch.device(DEVICE[impl]), torch.bool, torch.Generator().manual_seed(0))
        torch.library.opcheck(torch.ops.loopmdm.compact.default, (*given.values(), impl))


@pytest.mark.parametrize("impl", ["torch", "cpp", "auto"])
def test_one_graph_under_compile(impl):
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    example = OP.examples[1](torch.device("cpu"), torch.bool, torch.Generator().manual_seed(0))
    for got, want in zip(compiled(**example, impl=impl), compact(**example, impl="torch"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("mask", "capacity", "impl", "message"),
    [
        (torch.ones(2, 3), None, "auto", r"mask is \[2, 3\] torch.float32; compact takes a bool tensor"),
        (torch.ones(3).bool(), None, "auto", r"mask is \[3\] torch.bool"),
        (torch.ones(2, 3).bool(), 0, "auto", "capacity is 0; it must be a whole number of at least 1"),
        (torch.ones(2, 3).bool(), 2.5, "auto", "capacity is 2.5"),
        (torch.ones(2, 3).bool(), None, "cxx", "no impl 'cxx'"),
        (torch.ones(2, 3).bool(), None, "cuda", "impl='cuda' cannot run here"),
    ],
)
def test_errors_speak(mask, capacity, impl, message):
    with pytest.raises(InputError, match=message):
        compact(mask, capacity, impl=impl)

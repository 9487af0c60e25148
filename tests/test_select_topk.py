"""select_topk against a brute-force oracle that shares nothing with it."""

import math
import multiprocessing
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.errors import InputError
from loopmdm.ops.contract import unavailable
from loopmdm.ops.select_topk import OP, select_topk

INF, NAN = math.inf, math.nan
DEVICE = {"torch": "cpu", "cpp": "cpu", "cuda": "cuda", "auto": "cpu"}
NO_GPU = pytest.mark.skipif(
    unavailable("cuda", torch.device("cuda")) is not None or not torch.cuda.is_available(),
    reason="select_topk impl=cuda needs a CUDA device and a CUDA build",
)
IMPLS = ["torch", "cpp", "auto", pytest.param("cuda", marks=NO_GPU)]


def oracle(keys, eligible, k):
    """One row, by repeated search: O(k T) in Python floats."""
    left = [i for i, e in enumerate(eligible) if e]
    picked = [False] * len(keys)
    for _ in range(min(max(k, 0), len(left))):
        best = left[0]
        for i in left[1:]:
            a, b = keys[i], keys[best]
            if (math.isnan(b) and not math.isnan(a)) or a > b:
                best = i
        left.remove(best)
        picked[best] = True
    return picked


def check(keys, eligible, k, impl):
    keys = torch.as_tensor(keys, dtype=torch.float32)
    eligible, k = torch.as_tensor(eligible, dtype=torch.bool), torch.as_tensor(k, dtype=torch.int64)
    got = select_topk(*(x.to(DEVICE[impl]) for x in (keys, eligible, k)), impl=impl)
    assert got.dtype == torch.bool and got.shape == keys.shape
    want = [oracle(*row) for row in zip(keys.double().tolist(), eligible.tolist(), k.tolist(), strict=True)]
    assert got.tolist() == want


def coarse(rows, cols, seed, values=(NAN, INF, -INF, -0.0, 0.0)):
    """Many ties, every special value, about 70% eligible."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, cols, generator=rng).mul(3).round().div(3)
    for value in values:
        keys[torch.rand(keys.shape, generator=rng) < 0.05] = value
    return keys, torch.rand(keys.shape, generator=rng) < 0.7


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 31), (7, 33), (2, 127), (64, 65), (5, 513), (1, 1025), (13, 97)])
def test_shapes(shape, impl):
    keys, eligible = coarse(*shape, seed=shape[1])
    k = torch.randint(-1, shape[1] + 2, shape[:1], generator=torch.Generator().manual_seed(1))
    check(keys, eligible, k, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", range(-1, 9))
def test_special_values_in_order(k, impl):
    #      +inf, largest, tie of zeros, smallest denormal pair, lowest, -inf, NaN
    row = [NAN, -INF, -3.4e38, -1e-45, -0.0, 0.0, 1e-45, INF]
    check([row, row[::-1]], torch.ones(2, 8), [k, k], impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_below_minus_infinity_and_still_picked(impl):
    signed = torch.tensor([[NAN, -INF, NAN, -INF]])
    signed[0, 2] = signed[0, 2].neg()  # the sign bit of a NaN must not matter
    for k, want in [(1, [0, 1, 0, 0]), (2, [0, 1, 0, 1]), (3, [1, 1, 0, 1]), (4, [1, 1, 1, 1])]:
        where = DEVICE[impl]
        out = select_topk(signed.to(where), torch.ones(1, 4).bool().to(where), torch.tensor([k]).to(where), impl=impl)
        assert out[0].tolist() == [bool(w) for w in want]


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_index(impl):
    cols = 1500
    eligible = torch.ones(3, cols).bool()
    eligible[1, ::2] = False
    k = torch.tensor([700, 300, cols - 1])
    check(torch.zeros(3, cols), eligible, k, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_none_and_all_eligible(impl):
    keys, _ = coarse(4, 50, seed=3)
    eligible = torch.tensor([[False] * 50, [True] * 50, [False] * 50, [True] * 50])
    check(keys, eligible, [5, 5, 2**62, 2**62], impl)
    check(keys, eligible, [0, 0, -(2**62), -(2**62)], impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_long_rows(impl):
    """16384 positions: a numpy stable sort is the oracle, the brute force would take minutes."""
    keys, eligible = coarse(3, 16384, seed=5, values=(INF, -INF))
    k = torch.tensor([1, 5000, 11000])
    got = select_topk(*(x.to(DEVICE[impl]) for x in (keys, eligible, k)), impl=impl).cpu()
    for row in range(3):
        places = eligible[row].nonzero().flatten().numpy()
        best = places[(-keys[row].double().numpy()[places]).argsort(kind="stable")[: k[row]]]
        assert sorted(best.tolist()) == got[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_eligible_nan_goes_before_what_is_not_eligible(impl):
    """The last pick is one of several NaN, with an ineligible position before them."""
    nan = float("nan")
    keys = torch.tensor([[5.0, nan, nan, 1.0, nan]], device=DEVICE[impl])
    eligible = torch.tensor([[False, True, True, True, False]], device=DEVICE[impl])
    picked = select_topk(keys, eligible, torch.tensor([2], device=DEVICE[impl]), impl=impl)
    assert picked.tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_input(impl, data):
    rows, cols = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    value = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, NAN, INF, -INF]))
    keys = data.draw(st.lists(st.lists(value, min_size=cols, max_size=cols), min_size=rows, max_size=rows))
    flags = st.lists(st.booleans(), min_size=cols, max_size=cols)
    eligible = data.draw(st.lists(flags, min_size=rows, max_size=rows))
    k = data.draw(st.lists(st.integers(-2, cols + 2), min_size=rows, max_size=rows))
    check(keys, eligible, k, impl)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(shape, impl):
    where = DEVICE[impl]
    inputs = torch.rand(shape), torch.ones(shape).bool(), torch.ones(shape[0]).long()
    assert select_topk(*(x.to(where) for x in inputs), impl=impl).shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    keys, eligible = coarse(40, 9, seed=2)
    check(keys.t(), eligible.t(), torch.arange(18)[::2], impl)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_thread_count_does_not_matter(threads):
    keys, eligible = coarse(300, 4096, seed=4, values=())  # eight workers, and time for them to meet
    k = torch.arange(300) * 8
    want = select_topk(keys, eligible, k, impl="torch")
    for count in (1, 2, 3, 8):
        threads(count)
        assert torch.equal(select_topk(keys, eligible, k, impl="cpp"), want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_after_fork(threads):
    """Only ours runs in the child: torch's own pool does not survive a fork."""
    threads(4)
    keys, eligible = coarse(67, 2048, seed=4)
    inputs = keys, eligible, torch.arange(67) * 20
    want = select_topk(*inputs, impl="cpp").numpy().tobytes()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(select_topk(*inputs, impl="cpp").numpy().tobytes()))
    child.start()
    try:
        assert here.poll(60), "the child hangs"
        assert here.recv() == want
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    example = OP.examples[0](torch.device(DEVICE[impl]), torch.float32, torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.loopmdm.select_topk.default, (*example.values(), impl))


@pytest.mark.parametrize("impl", ["torch", "cpp", "auto"])
def test_one_graph_under_compile(impl):
    compiled = torch.compile(select_topk, fullgraph=True, backend="aot_eager")
    example = OP.examples[0](torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    assert torch.equal(compiled(**example, impl=impl), select_topk(**example, impl="torch"))


def test_auto_uses_cpp_here_and_agrees():
    assert OP.choose("auto", torch.device("cpu"), torch.float32, rows=8, cols=256).impl == "cpp"
    assert OP.deviation("cpp", torch.device("cpu"), torch.float32) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.rand(2, 3).double()}, r"keys is \[2, 3\] float64"),
        ({"keys": torch.rand(6)}, r"keys is \[6\] float32"),
        ({"eligible": torch.ones(2, 3)}, r"eligible is \[2, 3\] float32; it must be bool"),
        ({"eligible": torch.ones(2, 4).bool()}, r"eligible is \[2, 4\] bool; it must be bool and \[2, 3\]"),
        ({"k": torch.ones(2)}, r"k is \[2\] float32; it must be int64"),
        ({"k": torch.ones(3).long()}, r"k is \[3\] int64; it must be int64 and \[2\]"),
        ({"k": torch.ones(2).long().to("meta")}, "k on meta; move them to one device"),
        ({"impl": "cxx"}, "no impl 'cxx'"),
        ({"impl": "triton"}, "no impl 'triton'"),
        ({"impl": "cuda"}, "impl='cuda' cannot run here"),
    ],
)
def test_errors_speak(change, message):
    good = {"keys": torch.rand(2, 3), "eligible": torch.ones(2, 3).bool(), "k": torch.ones(2).long()}
    with pytest.raises(InputError, match=message):
        select_topk(**{**good, **change})

"""select_scatter against one sequence at a time in Python lists and fractions; batch, padding, threads and order of
the sequences change nothing."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from loopmdm.errors import InputError
from loopmdm.ops.compact import compact
from loopmdm.ops.contract import unavailable
from loopmdm.ops.select_scatter import OP, RULES, select_scatter
from loopmdm.ops.select_topk import select_topk

INF, NAN, MASK = math.inf, math.nan, 99
CPU = torch.device("cpu")
DEVICE = {"torch": "cpu", "cpp": "cpu", "cuda": "cuda", "auto": "cpu"}
NO_GPU = pytest.mark.skipif(
    unavailable("cuda", torch.device("cuda")) is not None or not torch.cuda.is_available(),
    reason="select_scatter impl=cuda needs a CUDA device and a CUDA build",
)
IMPLS = ["torch", "cpp", "auto", pytest.param("cuda", marks=NO_GPU)]


# One sequence in Python


def rank(score):
    """What sorts positions, smallest first: NaN last, -0.0 like 0.0."""
    return (1, 0.0) if math.isnan(score) else (0, -score)


def holds(rule, bound, n, scores):
    """Of the n best scores; exact."""
    last = scores[-1]
    if rule == "top_k" or math.isnan(last) or math.isnan(bound):
        return False
    if rule == "threshold":
        return last >= torch.tensor(bound).float().item()
    if bound < 0 or (last == -INF and (rule == "sum" or bound < INF)):
        return False
    if rule == "factor":
        return bound == INF or last == INF or Fraction(last) >= 1 - Fraction(bound) / (n + 1)
    total = sum(256 if s == -INF else min(256, Fraction(math.ceil(Fraction(-min(s, 0.0)) * 2**36), 2**36))
                for s in scores[:-1])  # fmt: skip
    return bound == INF or total <= Fraction(bound)


def plain(c, b):
    """(tokens, masked, done, revealed, remasked) of sequence b of a case."""
    T = c["scores"].shape[1]
    scores, proposed, tokens = (c[name][b].tolist() for name in ("scores", "proposed", "tokens"))
    masked, eligible = c["masked"][b].tolist(), c["eligible"][b].tolist()
    again, ends = ([False] * T if c[name] is None else c[name][b].tolist() for name in ("again", "ends"))
    done, k, remask = bool(c["done"][b]), int(c["k"][b]), c["remask"]
    if done:
        return tokens, masked, True, [False] * T, [False] * T
    ranked = [i for i in range(T) if eligible[i] and (proposed[i] >= 0 if masked[i] else remask)]
    ranked.sort(key=lambda i: (*rank(scores[i]), i))
    n = 0
    while n < len(ranked) and (
        n + 1 <= k or holds(c["rule"], float(c["bound"][b]), n + 1, [scores[i] for i in ranked[: n + 1]])
    ):
        n += 1
    best = set(ranked[:n])
    revealed = [masked[i] and i in best for i in range(T)]
    remasked = [not masked[i] and (again[i] or i in set(ranked) - best) for i in range(T)]
    tokens = [proposed[i] if revealed[i] else MASK if remasked[i] else tokens[i] for i in range(T)]
    masked = [(masked[i] and not revealed[i]) or remasked[i] for i in range(T)]
    eos = c["eos"].tolist() if c["ends"] is not None else []
    for i in range(T):
        if masked[i]:
            break
        if ends[i] and tokens[i] in eos:
            done = True
    if not any(masked) and not remask and c["again"] is None:
        done = True
    return tokens, masked, done, revealed, remasked


def case(rng, rows, cols, rule, *, remask=False, again=False, ends=False, special=0.03):
    def chance(p, *shape):
        return torch.rand(*(shape or (rows, cols)), generator=rng) < p

    scores = torch.rand(rows, cols, generator=rng).mul(16).round().div(16)
    scores = -scores if rule == "sum" else scores
    for value in (NAN, INF, -INF, -0.0):
        scores[chance(special)] = value
    masked = chance(0.6)
    masked[chance(0.15, rows)], masked[chance(0.15, rows)] = True, False
    length = torch.randint(0, cols + 1, (rows,), generator=rng)  # unequal prompts and padding
    real = torch.arange(cols) < length[:, None]
    choices = torch.tensor([-1, 0, 1, 2, cols // 2, cols + 3, 2**62])
    bounds = {"top_k": [0.0], "threshold": [0.5, 0.8125, -INF, 1.0, NAN], "factor": [0.0, 1.0, 1.5, 4.0, -1.0, INF],
              "sum": [0.0, 0.25, 1.0, 3.0, -1.0, NAN, INF]}[rule]  # fmt: skip
    return {
        "scores": scores,
        "proposed": torch.randint(-1, 9, (rows, cols), generator=rng),
        "tokens": torch.randint(0, 9, (rows, cols), generator=rng).masked_fill(masked & real, MASK),
        "masked": masked & real,
        "eligible": chance(0.85) & real,
        "k": choices[torch.randint(0, len(choices), (rows,), generator=rng)],
        "bound": torch.tensor(bounds, dtype=torch.float64)[torch.randint(0, len(bounds), (rows,), generator=rng)],
        "again": chance(0.1) & real if again else None,
        "eos": torch.tensor([3, 5]) if ends else None,
        "ends": chance(0.3) & real if ends else None,
        "done": chance(0.1, rows),
        "rule": rule,
        "remask": remask,
    }


def run(c, impl):
    """The op on a copy of a case; its five results on the CPU."""
    fresh = {n: x.clone().to(DEVICE[impl]) if isinstance(x, torch.Tensor) else x for n, x in c.items()}
    out = select_scatter(**fresh, mask_id=MASK, impl=impl)
    assert out.tokens is fresh["tokens"] and out.masked is fresh["masked"] and out.done is fresh["done"]
    return [x.cpu() for x in out]


def check(c, impl):
    want = [plain(c, b) for b in range(len(c["k"]))]
    for name, got, expected in zip(
        ("tokens", "masked", "done", "revealed", "remasked"), run(c, impl), zip(*want, strict=True), strict=True
    ):
        assert got.tolist() == list(expected), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_random_cases(rule, impl):
    """200 in all: ties, infinities, NaN, any k, none and all masked, unequal lengths, remasking, ends."""
    rng = torch.Generator().manual_seed(RULES.index(rule))
    for i in range(50):
        cols = [1, 2, 31, 33, 64, 100, 129][i % 7]
        check(case(rng, 5, cols, rule, remask=i % 3 == 1, again=i % 4 == 2, ends=i % 2 == 1), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_long_rows(rule, impl):
    """16384 positions, against select_topk with the count that each rule gives."""
    rng = torch.Generator().manual_seed(3)
    T = 16384
    c = case(rng, 3, T, rule, special=0.0)
    c["scores"] = torch.rand(3, T, generator=rng) * (1e-3 if rule == "sum" else 1.0) * (-1 if rule == "sum" else 1)
    c["masked"], c["eligible"], c["done"] = torch.ones(3, T).bool(), torch.ones(3, T).bool(), torch.zeros(3).bool()
    c["proposed"], c["k"] = c["proposed"].clamp(min=0), torch.tensor([0, 1, 7000])
    c["bound"] = torch.tensor({"threshold": 0.6, "factor": 40.0}.get(rule, 2.5), dtype=torch.float64).expand(3)
    ranked = c["scores"].double().sort(-1, descending=True).values
    n = torch.arange(1, T + 1, dtype=torch.float64)
    count = {
        "top_k": torch.zeros(3).long(),
        "threshold": (ranked >= 0.6).sum(-1),
        "factor": (ranked >= 1 - 40.0 / (n + 1)).long().cumprod(-1).sum(-1),
        "sum": ((-ranked).cumsum(-1) + ranked <= 2.5).sum(-1),
    }[rule]
    want = select_topk(c["scores"], c["eligible"], torch.maximum(c["k"], count), impl="torch")
    assert rule == "top_k" or 10 < int(count[0]) < T - 1000
    assert torch.equal(run(c, impl)[3], want)


@pytest.mark.parametrize("impl", IMPLS)
def test_rules_by_hand(impl):
    """The bounds are inclusive, the first is taken only if k asks for it or the rule holds."""

    def shown(rule, bound, scores, k=0):
        x = torch.tensor([scores])
        c = {
            "scores": x, "proposed": torch.zeros_like(x).long(), "tokens": torch.full_like(x, MASK).long(),
            "masked": torch.ones_like(x).bool(), "eligible": torch.ones_like(x).bool(), "k": torch.tensor([k]),
            "bound": torch.tensor([bound], dtype=torch.float64), "rule": rule, "done": torch.tensor([False]),
        }  # fmt: skip
        return run(c, impl)[3][0].long().tolist()

    assert shown("threshold", 0.5, [0.5, 0.25, 0.75]) == [1, 0, 1]
    assert shown("threshold", 0.9, [0.5, 0.25, 0.75]) == [0, 0, 0]
    assert shown("threshold", 0.9, [0.5, 0.25, 0.75], k=1) == [0, 0, 1]
    assert shown("threshold", 0.1, [0.5, NAN, -INF]) == [1, 0, 0]
    # 1/2 >= 1 - f/2 for one, 1/4 >= 1 - f/3 for two, 1/8 >= 1 - f/4 for three
    assert shown("factor", 1.0, [0.125, 0.5, 0.25]) == [0, 1, 0]
    assert shown("factor", 2.25, [0.125, 0.5, 0.25]) == [0, 1, 1]
    assert shown("factor", 3.5, [0.125, 0.5, 0.25]) == [1, 1, 1]
    assert shown("factor", 0.75, [0.125, 0.5, 0.25]) == [0, 0, 0]
    # entropies 1, 2 and 3: nothing before the first, 1 before the second, 3 before the third
    assert shown("sum", 0.0, [-2.0, -1.0, -3.0]) == [0, 1, 0]
    assert shown("sum", 1.0, [-2.0, -1.0, -3.0]) == [1, 1, 0]
    assert shown("sum", 3.0 - 1e-12, [-2.0, -1.0, -3.0]) == [1, 1, 0]
    assert shown("sum", 3.0, [-2.0, -1.0, -3.0]) == [1, 1, 1]
    assert shown("sum", 0.0, [-1e-30, -1e-30, -1e-30]) == [1, 0, 0]  # rounded up, never to nothing
    assert shown("sum", 0.0, [0.5, 0.0, -0.0]) == [1, 1, 1]


# Whatever shares the batch


def test_what_shares_the_batch_changes_nothing():
    """Each sequence by itself, in another order, with padding columns, and compacted to those that are not done."""
    rng = torch.Generator().manual_seed(8)
    for rule in RULES:
        c = case(rng, 9, 70, rule, remask=True, again=True, ends=True)
        want = run(c, "cpp")
        per_row = [n for n, x in c.items() if isinstance(x, torch.Tensor) and n != "eos"]
        order = torch.randperm(9, generator=rng)
        for rows in (order, (~c["done"]).nonzero()[:, 0], *torch.arange(9)[:, None]):
            some = run(c | {n: c[n][rows] for n in per_row}, "cpp")
            assert all(torch.equal(got, full[rows]) for got, full in zip(some, want, strict=True))
        wide = {n: torch.nn.functional.pad(c[n], (0, 30)) if c[n].ndim == 2 else c[n] for n in per_row}
        assert all(
            torch.equal(got[:, :70] if got.ndim == 2 else got, full)
            for got, full in zip(run(c | wide, "cpp"), want, strict=True)
        )


def test_thread_count_does_not_matter():
    before = torch.get_num_threads()
    c = case(torch.Generator().manual_seed(4), 150, 2048, "sum", remask=True, ends=True)  # 18 workers at most
    want = run(c, "torch")
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(c, "cpp"), want, strict=True))
    finally:
        torch.set_num_threads(before)


def test_it_counts_what_compact_lists():
    """Rows listed by compact, scores scattered back: the same step as on the whole."""
    rng = torch.Generator().manual_seed(2)
    c = case(rng, 6, 50, "top_k")
    rows, total = compact(c["masked"], 400)
    back = torch.full((301,), NAN).scatter(0, torch.where(rows < 0, 300, rows), c["scores"].view(-1)[rows.clamp(min=0)])
    scattered = c | {"scores": torch.where(c["masked"], back[:300].view(6, 50), 0.0)}
    assert int(total) == int(c["masked"].sum())
    assert all(torch.equal(a, b) for a, b in zip(run(scattered, "cpp"), run(c, "cpp"), strict=True))


# Registration, the self-check, refusals


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    c = case(torch.Generator().manual_seed(0), 3, 20, "threshold", again=True, ends=True)
    names = ("scores", "proposed", "tokens", "masked", "eligible", "k", "bound", "eos", "again", "ends", "done")
    given = [c[name].to(DEVICE[impl]) for name in names]
    torch.library.opcheck(torch.ops.loopmdm.select_scatter.default, (*given, "threshold", MASK, True, impl))


@pytest.mark.parametrize("impl", ["torch", "cpp", "auto"])
def test_one_graph_under_compile(impl):
    torch._dynamo.reset()  # the rules are compiled one by one, and their number is bounded
    compiled = torch.compile(select_scatter, fullgraph=True, backend="aot_eager")
    for seed, build in enumerate(OP.examples):
        a, b = (build(CPU, torch.float32, torch.Generator().manual_seed(seed)) for _ in range(2))
        for got, want in zip(compiled(**a, impl=impl), select_scatter(**b, impl="torch"), strict=True):
            assert torch.equal(got, want)


def test_a_tracer_sees_the_op():
    c = good()

    def revealed(scores):
        return select_scatter(**c | {"scores": scores}, mask_id=MASK, impl="cpp").revealed

    targets = [node.target for node in make_fx(revealed)(c["scores"]).graph.nodes]
    assert torch.ops.loopmdm.select_scatter.default in targets


def test_cpp_agrees_on_the_examples():
    for seed in range(20):
        assert OP.deviation("cpp", CPU, torch.float32, seed) == 0.0


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(shape, impl):
    c = case(torch.Generator().manual_seed(0), 3, 5, "top_k", ends=True)
    sized = {n: x[: shape[0], : shape[1]] if x.ndim == 2 else x[: shape[0]]
             for n, x in c.items() if isinstance(x, torch.Tensor) and n != "eos"}  # fmt: skip
    sized = {n: x.contiguous() for n, x in sized.items()}
    assert run(c | sized, impl)[3].shape == shape


def good():
    """Three columns, so that some of the tensors below fit."""
    return case(torch.Generator().manual_seed(1), 2, 3, "threshold", again=True, ends=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "tresh"}, "unknown rule 'tresh'; did you mean 'threshold'"),
        ({"bound": None}, r"rule 'threshold' needs a bound, float64 \[B\]"),
        ({"eos": None}, "eos and ends come together"),
        ({"scores": torch.rand(2, 3).double()}, r"scores is float64 \[2, 3\]; it must be float32"),
        ({"scores": torch.rand(6)}, r"scores is \[6\]"),
        ({"tokens": torch.ones(2, 3)}, r"tokens is float32 \[2, 3\]; it must be int64 \[2, 3\]"),
        ({"k": torch.ones(3).long()}, r"k is int64 \[3\]; it must be int64 \[2\]"),
        ({"bound": torch.ones(2)}, r"bound is float32 \[2\]; it must be float64 \[2\]"),
        ({"eos": torch.ones(2, 1).long()}, r"eos is int64 \[2, 1\]; it must be int64 \[2\]"),
        ({"again": torch.ones(2, 4).bool()}, r"again is bool \[2, 4\]; it must be bool \[2, 3\]"),
        ({"done": torch.zeros(2).bool().to("meta")}, "done is on meta and scores on cpu; move them to one device"),
        ({"masked": torch.ones(3, 2).bool().t()}, "masked is written in place and must be contiguous"),
        ({"impl": "cxx"}, "no impl 'cxx'"),
        ({"impl": "cuda"}, "impl='cuda' cannot run here"),
    ],
)
def test_errors_speak(change, message):
    with pytest.raises(InputError, match=message):
        select_scatter(**{**good(), "mask_id": MASK, **change})


def test_a_sum_is_over_at_most_262144_positions():
    c = good() | {"rule": "sum"}
    longer = {n: x[:, :1].expand(2, 2**18 + 1).contiguous() for n, x in c.items()
              if isinstance(x, torch.Tensor) and x.ndim == 2}  # fmt: skip
    with pytest.raises(InputError, match="rule 'sum' takes at most 262144"):
        select_scatter(**{**c, **longer}, mask_id=MASK)


WRONG = st.one_of(
    st.none(), st.integers(-3, 2**63 - 1), st.floats(), st.text(max_size=3), st.sampled_from(RULES),
    st.builds(
        lambda dtype, shape, step: torch.zeros([*shape, 6], dtype=dtype)[..., ::step],
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int32, torch.bool, torch.bfloat16]),
        st.lists(st.integers(0, 4), max_size=3), st.integers(1, 3),
    ),
)  # fmt: skip


def fuzz(arguments, impl):
    """Any arguments: a step of the right shapes, or one clear sentence."""
    c = {**good(), **arguments}
    try:
        out = select_scatter(**c, mask_id=MASK, impl=impl)
    except InputError as error:
        assert 10 < len(str(error)) < 300 and "\n" not in str(error)
    else:
        assert out.revealed.shape == out.tokens.shape == c["scores"].shape


ANY = st.dictionaries(st.sampled_from([n for n in good() if n != "remask"]), WRONG, max_size=3)


@given(arguments=ANY, impl=st.sampled_from(["torch", "cpp", "auto"]))
@settings(deadline=None, derandomize=True, max_examples=300)
@example(arguments={"tokens": 3}, impl="cpp")
def test_any_arguments(arguments, impl):
    fuzz(arguments, impl)


@pytest.mark.slow
@given(arguments=ANY, impl=st.sampled_from(["torch", "cpp", "auto"]))
@settings(deadline=None, max_examples=15_000)
def test_any_arguments_for_a_minute(arguments, impl):
    fuzz(arguments, impl)

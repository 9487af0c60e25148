"""DepthTable: its bins, its file, its refusals; solve against every possible assignment."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.errors import InputError
from loopmdm.sampling.depth import DepthTable, solve

# DepthTable


def test_bins_are_open_below_and_closed_above():
    table = DepthTable((0, 0.25, 0.5, 1), (1, 7, 3))
    t = torch.tensor([1e-6, 0.25, 0.2500001, 0.5, 0.51, 1.0])
    got = table(t)
    assert got.tolist() == [1, 1, 7, 7, 3, 3] and got.dtype == torch.int64
    assert DepthTable.constant(5)(t).tolist() == [5] * 6


def test_json_and_back(tmp_path):
    table = DepthTable([0, 0.1, 1.0], [2, 12])
    assert DepthTable.from_json(table.to_json(seed=3)) == table
    assert json.loads(table.to_json(seed=3)) == {"edges": [0.0, 0.1, 1.0], "loops": [2, 12], "seed": 3}
    table.save(tmp_path / "depth.json", budget=0.5)
    assert DepthTable.load(tmp_path / "depth.json") == table
    assert [p.name for p in tmp_path.iterdir()] == ["depth.json"]


@pytest.mark.parametrize(
    ("edges", "loops", "message"),
    [
        ((0, 1), (0,), "a depth table's S is 0"),
        ((0, 1), (1.5,), "S is 1.5"),
        ((0, 1), (True,), "S is True"),
        ((0, 1), (1, 2), "1 bins needs as many S; it has 2"),
        ((0, 0.5, 0.5, 1), (1, 2, 3), "rise from 0 to 1"),
        ((0.1, 1), (1,), "rise from 0 to 1"),
        ((0, 0.9), (1,), "rise from 0 to 1"),
        ((0,), (), "rise from 0 to 1"),
        ((0, math.nan, 1), (1, 2), "rise from 0 to 1"),
        ((0, "1"), (1,), "edges are numbers"),
        (None, (1,), "two lists, its edges and the S between them"),
        ((0, 1), 5, "two lists"),
    ],
)
def test_tables_that_are_none(edges, loops, message):
    with pytest.raises(InputError, match=message):
        DepthTable(edges, loops)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "an object|JSON object"),
        ('{"edges": [0, 1]}', "`edges` and `loops`"),
        ('{"edges": [0, 1], "loops": 3}', "`edges` and `loops`"),
        ('{"edges": [0, 1], "loops": ["3"]}', "S is '3'"),
        ('{"edges": [0, NaN], "loops": [3]}', "rise from 0 to 1"),
    ],
)
def test_files_that_are_none(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        DepthTable.from_json(text)
    (tmp_path / "depth.json").write_text(text)
    with pytest.raises(InputError, match=f"depth.json: .*({message})"):
        DepthTable.load(tmp_path / "depth.json")


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        DepthTable.load(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        DepthTable.load(tmp_path / "binary")
    with pytest.raises(InputError, match="cannot write"):
        DepthTable.constant(1).save(tmp_path / "no" / "depth.json")


# solve


def best(cost, loss, weights, limit):
    """(loss, choice) of the best assignment whose cost is at most `limit`, by trying all of them."""
    found = []
    for choice in itertools.product(range(len(cost)), repeat=len(loss)):
        if spent(cost, weights, choice) <= limit * (1 + 1e-9):
            found.append((total(loss, choice), choice))
    return min(found)


def spent(cost, weights, choice):
    return math.fsum(w * cost[k] for w, k in zip(weights, choice, strict=True)) / sum(weights)


def total(loss, choice):
    return math.fsum(float(loss[b][k]) for b, k in enumerate(choice))


def hull_steps(cost, row):
    """Indices of the lower convex hull of (cost, row), from the cheapest to the lowest, and the rate of each step."""
    order = sorted(range(len(cost)), key=lambda k: cost[k])
    points, steps = [order[0]], []
    while True:
        now = points[-1]
        rates = [((row[now] - row[k]) / (cost[k] - cost[now]), k) for k in order if cost[k] > cost[now]]
        rates = [r for r in rates if r[0] > 0]
        if not rates:
            return steps
        rate, k = max(rates)
        points.append(k)
        steps.append((rate, now, k))


def breakpoints(cost, loss, weights):
    """Budgets in FLOPs that taking the hull steps of all bins in the order of their rates passes through."""
    share = [w / sum(weights) for w in weights]
    steps = [
        (rate / share[b], share[b] * (cost[k] - cost[now]))
        for b, row in enumerate(loss.tolist())
        for rate, now, k in hull_steps(cost, row)
    ]
    steps.sort(reverse=True)
    return [min(cost) + sum(extra for _, extra in steps[:n]) for n in range(len(steps) + 1)]


def tables(convex=False):
    """Random (cost, loss, weights) of up to 4 bins and 4 columns, from a seed."""
    return st.integers(0, 2**32).map(lambda seed: a_table(random.Random(seed), convex))


def a_table(rng, convex):
    bins, K = rng.randint(1, 4), rng.randint(1, 4)
    cost = rng.sample(range(1, 40), K)
    weights = [rng.uniform(0.1, 1) for _ in range(bins)]
    if not convex:
        return cost, torch.tensor([[rng.uniform(-1, 1) for _ in cost] for _ in range(bins)]).double(), weights
    cost.sort()
    rows = []
    for _ in range(bins):
        slopes = sorted((rng.uniform(0.01, 1) for _ in cost[1:]), reverse=True)
        falls = itertools.accumulate(s * (b - a) for s, a, b in zip(slopes, cost, cost[1:], strict=False))
        rows.append([0.0, *(-fall for fall in falls)])
    return cost, torch.tensor(rows, dtype=torch.float64), weights


@settings(max_examples=150)
@given(tables())
def test_optimal_at_the_hull_s_breakpoints(table):
    cost, loss, weights = table
    for limit in breakpoints(cost, loss, weights):
        choice = solve(cost, loss, weights, min(1.0, limit / max(cost)))
        assert spent(cost, weights, choice) <= limit * (1 + 1e-9)
        assert total(loss, choice) == pytest.approx(best(cost, loss, weights, limit)[0], abs=1e-9)


@settings(max_examples=150)
@given(tables(), st.floats(0, 1))
def test_budget_kept_and_never_worse_than_a_constant(table, place):
    cost, loss, weights = table
    budget = min(1.0, min(cost) / max(cost) * (1 - place) + place)
    choice = solve(cost, loss, weights, budget)
    assert spent(cost, weights, choice) <= budget * max(cost) * (1 + 1e-9)
    for k, price in enumerate(cost):
        if price <= budget * max(cost):
            assert total(loss, choice) <= total(loss, [k] * len(loss)) + 1e-12
    # nothing that would still fit is left lying
    for b, k in itertools.product(range(len(loss)), range(len(cost))):
        changed = [*choice[:b], k, *choice[b + 1 :]]
        if spent(cost, weights, changed) <= budget * max(cost):
            assert total(loss, changed) >= total(loss, choice) - 1e-12


@settings(max_examples=100)
@given(tables(convex=True))
def test_as_good_as_every_constant_of_its_own_cost(table):
    cost, loss, weights = table
    for k, price in enumerate(cost):
        choice = solve(cost, loss, weights, price / max(cost))
        assert total(loss, choice) <= total(loss, [k] * len(loss)) + 1e-12


@settings(max_examples=50)
@given(tables())
def test_all_of_the_budget_gives_the_best_of_every_bin(table):
    cost, loss, weights = table
    choice = solve(cost, loss, weights, 1.0)
    assert [float(row[k]) for row, k in zip(loss, choice, strict=True)] == loss.min(1).values.tolist()


def test_a_step_that_is_useless_alone_is_no_dead_end():
    # bin 0 gains nothing from S = 2 and much from S = 3; bin 1 a little from each
    cost, loss = [1.0, 2.0, 3.0], torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.9, 0.85]])
    assert solve(cost, loss, [1, 1], 2 / 3) == [2, 0]
    assert solve(cost, loss, [1, 1], 2.5 / 3) == [2, 1]


def test_bins_that_see_more_passes_pay_more():
    cost, loss = [1.0, 2.0], torch.tensor([[1.0, 0.5], [1.0, 0.6]])
    assert solve(cost, loss, [1, 1], 0.75) == [1, 0]
    assert solve(cost, loss, [3, 1], 0.75) == [0, 1]  # bin 0 would need 1.75 of 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 1.1}, "budget is 1.1"),
        ({"budget": math.nan}, "budget is nan"),
        ({"budget": 0.3}, "the smallest S alone takes 0.500 of the FLOPs"),
        ({"cost": [1.0]}, r"loss is \[1, 2\]; expected \[1, 1\]"),
        ({"weights": [1.0, 1.0]}, r"expected \[2, 2\]"),
        ({"cost": [0.0, 1.0]}, "above 0"),
        ({"weights": [-1.0]}, "above 0"),
        ({"loss": torch.tensor([[math.inf, 0.0]])}, "not all finite"),
        ({"loss": torch.zeros(1, 0), "cost": []}, "loss is"),
    ],
)
def test_solve_refuses(changes, message):
    settings = {"cost": [1.0, 2.0], "loss": torch.tensor([[1.0, 0.5]]), "weights": [1.0], "budget": 0.8, **changes}
    with pytest.raises(InputError, match=message):
        solve(**settings)

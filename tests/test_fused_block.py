"""A looped block through the fused ops is the block: every S, every boundary, no work for sequences that have left."""

import pytest
import torch

from loopmdm.errors import InputError
from loopmdm.model import fused_layers as module
from loopmdm.model.block import Context
from loopmdm.model.depth import Depth, RelativeChange
from loopmdm.model.loop import LoopedBlock
from loopmdm.ops.rotate import rope_table
from loopmdm.ops.spans import spans_of

from .helpers import ids, live, tiny

LOOPS = (1, 4, 12, 24)
B, T, D = 5, 9, 32
F64 = torch.float64
KINDS = [(backbone, boundary) for backbone in ("llama", "dit") for boundary in ("plain", "anchored")]


def made(backbone, boundary="plain", dtype=F64, **changes):
    return live(tiny(backbone, boundary=boundary, **changes), dtype=dtype).loop


def state(dtype=F64, mean=3.0):
    rng = torch.Generator().manual_seed(5)
    return (torch.randn(B, T, D, generator=rng) + mean).to(dtype)


def branch_error(got, want, x):
    return ((got - want).double().norm() / (want - x).double().norm()).item()


@pytest.mark.parametrize("backbone, boundary", KINDS)
def test_it_is_the_block(backbone, boundary):
    block, x = made(backbone, boundary), state()
    plan, each = block.fused(), torch.tensor([3, 1, 24, 4, 1])
    with torch.no_grad():
        for S in (*LOOPS, each):
            torch.testing.assert_close(plan(x, S), block(x, S), rtol=0, atol=1e-11)
        assert torch.equal(plan(x), plan(x, 3)), "max_loops is 3"


@pytest.mark.parametrize("backbone, boundary", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_errors_relative_to_the_branch(backbone, boundary, dtype, bound):
    """An fp32 stream; bf16 is what is multiplied in. tests/test_fused.py bounds it closer."""
    block, x = made(backbone, boundary), state()
    plan = made(backbone, boundary, torch.float32).fused(dtype)
    with torch.no_grad():
        for S in LOOPS if dtype == torch.float32 else (1, 4):
            got = plan(x.float(), S)
            assert got.dtype == torch.float32
            assert branch_error(got, block(x, S), x) < bound


@pytest.mark.parametrize("backbone, boundary", KINDS)
def test_exits(backbone, boundary):
    """Sequences stop where the block's do, and leave their record."""
    block, x = made(backbone, boundary), state()
    block(x, found := Depth(24, early_exit=Never(record := [])))
    changes = torch.stack(record)  # [visits, B]
    tau = float(changes[3].median()) * 1.0001
    ours, theirs = (Depth(24, early_exit=RelativeChange(tau, 2)) for _ in range(2))
    plan = block.fused()
    with torch.no_grad():
        torch.testing.assert_close(plan(x, ours), block(x, theirs), rtol=0, atol=1e-11)
    assert torch.equal(ours.visits, theirs.visits) and len(set(theirs.visits.tolist())) > 1
    assert found.visits.tolist() == [24] * B
    with torch.no_grad():
        plan(x, same := Depth(4))
    assert same.visits.tolist() == [4] * B


class Never:
    """An exit rule that stops nothing and keeps each visit's relative change."""

    def __init__(self, record):
        self.record = record

    def __call__(self, before, after, k, positions):
        change = (after - before).flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1)
        self.record.append(change.detach())
        return torch.zeros(len(after), dtype=torch.bool)


def test_padding_positions_and_tables():
    """Spans for padding, a rotary table of each sequence's own, and an exit rule that looks at real tokens alone."""
    block, x = made("llama", "anchored"), state()
    real = torch.arange(T)[None] < torch.tensor([[9], [4], [7], [1], [9]])
    places = torch.arange(T)[None] + torch.arange(B)[:, None]
    rope = rope_table(places, D // 4, block.config.rope_theta)
    loops = torch.tensor([2, 5, 1, 3, 5])
    plan = block.fused()
    with torch.no_grad():
        for S in (4, loops, Depth(loops, early_exit=RelativeChange(0.3, 1))):
            want = block(x, S, Context(rope=rope, mask=real[:, None, None], positions=real))
            got = plan(x, S, Context(rope=rope, positions=real), spans_of(real))
            torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-11)
        assert (plan(x, 4, Context(rope=rope))[real] - want[real]).abs().max() > 1e-3, "the mask changes nothing"


@pytest.mark.parametrize("wanted", [True, False])
def test_spans_are_packed_where_attention_prefers_it(monkeypatch, wanted):
    """Once a pass and again when sequences have left, for a block and for a model; the results are the same."""
    model = live(tiny("llama"), dtype=F64)
    real = torch.arange(T)[None] < torch.tensor([[9], [4], [7], [1], [9]])
    loops, x, tokens = torch.tensor([2, 5, 1, 3, 5]), state(), ids(B, T)
    want = model.loop.fused()(x, loops, spans=spans_of(real)), model.fused().hidden(tokens, real, loops)
    seen = []
    run = module.attention
    monkeypatch.setattr(module, "packs", lambda *a, **k: wanted)
    monkeypatch.setattr(module, "attention", lambda *a, **k: seen.append(a[3].cu_seqlens) or run(*a, **k))
    got = model.loop.fused()(x, loops, spans=spans_of(real)), model.fused().hidden(tokens, real, loops)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert [ends is not None for ends in seen] == [wanted] * len(seen)
    assert not wanted or {int(ends[-1]) for ends in seen} == {T * n for n in (5, 4, 3, 2)}


def test_conditioning_is_folded():
    block, x = made("dit"), state()
    cond = torch.randn(1, 12, dtype=F64)
    context = block._default_context(x)
    with torch.no_grad():
        want = block(x, 4, context._replace(cond=cond))
        torch.testing.assert_close(block.fused(cond=cond)(x, 4), want, rtol=0, atol=1e-11)
        assert (block.fused()(x, 4) - want).abs().max() > 1e-3


def test_launches_do_not_depend_on_the_visits(monkeypatch):
    """Of every op as many calls a visit at any S, with shapes that differ in the number of sequences alone."""
    block, x = made("llama", "anchored"), state()
    plan = block.fused()
    calls = []
    for name in ("norm_linear", "attention", "linear_residual", "loop_boundary", "residual_norm"):
        run = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _name=name, _run=run, **k: calls.append((_name, a[0])) or _run(*a, **k)
        )
    counts, shapes = {}, set()
    for S in LOOPS:
        calls.clear()
        plan(x, S)
        counts[S] = len(calls)
        shapes.add(frozenset((name, tuple(t.shape)) for name, t in calls))
    layers = len(block.layers)
    assert counts == {S: 1 + S * 5 * layers + (S - 1) for S in LOOPS}  # entering, and a boundary between visits
    assert len(shapes) == 1, "the same shapes at every S"
    calls.clear()
    plan(x, torch.tensor([1, 2, 2, 3, 3]))
    rows = [len(t) for name, t in calls if name == "attention"]
    assert rows == [5] * layers + [4] * layers + [2] * layers, "a sequence that has left costs nothing"


@pytest.mark.parametrize("boundary", ["plain", "anchored"])
def test_no_graph_for_another_number_of_visits(boundary):
    """What torch.compile makes of a visit serves every S."""
    block, x = made("llama", boundary, torch.float32), state(torch.float32)
    plan = block.fused()
    want = {S: plan(x, S) for S in LOOPS}
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plan._visit = torch.compile(plan._visit, backend=count, dynamic=False)
    torch.testing.assert_close(plan(x, 4), want[4])
    made_once = len(graphs)
    for S in LOOPS:
        torch.testing.assert_close(plan(x, S), want[S])
    assert 1 <= len(graphs) == made_once
    torch._dynamo.reset()


def test_refusals():
    block, x = made("llama"), state()
    plan = block.fused()
    with pytest.raises(InputError, match="takes spans, not a mask"):
        plan(x, 2, Context(mask=torch.ones(B, 1, 1, T, dtype=torch.bool)))
    with pytest.raises(InputError, match="conditioning of a fused looped block is folded in"):
        plan(x, 2, Context(cond=torch.zeros(B, 3)))
    with pytest.raises(InputError, match="num_loops"):
        plan(x, 0)
    with pytest.raises(InputError, match="for training"):
        plan(x, Depth(2, every=True))
    with pytest.raises(InputError, match=r"cond is \[1, 3\]; it must be \[1, "):
        block.fused(cond=torch.zeros(1, 3))
    with pytest.raises(InputError, match="must be floating point"):
        block.fused(torch.int8)
    own = LoopedBlock(block.config, boundary=lambda x, x0, k: x)
    with pytest.raises(InputError, match="this looped block cannot be fused: its loop boundary is a callable"):
        own.fused()


def test_no_gradients_and_no_change_of_the_input():
    block, x = made("llama"), state().requires_grad_()
    before = x.detach().clone()
    assert not block.fused()(x, 2).requires_grad
    assert torch.equal(x, before)


def test_autocast_changes_nothing():
    block, x = made("llama"), state()
    plan = block.fused(torch.float32)
    want = plan(x, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan(x, 3), want)

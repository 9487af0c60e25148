"""Depth of a pass: sequences that leave the batch, exit rules, truncated backprop, recomputation, deep supervision,
several looped blocks, retrofit.
"""

import copy
import math
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loopmdm.diffusion import nelbo
from loopmdm.errors import InputError
from loopmdm.model.depth import Depth, RelativeChange
from loopmdm.model.lm import LoopMDM
from loopmdm.model.loop import LoopedBlock
from loopmdm.ops.contract import on_torch

from . import unlooped
from .helpers import BACKBONES, ids, live, randomize_, tiny

BOUNDARIES = ("plain", "anchored")
B, T = 32, 9


class Scatter:
    """An exit rule that spreads: reads the sequence's own state like a hash. It keeps what it was called with."""

    def __init__(self, share=0.25, over="sequence"):
        self.share, self.over, self.calls = share, over, []

    def __call__(self, h_prev, h, k, positions):
        self.calls.append((len(h), k, positions))
        real = h if positions is None else h * positions[..., None]
        return (real.sum((1, 2)) * 7.3).frac().abs() < self.share


def layer_rows(model):
    """A list that grows by the batch size at every application of a looped layer, and one for the other layers."""
    looped, other = [], []
    inside = {id(layer) for block in model.looped_blocks for layer in block.layers}
    for layer in model.layers:
        into = looped if id(layer) in inside else other
        layer.register_forward_hook(lambda _, args, out, into=into: into.append(len(args[0])))
    return looped, other


def variant(name):
    """(model in float64, inputs of a batch of 32) of one way in which a context can depend on the sequence."""
    tokens = ids(B, T)
    side = torch.arange(B) % 3  # 0 no padding, 1 on the left, 2 on the right
    length = 3 + torch.arange(B) % 7
    place = torch.arange(T)[None]
    real = torch.where((side == 1)[:, None], place >= T - length[:, None], place < length[:, None])
    real |= (side == 0)[:, None]
    if name == "llama":
        return live(tiny(), dtype=torch.float64), {"input_ids": tokens}
    if name == "anchored, padded":
        model = live(tiny(boundary="anchored", positions="both"), dtype=torch.float64)
        return model, {"input_ids": tokens, "attention_mask": real}
    if name == "documents":
        documents = (place > 2 + torch.arange(B)[:, None] % 4).long()
        model = live(tiny("dit", boundary="anchored"), dtype=torch.float64)
        return model, {"input_ids": tokens, "document_ids": documents, "attention_mask": real}
    config = tiny("dit", boundary="anchored", time_conditioning=True)
    sigma = torch.linspace(0.01, 3, B, dtype=torch.float64)
    return live(config, dtype=torch.float64), {"input_ids": tokens, "attention_mask": real, "sigma": sigma}


VARIANTS = ("llama", "anchored, padded", "documents", "time")


def row(inputs, i):
    return {key: value[i : i + 1] for key, value in inputs.items()}


# Sequences that leave the batch


@pytest.mark.parametrize("name", VARIANTS)
def test_an_s_for_each_sequence_equals_the_unbatched_passes(name):
    """And the looped layers run on as many rows as there are visits: the mean, not the maximum."""
    model, inputs = variant(name)
    S = 2 + torch.randperm(B, generator=torch.Generator().manual_seed(0)) % 11
    looped, other = layer_rows(model)
    with torch.no_grad():
        out = model(**inputs, num_loops=S)
        assert S.min() == 2 and S.max() == 12
        assert sum(looped) == 2 * int(S.sum()) < 2 * B * 12 and sum(other) == 2 * B
        assert torch.equal(out.loops, S) and out.loops.dtype == torch.int64
        for i in range(B):
            alone = model.hidden(**row(inputs, i), num_loops=int(S[i]))
            torch.testing.assert_close(out.hidden[i : i + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_exits_equal_the_unbatched_passes(name):
    model, inputs = variant(name)
    looped, other = layer_rows(model)
    with torch.no_grad():
        depth = Depth(12, early_exit=Scatter())
        out = model(**inputs, num_loops=depth)
        assert depth.visits.min() <= 2 and depth.visits.max() == 12 and len(depth.visits.unique()) > 6
        assert sum(looped) == 2 * int(depth.visits.sum()) and sum(other) == 2 * B
        assert out.loops is depth.visits and depth.visits.dtype == torch.int64
        for i in range(B):
            single = Depth(12, early_exit=Scatter())
            alone = model.hidden(**row(inputs, i), num_loops=single)
            assert single.visits.tolist() == depth.visits[i : i + 1].tolist()
            torch.testing.assert_close(out.hidden[i : i + 1], alone, rtol=0, atol=1e-12)
            fixed = model.hidden(**row(inputs, i), num_loops=int(depth.visits[i]))
            assert torch.equal(alone, fixed)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_tau_zero_is_fixed_s_bit_for_bit(backbone, boundary):
    model = live(tiny(backbone, boundary=boundary))
    tokens, real = ids(5, T), torch.arange(T) < torch.tensor([9, 4, 1, 9, 7])[:, None]
    with torch.no_grad():
        want = model.hidden(tokens, real, 6)
        for request in (Depth(6, RelativeChange(0.0)), Depth(6), torch.full((5,), 6), Depth(torch.full((5,), 6))):
            assert torch.equal(model.hidden(tokens, real, request), want)
            if isinstance(request, Depth):
                assert request.visits.tolist() == [6] * 5 and request.visits.dtype == torch.int64
        assert torch.equal(model.loop(want, Depth(3, RelativeChange(0.0))), model.loop(want, 3))


def test_an_exit_ends_what_an_s_for_each_sequence_allows():
    model, inputs = variant("llama")
    S = 1 + torch.arange(B) % 12
    with torch.no_grad():
        free, bound = Depth(12, Scatter()), Depth(S, Scatter())
        model(**inputs, num_loops=free)
        out = model(**inputs, num_loops=bound)
    assert torch.equal(bound.visits, torch.minimum(S, free.visits)) and out.loops is bound.visits
    assert (bound.visits == S).any() and (bound.visits < S).any()


def test_gradients_with_exits_are_the_sequences_own():
    model, inputs = variant("anchored, padded")
    model.train()
    inputs = {key: value[:10] for key, value in inputs.items()}
    probe = torch.randn(10, T, 32, dtype=torch.float64)
    for checkpoint in (False, True):
        depth = Depth(8, Scatter(), checkpoint=checkpoint)
        model.zero_grad()
        model.hidden(**inputs, num_loops=depth).mul(probe).sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert len(depth.visits.unique()) > 3
        model.zero_grad()
        for i in range(10):
            alone = model.hidden(**row(inputs, i), num_loops=int(depth.visits[i]))
            alone.mul(probe[i : i + 1]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_padding_does_not_change_when_a_sequence_leaves():
    model = live(tiny(boundary="anchored"))
    tokens = ids(8, 7)
    pad = torch.full((8, 4), 5)  # an ordinary id: its states move, and only the mask may say that they do not count
    with torch.no_grad():
        for over in ("sequence", "masked"):
            want = Depth(12, RelativeChange(0.25, over=over))
            hidden = model.hidden(tokens, None, want)
            assert len(want.visits.unique()) > 3
            for parts in ((pad, tokens), (tokens, pad)):
                real = torch.cat([torch.full_like(p, p is tokens) for p in parts], 1).bool()
                got = Depth(12, RelativeChange(0.25, over=over))
                out = model.hidden(torch.cat(parts, 1), real, got)
                assert torch.equal(got.visits, want.visits)
                torch.testing.assert_close(out[real].view(8, 7, -1), hidden, rtol=0, atol=1e-5)


def test_no_rows():
    model = live(tiny())
    depth = Depth(3, RelativeChange(0.1))
    assert model.hidden(ids(2, 5)[:0], None, depth).shape == (0, 5, 32) and depth.visits.shape == (0,)


class Ops(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_one_s_for_all_reads_nothing_back(boundary):
    """No synchronisation and nothing copied: what runs is the layers, and the boundary between visits."""
    block = randomize_(LoopedBlock(tiny(boundary=boundary)))
    x = torch.randn(3, 5, 32)
    context = block._default_context(x)
    with torch.no_grad(), Ops() as ops:
        block(x, 4, context)
    with torch.no_grad(), Ops() as plain:
        h = x
        for k in range(4):
            if k and boundary == "anchored":
                h = block.boundary(h, x, k + 1)
            for layer in block.layers:
                h = layer(h, context)
    assert ops.names == plain.names and "aten._local_scalar_dense.default" not in ops.names
    with Ops() as ops:
        block(x, Depth(4, backprop_loops=2, checkpoint=True, every=True), context)
    assert "aten._local_scalar_dense.default" not in ops.names
    with Ops() as ops:
        block(x, Depth(4, Scatter()), context)
    assert "aten._local_scalar_dense.default" in ops.names, "the check would not see a synchronisation"


# Exit rules


def states(model, inputs, S):
    """The looped block's input and its states after visits 1..S."""
    found = []
    handle = model.loop.register_forward_hook(lambda _, args, out: found.extend((args[0], out)))
    for k in range(1, S + 1):
        model.hidden(**inputs, num_loops=k)
    handle.remove()
    return [found[0], *found[1::2]]


@pytest.mark.parametrize("over", ["sequence", "masked"])
@pytest.mark.parametrize("min_loops", [1, 2, 4])
def test_relative_change_against_its_formula(min_loops, over):
    """k >= min_loops and ||h^k - h^(k-1)|| < tau ||h^k|| over the real or masked positions, in Python floats."""
    model, inputs = variant("anchored, padded")
    tokens, real = inputs["input_ids"], inputs["attention_mask"]
    tokens[5] = 3  # no mask
    tau, visits = 0.2, []
    with torch.no_grad():
        h = states(model, inputs, 12)
        for i in range(B):
            looked_at = [j for j in range(T) if real[i, j] and (over == "sequence" or tokens[i, j] == 10)]
            for k in range(min_loops, 13):
                change = math.sqrt(sum(((h[k][i, j] - h[k - 1][i, j]) ** 2).sum().item() for j in looked_at))
                size = math.sqrt(sum((h[k][i, j] ** 2).sum().item() for j in looked_at))
                if change < tau * size or not looked_at or k == 12:
                    visits.append(k)
                    break
        depth = Depth(12, RelativeChange(tau, min_loops, over))
        model(**inputs, num_loops=depth)
    assert depth.visits.tolist() == visits
    assert over == "sequence" or min(visits) == visits[5] == min_loops
    assert len(set(visits)) > 3


def test_the_first_visit_is_compared_with_the_block_s_input():
    rule = RelativeChange(0.5, min_loops=1)
    h0 = torch.tensor([[[3.0, 4.0]], [[30.0, 40.0]]])
    h1 = h0 + torch.tensor([3.0, 0.0])  # changes of 3 against norms of about 7 and 51
    assert rule(h0, h1, 1, None).tolist() == [True, True]
    assert RelativeChange(0.1, 1)(h0, h1, 1, None).tolist() == [False, True]
    assert RelativeChange(0.1)(h0, h1, 1, None).tolist() == [False, False], "min_loops is 2 by default"
    assert RelativeChange(0.1)(h0, h1, 2, None).tolist() == [False, True]
    assert not RelativeChange(0.0, 1)(h0, h0, 1, None).any(), "tau = 0 never exits, not even at a fixed point"
    assert RelativeChange(1e-9, 1)(h0 * 0, h0 * 0, 1, None).all(), "a fixed point at 0"
    assert not RelativeChange(0.5)(h0 * float("nan"), h1, 2, None).any()
    seen = []
    block = randomize_(LoopedBlock(tiny()))
    x = torch.randn(2, 3, 32)
    block(x, Depth(2, lambda before, h, k, positions: seen.append(before) or torch.ones(2).bool()))
    assert len(seen) == 1 and torch.equal(seen[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_relative_change_is_computed_in_fp32(dtype):
    """The norm of fp16 states overflows, and bf16 has no room for the third digit of a norm."""
    h = torch.full((2, 50, 40), 3000.0, dtype=dtype)
    moved = h.clone()
    moved[1, 0, 0] += 16
    gap = (moved[1].double() - h[1].double()).norm().item() / moved[1].double().norm().item()
    assert RelativeChange(gap * 1.001)(h, moved, 2, None).tolist() == [True, True]
    assert RelativeChange(gap * 0.999)(h, moved, 2, None).tolist() == [True, False]


@pytest.mark.parametrize("over", ["sequence", "masked"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_rule_is_given(over, padded):
    model, inputs = variant("anchored, padded")
    tokens, real = inputs["input_ids"], inputs["attention_mask"]
    if not padded:
        real = inputs["attention_mask"] = None
    rule = Scatter(over=over)
    depth = Depth(12, rule)
    with torch.no_grad():
        model(**inputs, num_loops=depth)
    assert [k for _, k, _ in rule.calls] == list(range(1, 12)), "after the last visit there is nothing to decide"
    want = tokens == 10 if over == "masked" else torch.ones_like(tokens).bool()
    want = want & real if padded else want
    for rows, k, positions in rule.calls:
        stayed = depth.visits >= k
        assert rows == stayed.sum()
        if over == "sequence" and not padded:
            assert positions is None
        else:
            assert torch.equal(positions, want[stayed])


def test_a_rule_may_be_a_plain_function():
    model = live(tiny())
    with torch.no_grad():
        out = model(ids(3, 5), num_loops=Depth(5, lambda before, h, k, positions: torch.arange(len(h)) < k - 1))
    assert out.loops.tolist() == [2, 3, 3]


def test_bad_requests():
    model, tokens = LoopMDM(tiny()), ids(3, 5)
    for request, words in [
        (torch.tensor([1, 2]), r"num_loops is torch.int64 \[2\]; it must be an S for each of the 3 sequences"),
        (torch.tensor([1.0, 2, 3]), r"num_loops is torch.float32 \[3\]"),
        (torch.tensor([True] * 3), "num_loops is torch.bool"),
        (torch.tensor(2), r"num_loops is torch.int64 \[\]"),
        (torch.tensor([1, 0, 3]), "num_loops is 0; .*at least once"),
        (Depth(0), "num_loops is 0"),
        (Depth(True), "num_loops is True"),
        (Depth(2, 0.1), r"early_exit is 0.1; it must be a rule"),
        (Depth(2, backprop_loops=0), "backprop_loops is 0"),
        (Depth(2, RelativeChange(0.1), backprop_loops=1), "backprop_loops needs one S for the whole batch"),
        (Depth(torch.tensor([1, 2, 3]), backprop_loops=1), "backprop_loops needs one S"),
        (Depth(2, RelativeChange(0.1), every=True), "every needs one S"),
        (Depth(torch.tensor([2, 2, 2]), every=True), "every needs one S"),
        (Depth(3, lambda *_: True), r"the exit rule returned True; it must return bool \[3\]"),
        (Depth(3, lambda *_: torch.ones(3)), r"the exit rule returned torch.float32 \[3\]"),
        (Depth(3, lambda *_: torch.ones(3, 5).bool()), r"returned torch.bool \[3, 5\]"),
        (Depth(3, Scatter(over="mask")), "over is 'mask'; did you mean 'masked'"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            model(tokens, num_loops=request)
        assert "\n" not in str(caught.value)
    for options, words in [
        ({"tau": -0.1}, "tau is -0.1; it must be a finite number of at least 0"),
        ({"tau": math.inf}, "tau is inf"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": "0.1"}, "tau is '0.1'"),
        ({"tau": True}, "tau is True"),
        ({"tau": 0.1, "min_loops": 0}, "min_loops is 0"),
        ({"tau": 0.1, "min_loops": 1.5}, "min_loops is 1.5"),
        ({"tau": 0.1, "over": "tokens"}, "over is 'tokens'"),
    ]:
        with pytest.raises(InputError, match=words):
            RelativeChange(**options)


# Truncated backprop and recomputation


@pytest.mark.parametrize("k", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_truncated_backprop_has_the_gradient_of_the_last_visits(boundary, k):
    """As a copy of the model that starts at visit S - k + 1 from a given state, the anchor aside."""
    S = 5
    model = live(tiny("dit", boundary=boundary), dtype=torch.float64).train()
    tokens, probe = ids(3, 6), torch.randn(3, 6, 32, dtype=torch.float64)
    model.zero_grad()
    out = model(tokens, num_loops=Depth(S, backprop_loops=k))
    assert out.loops == S
    # not bit for bit: without a graph RMS norm takes another route
    torch.testing.assert_close(out.hidden, model.hidden(tokens, None, S), rtol=0, atol=1e-12)
    out.hidden.mul(probe).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}

    other = copy.deepcopy(model)
    other.zero_grad()
    context = other.loop._default_context(probe)._replace(cond=other._condition(None, probe.device))
    with torch.no_grad():
        cut = states(other, {"input_ids": tokens}, S)[max(0, S - k)]
    x0 = other.prelude[0](other.embed(tokens), context)
    x = x0 if k >= S else cut
    for visit in range(max(0, S - k) + 1, S + 1):
        if visit > 1 and boundary == "anchored":
            total = x + x0
            x = total / torch.sqrt((total * total).mean(-1, keepdim=True) + 1e-5) * other.loop.boundary.weight
        for layer in other.loop.layers:
            x = layer(x, context)
    x = other.coda[0](x, context)
    other._final(x, context).mul(probe).sum().backward()
    for name, parameter in other.named_parameters():
        if parameter.grad is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-10)
    cut_off = boundary == "plain" and k < S
    assert (got["embed.weight"] is None) == (got["prelude.0.mlp.up.weight"] is None) == cut_off
    model.zero_grad()
    model.hidden(tokens, None, S).mul(probe).sum().backward()
    whole = model.loop.layers[0].mlp.up.weight.grad
    assert torch.allclose(got["loop.layers.0.mlp.up.weight"], whole, rtol=1e-9) == (k >= S)


def test_truncated_backprop_under_autocast():
    """Weights that autocast kept from the visits without a graph would get no gradient (in older torch)."""
    model = live(tiny(boundary="anchored")).train()
    for checkpoint in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(ids(2, 6), None, Depth(4, backprop_loops=2, checkpoint=checkpoint))
        hidden.float().square().sum().backward()
        for name, parameter in model.named_parameters():
            assert name.startswith("lm_head") or parameter.grad.abs().max() > 0, name


def saved(run):
    """Bytes of distinct tensors that autograd saves for the backward pass of `run()`."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr(), tensor.shape] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    return loss, sum(t.numel() * t.element_size() for t in kept.values())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkpointing_keeps_the_gradient_and_not_the_activations(backbone, boundary):
    model = live(tiny(backbone, boundary=boundary, dropout=0.2), dtype=torch.float64).train()
    tokens, probe, S = ids(3, 12), torch.randn(3, 12, 32, dtype=torch.float64), 6
    results = {}
    for checkpoint in (False, True):
        torch.manual_seed(0)  # the recomputation must drop the same units
        model.zero_grad()
        request = Depth(S, checkpoint=checkpoint)
        loss, kept = saved(lambda request=request: model.hidden(tokens, None, request).mul(probe).sum())
        loss.backward()
        results[checkpoint] = loss.item(), kept, [p.grad for p in model.parameters() if p.grad is not None]
    assert results[True][0] == results[False][0]
    for a, b in zip(results[True][2], results[False][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    inputs = S * 3 * 12 * 32 * 8  # what checkpointing holds itself, unseen by the hooks: a state a visit
    assert results[True][1] + inputs < results[False][1] / 2


def test_a_visit_is_computed_twice_only_where_there_is_a_gradient():
    model = live(tiny())
    calls = []
    model.loop.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.hidden(ids(2, 5), None, Depth(4, checkpoint=True))
    assert len(calls) == 4
    model.hidden(ids(2, 5), None, Depth(4, checkpoint=True, backprop_loops=1)).sum().backward()
    assert len(calls) == 4 + 4 + 1


# Deep supervision


@pytest.mark.parametrize("also", [(), ((3, 1),)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_gives_what_the_model_says_after_each_visit(boundary, also):
    config = tiny("dit", boundary=boundary, num_hidden_layers=5).replace(also=also)
    model = live(config, dtype=torch.float64)
    tokens, real = ids(3, 6), torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    depth = Depth(4, every=True)
    hidden = model.hidden(tokens, real, depth)
    assert len(depth.outputs) == 4 and depth.outputs[-1] is hidden and depth.visits.tolist() == [4] * 3
    for k, output in enumerate(depth.outputs, start=1):
        torch.testing.assert_close(output, model.hidden(tokens, real, k), rtol=0, atol=1e-13)
    assert (depth.outputs[0] - hidden).abs().max() > 1e-3
    probe = [torch.randn_like(hidden) for _ in range(4)]
    sum((output * p).sum() for output, p in zip(depth.outputs, probe, strict=True)).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for k in range(4):
        (model.hidden(tokens, real, k + 1) * probe[k]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-10)


def test_a_depth_keeps_no_record_of_the_pass_before():
    model = live(tiny())
    depth = Depth(4, every=True)
    model.hidden(ids(2, 5), None, depth)
    depth.every, depth.num_loops = False, None
    model.hidden(ids(2, 5), None, depth)
    assert depth.outputs == [] and depth.visits.tolist() == [3, 3] and depth.num_loops is None
    block = randomize_(LoopedBlock(tiny()))
    x, depth = torch.randn(2, 5, 32), Depth(every=True)
    out = block(x, depth)
    assert torch.equal(depth.outputs[1], block(x, 2)) and depth.outputs[2] is out and len(depth.outputs) == 3


def test_the_training_loss_takes_a_depth():
    model = live(tiny(boundary="anchored"), dtype=torch.float64).train()
    tokens = ids(4, 8, masks=0)
    common = {"seed": 1, "t_range": (0.5, 1.0)}
    each = [nelbo(model, tokens, num_loops=k, **common).loss for k in (1, 2, 3)]
    every = nelbo(model, tokens, num_loops=3, depth=Depth(every=True), **common).loss
    torch.testing.assert_close(every, sum(each) / 3)
    both = Depth(backprop_loops=1, checkpoint=True)
    torch.testing.assert_close(nelbo(model, tokens, num_loops=3, depth=both, **common).loss, each[2])


# Several looped blocks, the whole stack, boundaries


@pytest.mark.parametrize(
    ("start", "length", "also"),
    [(1, 2, ((3, 1), (5, 2))), (0, 1, ((1, 1),)), (0, 2, ((6, 1),)), (0, 7, ()), (2, 1, ((4, 1),))],
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_several_looped_blocks_are_layers_repeated_bit_for_bit(backbone, start, length, also):
    config = tiny(backbone, num_hidden_layers=7, start=start, length=length).replace(also=also)
    model = live(config)
    runs = dict(config.loop.runs)
    order, layer = {1: [], 3: []}, 0
    while layer < 7:
        n = runs.get(layer, 1)
        for S in order:
            order[S] += list(range(layer, layer + n)) * (S if layer in runs else 1)
        layer += n
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(("prelude", "loop", "coda"))}
    for i, block in enumerate(model.layers):
        weights |= {f"layers.{i}.{name}": value for name, value in block.state_dict().items()}
    for S, layers in order.items():
        assert len(layers) == config.depth(S)
        with torch.no_grad(), on_torch():
            got = model(ids(3, 8), num_loops=S).logits[..., :10]
        want = unlooped.logits(weights, ids(3, 8), 4, config.num_key_value_heads, layers)[..., :10]
        assert torch.equal(got, want)


def test_further_looped_blocks_make_the_visits_of_each_sequence(tmp_path):
    config = tiny(num_hidden_layers=6, boundary="anchored").replace(also=((4, 1),))
    model = live(config, dtype=torch.float64)
    S = torch.tensor([1, 4, 2])
    looped, _ = layer_rows(model)
    with torch.no_grad():
        got = model.hidden(ids(3, 6), None, Depth(S, checkpoint=True))
        assert sum(looped) == 3 * 7
        for i in range(3):
            alone = model.hidden(ids(3, 6)[i : i + 1], None, int(S[i]))
            torch.testing.assert_close(got[i : i + 1], alone, rtol=0, atol=1e-12)
    for request in (Depth(3, RelativeChange(0.1)), Depth(3, backprop_loops=1)):
        with pytest.raises(InputError, match=r"needs a model with one looped block; this one has 2"):
            model(ids(3, 6), num_loops=request)
    assert "coda.1.boundary.weight" in model.state_dict() and model.coda[1].boundary is not model.loop.boundary
    model.float().save_pretrained(tmp_path)
    again = LoopMDM.from_pretrained(tmp_path)
    assert again.config == config and torch.equal(again.hidden(ids(3, 6)), model.hidden(ids(3, 6)))


def test_a_model_with_a_boundary_of_one_s_own(tmp_path):
    calls = []

    def halve(x, x0, k):
        calls.append(k)
        return (x + x0) / 2

    model = randomize_(LoopMDM(tiny(boundary="anchored"), boundary=halve)).eval()
    assert model.config.loop.boundary == "plain" and not any("boundary" in key for key in model.state_dict())
    plain = LoopMDM(tiny())
    plain.load_state_dict(model.state_dict())
    plain.eval()
    with torch.no_grad():
        got = model.hidden(ids(2, 6), None, 3)
        x = [plain.embed(ids(2, 6))]
        context = model.loop._default_context(x[0])
        x[0] = plain.prelude[0](x[0], context)
        h = x[0]
        for k in range(3):
            h = (h + x[0]) / 2 if k else h
            for layer in plain.loop.layers:
                h = layer(h, context)
        assert torch.equal(got, plain._final(plain.coda[0](h, context), context))
        assert calls == [2, 3] and (got - plain.hidden(ids(2, 6), None, 3)).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = LoopMDM.from_pretrained(tmp_path).relooped(boundary=halve)
        assert torch.equal(again.hidden(ids(2, 6), None, 3), got)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, x0, k):
            return x * self.weight

    own = LoopMDM(tiny(), boundary=Scale())
    assert "loop.boundary.weight" in own.state_dict()


# Retrofit


@pytest.mark.parametrize("boundary", [None, "plain", "anchored", "callable"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_retrofit_is_the_same_model_at_s_1(backbone, boundary):
    config = tiny(backbone, num_hidden_layers=6, start=0, length=1, max_loops=1, tie_word_embeddings=True)
    source = live(config)
    source.embed.weight.requires_grad_(False)
    source.logit_shift, source.suppressed_ids = 1, (10, 3)
    given = (lambda x, x0, k: x + 0.1 * x0) if boundary == "callable" else boundary
    looped = source.relooped(start=2, length=2, max_loops=5, boundary=given, also=((4, 1),))
    assert looped.config.loop.runs == ((2, 2), (4, 1)) and looped.max_loops == 5
    assert looped.logit_shift == 1 and looped.suppressed_ids == (10, 3) and not looped.training
    tokens = ids(3, 7)
    with torch.no_grad():
        assert torch.equal(looped(tokens, num_loops=1).logits, source(tokens, num_loops=1).logits)
        assert (looped.hidden(tokens) - source.hidden(tokens)).abs().max() > 1e-3
    objects = {id(p) for p in source.parameters()}
    fresh = [name for name, p in looped.named_parameters() if id(p) not in objects]
    assert fresh == (["loop.boundary.weight", "coda.0.boundary.weight"] if boundary == "anchored" else [])
    assert objects <= {id(p) for p in looped.parameters()}
    assert not looped.embed.weight.requires_grad and looped.lm_head.weight is looped.embed.weight
    assert looped.layers[2].mlp.up.weight is source.layers[2].mlp.up.weight
    assert all(p.requires_grad and p.device.type == "cpu" for n, p in looped.named_parameters() if n != "embed.weight")
    looped.hidden(tokens).square().sum().backward()
    assert source.layers[5].mlp.up.weight.grad is not None


def test_a_retrofit_keeps_what_it_is_not_told():
    model = live(tiny(boundary="anchored", num_hidden_layers=6).replace(also=((4, 1),)), dtype=torch.bfloat16).train()
    same = model.relooped()
    assert same.config == model.config and same.training and same.layers[0] is not model.layers[0]
    pairs = zip(same.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and x is y for (a, x), (b, y) in pairs)
    moved = model.relooped(start=2)
    assert moved.config.loop.runs == ((2, 2),) and moved.loop.boundary.weight is model.loop.boundary.weight
    assert model.relooped(boundary="plain").loop.boundary is None
    fresh = model.relooped(boundary="plain").relooped(boundary="anchored").loop.boundary.weight
    assert (fresh == 1).all() and fresh.dtype == torch.bfloat16 and fresh.requires_grad
    own = model.relooped(boundary=lambda x, x0, k: x)
    assert own.relooped(max_loops=9).loop.boundary is own.loop.boundary
    assert model.relooped(max_loops=9).max_loops == 9 and model.relooped(start=0).max_loops == 3
    with pytest.raises(InputError, match=r"covers layers 5\.\.6"):
        model.relooped(start=5)
    with pytest.raises(InputError, match="boundary is 'anchord'; did you mean 'anchored'"):
        model.relooped(boundary="anchord")
    with pytest.raises(InputError, match="boundary is 5; it must be a name or a callable"):
        model.relooped(boundary=5)


# Time


@pytest.mark.slow
def test_time_follows_the_mean_depth():
    """32 sequences of 2..12 visits against fixed S, interpolated at their mean: within 1.15 times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio, figures = measure()
    finally:
        torch.set_num_threads(threads)
    print(figures)
    assert ratio < 1.15


def measure(rounds=7, length=128):
    """Processor time of this one thread, which on a machine of its own is the wall time."""
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 704}
    model = live(tiny(boundary="anchored", max_position_embeddings=length, vocab_size=64, **wide))
    tokens = ids(32, length, 64)
    S = 2 + torch.randperm(32, generator=torch.Generator().manual_seed(1)) % 11
    mean = S.double().mean().item()
    low, high = math.floor(mean), math.ceil(mean)

    class Planned:
        """Leaves where S says so, at the full price of the usual rule."""

        def __call__(self, h_prev, h, k, positions):
            if k == 1:
                self.left = S.clone()
            RelativeChange(1e-9)(h_prev, h, 2, positions)
            stop = self.left <= k
            self.left = self.left[~stop]
            return stop

    runs = {"low": low, "high": high, "S": S, "exit": Depth(12, Planned())}
    seconds = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, request in runs.items():
                start = time.process_time()
                model.loop(model.embed(tokens), request)
                if turn:
                    seconds[name].append(time.process_time() - start)
    median = {name: sorted(values)[rounds // 2] for name, values in seconds.items()}
    expected = median["low"] + (mean - low) * (median["high"] - median["low"])
    ratios = {name: round(median[name] / expected, 3) for name in ("S", "exit")}
    return max(ratios.values()), {"mean": mean, "ratios": ratios, **median}

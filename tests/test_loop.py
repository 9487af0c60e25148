"""The loop: S = 1 is the unlooped model bit for bit, S visits are S applications, gradients are sums over visits."""

import copy

import pytest
import torch

from loopmdm.errors import InputError
from loopmdm.model.depth import Depth
from loopmdm.model.lm import LoopMDM
from loopmdm.model.loop import LoopedBlock
from loopmdm.ops.contract import on_torch

from . import unlooped
from .helpers import BACKBONES, ids, live, randomize_, tiny

BOUNDARIES = ("plain", "anchored")
RANGES = [(1, 2), (0, 1), (0, 4), (3, 1)]


def unlooped_logits(model, tokens, order):
    config = model.config
    weights = unlooped.rename(model.state_dict(), config.loop.start, config.loop.length)
    return unlooped.logits(weights, tokens, config.num_attention_heads, config.num_key_value_heads, order)


def compare(model, tokens, num_loops, order):
    with torch.no_grad(), on_torch():
        got = model(tokens, num_loops=num_loops).logits
    want = unlooped_logits(model, tokens, order)
    assert (got[..., model.mask_id] == float("-inf")).all()
    assert torch.equal(got[..., : model.mask_id], want[..., : model.mask_id])


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_loop_is_the_unlooped_model_bit_for_bit(backbone, boundary, span):
    model = live(tiny(backbone, boundary=boundary, start=span[0], length=span[1]))
    compare(model, ids(3, 13), 1, range(4))


@pytest.mark.parametrize("num_loops", [2, 3, 7])
@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_plain_loops_are_layers_repeated_bit_for_bit(backbone, span, num_loops):
    a, n = span
    model = live(tiny(backbone, start=a, length=n))  # max_loops is 3: a larger S is as good
    order = [*range(a), *list(range(a, a + n)) * num_loops, *range(a + n, 4)]
    assert len(order) == model.config.depth(num_loops)
    compare(model, ids(3, 13), num_loops, order)


def test_the_comparison_sees_a_wrong_order():
    model = live(tiny())
    with pytest.raises(AssertionError):
        compare(model, ids(3, 13), 2, [0, 1, 1, 2, 2, 3])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_anchored_boundary_against_its_formula(backbone):
    """x <- (x + x0) / sqrt(mean (x + x0)^2 + eps) * g before visits 2..S, x0 the prelude's output."""
    config = tiny(backbone, boundary="anchored", norm_eps=0.01)
    model = live(config, dtype=torch.float64)
    x0 = torch.randn(2, 7, config.hidden_size, dtype=torch.float64)
    block, gain = model.loop, model.loop.boundary.weight
    with torch.no_grad():
        context = block._default_context(x0)
        x = x0
        for visit in range(4):
            if visit:
                total = x + x0
                x = total / torch.sqrt((total * total).mean(-1, keepdim=True) + 0.01) * gain
            for layer in block.layers:
                x = layer(x, context)
        got = block(x0, 4)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_the_anchor_is_the_prelude_s_output():
    """A zero embedding would make x0 = 0 after an identity prelude; here x0 must be what enters visit 1."""
    model = live(tiny(boundary="anchored"), dtype=torch.float64)
    seen = []
    model.prelude[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    model.loop.boundary.register_forward_hook(lambda _, args, out: seen.append(args[1]))
    with torch.no_grad():
        model(ids(2, 9), num_loops=3)
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_parameters_do_not_depend_on_loops(boundary):
    def shapes(max_loops):
        model = LoopMDM(tiny(boundary=boundary, max_loops=max_loops))
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    assert shapes(1) == shapes(3) == shapes(12)
    extra = shapes(1).keys() - {name for name, _ in LoopMDM(tiny()).named_parameters()}
    assert extra == ({"loop.boundary.weight"} if boundary == "anchored" else set())


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_is_the_sum_over_visits(backbone, boundary):
    """Each visit with weights of its own: their gradients add up to the looped block's."""
    S = 3
    model = live(tiny(backbone, boundary=boundary), dtype=torch.float64).train()
    block = model.loop
    x0 = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 6, 32, dtype=torch.float64)
    cond = torch.randn(1, 12, dtype=torch.float64) if backbone == "dit" else None
    context = block._default_context(x0)._replace(cond=cond)
    block(x0, S, context).mul(probe).sum().backward()
    dx0, x0.grad = x0.grad, None

    visits = [copy.deepcopy(block) for _ in range(S)]
    for visit in visits:
        visit.zero_grad()
    x = x0
    for k, visit in enumerate(visits):
        if k and boundary == "anchored":
            total = x + x0
            x = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * visit.boundary.weight
        for layer in visit.layers:
            x = layer(x, context)
    x.mul(probe).sum().backward()

    torch.testing.assert_close(dx0, x0.grad, rtol=1e-9, atol=1e-10)
    copies = [dict(visit.named_parameters()) for visit in visits]
    for name, parameter in block.named_parameters():
        parts = [c[name].grad for c in copies if c[name].grad is not None]
        assert len(parts) == (S - 1 if name.startswith("boundary") else S)
        torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-9, atol=1e-10)
        assert (parameter.grad - parts[0]).abs().max() > 1e-6, f"{name}: one visit would do"


def test_a_boundary_may_be_any_callable():
    calls = []

    def halve(x, x0, k):
        calls.append((k, torch.equal(x0, given)))
        return x / 2

    block = randomize_(LoopedBlock(tiny(), halve))
    given = torch.randn(2, 5, 32)
    with torch.no_grad():
        got = block(given, 3)
        want, context = given, block._default_context(given)
        for k in range(3):
            want = want / 2 if k else want
            for layer in block.layers:
                want = layer(want, context)
    assert calls == [(2, True), (3, True)]
    assert torch.equal(got, want)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_block_of_its_own_equals_the_model_s(backbone):
    """Default context: full attention, positions from 0; the conditioning of sigma is the model's to give."""
    model = live(tiny(backbone, boundary="anchored"))
    inside = []
    model.loop.register_forward_hook(lambda _, args, out: inside.append((args, out)))
    with torch.no_grad():
        model(ids(2, 9), num_loops=2)
        (x, _, context), out = inside[0]
        block = LoopedBlock(model.config)
        block.load_state_dict(model.loop.state_dict())
        if backbone == "dit":
            context = block._default_context(x)._replace(cond=context.cond)
            assert torch.equal(block(x, 2, context), out)
            assert not torch.equal(block(x, 2), out)
        else:
            assert torch.equal(block(x, 2), out)


def test_num_loops_defaults_to_max_loops():
    model = live(tiny())
    tokens = ids(2, 9)
    with torch.no_grad():
        out = model(tokens)
        assert out.loops == 3
        assert torch.equal(out.hidden, model(tokens, num_loops=3).hidden)
        assert torch.equal(model.loop(out.hidden), model.loop(out.hidden, 3))
        assert not torch.equal(out.hidden, model(tokens, num_loops=2).hidden)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2"])
def test_loop_count_must_be_a_positive_whole_number(bad):
    model = LoopMDM(tiny())
    with pytest.raises(InputError, match=r"num_loops is .*at least once"):
        model(ids(1, 4), num_loops=bad)
    with pytest.raises(InputError, match="at least once"):
        model.loop(torch.zeros(1, 4, 32), bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_block_keeps_the_dtype_of_its_input(dtype):
    """Also where the parameters are wider; what deep supervision keeps is of that dtype too."""
    block, x = randomize_(LoopedBlock(tiny())), torch.randn(2, 5, 32).to(dtype)
    every = Depth(3, every=True)
    for loops in (1, 3, torch.tensor([1, 3]), every):
        assert block(x, loops).dtype == dtype
    assert {h.dtype for h in every.outputs} == {dtype}


def test_a_block_in_bf16_takes_an_fp32_stream():
    """The residual stream may be wider than the parameters, the conditioning may not."""
    for backbone in BACKBONES:
        block = randomize_(LoopedBlock(tiny(backbone))).bfloat16()
        out = block(torch.randn(2, 5, 32), 2)
        assert out.dtype == torch.float32 and out.isfinite().all()

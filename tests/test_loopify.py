"""loopify: the last layer of a run drives it, on patched and on plain models; what S = 1, schedules and exits do."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import loopmdm
from loopmdm.adapters import (
    as_denoiser,
    families,
    load_loops,
    looping,
    save_loops,
    set_num_loops,
    unloopify,
)
from loopmdm.adapters.splice import layers_of
from loopmdm.errors import InputError
from loopmdm.model.depth import Depth, RelativeChange
from loopmdm.model.lm import LoopMDM

from . import peer_layers as peers

NAMES = list(peers.FAMILIES)


def some_ids(batch=4, length=8, seed=1):
    return torch.randint(0, peers.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def model_of(name, patched=True):
    model = peers.drawn(name, scale=0.5)
    return loopmdm.patch(model) if patched else model


def repeated(name, start, length, S, patched=False):
    """The same model with its layers written out: the run appears S times in the list of layers."""
    model = model_of(name, patched)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            layers = list(module)
            run = layers[start : start + length]
            module._modules.clear()
            module.extend([*layers[:start], *run * S, *layers[start + length :]])
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize(("start", "length"), [(1, 2), (0, 1), (3, 1), (0, 4)])
def test_equals_layers_written_out(name, patched, start, length):
    ids, model = some_ids(), model_of(name, patched)
    keys, modules = list(model.state_dict()), list(model.modules())
    with torch.no_grad():
        before = peers.logits(model, ids)
        assert loopmdm.loopify(model, start, length) is model
        assert torch.equal(peers.logits(model, ids), before), "S = 1 must change no bit"
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
        for S in (2, 4):
            set_num_loops(model, S)
            want = peers.logits(repeated(name, start, length, S, patched), ids)
            assert torch.equal(peers.logits(model, ids), want)
            assert (want - before).abs().max() > 1e-2
        unloopify(model)
        assert torch.equal(peers.logits(model, ids), before)
    assert not any("_loopmdm_loop" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("first", ["patch", "loopify"])
def test_order_of_patch_and_loopify(first):
    ids, model = some_ids(), peers.drawn("llada", scale=0.5)
    steps = [loopmdm.patch, lambda m: loopmdm.loopify(m, 1, 2, 3)]
    for step in steps if first == "patch" else steps[::-1]:
        step(model)
    want = peers.logits(repeated("llada", 1, 2, 3, True), ids)
    assert torch.equal(peers.logits(model, ids), want)
    loopmdm.unpatch(model)
    assert torch.equal(peers.logits(model, ids), peers.logits(repeated("llada", 1, 2, 3), ids))


def test_gradients_through_every_visit():
    ids, grads = some_ids(), []
    for model in (loopmdm.loopify(model_of("mdlm"), 1, 2, 3), repeated("mdlm", 1, 2, 3)):
        peers.logits(model, ids).square().mean().backward()
        grads.append({id(p): p.grad for p in model.parameters()}.values())
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_checkpointing_and_truncated_backprop():
    ids = some_ids()
    grads = {}
    for name, depth in {
        "plain": 3,
        "checkpoint": Depth(3, checkpoint=True),
        "all": Depth(3, backprop_loops=3),
        "last": Depth(3, backprop_loops=1),
    }.items():
        model = loopmdm.loopify(model_of("llada"), 1, 2)
        set_num_loops(model, depth)
        out = peers.logits(model, ids)
        out.square().mean().backward()
        grads[name] = [p.grad for p in model.parameters()]
        if isinstance(depth, Depth):
            assert depth.visits.tolist() == [3] * 4
    for kind in ("checkpoint", "all"):
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(grads["plain"], grads[kind], strict=True))
    assert grads["last"][0] is None, "nothing before the cut gets a gradient"
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(grads["plain"], grads["last"], strict=True) if b is not None)
    # by hand: the last visit alone, from a constant
    model = model_of("llada")
    blocks, x = model.model.transformer["blocks"], None
    with torch.no_grad():
        x = blocks[0](model.model.transformer["wte"](ids))[0]
        for _ in range(2):
            x = blocks[2](blocks[1](x)[0])[0]
    x = blocks[3](blocks[2](blocks[1](x)[0])[0])[0]
    model.model.transformer["ff_out"](model.model.transformer["ln_f"](x)).square().mean().backward()
    for p, b in zip(model.parameters(), grads["last"], strict=True):
        assert (p.grad is None) == (b is None) and (b is None or (p.grad - b).abs().max() < 1e-5)


def checkpointed(model, reentrant):
    """Each layer computed again in backward, as transformers' gradient_checkpointing_enable does it."""

    def call(self, *args, **kwargs):
        forward = partial(type(self).__mro__[1].__call__, self, **kwargs)
        return checkpoint(forward, *args, use_reentrant=reentrant) if torch.is_grad_enabled() else forward(*args)

    layers = layers_of(model)
    again = type(type(layers[0]).__name__, (type(layers[0]),), {"__call__": call})
    for layer in layers:
        layer.__class__ = again
    return model


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


REAL = torch.arange(8) < torch.tensor([[8], [5], [3], [8]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("S", [3, torch.tensor([1, 3, 2, 3])], ids=["one", "each"])
def test_checkpointed_visits_see_their_pass(name, padded, S):
    """Depth(checkpoint=True): the backward pass, when the call is long over, computes with its padding and S."""
    model, ids = loopmdm.loopify(model_of(name), 1, 2), some_ids()
    denoiser, mask = as_denoiser(model), REAL if padded else None
    weights = torch.linspace(-1, 1, 8)[:, None]
    grads = [
        gradients(model, lambda c=c: (denoiser.hidden(ids, mask, Depth(S, checkpoint=c)) * weights).square().sum())
        for c in (False, True)
    ]
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()
    if isinstance(S, int):
        data = ids % (peers.VOCAB - 1)
        grads = [
            gradients(
                model,
                lambda d=d: loopmdm.nelbo(denoiser, data, attention_mask=mask, num_loops=S, depth=d).loss,
            )
            for d in (None, Depth(checkpoint=True))
        ]
        assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


def test_a_loss_inside_checkpointed_visits():
    """Gradients that do not come through the pass's result: a visit itself knows its pass."""
    model, seen = loopmdm.loopify(model_of("llada"), 1, 2), []
    layers_of(model)[1].register_forward_hook(lambda module, args, out: seen.append(out[0]))

    def loss(recompute):
        seen.clear()
        as_denoiser(model).hidden(some_ids(), REAL, Depth(3, checkpoint=recompute))
        return seen[2].square().mean()

    a, b = (gradients(model, lambda c=c: loss(c)) for c in (False, True))
    assert (a - b).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_layers_checkpointed_from_outside_see_their_pass(name, reentrant):
    """Padding and S of a call, or of `looping`, reach the layers that are computed again when it is over."""
    ids, data = some_ids(), some_ids() % (peers.VOCAB - 1)
    models = [loopmdm.loopify(m, 1, 2) for m in (model_of(name), checkpointed(model_of(name), reentrant))]

    def called(model, mask, S):
        return loopmdm.nelbo(as_denoiser(model), data, attention_mask=mask, num_loops=S).loss

    def twice(model):  # two passes in one graph
        return called(model, REAL, 3) + 2 * called(model, REAL.flip(0), 2)

    def looped(model):
        with looping(model, 3):
            return peers.logits(model, ids).square().mean()

    def scheduled(model):
        count = iter((3, 1, 1, 1))
        set_num_loops(model, lambda: next(count))
        return as_denoiser(model).hidden(ids, REAL).square().mean()

    def apart(model):
        return as_denoiser(model).hidden(ids, REAL, torch.tensor([1, 3, 2, 3])).square().mean()

    cases = [partial(called, mask=mask, S=S) for mask in (None, REAL) for S in (1, 3)]
    for case in (*cases, twice, looped, scheduled, apart):
        want, got = (gradients(model, partial(case, model)) for model in models)
        assert (got - want).norm() < 1e-5 * want.norm(), case
    with looping(models[1], 2):  # another pass than the one that is computed again
        want, got = (gradients(model, partial(called, model, REAL, 3)) for model in models)
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_schedules_are_not_asked_again(reentrant):
    """A plain call's schedule: known again where the graph holds the first pass, otherwise refused."""
    ids, count = some_ids(), iter((3, 1, 2))
    model = loopmdm.loopify(model_of("llada"), 1, 2, 3)
    again = loopmdm.loopify(checkpointed(model_of("llada"), reentrant), 1, 2, lambda: next(count))
    plain, loss = (peers.logits(m, ids).square().mean() for m in (model, again))
    if reentrant:
        with pytest.raises(InputError, match="use_reentrant=False"):
            loss.backward()
    else:
        a, b = gradients(model, lambda: plain), gradients(again, lambda: loss)
        assert (a - b).norm() < 1e-5 * a.norm()
    assert next(count) == 1


def test_threads_have_their_own_s():
    model, ids = loopmdm.loopify(model_of("llada"), 1, 2), some_ids()
    denoiser = as_denoiser(model).eval()
    with torch.no_grad():
        want = [(denoiser.hidden(ids, None, S), looped_logits(model, ids, S)) for S in (1, 2, 3, 4)]

    def ask(S):
        with torch.no_grad():
            got = ((denoiser.hidden(ids, None, S), looped_logits(model, ids, S)) for _ in range(50))
            return all(torch.allclose(a, b, atol=1e-5) for pair in got for a, b in zip(pair, want[S - 1], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, (1, 2, 3, 4)))
    assert not model._forward_hooks
    models = model, loopmdm.loopify(checkpointed(model_of("llada"), True), 1, 2)
    with looping(models[1], 3), ThreadPoolExecutor(1) as pool:
        a, b = (pool.submit(gradients, m, lambda m=m: peers.logits(m, ids).square().mean()).result() for m in models)
    assert (a - b).norm() < 1e-5 * a.norm()


def looped_logits(model, ids, S):
    with looping(model, S):
        return peers.logits(model, ids)


@pytest.mark.parametrize("name", NAMES)
def test_an_s_for_each_sequence(name):
    """As if each sequence were alone at its S; conditioning, masks and tables follow their rows."""
    model, ids, S = loopmdm.loopify(model_of(name), 1, 2), some_ids(), torch.tensor([3, 1, 4, 2])
    sigma = torch.tensor([0.1, 0.4, 1.0, 2.0])
    real = torch.arange(8) < torch.tensor([8, 5, 3, 8])[:, None]
    mask = real if name in ("llada", "dream", "qwen3") else None
    with torch.no_grad():
        set_num_loops(model, S)
        together = peers.logits(model, ids, mask, sigma=sigma)
        for row in range(4):
            set_num_loops(model, int(S[row]))
            part = None if mask is None else mask[row : row + 1]
            alone = peers.logits(model, ids[row : row + 1], part, sigma=sigma[row : row + 1])
            at = real[row] if mask is not None else slice(None)
            assert (together[row][at] - alone[0][at]).abs().max() < 1e-5
        denoiser = as_denoiser(model)
        hidden = denoiser.hidden(ids, real, S)
        for row in range(4):
            alone = denoiser.hidden(ids[row][real[row]][None], None, int(S[row]))
            assert (hidden[row][real[row]] - alone[0]).abs().max() < 1e-5


def test_batch_as_long_as_the_sequence():
    """SMDM's table [T, hd/2] must not be cut down with the batch when B = T."""
    model, ids = loopmdm.loopify(model_of("smdm"), 1, 2), some_ids(8, 8)
    S = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])
    with torch.no_grad():
        set_num_loops(model, S)
        together = peers.logits(model, ids)
        set_num_loops(model, 3)
        assert (together[2] - peers.logits(model, ids[2:3])[0]).abs().max() < 1e-5


def test_exits():
    """A sequence leaves once a visit changes little; asked from the second visit on; at its own visits' output."""
    model, ids = loopmdm.loopify(model_of("llada"), 1, 2, damping=0.3), some_ids()
    depth = Depth(9, early_exit=RelativeChange(0.053))
    with torch.no_grad():
        set_num_loops(model, depth)
        out = peers.logits(model, ids)
        visits = depth.visits.tolist()
        assert len(set(visits)) > 1 and min(visits) >= 2 and max(visits) <= 9
        for row, S in enumerate(visits):
            set_num_loops(model, S)
            assert (peers.logits(model, ids[row : row + 1])[0] - out[row]).abs().max() < 1e-5
        masked = RelativeChange(0.053, over="masked")
        set_num_loops(model, Depth(9, early_exit=masked))
        with pytest.raises(InputError, match="as_denoiser"):
            peers.logits(model, ids)
        denoiser = as_denoiser(model)
        depth = Depth(9, early_exit=masked)
        denoiser.hidden(ids, None, depth)
        assert depth.visits.tolist() != visits
        result = loopmdm.generate(
            denoiser, some_ids()[:, :3] % 16, max_new_tokens=4, num_loops=4, early_exit=RelativeChange(0.18)
        )
        assert 2 <= min(result.loops_per_step) < 4


def test_schedules():
    """A callable is asked once a pass; `looping` holds for a while; generate's S a sequence reaches the layers."""
    model, ids, asked = loopmdm.loopify(model_of("dream"), 1, 2), some_ids(), []

    def schedule():
        asked.append(1)
        return len(asked)

    set_num_loops(model, schedule)
    with torch.no_grad():
        outs = [peers.logits(model, ids) for _ in range(3)]
        for S, out in enumerate(outs, start=1):
            set_num_loops(model, S)
            assert torch.equal(peers.logits(model, ids), out)
        set_num_loops(model, 2)
        with pytest.raises(RuntimeError, match="stop"), looping(model, 3):
            assert torch.equal(peers.logits(model, ids), outs[2])
            raise RuntimeError("stop")
        assert torch.equal(peers.logits(model, ids), outs[1])
        denoiser = as_denoiser(model)
        assert denoiser.max_loops == 2
        assert torch.equal(F.linear(denoiser.hidden(ids), *denoiser.head()), outs[1])
        assert torch.equal(F.linear(denoiser.hidden(ids, num_loops=3), *denoiser.head()), outs[2])
        out = loopmdm.generate(denoiser, max_new_tokens=6, steps=3, num_loops=lambda share: (1 + 3 * share).long())
        assert len(set(out.loops_per_step)) > 1


def test_damping():
    """x <- x + beta (f(x) - x) from the second visit on."""
    ids, beta = some_ids(), 0.25
    model = model_of("smdm")
    blocks, parts = model.transformer["h"], model.transformer
    angle = torch.outer(torch.arange(8).float(), 10000 ** (-torch.arange(0, 8, 2).float() / 8))
    rope = (angle.cos().bfloat16(), angle.sin().bfloat16())
    with torch.no_grad():
        x = blocks[0](parts["wte"](ids), rope)
        x = blocks[2](blocks[1](x, rope), rope)
        for _ in range(2):
            x = x + beta * (blocks[2](blocks[1](x, rope), rope) - x)
        want = model.lm_head(parts["ln_f"](blocks[3](x, rope)))
        looped = loopmdm.loopify(model, 1, 2, 3, damping=beta)
        assert (peers.logits(looped, ids) - want).abs().max() < 1e-5


def test_equals_a_looped_model():
    """A converted LoopMDM with the same looped layers."""
    model = peers.drawn("llada", scale=0.5)
    family = families()["llada"]
    config = family.to_config(vars(model.config))
    ours = LoopMDM(config).eval()
    ours.load_state_dict(family.to_ours(model.state_dict(), config))
    ours = ours.relooped(start=1, length=3, max_loops=4)
    loopmdm.loopify(loopmdm.patch(model), 1, 3, 4)
    with torch.no_grad():
        assert (as_denoiser(model).hidden(some_ids()) - ours.hidden(some_ids())).abs().max() < 2e-5


def test_copies_loop_by_themselves():
    model = loopmdm.loopify(model_of("mdlm"), 1, 2, 3)
    twin, ids = copy.deepcopy(model), some_ids()
    set_num_loops(model, 1)
    with torch.no_grad():
        assert torch.equal(peers.logits(twin, ids), peers.logits(repeated("mdlm", 1, 2, 3, True), ids))
        for p in twin.parameters():
            p.zero_()
        assert peers.logits(model, ids).abs().max() > 0.1
    with pytest.raises(InputError, match="save_loops"):  # what it would be read back as is not looped
        pickle.dumps(model)
    again = pickle.loads(pickle.dumps(unloopify(model)))
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def test_sidecar(tmp_path):
    path, ids = tmp_path / "loops.json", some_ids()
    model = loopmdm.loopify(model_of("dream"), 0, 1, 2, damping=0.5)
    loopmdm.loopify(model, 2, 2, 3)
    save_loops(model, path)
    again = load_loops(model_of("dream"), path)
    with torch.no_grad():
        assert torch.equal(peers.logits(again, ids), peers.logits(model, ids))
    with pytest.raises(InputError, match="DreamDecoderLayer"):
        load_loops(model_of("mdlm"), path)
    data = json.loads(path.read_text())
    for spoil, said in (
        ({**data, "format": 9}, "format 9"),
        ({"format": 1}, "not a file of loop settings"),
        ({**data, "loops": [data["loops"][0], {**data["loops"][1], "start": 3}]}, "has 4"),
        ({**data, "loops": [{**data["loops"][0], "num_loops": "3"}]}, "num_loops"),
    ):
        path.write_text(json.dumps(spoil))
        fresh = model_of("dream")
        with pytest.raises(InputError, match=said):
            load_loops(fresh, path)
        assert not any("_loopmdm_loop" in m.__dict__ for m in fresh.modules())
    set_num_loops(model, lambda: 2)
    with pytest.raises(InputError, match="whole number S"):
        save_loops(model, path)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_live_caches_are_refused(name):
    """Also on a plain model, whose layers would take one; at S = 1 the model is left to itself."""
    model = loopmdm.loopify(model_of(name, patched=False), 1, 2, 2)
    with pytest.raises(InputError, match=r"key/value cache.*use_cache"):
        model(some_ids(), use_cache=True)
    set_num_loops(model, 1)
    model(some_ids(), use_cache=True)


def test_what_is_refused():
    model = model_of("llada")
    for start, length, said in ((3, 2, "has 4"), (-1, 1, "start"), (0, 0, "length")):
        with pytest.raises(InputError, match=said):
            loopmdm.loopify(model, start, length)
    for damping in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="damping"):
            loopmdm.loopify(model, 1, 1, damping=damping)
    for S in (0, True, "3", 2.0):
        with pytest.raises(InputError, match="num_loops"):
            loopmdm.loopify(model, 1, 1, S)
    for use in (lambda: set_num_loops(model, 2), lambda: save_loops(model, "x")):
        with pytest.raises(InputError, match="call loopify first"):
            use()
    with pytest.raises(InputError, match="call loopify first"):
        as_denoiser(model).hidden(some_ids(), None, 2)
    loopmdm.loopify(model, 1, 2)
    with pytest.raises(InputError, match="looped already"):
        loopmdm.loopify(model, 2, 1)
    set_num_loops(model, Depth(2, every=True))
    with pytest.raises(InputError, match="every"):
        peers.logits(model, some_ids())
    mixed = [*layers_of(model_of("llada")), *layers_of(model_of("smdm"))]
    with pytest.raises(InputError, match=r"one class and signature; layers 3\.\.4 are Block.*LLaDALlamaBlock"):
        loopmdm.loopify(model_of("llada"), 3, 2, layers=mixed)
    assert not any("_loopmdm_loop" in layer.__dict__ for layer in mixed)


def test_layers_of_no_family():
    """Named by hand: called as layer(x, ...), they return x or a tuple."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, h, scale=None):
            return (h + self.linear(h).tanh() * scale, "aside")

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList(Step() for _ in range(3))

        def forward(self, x, scale):
            for step in self.steps:
                x, aside = step(h=x, scale=scale)
            assert aside == "aside"
            return x

    model, x, scale = Odd(), torch.randn(4, 5, 6), torch.rand(4, 1, 1)
    a, b, c = model.steps
    with torch.no_grad():
        want = x
        for step in (a, b, a, b, a, b, c):
            want, _ = step(want, scale)
        loopmdm.loopify(model, 0, 2, 3, layers=model.steps)
        assert torch.equal(model(x, scale), want)
        set_num_loops(model, torch.tensor([3, 1, 2, 3]))
        with pytest.raises(InputError, match="batched="):
            model(x, scale)
        unloopify(model)
        loopmdm.loopify(model, 0, 2, torch.tensor([3, 1, 2, 3]), layers=model.steps, batched={"scale": 3})
        assert (model(x, scale)[[0, 3]] - want[[0, 3]]).abs().max() < 1e-6
        assert (model(x, scale)[1] - want[1]).abs().max() > 1e-3

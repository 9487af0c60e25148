"""patch in place: what stays, what training sees, what is refused, and models of any codebase as a Denoiser."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import loopmdm
from loopmdm.adapters import as_denoiser, families, layer, set_num_loops, unloopify
from loopmdm.adapters.passes import Pass, during
from loopmdm.adapters.patching import is_ours, recognise
from loopmdm.errors import InputError
from loopmdm.model.denoiser import Denoiser
from loopmdm.ops import native
from loopmdm.ops.linear import Panels, pack
from loopmdm.ops.rotary_attention import OP as ATTENTION

from . import peer_layers as peers

NAMES = list(peers.FAMILIES)
WHOLE = ("mdlm", "llada", "dream")  # whose layers a CPU with bf16 products computes in one call; qwen3 norms q and k


def some_ids(batch=4, length=8, seed=1):
    return torch.randint(0, peers.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss(model, ids, **kwargs):
    out = peers.logits(model, ids) if not kwargs else model(ids, **kwargs)
    return F.cross_entropy(out.flatten(0, 1), ids.flatten() % out.shape[-1])


@pytest.mark.parametrize("name", NAMES)
def test_what_stays(name):
    """The same modules, Parameter objects and keys; hooks run; state dicts go both ways; unpatch restores bits."""
    model, ids = peers.drawn(name), some_ids()
    plain, before = copy.deepcopy(model), peers.logits(model, ids).detach()
    modules, parameters, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    assert loopmdm.patch(model) is model
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    layer = next(m for m in model.modules() if recognise(m))
    assert "forward" in layer.__dict__ and "forward" not in plain.get_submodule("").__dict__
    called = []
    layer.register_forward_hook(lambda *a: called.append(1))
    peers.logits(model, ids)
    assert called == [1]
    other = peers.drawn(name, seed=7)
    model.load_state_dict(other.state_dict())
    assert (peers.logits(model, ids) - peers.logits(other, ids)).abs().max() < 1e-5
    plain.load_state_dict(model.state_dict())
    assert torch.equal(peers.logits(plain, ids), peers.logits(other, ids))
    model.load_state_dict(peers.drawn(name).state_dict())
    assert loopmdm.unpatch(model) is model and "forward" not in layer.__dict__
    assert torch.equal(peers.logits(model, ids), before)


def test_copies_and_pickles():
    """A deep copy is patched and independent; a pickle comes back with its own forward, says so, and can be patched."""
    model = loopmdm.patch(peers.drawn("llada"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.transformer["blocks"][0].q_proj.weight.zero_()
    ids = some_ids()
    assert torch.equal(peers.logits(model, ids), peers.logits(loopmdm.patch(peers.drawn("llada")), ids))
    assert not torch.equal(peers.logits(model, ids), peers.logits(twin, ids))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(peers.logits(again, ids), peers.logits(peers.drawn("llada"), ids))
    assert "not patched" in loopmdm.report(again)
    assert torch.equal(peers.logits(loopmdm.patch(again), ids), peers.logits(model, ids))
    block = again.model.transformer["blocks"][0]
    assert block.forward.__self__ is block and block.forward.__func__ is families()["llada"].forward


def test_optimizer_state_survives():
    """Two steps, patch, two more: as four without patching."""
    runs = []
    for patched in (False, True):
        model = peers.drawn("dream")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            if patched and step == 2:
                moments = [id(state["exp_avg"]) for state in optimizer.state.values()]
                loopmdm.patch(model)
                assert moments == [id(state["exp_avg"]) for state in optimizer.state.values()]
            optimizer.zero_grad()
            loss(model, some_ids(seed=step)).backward()
            optimizer.step()
        runs.append(model)
    for a, b in zip(*(run.parameters() for run in runs), strict=True):
        assert (a - b).abs().max() < 1e-4
    start = next(peers.drawn("dream").parameters())
    assert (next(runs[1].parameters()) - start).abs().max() > 1e-2


def train(rank, folder, how):
    """Two steps of the plain and of the patched model as process `rank` of two, each on its own data."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in ("plain", "patched"):
        model = peers.drawn("mdlm")
        if name == "patched":
            loopmdm.patch(model)
        if how == "fsdp":  # every layer a unit of its own, then the rest
            mesh = dist.init_device_mesh("cpu", (2,))
            for part in (*model.blocks, model):
                wrapped = fully_shard(part, mesh=mesh)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            loss(wrapped, some_ids(seed=10 * step + rank), sigma=torch.tensor([0.1, 0.5, 1.0, 2.0])).backward()
            optimizer.step()
        state = {key: p.full_tensor() if hasattr(p, "full_tensor") else p for key, p in model.state_dict().items()}
        if rank == 0:
            torch.save(state, f"{folder}/{name}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_steps_on_two_processes(tmp_path, how):
    code = "import sys; from tests.test_patch import train; train(int(sys.argv[1]), *sys.argv[2:])"
    command, root = [sys.executable, "-W", "ignore", "-c", code], Path(__file__).parents[1]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path), how], cwd=root) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    states = [torch.load(tmp_path / f"{name}.pt") for name in ("plain", "patched")]
    start = peers.drawn("mdlm").state_dict()
    moved = 0.0
    for key, want in states[0].items():
        assert (states[1][key] - want).abs().max() < 1e-5, key
        moved = max(moved, float((want - start[key]).abs().max()))
    assert moved > 1e-2


def test_autocast_keeps_the_residual_stream_in_fp32():
    model = loopmdm.patch(peers.drawn("mdlm"))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        block.attn_qkv.register_forward_hook(lambda m, a, out: seen.append((a[0].dtype, out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(some_ids(), torch.zeros(4))
    assert seen == [(torch.bfloat16, torch.bfloat16), torch.float32] * peers.LAYERS


@pytest.mark.parametrize("name", ["mdlm", "dream"])
def test_torch_compile(name):
    """Traced without a graph break, forward and backward (the `aot_eager` backend needs no compiler)."""
    layers = {"n_blocks": 1} if name == "mdlm" else {"num_hidden_layers": 1}
    model, ids = loopmdm.patch(peers.drawn(name, **layers)), some_ids()
    want = loss(model, ids)
    want.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = loss(compiled, ids, sigma=torch.zeros(4)) if name == "mdlm" else loss(compiled, ids, use_cache=False)
    got.backward()
    assert abs(got - want) < 1e-5
    for a, p in zip(gradients, model.parameters(), strict=True):
        assert (a - p.grad).abs().max() < 1e-5


def test_projections_are_called_as_modules():
    """So LoRA, put on before or after, is in force."""

    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.lora_A = base, nn.Linear(base.in_features, base.out_features, bias=False)

        @property
        def weight(self):
            return self.base_layer.weight

        def forward(self, x):
            return self.base_layer(x) + self.lora_A(x)

    for first in (True, False):
        torch.manual_seed(0)
        model = peers.drawn("llada")
        if not first:
            loopmdm.patch(model)
        for block in model.model.transformer["blocks"]:
            block.q_proj = Lora(block.q_proj)
        plain = loopmdm.unpatch(copy.deepcopy(model))
        model = loopmdm.patch(model)
        assert (peers.logits(plain, some_ids()) - peers.logits(model, some_ids())).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.blocks[3].mlp.insert(2, nn.ReLU()), "other parameters than the rest"),
        (
            lambda m: setattr(m.blocks[2].mlp[1], "approximate", "none") or setattr(m.blocks[2], "n_heads", 5),
            "do not divide",
        ),
        (lambda m: m.blocks[1].mlp.__setitem__(1, nn.ReLU()), "its activation is ReLU"),
        (lambda m: setattr(m.blocks[0], "forward", lambda *a: None), "forward put in place"),
    ],
)
def test_nothing_is_changed_on_failure(spoil, said):
    model = peers.drawn("mdlm")
    spoil(model)
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(InputError, match=said):
        loopmdm.patch(model)
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_an_unknown_model_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))

    for call in (loopmdm.patch, lambda m: loopmdm.loopify(m, 0, 1)):
        with pytest.raises(
            InputError, match=r"Odd .*seen: TransformerEncoderLayer.*docs/adapters.md.*nothing was"
        ) as error:
            call(Odd())
        assert "\n" not in str(error.value)
    assert "TransformerEncoderLayer" in loopmdm.report(Odd())


def test_report():
    model = peers.drawn("llada")
    assert "4 LLaDALlamaBlock" in loopmdm.report(model) and "not patched" in loopmdm.report(model)
    text = loopmdm.report(loopmdm.loopify(loopmdm.patch(model), 1, 2, 3))
    size = {"tokens": 1024, "head_dim": 8, "level_below_4": native.level_below_4()}
    choice = ATTENTION.choose("auto", torch.device("cpu"), torch.float32, **size)
    assert f"attention: {choice.impl} ({choice.why})" in text
    for part in ("llada: 4", "patched", "rmsnorm eps 1e-05", "4 heads of 8 over 2", "honoured", "layers 1..2, S = 3"):
        assert part in text


def test_a_live_models_own_mask_id_counts():
    model = peers.drawn("mdlm")
    last = as_denoiser(model).mask_id
    model.mask_index = 3  # as MDLM's Lightning module has it
    assert (as_denoiser(model).mask_id, as_denoiser(model, mask_id=5).mask_id) == (3, 5) and last != 3


def test_live_caches_are_refused():
    with pytest.raises(InputError, match="use_cache=False"):
        loopmdm.patch(peers.drawn("llada"))(some_ids(), use_cache=True)
    with pytest.raises(InputError, match="use_cache=False"):
        loopmdm.patch(peers.drawn("dream"))(some_ids(), past_key_values=[()])


@pytest.mark.parametrize("name", NAMES)
def test_denoiser(name):
    """Hidden states and head give the model's logits; losses and samplers take it; rows that need none get no head."""
    model = loopmdm.patch(peers.drawn(name))
    denoiser = as_denoiser(model)
    assert isinstance(denoiser, Denoiser) and denoiser.mask_id == peers.VOCAB - 1
    assert denoiser.logit_shift == (name in ("dream", "qwen3"))
    assert denoiser.vocab_size == peers.VOCAB
    ids = some_ids()
    assert torch.equal(F.linear(denoiser.hidden(ids), *denoiser.head()), peers.logits(model, ids, sigma=torch.zeros(1)))
    data = some_ids(4, 12) % (peers.VOCAB - 1)
    loopmdm.nelbo(denoiser, data, seed=3).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    out = loopmdm.generate(denoiser, max_new_tokens=12, steps=6, policy="ancestral", seed=0)
    assert out.tokens.shape == (1, 12) and out.head_rows == 12 and (out.tokens < peers.VOCAB - 1).all()
    assert out.flops > 0


def test_tied_head():
    """LLaDA with weight_tying has no head module: the last norm's output and the embedding are the head."""
    model = loopmdm.patch(peers.drawn("llada", weight_tying=True))
    denoiser, ids = as_denoiser(model), some_ids()
    assert (F.linear(denoiser.hidden(ids), *denoiser.head()) - peers.logits(model, ids)).abs().max() < 1e-6


def test_time_conditioning():
    model = loopmdm.patch(peers.drawn("mdlm"))
    model.config.time_conditioning = True
    denoiser, ids, sigma = as_denoiser(model), some_ids(), torch.tensor([0.1, 0.5, 1.0, 2.0])
    got = F.linear(denoiser.hidden(ids, sigma=sigma), *denoiser.head())
    assert torch.equal(got, peers.logits(model, ids, sigma=sigma))
    still = as_denoiser(model, time_conditioning=False)
    assert torch.equal(still.hidden(ids, sigma=sigma), still.hidden(ids))


@pytest.mark.parametrize("name", NAMES)
def test_copy_in_bf16(name):
    """Projections in bf16, the residual stream not; every generate reads the present weights; the model keeps its."""
    model = loopmdm.patch(peers.drawn(name))
    keys, ids = {k: v.dtype for k, v in model.state_dict().items()}, some_ids()
    narrow = as_denoiser(model, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = as_denoiser(model).hidden(ids)
        assert narrow.hidden(ids).dtype == torch.bfloat16
        assert (narrow.hidden(ids) - exact).norm() < 0.02 * exact.norm()
        for p in model.parameters():
            p.mul_(0.5)
        stale, fresh = narrow.hidden(ids), as_denoiser(model, dtype=torch.bfloat16).hidden(ids)
        assert not torch.equal(stale, fresh)
        loopmdm.generate(narrow, max_new_tokens=2, steps=1, policy="ancestral")
        assert torch.equal(narrow.hidden(ids), fresh)
    assert {k: v.dtype for k, v in model.state_dict().items()} == keys
    with pytest.raises(InputError, match="patch"):
        as_denoiser(peers.drawn(name), dtype=torch.bfloat16)


def test_a_narrow_copy_follows_its_model():
    """S, damping and the way with padding are the model's; other Parameters or loops than then are refused."""
    ids, real = some_ids(), torch.arange(8) < torch.tensor([[8], [5], [3], [8]])
    model = loopmdm.loopify(loopmdm.patch(peers.drawn("llada")), 1, 2)
    wide, narrow = as_denoiser(model), as_denoiser(model, dtype=torch.float32)
    with torch.no_grad():
        before = wide.hidden(ids, real)
        set_num_loops(model, 4)
        loopmdm.patch(model, ignore_padding=True)
        assert narrow.max_loops == 4
        want, got = wide.hidden(ids, real), narrow.eval().hidden(ids, real)
        assert (got - want).norm() < 1e-5 * want.norm() < 1e-3 * (want - before).norm()
        model.load_state_dict(peers.drawn("llada", seed=7).state_dict())
        want, got = wide.hidden(ids, real), narrow.eval().hidden(ids, real)
        assert (got - want).norm() < 1e-5 * want.norm()
    loopmdm.loopify(unloopify(model), 1, 1)
    with pytest.raises(InputError, match="call as_denoiser again"):
        narrow.eval()
    narrow = as_denoiser(model, dtype=torch.float32)
    model.load_state_dict(peers.drawn("llada").state_dict(), assign=True)
    with pytest.raises(InputError, match="call as_denoiser again"):
        loopmdm.generate(narrow, max_new_tokens=2, steps=1)


def test_a_narrow_copy_calls_what_is_more_than_a_product():
    """Packed weights are for projections that a layer itself calls; wrapped and hooked ones are called as modules."""
    model = loopmdm.patch(peers.drawn("mdlm"))
    seen = []

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x):
            seen.append("wrapped")
            return self.base(x) + 0 * self.weight[0, 0]  # reads the numbers, as a merged adapter does

    model.blocks[0].attn_out = Wrapped(model.blocks[0].attn_out)
    model.blocks[1].mlp[2].register_forward_hook(lambda *_: seen.append("hook"))
    ids = torch.randint(0, 6, (2, 9))
    with torch.no_grad():
        exact = as_denoiser(model).hidden(ids)
        seen.clear()
        narrow = as_denoiser(model, dtype=torch.bfloat16)
        got = narrow.hidden(ids)
    assert seen == ["wrapped", "hook"]
    assert (got - exact).norm() < 0.02 * exact.norm()
    if pack(torch.zeros(1, 1).bfloat16()) is not None:
        assert narrow.model.blocks[0].mlp[0].weight.is_meta and not model.blocks[0].mlp[0].weight.is_meta


def taken(monkeypatch, allowed=True):
    """Whether each call of a packed layer was made at once; without `allowed` none is."""
    calls, original = [], layer.through

    def through(*given, **more):
        out = original(*given, **more) if allowed else None
        calls.append(out is not None)
        return out

    monkeypatch.setattr(layer, "through", through)
    return calls


@pytest.mark.skipif(not isinstance(pack(torch.zeros(1, 1).bfloat16()), Panels), reason="no bf16 products of ours here")
@pytest.mark.parametrize(
    "name, changes",
    [
        ("mdlm", {}),
        ("llada", {}),
        ("llada", {"include_qkv_bias": True}),
        ("dream", {}),
    ],
    ids=str,
)
def test_layers_in_one_call_are_their_projections_one_by_one(name, changes, monkeypatch):
    """No further from float64 than the projections of the same copy, with padding and with present weights."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(3):
        model = loopmdm.patch(peers.drawn(name, seed, **changes))
        ids = some_ids(batch=4, length=24, seed=seed)
        real = torch.arange(24) >= torch.tensor([0, 3, 0, 11])[:, None]
        narrow = as_denoiser(model, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = as_denoiser(copy.deepcopy(model).double()).hidden(ids, real)
            for p in model.parameters():  # the packed layers are to read what the weights are then
                p.mul_(1.25)
            narrow.refresh()
            scaled = as_denoiser(copy.deepcopy(model).double()).hidden(ids, real)
            assert (scaled - exact).norm() > 0.05 * exact.norm()
            for at_once in errors:
                with monkeypatch.context() as patch:
                    calls = taken(patch, at_once)
                    got = narrow.hidden(ids, real)
                assert calls == [at_once] * peers.LAYERS
                errors[at_once] += float((got - scaled).norm() / scaled.norm())
    assert errors[True] <= 1.2 * errors[False] and errors[True] < 0.06


@pytest.mark.skipif(not isinstance(pack(torch.zeros(1, 1).bfloat16()), Panels), reason="no bf16 products of ours here")
def test_which_layers_are_not_taken_at_once(monkeypatch):
    """Rows by query group, norms of q and k, rotary tables in bf16, a conditioning of each sequence, dropout."""
    ids, calls = some_ids(), taken(monkeypatch)
    for name, packed in (("smdm", False), ("qwen3", False), ("dream", True)):
        narrow = as_denoiser(loopmdm.patch(peers.drawn(name)), dtype=torch.bfloat16)
        assert [m._loopmdm.packed is not None for m in narrow.modules() if is_ours(m)] == [packed] * peers.LAYERS
    model = loopmdm.patch(peers.drawn("smdm", n_query_groups=1))
    with torch.no_grad():
        want = as_denoiser(model).hidden(ids)
        assert (as_denoiser(model, dtype=torch.bfloat16).hidden(ids) - want).norm() < 0.02 * want.norm()
        assert calls == [False] * peers.LAYERS
        model = loopmdm.patch(peers.drawn("mdlm", dropout=0.1))
        narrow = as_denoiser(model, dtype=torch.bfloat16, time_conditioning=True).eval()
        one, each = torch.full((4,), 0.3), torch.tensor([0.3, 1.0, 2.0, 0.1])
        for sigma, seen in ((one, [True] * peers.LAYERS), (each, [])):
            calls.clear()
            got, want = (
                d.hidden(ids, sigma=sigma) for d in (narrow, as_denoiser(model, time_conditioning=True).eval())
            )
            assert calls == seen and (got - want).norm() < 0.02 * want.norm()
        calls.clear()
        assert (narrow.train().hidden(ids, sigma=one) - want).norm() > 0.02 * want.norm() and calls == []


@pytest.mark.skipif(not isinstance(pack(torch.zeros(1, 1).bfloat16()), Panels), reason="no bf16 products of ours here")
def test_held_modulation_is_folded_once(monkeypatch):
    """The same bits with and without, one product with the conditioning a layer, and another one for another sigma."""
    model = loopmdm.patch(peers.drawn("mdlm"))
    narrow = as_denoiser(model, dtype=torch.bfloat16, time_conditioning=True).eval()
    ids, calls = some_ids(), taken(monkeypatch)
    modulated = []
    original = layer.Around.modulated
    monkeypatch.setattr(layer.Around, "modulated", lambda self, parts: (modulated.append(1), original(self, parts))[1])
    with torch.no_grad():
        want = [narrow.hidden(ids, sigma=torch.full((4,), s)) for s in (0.2, 1.5)]
        assert len(modulated) == 2 * peers.LAYERS and (want[0] - want[1]).abs().max() > 1e-2
        modulated.clear()
        with narrow.held():
            for i in (0, 0, 1, 1):
                assert torch.equal(narrow.hidden(ids, sigma=torch.full((4,), (0.2, 1.5)[i])), want[i])
        assert len(modulated) == 2 * peers.LAYERS
    assert calls == [True] * 6 * peers.LAYERS


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_what_the_whole_pass_gives(name, padded, dtype):
    """hidden(rows=) is hidden() there; the last layer's MLP sees these positions alone."""
    model = loopmdm.patch(peers.drawn(name))
    denoiser, ids = as_denoiser(model, dtype=dtype).eval(), some_ids(batch=3, length=9)
    real = torch.arange(9) >= torch.tensor([0, 0, 4])[:, None] if padded else None
    rows = torch.zeros(3, 9, dtype=torch.bool)
    rows[0, [1, 2, 8]], rows[2, 8] = True, True
    layout = [m for m in denoiser.modules() if is_ours(m)][-1]._loopmdm.layout
    seen, whole = [], []  # (projection, rows that it makes), and whether a layer went in one call
    original, at_once = layer.project, layer.through

    def watched(module, x):
        seen.append((module, x.shape[1]))
        return original(module, x)

    def together(visits, x, *rest, **more):
        made = at_once(visits, x, *rest, **more)
        whole.append(made is not None)
        if made is not None:
            (modules,), inner = (visit.modules for visit in visits), len(layout.qkv)
            seen.extend((module, x.shape[1]) for module in modules[:inner])
            seen.extend((module, made.shape[1]) for module in modules[inner:])
        return made

    with torch.no_grad():
        want = denoiser.hidden(ids, real)
        denoiser.hidden(ids, real, rows=rows)  # asks once whether the model bears it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "project", watched)
            patch.setattr(layer, "through", together)
            got = denoiser.hidden(ids, real, rows=rows)
    assert (got - want)[rows].norm() <= (1e-6 if dtype is None else 0.02) * want[rows].norm()
    last = [m for m in denoiser.modules() if is_ours(m)][-1].get_submodule(layout.out)
    assert [n for m, n in seen if m is last] == [3] and {n for _, n in seen} == {3, 9}
    ours = dtype is not None and isinstance(pack(torch.zeros(1, 1).bfloat16()), Panels)
    assert whole == [True] * peers.LAYERS * (ours and name in WHOLE)


def test_threads_and_what_happens_to_the_model_meanwhile():
    """Several threads sample from one model; unpatching it, gradients and autocast leave a Denoiser of it whole."""
    model, ids = loopmdm.patch(peers.drawn("llada")), some_ids(batch=2, length=9)
    denoiser, narrow = as_denoiser(model).eval(), as_denoiser(model, dtype=torch.bfloat16).eval()
    rows = [torch.arange(9).expand(2, 9) % 9 == i for i in range(4)]
    with torch.no_grad():
        want = denoiser.hidden(ids)
        denoiser.hidden(ids, rows=rows[0])

    def ask(i):
        with torch.no_grad():
            return all(
                torch.allclose(denoiser.hidden(ids, rows=rows[i])[rows[i]], want[rows[i]], atol=1e-5) for _ in range(40)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not narrow.hidden(ids, rows=rows[1]).requires_grad
    for wrong in (rows[0].long(), rows[0][:1]):
        with pytest.raises(InputError, match="rows is"):
            denoiser.hidden(ids, rows=wrong)
    loopmdm.unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(denoiser.hidden(ids, rows=rows[2]), want, rtol=1e-5, atol=1e-5)


def test_threads_have_their_own_padding():
    model, ids = loopmdm.patch(peers.drawn("llada")), some_ids(batch=2, length=9)
    denoiser = as_denoiser(model).eval()
    masks = [None, *(torch.arange(9) < torch.tensor([[n], [9]]) for n in (5, 6, 7))]
    with torch.no_grad():
        want = [denoiser.hidden(ids, mask) for mask in masks]

    def ask(i):
        with torch.no_grad():
            return all(torch.allclose(denoiser.hidden(ids, masks[i]), want[i], atol=1e-5) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_compiled_models_as_denoisers():
    """Compiled as a whole it is unwrapped, compiled layers are used; in place it may run past its head, and says so."""
    model, ids, real = peers.drawn("llada"), some_ids(), torch.arange(8) < torch.tensor([[8], [5], [3], [8]])
    denoiser = as_denoiser(loopmdm.patch(model))
    with torch.no_grad():
        want = denoiser.hidden(ids, real), denoiser.hidden(ids)
        compiled = torch.compile(model, backend="eager")
        compiled(ids)
        assert torch.equal(as_denoiser(compiled).hidden(ids, real), want[0])
        for block in model.model.transformer["blocks"]:
            block.compile(backend="eager", fullgraph=True)
        for _ in range(2):
            assert (denoiser.hidden(ids, real) - want[0]).abs().max() < 1e-5
            assert (denoiser.hidden(ids) - want[1]).abs().max() < 1e-5
        plain = peers.drawn("llada")
        plain.compile(backend="eager")
        plain(ids)
        with pytest.raises(InputError, match="compile its layers"):
            as_denoiser(plain).hidden(ids)


def test_a_model_that_needs_the_last_layer_whole():
    """Where something behind the layers looks at all positions, the layers are left to work on all."""
    model = loopmdm.patch(peers.drawn("mdlm"))
    forward = model.blocks[-1].forward
    model.blocks[-1].forward = lambda x, *args, **more: x + 0.5 * forward(x, *args, **more)
    denoiser, ids = as_denoiser(model).eval(), some_ids(batch=1, length=9)
    rows = torch.arange(9)[None] == 4
    with torch.no_grad():
        assert torch.equal(denoiser.hidden(ids, rows=rows), denoiser.hidden(ids))


class LLaDABlockGroup(nn.ModuleList):
    def forward(self, x, attention_bias=None, layers_past=None, use_cache=False):
        for block in self:
            x, _ = block(x, attention_bias=attention_bias, use_cache=use_cache)
        return x, None


class GroupedLLaDA(peers.LLaDAModelLM):
    """Blocks in groups of two, as with block_group_size = 2."""

    def __init__(self, plain):
        super().__init__(plain.config)
        parts = self.model.transformer
        blocks = list(plain.model.transformer.pop("blocks"))
        parts.update(plain.model.transformer)
        parts["block_groups"] = nn.ModuleList(LLaDABlockGroup(blocks[i : i + 2]) for i in range(0, len(blocks), 2))
        del parts["blocks"]

    def forward(self, ids, attention_mask=None, use_cache=False):
        parts = self.model.transformer
        x = parts["wte"](ids)
        for group in parts["block_groups"]:
            x, _ = group(x, use_cache=use_cache)
        return parts["ff_out"](parts["ln_f"](x))


def test_blocks_in_groups():
    """Patched, and looped across the border of two groups, as the ungrouped model."""
    plain, ids = peers.drawn("llada"), some_ids()
    grouped = loopmdm.patch(GroupedLLaDA(peers.drawn("llada")).eval())
    assert any("block_groups.1.0.q_proj" in key for key in grouped.state_dict())
    torch.testing.assert_close(grouped(ids), plain(ids), atol=1e-5, rtol=0)
    for model in (grouped, plain):
        loopmdm.loopify(model, 1, 2, num_loops=3)
    torch.testing.assert_close(grouped(ids), plain(ids), atol=1e-5, rtol=0)
    denoiser = as_denoiser(grouped)
    torch.testing.assert_close(F.linear(denoiser.hidden(ids), *denoiser.head()), plain(ids), atol=1e-5, rtol=0)


def test_folded_modulation_is_never_stale():
    """Constants are folded in each call, so weights that change under torch's nose are seen."""
    model, ids = loopmdm.patch(peers.drawn("mdlm")), some_ids()
    denoiser = as_denoiser(model)
    with torch.no_grad():
        denoiser.hidden(ids)
        for tensor in model.state_dict().values():
            tensor.data.mul_(0.7)
        assert torch.equal(denoiser.hidden(ids), as_denoiser(loopmdm.patch(copy.deepcopy(model))).hidden(ids))
        plain = loopmdm.unpatch(copy.deepcopy(model))
        assert (peers.logits(plain, ids) - peers.logits(model, ids)).abs().max() < 1e-5


def test_modulation_is_worked_out_once_in_a_generation():
    """Constants once a generate, each generate anew; what depends on time every step; hooks every time."""
    model = loopmdm.patch(peers.drawn("mdlm"))
    layers, calls, original = [b.adaLN_modulation for b in model.blocks], [], F.linear

    def counted(x, weight, bias=None):
        calls.append(any(weight is layer.weight for layer in layers))
        return original(x, weight, bias)

    def run(denoiser):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", counted)
            out = loopmdm.generate(denoiser, max_new_tokens=12, steps=4, policy="confidence", seed=2).tokens
        return sum(calls), out

    denoiser = as_denoiser(model)
    loopmdm.generate(denoiser, max_new_tokens=12, steps=4, policy="confidence")  # asks once about the last layer
    (once, first), n = run(denoiser), len(layers)
    assert once == n
    with torch.no_grad():
        for layer in layers:
            layer.bias.data.add_(1.0)
    again, second = run(denoiser)
    assert again == n and not torch.equal(first, second)
    assert torch.equal(second, run(as_denoiser(loopmdm.patch(copy.deepcopy(loopmdm.unpatch(model)))))[1])
    loopmdm.patch(model)
    assert run(as_denoiser(model, time_conditioning=True))[0] > 3 * n
    layers[0].register_forward_hook(lambda *_: None)
    assert run(as_denoiser(model))[0] >= n + 3


def test_a_model_of_no_family():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)

        def forward(self, ids):
            return self.out(self.embed(ids).cumsum(1))

    model, ids = Bag(), some_ids() % 9
    denoiser = as_denoiser(model, head="out", mask_id=8)
    assert torch.equal(F.linear(denoiser.hidden(ids), *denoiser.head()), model(ids))
    assert loopmdm.generate(denoiser, max_new_tokens=4, steps=2).tokens.shape == (1, 4)
    with pytest.raises(InputError, match="head="):
        as_denoiser(Bag(), mask_id=8)
    with pytest.raises(InputError, match="mask_id="):
        as_denoiser(Bag(), head="out")
    with pytest.raises(InputError, match="no padding mask"):
        denoiser.hidden(ids, torch.arange(8) < torch.tensor([8, 8, 3, 2])[:, None])


@pytest.mark.parametrize("additive", [False, True])
def test_masks_add_up(additive):
    """A key that the model's own mask hides and one that as_denoiser hides are both hidden."""
    model = loopmdm.patch(peers.drawn("dream"))
    layer, x = model.model.layers[0], torch.randn(2, 6, 32)
    rope = (torch.ones(1, 6, 8), torch.zeros(1, 6, 8))
    theirs, ours = torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.ones(2, 1, 1, 6, dtype=torch.bool)
    theirs[..., 4], ours[..., 5] = False, False
    given = (~theirs).float() * torch.finfo(torch.float32).min if additive else theirs
    with torch.no_grad():
        with during(Pass(ours)):
            got = layer(x, attention_mask=given, position_embeddings=rope)[0][:, :4]
        want = layer(x[:, :4], position_embeddings=(rope[0][:, :4], rope[1][:, :4]))[0]
    assert (got - want).abs().max() < 1e-5

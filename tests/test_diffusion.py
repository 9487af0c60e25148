"""The NELBO against exact enumeration, and the corruption behind it."""

import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from loopmdm import diffusion, random
from loopmdm.diffusion import T_MIN, LogLinear, corrupt, nelbo, sample_loops, sft, stratified_times
from loopmdm.errors import InputError
from loopmdm.model.denoiser import Denoiser
from loopmdm.model.depth import Depth, RelativeChange

from .enumeration import all_masks, exact_nelbo
from .helpers import Table, ids, live, tiny

T, V = 4, 5  # ids 0..3 and the mask, 4


@pytest.fixture(scope="module")
def toy():
    return live(tiny("llama", vocab_size=V, boundary="anchored"), dtype=torch.float64, head_scale=3.0)


@pytest.mark.parametrize("clean", [[0, 1, 2, 3], [3, 3, 0, 3], [2, 0, 0, 1]])
@pytest.mark.parametrize("num_loops", [1, 3])
def test_nelbo_is_exact_when_fed_every_mask_and_time(toy, clean, num_loops):
    """Every (t node, mask) as one row of a batch; Gauss-Legendre is exact for the polynomial integrand."""
    clean = torch.tensor(clean)
    nodes, weights = np.polynomial.legendre.leggauss(6)
    nodes = torch.tensor(T_MIN + (1 - T_MIN) * (nodes + 1) / 2)
    weights = torch.tensor(weights / 2)  # of a mean over the interval
    masks = all_masks(T)
    t = nodes.repeat_interleave(len(masks))
    mask = masks.repeat(len(nodes), 1)
    with torch.no_grad():
        out = nelbo(toy, clean.repeat(len(t), 1), t=t, mask=mask, num_loops=num_loops)
    p = 0.999 * t[:, None]
    chance = torch.where(mask, p, 1 - p).prod(-1)
    assert chance.view(len(nodes), -1).sum(-1).allclose(torch.ones(len(nodes), dtype=torch.float64))
    got = (weights.repeat_interleave(len(masks)) * chance * out.per_sequence).sum().item()
    want = exact_nelbo(toy, clean, num_loops)
    assert want > 0.5 and got == pytest.approx(want, abs=1e-9)
    assert out.masked_tokens == int(mask.sum()) and out.num_loops == num_loops


def estimates(model, clean, runs=24, batch=1024):
    with torch.no_grad():
        values = [nelbo(model, clean.repeat(batch, 1), num_loops=1, seed=s).nelbo.item() for s in range(runs)]
    return np.mean(values), np.std(values, ddof=1) / runs**0.5


def test_nelbo_is_exact_on_average(toy, monkeypatch):
    """Drawn t and masks; and a wrong weight or rate would be seen."""
    clean = torch.tensor([2, 0, 3, 3])
    want = exact_nelbo(toy, clean, 1)
    toy = copy.deepcopy(toy).float()
    mean, error = estimates(toy, clean)
    assert abs(mean - want) < 4 * error < 0.05 * want

    def wrong(name, function):
        with monkeypatch.context() as patch:
            patch.setattr(LogLinear, name, function)
            mean, error = estimates(toy, clean)
            assert abs(mean - want) > 5 * error

    wrong("weight", lambda self, t: torch.ones_like(t))
    wrong("weight", lambda self, t: t**-0.9)
    wrong("alpha", lambda self, t: 1 - 0.9 * t)
    wrong("alpha", lambda self, t: (1 - t) ** 1.5)


def test_loss_by_hand(toy):
    """Sum over counted, masked positions of CE / t, divided by the counted positions of the batch."""
    tokens = ids(5, 7, V, masks=0)
    real = torch.arange(7)[None] < torch.tensor([7, 4, 1, 6, 0])[:, None]
    maskable = torch.rand(5, 7) < 0.8
    counted = real & maskable
    out = nelbo(toy, tokens, attention_mask=real.long(), maskable=maskable, num_loops=2, seed=3, t_range=(0.3, 0.9))
    seen, mask, t = out.corruption.tokens, out.corruption.mask, out.corruption.t
    assert mask.any() and not (mask & ~counted).any() and torch.equal(seen == toy.mask_id, mask)
    assert torch.equal(seen[~mask], tokens[~mask])
    with torch.no_grad():
        chance = toy(seen, real, num_loops=2).logits[..., : V - 1].softmax(-1)
    sums, plain = [0.0] * 5, 0.0
    for b, i in mask.nonzero().tolist():
        ce = -math.log(chance[b, i, tokens[b, i]])
        sums[b] += ce / t[b].item()
        plain += ce
    total = int(counted.sum())
    assert out.loss.item() == pytest.approx(sum(sums) / total) and out.loss.requires_grad
    assert out.nelbo.item() == out.loss.item() and not out.nelbo.requires_grad
    want = [s / max(1, n) for s, n in zip(sums, counted.sum(-1).tolist(), strict=True)]
    assert out.per_sequence.tolist() == pytest.approx(want) and want[4] == 0
    assert out.masked_tokens == int(mask.sum())

    mean = nelbo(
        toy,
        tokens,
        attention_mask=real,
        maskable=maskable,
        num_loops=2,
        seed=3,
        t_range=(0.3, 0.9),
        objective="masked_mean",
    )
    assert mean.loss.item() == pytest.approx(plain / int(mask.sum()))
    assert mean.nelbo.item() == out.nelbo.item()


@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
def test_nothing_masked(toy, objective):
    tokens = ids(2, T, V, masks=0)
    out = nelbo(toy, tokens, mask=torch.zeros(2, T).bool(), t=torch.tensor([0.5, 0.5]), objective=objective)
    assert out.loss.item() == 0 and out.masked_tokens == 0 and out.per_sequence.tolist() == [0, 0]
    out.loss.backward()
    toy.zero_grad()


# Corruption


@pytest.mark.parametrize("t", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_mask_rate(t):
    """1 - alpha_t = 0.999 t, at every position."""
    tokens = torch.zeros(4000, 12).long()
    mask = corrupt(tokens, 9, torch.full((4000,), t), seed=5).mask
    p, n = 0.999 * t, 4000
    for rate, count in ((mask.float().mean(), 12 * n), (mask[:, 0].float().mean(), n), (mask[:, 11].float().mean(), n)):
        assert abs(rate.item() - p) < 4.5 * math.sqrt(p * (1 - p) / count)


def test_mask_rate_is_that_of_each_row():
    t = torch.tensor([0.1, 0.9]).repeat(2000)
    rates = corrupt(torch.zeros(4000, 20).long(), 9, t).mask.float().view(2000, 2, 20).mean((0, 2))
    assert abs(rates[0] - 0.0999) < 0.01 and abs(rates[1] - 0.8991) < 0.01


def test_masks_are_independent_across_positions_and_rows():
    mask = corrupt(torch.zeros(3000, 8).long(), 9, torch.full((3000,), 0.5)).mask.double() - 0.4995
    covariance = (mask.T @ mask / 3000).fill_diagonal_(0).abs().max()
    assert covariance < 5 * 0.25 / 3000**0.5
    assert (mask[1:] * mask[:-1]).mean().abs() < 5 * 0.25 / 24000**0.5


def test_corruption_is_a_function_of_seed_step_and_index():
    tokens, t = ids(8, 30, masks=0), torch.full((8,), 0.5)
    base = corrupt(tokens, 10, t, seed=1, step=2)
    assert torch.equal(base.mask, corrupt(tokens, 10, t, seed=1, step=2).mask)
    torch.manual_seed(99)
    assert torch.equal(base.mask, corrupt(tokens, 10, t, seed=1, step=2, index=torch.arange(8)).mask)
    for changed in (
        corrupt(tokens, 10, t, seed=2, step=2),
        corrupt(tokens, 10, t, seed=1, step=3),
        corrupt(tokens, 10, t, seed=1, step=2, index=torch.arange(8) + 8),
    ):
        assert all((changed.mask[i] != base.mask[i]).any() for i in range(8))
    # a longer sequence begins with the same masks, and masks grow with t
    longer = corrupt(ids(8, 40, masks=0), 10, t, seed=1, step=2)
    assert torch.equal(longer.mask[:, :30], base.mask)
    assert not (base.mask & ~corrupt(tokens, 10, t + 0.2, seed=1, step=2).mask).any()


def test_maskable_and_padding_are_never_masked():
    tokens = ids(6, 20, masks=0)
    maskable = torch.rand(6, 20) < 0.5
    out = corrupt(tokens, 10, torch.ones(6), maskable=maskable)
    assert not (out.mask & ~maskable).any() and out.mask.sum() > 0.9 * maskable.sum()
    assert torch.equal(out.tokens[~out.mask], tokens[~out.mask])
    assert (out.tokens[out.mask] == 10).all() and not (tokens == 10).any(), "the input is left alone"


@pytest.mark.parametrize("given", [torch.bool, torch.int64])
def test_an_injected_mask_spares_what_does_not_count(toy, given):
    tokens = ids(2, T, V, masks=0)
    real = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    maskable = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    out = nelbo(
        toy,
        tokens,
        attention_mask=real.to(given),
        maskable=maskable.to(given),
        mask=torch.ones(2, T).to(given),
        t=torch.ones(2),
        num_loops=1,
    )
    assert out.corruption.mask.tolist() == [[False, True, True, False], [True] * 4]


# Times and loop counts


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 512])
def test_each_stratum_has_one_time(batch):
    for step in range(20):
        t = stratified_times(torch.arange(batch), batch, seed=3, step=step).double()
        assert t.min() >= T_MIN - 1e-9 and t.max() <= 1
        place = ((t - T_MIN) / (1 - T_MIN) * batch).clamp(max=batch - 1e-3)
        assert sorted(place.floor().long().tolist()) == list(range(batch))
        inside = (place % 1).sort().values  # the same offset in each stratum, wrap-around aside
        assert inside[-1] - inside[0] < 1e-3 or inside[-1] - inside[0] > 1 - 1e-3


def test_times_are_uniform():
    t = torch.cat([stratified_times(torch.arange(4), 4, seed=0, step=step) for step in range(500)]).double()
    assert abs(t.mean().item() - 0.5005) < 0.02 and abs(t.var().item() - 0.999**2 / 12) < 0.005
    first = torch.stack([stratified_times(torch.arange(4), 4, 0, s)[0] for s in range(400)])
    assert abs(first.mean().item() - 0.5005) < 0.06  # each sample sees all times, not its own stratum
    narrow = stratified_times(torch.arange(50), 50, 0, 0, (0.2, 0.4))
    assert narrow.min() >= 0.2 and narrow.max() <= 0.4 and narrow.max() - narrow.min() > 0.19


def test_batches_wrap_around():
    """Accumulation: samples B.. of a step take the strata again."""
    assert torch.equal(stratified_times(torch.arange(8, 16), 8, 0, 0), stratified_times(torch.arange(8), 8, 0, 0))


@pytest.mark.parametrize("bad", [(0.0, 1.0), (0.5, 0.4), (0.1, 1.1), (-1.0, 1.0)])
def test_time_range_is_checked(bad):
    with pytest.raises(InputError, match=r"t_range is .*0 < low <= high <= 1"):
        stratified_times(torch.arange(2), 2, 0, 0, bad)


def test_ranks_see_slices_of_one_batch(toy):
    """One process with 8 samples, two with 4, four with 2: the same times, masks, S and losses."""
    tokens = ids(8, 6, V, masks=0)
    with torch.no_grad():
        whole = nelbo(toy, tokens, seed=4, step=7)
        for ranks in (2, 4):
            per = 8 // ranks
            parts = [
                nelbo(
                    toy,
                    tokens[r * per : (r + 1) * per],
                    seed=4,
                    step=7,
                    index=torch.arange(r * per, (r + 1) * per),
                    global_batch=8,
                )
                for r in range(ranks)
            ]
            assert {p.num_loops for p in parts} == {whole.num_loops}
            for name in ("tokens", "mask", "t"):
                joined = torch.cat([getattr(p.corruption, name) for p in parts])
                assert torch.equal(joined, getattr(whole.corruption, name))
            torch.testing.assert_close(torch.cat([p.per_sequence for p in parts]), whole.per_sequence)
            torch.testing.assert_close(sum(p.loss for p in parts) / ranks, whole.loss)
        other = [nelbo(toy, tokens, seed=4, step=8), nelbo(toy, tokens, seed=5, step=7)]
    for o in other:
        assert not torch.equal(o.corruption.mask, whole.corruption.mask)
        assert not torch.equal(o.corruption.t, whole.corruption.t)


def test_loop_counts():
    draws = [sample_loops(12, seed=2, step=s) for s in range(2400)]
    counts = np.bincount(draws, minlength=13)
    assert counts[0] == 0 and len(counts) == 13
    assert ((counts[1:] - 200) ** 2 / 200).sum() < 35  # chi-square, 11 degrees of freedom: p about 2e-4
    assert draws != [sample_loops(12, seed=3, step=s) for s in range(2400)]
    assert sample_loops(1, 0, 0) == 1


def test_loop_counts_from_a_distribution(toy):
    table = {8: 0.25, 1: 0.5, 3: 0.25}
    for step in range(60):
        u = random.scalar(6, random.LOOPS, step)
        assert sample_loops(table, 6, step) == (1 if u < 0.5 else 3 if u < 0.75 else 8)
    tokens = ids(2, T, V, masks=0)
    with torch.no_grad():
        assert {nelbo(toy, tokens, num_loops=table, step=s).num_loops for s in range(12)} == {1, 3, 8}
        assert {nelbo(toy, tokens, step=s).num_loops for s in range(12)} == {1, 2, 3}  # U{1..max_loops}
        assert nelbo(toy, tokens, num_loops=5).num_loops == 5


@pytest.mark.parametrize("bad", [0, -3, 2.0])
def test_loop_count_is_checked(toy, bad):
    with pytest.raises(InputError, match="at least once"):
        nelbo(toy, ids(2, T, V, masks=0), num_loops=bad)


# Inputs


def test_mask_ids_in_the_data(toy):
    tokens = ids(2, T, V, masks=0)
    tokens[1, 2] = toy.mask_id
    with pytest.raises(InputError, match="the data contain the mask id 4; clean tokens cannot be"):
        nelbo(toy, tokens)
    maskable = tokens != toy.mask_id
    with torch.no_grad():
        assert nelbo(toy, tokens, maskable=maskable).nelbo.isfinite()
        assert nelbo(toy, tokens, attention_mask=maskable).nelbo.isfinite()


def test_targets_that_are_never_predicted():
    """Their cross-entropy would be infinite; where they do not count, they may stand."""
    model = Table(torch.randn(T, V, V), mask_id=4, suppressed=(2,))
    tokens = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(InputError, match="contain id 2, which this model never predicts"):
        nelbo(model, tokens)
    out = nelbo(model, tokens, maskable=tokens != 2, mask=torch.ones(1, T).bool(), t=torch.ones(1))
    assert out.nelbo.isfinite() and out.masked_tokens == 3


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"maskable": torch.ones(2, 3).bool()}, r"maskable is \[2, 3\], tokens is \[2, 4\]; they must agree"),
        ({"attention_mask": torch.ones(3, 4).bool()}, r"attention_mask is \[3, 4\], tokens is \[2, 4\]"),
        ({"mask": torch.ones(4).bool()}, r"mask is \[4\], tokens is \[2, 4\]"),
        ({"t": torch.tensor(0.5)}, r"t is \[\]; it must be \[2\], one for each sequence"),
        ({"index": torch.arange(3)}, r"index is \[3\]; it must be \[2\]"),
        ({"index": [0, 1]}, r"index is a list; it must be \[2\]"),
        ({"index": torch.tensor([0.5, 1.0])}, "index is torch.float32; sequences are numbered by integers"),
        ({"t": 0.5}, r"t is a float; it must be \[2\]"),
        ({"attention_mask": [[1]]}, r"attention_mask is a list, tokens is \[2, 4\]"),
        ({"document_ids": torch.zeros(2, 3)}, r"document_ids is \[2, 3\], tokens is \[2, 4\]"),
        ({"document_ids": torch.zeros(2, 4)}, "document_ids is torch.float32; documents are numbered by integers"),
        ({"depth": 3}, "depth is 3; it must be a Depth"),
        ({"global_batch": 0}, "global_batch is 0; it must be a whole number of at least 1"),
        ({"step": -1}, "step is -1; it must be a whole number of at least 0"),
        ({"step": 1.5}, "step is 1.5"),
        ({"step": 2**32}, r"step is 4294967296; it must be below 2\^32"),
        ({"t_range": 0.5}, "t_range is 0.5; it must satisfy 0 < low <= high <= 1"),
        ({"num_loops": {}}, "the probabilities of S must be at least 0 and sum to 1"),
        ({"num_loops": {1: 1.0, 2: 1.0}}, "sum to 1"),
        ({"num_loops": {2: 0.3}}, "sum to 1"),
        ({"num_loops": {2: -1.0, 3: 2.0}}, "at least 0"),
        ({"num_loops": {1: "a"}}, "the probabilities of S"),
        ({"num_loops": {0: 0.5, 1: 0.5}}, "num_loops is 0; .*at least once"),
        ({"objective": "elbo"}, "objective is 'elbo'; it must be 'nelbo' or 'masked_mean'"),
        ({"t_range": (0.0, 1.0)}, "t_range"),
        ({"average": "batch"}, "average is 'batch'; it must be 'token' or 'sequence'"),
        ({"schedule": "linaer"}, "did you mean 'linear'"),
    ],
)
def test_refusals(toy, bad, words):
    with pytest.raises(InputError, match=words):
        nelbo(toy, ids(2, T, V, masks=0), **bad)


# Any Denoiser


@pytest.mark.parametrize("shift", [0, 1])
def test_any_denoiser(shift):
    """A table of logits; with a shift of 1 the token at i is read at i - 1, and position 0 at itself (Dream)."""
    model = Table(torch.randn(T, V, V, dtype=torch.float64), mask_id=4, logit_shift=shift)
    assert isinstance(model, Denoiser)
    clean = torch.tensor([[3, 1, 0, 2], [0, 0, 1, 3]])
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    t = torch.tensor([0.5, 0.8], dtype=torch.float64)
    out = nelbo(model, clean, mask=mask, t=t)
    want = 0.0
    for b, i in mask.nonzero().tolist():
        at = max(0, i - shift)
        logits = model.table[at, 4 if mask[b, at] else clean[b, at], :4]
        want += -logits.log_softmax(0)[clean[b, i]].item() / t[b].item()
    assert out.nelbo.item() == pytest.approx(want / 8)
    (_, attention_mask, loops, sigma) = model.calls[0]
    assert attention_mask is None and loops == 1
    torch.testing.assert_close(sigma, -torch.log(1 - 0.999 * t))


def test_time_conditioned_models_get_sigma():
    model = live(tiny("dit", time_conditioning=True), dtype=torch.float64)
    tokens = ids(2, 6, masks=0)
    mask = torch.ones(2, 6).bool()
    with torch.no_grad():
        out = [nelbo(model, tokens, mask=mask, t=torch.tensor(t), num_loops=1) for t in ([0.2, 0.9], [0.9, 0.9])]
    # masks and weights aside, only sigma differs between the first rows
    assert abs(out[0].per_sequence[0] * 0.2 / (out[1].per_sequence[0] * 0.9) - 1) > 1e-3
    torch.testing.assert_close(out[0].per_sequence[1], out[1].per_sequence[1])


def test_a_mask_needs_its_times(toy):
    """Without them the weights would be those of times that the mask was not drawn at."""
    for objective in ("nelbo", "masked_mean"):
        with pytest.raises(InputError, match=r"mask is given without t; give the times \[B\]"):
            nelbo(toy, ids(2, T, V, masks=0), mask=torch.ones(2, T).bool(), objective=objective)


PARALLEL = """
import sys
from functools import partial
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from loopmdm import LoopMDM, NELBOLoss, nelbo
from loopmdm.diffusion import sft

dist.init_process_group("gloo")
rank = dist.get_rank()

def made():
    torch.manual_seed(0)
    model = LoopMDM.from_preset("tiny-llama", zero_init_output=False, vocab_size=31).double()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    return model

tokens = torch.arange(64).view(4, 16) % 30
mine = torch.arange(2) + 2 * rank
given = dict(num_loops=3, step=5, global_batch=4)
seen = {}
for name, function in (("nelbo", nelbo), ("sft", partial(sft, prompt_lengths=[3, 3]))):
    loss = DistributedDataParallel(NELBOLoss(made(), function))
    result = loss(tokens[mine], index=mine, **given)
    result.loss.backward()
    seen[name] = [float(result.loss)] + [p.grad for p in loss.parameters()]
loss = NELBOLoss(made())
mesh = init_device_mesh("cpu", (2,))
for layer in loss.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(loss, mesh=mesh)
assert all(isinstance(p, DTensor) for p in loss.parameters())
result = loss(tokens[mine], index=mine, **given)
result.loss.backward()
seen["shards"] = [float(result.loss)] + [p.grad.full_tensor() for p in loss.parameters()]
try:
    nelbo(DistributedDataParallel(made()), tokens)
except ValueError as error:
    seen["refused"] = str(error)
if rank == 0:
    whole = {}
    for name, function in (("nelbo", nelbo), ("sft", partial(sft, prompt_lengths=[3] * 4))):
        model = made()
        function(model, tokens, **given).loss.backward()
        whole[name] = [p.grad for p in model.parameters()]
    torch.save([seen, whole], sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def test_the_loss_under_ddp_and_fully_shard(tmp_path):
    """Two processes, each with half of the batch, have the gradients of one with all of it."""
    (tmp_path / "parallel.py").write_text(PARALLEL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "parallel.py", "result"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen, whole = torch.load(tmp_path / "result")
    for got, want in (("nelbo", "nelbo"), ("sft", "sft"), ("shards", "nelbo")):
        for a, b in zip(seen[got][1:], whole[want], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert seen["shards"][0] == seen["nelbo"][0]
    assert "DistributedDataParallel has no hidden()" in seen["refused"] and "NELBOLoss(model)" in seen["refused"]


def test_training_lowers_the_bound():
    """Thirty steps on one sequence, known by heart at the end."""
    model = live(tiny("llama", boundary="anchored", positions="learned")).train()
    tokens = ids(1, 8, masks=0).repeat(16, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        out = diffusion.nelbo(model, tokens, seed=0, step=step, objective="masked_mean")
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.tensor([[1, 99]])}, "outside the vocabulary of 7"),
        ({"tokens": [[1, 2]]}, "tokens is a list; expected a tensor of integers"),
        ({"tokens": torch.tensor([1, 2])}, r"tokens is torch.int64 \[2\]; expected a tensor of integers, a row"),
        ({"tokens": torch.ones(1, 2)}, "tokens is torch.float32"),
        ({"tokens": torch.tensor([[1, -100]])}, "outside the vocabulary of 7"),
        ({"t": torch.tensor([0.0])}, r"t must be in \(0, 1\]"),
        ({"t": torch.tensor([2.0])}, r"t must be in \(0, 1\]"),
    ],
)
def test_data_that_would_go_wrong_silently(change, words):
    model = live(tiny(vocab_size=7))
    arguments = {"tokens": torch.tensor([[1, 2]]), "mask": torch.tensor([[True, True]]), **change}
    with pytest.raises(InputError, match=words):
        nelbo(model, arguments.pop("tokens"), **arguments)


@pytest.mark.parametrize("shift", [0, 1])
def test_packed_documents_reach_the_model(shift):
    """Two documents packed in a row have the loss of each alone."""
    model = live(tiny(vocab_size=7, logit_shift=shift))
    row = torch.tensor([[1, 2, 3, 4, 5, 0, 1, 2]])
    mask = torch.tensor([[True, False, True, True, False, True, True, False]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    t = torch.tensor([0.5])
    packed = nelbo(model, row, t=t, mask=mask, num_loops=2, document_ids=documents).loss * 8
    alone = [nelbo(model, row[:, s], t=t, mask=mask[:, s], num_loops=2).loss for s in (slice(0, 3), slice(3, 8))]
    assert abs(packed - (alone[0] * 3 + alone[1] * 5)) < 1e-4
    with pytest.raises(InputError, match="Table does not take document_ids; give it one document a row"):
        nelbo(Table(torch.zeros(8, 7, 7), mask_id=6), row, document_ids=documents)
    unpacked = nelbo(model, row, t=t, mask=mask, num_loops=2).loss * 8
    assert abs(packed - unpacked) > 1e-3


# Averages, fine-tuning, loop counts of a function, depth


def by_hand(model, tokens, out, num_loops, real=None):
    """Sum over masked positions of CE / t for each sequence, from the whole logits."""
    with torch.no_grad():
        chance = model(out.corruption.tokens, real, num_loops=num_loops).logits[..., : V - 1].softmax(-1)
    ce = -torch.log(chance.gather(-1, tokens.clamp(max=V - 2)[..., None])[..., 0])
    return (ce * out.corruption.mask).sum(-1), (ce * out.corruption.mask).sum(-1) / out.corruption.t


def test_average_over_sequences(toy):
    """Each sequence by its own length; one that counts nothing does not count."""
    tokens = ids(4, 7, V, masks=0)
    counted = torch.arange(7)[None] < torch.tensor([7, 3, 0, 5])[:, None]
    common = {"maskable": counted, "num_loops": 2, "seed": 3, "t_range": (0.4, 0.9)}
    out = nelbo(toy, tokens, average="sequence", **common)
    plain, weighted = by_hand(toy, tokens, out, 2)
    lengths = torch.tensor([7.0, 3.0, 1.0, 5.0], dtype=torch.float64)
    assert out.loss.item() == pytest.approx(((weighted / lengths).sum() / 3).item())
    by_token = nelbo(toy, tokens, **common)
    assert by_token.loss.item() == pytest.approx((weighted.sum() / 15).item()) != out.loss.item()
    assert out.nelbo == by_token.nelbo and torch.equal(out.per_sequence, by_token.per_sequence)
    masked = out.corruption.mask.sum(-1)
    assert (masked[[0, 1, 3]] > 0).all()
    mean = nelbo(toy, tokens, average="sequence", objective="masked_mean", **common)
    assert mean.loss.item() == pytest.approx(((plain / masked.clamp(min=1)).sum() / 3).item())


PROMPTS = torch.tensor([3, 0, 5])


def dialogue():
    """Prompts of 3, 0 and 5 tokens in sequences of 6, 8 and 7, filled up to 8 with the EOS token 0."""
    tokens = ids(3, 8, V, masks=0)
    return tokens.masked_fill(torch.arange(8)[None] >= torch.tensor([6, 8, 7])[:, None], 0)


def test_fine_tuning_by_hand(toy):
    """LLaDA's formula: sum of CE / t over masked answer tokens, EOS filling included, over the answer's length."""
    tokens = dialogue()
    place = torch.arange(8)[None]
    for seed in range(30):
        out = sft(toy, tokens, PROMPTS, num_loops=2, seed=seed, t_range=(0.5, 1.0))
        assert not out.corruption.mask[place < PROMPTS[:, None]].any()
    assert out.corruption.mask.any(-1).all() and out.corruption.mask[0, 6:].any()
    _, weighted = by_hand(toy, tokens, out, 2)
    want = sum((weighted[b] / (8 - PROMPTS[b])).item() for b in range(3)) / 3
    assert out.loss.item() == pytest.approx(want)
    everything = sft(toy, tokens, PROMPTS, num_loops=2, mask=torch.ones(3, 8).bool(), t=torch.ones(3))
    assert torch.equal(everything.corruption.mask, place >= PROMPTS[:, None])
    # a mask of the prompts says the same; so do plain numbers
    for same in (
        sft(toy, tokens, prompt_mask=(place < PROMPTS[:, None]).long(), num_loops=2, seed=29, t_range=(0.5, 1.0)),
        sft(toy, tokens, [3, 0, 5], num_loops=2, seed=29, t_range=(0.5, 1.0)),
    ):
        assert same.loss == out.loss
    summed = sft(toy, tokens, PROMPTS, num_loops=2, seed=29, t_range=(0.5, 1.0), average="token")
    assert summed.loss.item() == pytest.approx((weighted.sum() / (24 - 8)).item())


@pytest.mark.parametrize("shift", [0, 1])
def test_fine_tuning_ignores_padding(toy, shift, monkeypatch):
    """A wider batch: same loss, same gradients; and lengths count real tokens, wherever the padding is."""
    monkeypatch.setattr(toy, "logit_shift", shift)
    tokens = dialogue()
    mask, t = torch.rand(3, 8) < 0.6, torch.tensor([0.4, 0.7, 0.9], dtype=torch.float64)
    padding = torch.full((3, 4), 2)
    results = []
    for widen in (lambda x, y: x, lambda x, y: torch.cat((x, y), 1), lambda x, y: torch.cat((y, x), 1)):
        real = widen(torch.ones(3, 8).bool(), torch.zeros(3, 4).bool())
        wide = widen(mask, torch.ones(3, 4).bool())
        out = sft(toy, widen(tokens, padding), PROMPTS, attention_mask=real, mask=wide, t=t, num_loops=2)
        grads = torch.autograd.grad(out.loss, list(toy.parameters()))
        results.append((out.loss.detach(), *grads))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b)
    drawn = [
        sft(toy, tokens, PROMPTS, num_loops=1, seed=1).loss,
        sft(
            toy,
            torch.cat((tokens, padding), 1),
            PROMPTS,
            attention_mask=(torch.arange(12) < 8).expand(3, 12),
            num_loops=1,
            seed=1,
        ).loss,
    ]
    torch.testing.assert_close(*drawn)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs one of prompt_lengths and prompt_mask"),
        (
            {"prompt_lengths": [1, 1, 1], "prompt_mask": torch.zeros(3, 8)},
            "needs one of prompt_lengths and prompt_mask",
        ),
        ({"prompt_lengths": [1, 8, 1]}, "the prompt of sequence 1 covers all of it"),
        (
            {"prompt_lengths": [1, 1, 3], "attention_mask": torch.arange(8).expand(3, 8) < 3},
            "the prompt of sequence 2 covers all of it",
        ),
        ({"prompt_mask": torch.ones(3, 8)}, "the prompt of sequence 0 covers all of it"),
        ({"prompt_lengths": [1, 1]}, r"prompt_lengths is torch.int64 \[2\]; expected integers \[3\]"),
        ({"prompt_lengths": [1.0, 1.0, 2.0]}, "prompt_lengths is torch.float32"),
        ({"prompt_lengths": [1, -1, 2]}, r"prompt_lengths are \[1, -1, 2\]; a prompt has at least 0"),
        ({"prompt_lengths": [1, 1, 2], "maskable": torch.ones(3, 8).bool()}, "leave out maskable"),
        ({"prompt_mask": torch.ones(3, 7)}, r"prompt_mask is \[3, 7\], tokens is \[3, 8\]"),
    ],
)
def test_prompts_that_make_no_sense(toy, arguments, words):
    with pytest.raises(InputError, match=words):
        sft(toy, dialogue(), **arguments)


def test_loop_counts_from_a_function(toy):
    tokens = ids(2, T, V, masks=0)
    with torch.no_grad():
        assert [nelbo(toy, tokens, num_loops=lambda step: 2 + step % 2, step=s).num_loops for s in (0, 1, 4)] == [
            2,
            3,
            2,
        ]
    with pytest.raises(InputError, match="at least once"):
        nelbo(toy, tokens, num_loops=lambda step: 0)


class Deep(Table):
    """Its table times k after visit k; takes a Depth and keeps it."""

    takes_depth = True

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        out = super().hidden(input_ids, attention_mask, num_loops, sigma)
        if isinstance(num_loops, int):
            return out * num_loops
        if num_loops.every:
            num_loops.outputs.extend(out * k for k in range(1, num_loops.num_loops + 1))
        return out * num_loops.num_loops


def test_deep_supervision_is_the_mean_over_visits():
    model = Deep(torch.randn(T, V, V, dtype=torch.float64, requires_grad=True), mask_id=4)
    tokens = ids(5, T, V, masks=0)
    common = {"seed": 2, "t_range": (0.5, 1.0)}
    template = Depth(every=True)
    for options in ({}, {"objective": "masked_mean"}, {"average": "sequence"}):
        out = nelbo(model, tokens, num_loops=3, depth=template, **common, **options)
        each = [nelbo(model, tokens, num_loops=k, **common, **options) for k in (1, 2, 3)]
        assert out.loss.item() == pytest.approx(sum(e.loss.item() for e in each) / 3)
        assert out.nelbo == each[2].nelbo and torch.equal(out.per_sequence, each[2].per_sequence)
        assert out.num_loops == 3 and out.loss.requires_grad and len({e.loss.item() for e in each}) == 3
    assert template.num_loops is None and template.outputs == []


def test_loopmdm_with_a_template(toy):
    """Deep supervision against three passes, gradients included; recomputation changes nothing."""
    tokens = ids(3, 6, V, masks=0)
    common = {"seed": 2, "t_range": (0.5, 1.0)}

    def gradient(loss):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(toy.parameters()), materialize_grads=True)]
        )

    every = nelbo(toy, tokens, num_loops=3, depth=Depth(every=True), **common)
    each = [nelbo(toy, tokens, num_loops=k, **common) for k in (1, 2, 3)]
    assert every.loss.item() == pytest.approx(sum(e.loss.item() for e in each) / 3)
    assert every.nelbo.item() == pytest.approx(each[2].nelbo.item())
    torch.testing.assert_close(gradient(every.loss), gradient(sum(e.loss for e in each) / 3))
    plain = nelbo(toy, tokens, num_loops=3, **common)
    whole = gradient(plain.loss)
    torch.testing.assert_close(
        gradient(nelbo(toy, tokens, num_loops=3, depth=Depth(checkpoint=True), **common).loss), whole
    )
    short = nelbo(toy, tokens, num_loops=3, depth=Depth(backprop_loops=1), **common)
    assert short.loss.item() == pytest.approx(plain.loss.item()) and (gradient(short.loss) - whole).abs().max() > 1e-3


def test_the_template_reaches_the_model():
    model = Deep(torch.randn(T, V, V), mask_id=4)
    tokens = ids(2, T, V, masks=0)
    rule = RelativeChange(0.1)
    nelbo(model, tokens, num_loops=5, depth=Depth(backprop_loops=2, checkpoint=True, early_exit=rule))
    given = model.calls[-1][2]
    assert (given.num_loops, given.backprop_loops, given.checkpoint, given.early_exit) == (5, 2, True, rule)
    nelbo(model, tokens, num_loops=5)
    assert model.calls[-1][2] == 5, "no template, no Depth"
    with pytest.raises(InputError, match=r"depth.num_loops must be None here"):
        nelbo(model, tokens, depth=Depth(num_loops=2))
    with pytest.raises(InputError, match="Table does not take a depth"):
        nelbo(Table(torch.randn(T, V, V), mask_id=4), tokens, depth=Depth())

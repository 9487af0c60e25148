"""unmask_step and unmask_from_logits: against a plain step in Python, against generate, and what must not matter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm import unmask_from_logits, unmask_step
from loopmdm.errors import InputError
from loopmdm.ops.contract import unavailable
from loopmdm.ops.noise import TOKEN, gumbel
from loopmdm.sampling.engine import generate

from .helpers import live, tiny
from .samplers import EVERY, REVEALING, drawn

INF, NAN = math.inf, math.nan
IMPLS = [i for i in ("torch", "cpp", "auto") if i == "auto" or unavailable(i, torch.device("cpu")) is None]


def fp32(x):
    return torch.tensor(x, dtype=torch.float64).float().item()


# A step in Python


def judged(row, never, temperature, seed, step, position):
    """(token, its probability in fp32) of one row of logits; (-1, 0) where there is nothing to choose."""
    row = [-INF if v in never or math.isnan(x) else min(x, torch.finfo(torch.float32).max) for v, x in enumerate(row)]
    most = max(row)
    if most == -INF:
        return -1, 0.0
    token = drawn(row, temperature, seed, step, position)
    lse = most + math.log(math.fsum(math.exp(x - most) for x in row))
    return token, fp32(math.exp(fp32(row[token]) - fp32(lse)))


def plain(logits, tokens, real, mask_id, k, tau, suppressed, temperature, seeds, step):
    """New tokens of sequences that reveal the k most confident positions, and those of confidence >= tau."""
    out = []
    for b, x in enumerate(tokens):
        first = real[b].index(True) if True in real[b] else 0
        proposed = {
            t: judged(logits[b][t], {*suppressed, mask_id}, temperature, seeds[b], step, t - first)
            for t in range(len(x))
            if x[t] == mask_id and real[b][t]
        }
        best = sorted((t for t, (token, _) in proposed.items() if token >= 0), key=lambda t: (-proposed[t][1], t))
        n = max(k[b], 0)
        while tau is not None and n < len(best) and proposed[best[n]][1] >= fp32(tau):
            n += 1
        shown = set(best[:n])
        out.append([proposed[t][0] if t in shown else token for t, token in enumerate(x)])
    return out


def case(rng, temperature=0.0):
    """A few sequences whose rows of logits come from a small pool, so that positions tie to the last bit."""

    def number(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=rng))

    B, T, V = number(1, 4), number(1, 24), [2, 5, 31, 127, 128, 129, 300][number(0, 6)]
    mask_id = number(0, V - 1)
    pool = torch.randn(6, V, generator=rng) * 3
    pool[0, number(0, V - 1)] = pool[0].max()  # two likeliest ids, or three
    for value in (NAN, -INF):
        pool[torch.rand(pool.shape, generator=rng) < 0.05] = value
    pool[1, number(0, V - 1)] = INF
    pool[2] = torch.full((V,), -INF if number(0, 1) else NAN)
    masked = torch.rand(B, T, generator=rng) < [0.0, 0.5, 0.9, 1.0][number(0, 3)]
    lengths = torch.randint(1, T + 1, (B,), generator=rng)
    column = torch.arange(T)
    left = number(0, 1)
    real = column >= T - lengths[:, None] if left else column < lengths[:, None]
    tokens = torch.where(masked, mask_id, torch.randint(0, V, (B, T), generator=rng))
    return {
        "logits": pool[torch.randint(0, len(pool), (B, T), generator=rng)],
        "tokens": tokens,
        "attention_mask": real,
        "mask_id": mask_id,
        "k": torch.tensor([[-1, 0, 1, 2, T // 2, T + 3][number(0, 5)] for _ in range(B)]),
        "threshold": [None, 0.5, 0.9][number(0, 2)],
        "suppressed": [number(0, V - 1) for _ in range(number(0, 2))],
        "temperature": temperature,
        "row_seeds": torch.randint(-(2**62), 2**62, (B,), generator=rng),
        "step": number(0, 100),
    }


def want(c):
    return plain(
        c["logits"].double().tolist(), c["tokens"].tolist(), c["attention_mask"].tolist(), c["mask_id"],
        c["k"].tolist(), c["threshold"], c["suppressed"], c["temperature"], c["row_seeds"].tolist(), c["step"],
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_is_the_plain_step(impl):
    """200 cases: ties, infinities, NaN, any k, none and all masked, odd vocabularies, padding on either side."""
    rng = torch.Generator().manual_seed(0)
    revealed = 0
    for _ in range(200):
        c = case(rng)
        before = c["tokens"].clone()
        out = unmask_from_logits(**c, impl=impl)
        assert out.tokens.tolist() == want(c)
        assert torch.equal(c["tokens"], before) and torch.equal(out.revealed, out.tokens != before)
        assert not out.remasked.any()
        revealed += int(out.revealed.sum())
    assert revealed > 500


@pytest.mark.parametrize("impl", IMPLS)
def test_drawn_tokens_are_those_of_the_contract(impl):
    """Noise of (row seed, step, position from the first real token), in Python."""
    rng = torch.Generator().manual_seed(1)
    for temperature in (0.5, 1.0, 2.0) * 8:
        c = case(rng, temperature)
        c["logits"] = torch.where(c["logits"] == INF, 4.0, c["logits"])
        assert unmask_from_logits(**c, impl=impl).tokens.tolist() == want(c)


def test_the_examples():
    """Those of the docstrings: hidden states and logits give the same, a capacity changes nothing."""
    rng = torch.Generator().manual_seed(0)
    mask_id, weight = 20, torch.randn(21, 8, generator=rng)
    embedding, place = torch.randn(21, 8, generator=rng), torch.randn(64, 8, generator=rng)
    x = torch.full((2, 64), mask_id)
    for step in range(16):
        hidden = embedding[x].cumsum(1) * 0.1 + place
        options = {"mask_id": mask_id, "k": 4, "temperature": 1.0, "step": step}
        out = unmask_step(hidden, weight, x, **options)
        assert out.revealed.sum(-1).tolist() == [4, 4] and out.done.tolist() == [step == 15] * 2
        for other in (
            unmask_from_logits(hidden @ weight.T, x, **options),
            unmask_step(hidden, weight, x, capacity=128, **options),
            unmask_step(hidden, weight, x, bias=torch.zeros(21), step=torch.tensor(step), **_without(options, "step")),
        ):
            assert torch.equal(other.tokens, out.tokens) and torch.equal(other.done, out.done)
        x = out.tokens
    assert not (x == mask_id).any()
    by_threshold = unmask_from_logits(hidden @ weight.T, torch.full((2, 64), mask_id), mask_id=mask_id, threshold=0.9)
    assert torch.equal(by_threshold.revealed, by_threshold.confidence >= 0.9) and by_threshold.revealed.any()


def _without(options, name):
    return {key: value for key, value in options.items() if key != name}


# What must not matter


def test_selection_is_exact_whatever_the_batch():
    """From given logits: another order, alone, wider, padded on the other side, another capacity, more threads."""
    rng = torch.Generator().manual_seed(3)
    B, T, V = 6, 40, 200
    logits = torch.randn(B, T, V, generator=rng) * 2
    masked = torch.rand(B, T, generator=rng) < 0.6
    tokens = torch.where(masked, V - 1, torch.randint(0, V - 1, (B, T), generator=rng))
    seeds = torch.arange(B) * 7 + 1
    options = {"mask_id": V - 1, "k": 5, "threshold": 0.3, "temperature": 0.8, "step": 9, "top_k": 50}
    full = unmask_from_logits(logits, tokens, row_seeds=seeds, **options)
    assert full.revealed.sum(-1).min() >= 5 and full.revealed.any(-1).all()
    for rows in (torch.randperm(B, generator=rng), *torch.arange(B)[:, None]):
        some = unmask_from_logits(logits[rows], tokens[rows], row_seeds=seeds[rows], **options)
        assert torch.equal(some.tokens, full.tokens[rows])
    for pad in ((0, 9), (9, 0)):
        wide = {
            "logits": torch.nn.functional.pad(logits, (0, 0, *pad)),
            "tokens": torch.nn.functional.pad(tokens, pad, value=V - 1),  # a pad id that is the mask's
            "attention_mask": torch.nn.functional.pad(torch.ones(B, T).bool(), pad),
        }
        out = unmask_from_logits(**wide, row_seeds=seeds, **options)
        assert torch.equal(out.tokens[wide["attention_mask"]].view(B, T), full.tokens)
        assert (out.tokens[~wide["attention_mask"]] == V - 1).all()
    before = torch.get_num_threads()
    try:
        for threads, capacity in ((1, int(masked.sum())), (3, B * T), (8, 1000)):
            torch.set_num_threads(threads)
            out = unmask_from_logits(logits, tokens, row_seeds=seeds, capacity=capacity, **options)
            assert torch.equal(out.tokens, full.tokens) and torch.equal(out.confidence, full.confidence)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_rounding_of_the_product_can_change_a_token(temperature):
    """Implementations and batches agree except where the two best keys are closer than what fp32 products of length D
    may differ by, 2 D 2^-24 |h| |w|; hidden states are solved for such that half of the rows are such."""
    rng = torch.Generator().manual_seed(5)
    N, D, V = 400, 128, 128  # one group: the keys of the draw are those of the ids
    tokens, seeds = torch.full((1, N), V - 1), torch.tensor([11])
    noise = gumbel(seeds[:, None], 2, torch.arange(N)[:, None], torch.arange(V)[None], TOKEN) * temperature
    wanted = torch.rand(N, V, generator=rng)  # keys
    wanted[: N // 2].scatter_(1, torch.rand(N // 2, V - 1, generator=rng).topk(2).indices, 3.0)
    weight = torch.linalg.qr(torch.randn(V, D, generator=rng)).Q  # its inverse is its transpose
    hidden = ((wanted - noise) @ weight)[None]
    options = {"mask_id": V - 1, "k": N, "temperature": temperature, "row_seeds": seeds, "step": 2}
    runs = [unmask_step(hidden, weight, tokens, **options, impl=impl).tokens[0] for impl in IMPLS]
    parts = [
        unmask_step(hidden[:, a : a + 7], weight, tokens[:, a : a + 7], positions=torch.arange(a, min(a + 7, N))[None],
                    **options).tokens[0]
        for a in range(0, N, 7)
    ]  # fmt: skip
    runs.append(torch.cat(parts))
    keys = hidden[0].double() @ weight.double().T + noise.double()
    keys[:, V - 1] = -INF
    first, second = keys.topk(2, dim=-1).values.unbind(-1)
    bound = 2 * D * 2.0**-24 * hidden[0].norm(dim=-1) * weight.norm(dim=-1).max()
    close = first - second <= bound
    assert close[: N // 2].all() and (~close).sum() >= 100
    for run in runs:
        assert torch.equal(run[~close], keys.argmax(-1)[~close])
        differ = run != keys.argmax(-1)
        assert differ.any() and (keys.gather(1, run[:, None])[:, 0] >= first - bound)[differ].all()


@pytest.mark.parametrize("name", EVERY)
def test_steps_of_generate(name):
    """Teacher-forced: from every state that generate with impl="torch" passes, unmask_step makes its next one."""
    model = live(tiny("llama", boundary="anchored", positions="both"), head_scale=3.0)
    start = torch.tensor([[1, 2, 10, 3, *[10] * 9], [10] * 13])
    generated, states, steps = start == 10, [start], 6
    generate(
        model, start, steps=steps, policy=EVERY[name], temperature=1.0, row_seeds=[4, 2**63 + 9], num_loops=2,
        impl="torch", on_step=lambda step, tokens, r: states.append((step, tokens)),
    )  # fmt: skip
    before, kept = start, torch.zeros(start.shape)
    weight, bias = model.head()
    for step, after in states[1:]:
        with torch.no_grad():
            hidden = model.hidden(before, num_loops=2)
        for impl in IMPLS:
            out = unmask_step(
                hidden, weight, before, bias=bias, mask_id=10, policy=EVERY[name], temperature=1.0, step=step,
                steps=steps, generated=generated, confidence=kept, row_seeds=torch.tensor([4, 9 - 2**63]), impl=impl,
                suppressed=model.suppressed_ids,
            )  # fmt: skip
            assert torch.equal(out.tokens, after), (step, impl)
        kept = torch.where(out.revealed, out.confidence, kept)
        before = after
    assert not (before == 10).any() and len(states) > 3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["confidence", "ancestral", "eb", "p2", "conf"])
def test_generate_is_the_same_with_every_implementation(name, impl):
    """In fp32; equal as long as no step meets two keys within rounding, which these do not."""
    model = live(tiny("llama", boundary="anchored", positions="both"), head_scale=3.0)
    options = {
        "max_new_tokens": 9,
        "steps": 5,
        "temperature": 0.9,
        "policy": EVERY[name],
        "top_p": 0.95,
        "num_loops": 2,
    }
    prompts = [[1, 2, 3], [4], [5, 10, 6, 10]]
    a, b = (generate(model, prompts, impl=i, **options) for i in ("torch", impl))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.revealed_at, b.revealed_at)


# Options


def toy(seed=0, B=2, T=12, V=30, D=8):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.where(torch.rand(B, T, generator=rng) < 0.7, V - 1, torch.randint(0, V - 1, (B, T), generator=rng))
    return torch.randn(B, T, D, generator=rng), torch.randn(V, D, generator=rng), tokens


def test_guidance_and_bias():
    hidden, weight, tokens = toy()
    blind, bias = toy(9)[0], torch.randn(30, generator=torch.Generator().manual_seed(4))
    mixed = blind + 2.5 * (hidden - blind)
    options = {"mask_id": 29, "k": 3, "temperature": 0.7}
    want = unmask_from_logits((mixed @ weight.T) + bias, tokens, **options)
    got = unmask_step(hidden, weight, tokens, bias=bias, cfg_hidden=blind, cfg_scale=1.5, **options)
    assert torch.equal(got.tokens, want.tokens)
    both = unmask_from_logits(hidden @ weight.T, tokens, cfg_logits=blind @ weight.T, cfg_scale=1.5, **options)
    plain = unmask_step(mixed, weight, tokens, **options)
    assert torch.equal(both.tokens, plain.tokens)
    assert not torch.equal(plain.tokens, unmask_step(hidden, weight, tokens, **options).tokens)


def test_a_mask_without_a_row_of_the_head():
    hidden, weight, tokens = toy()
    outside = unmask_step(hidden, weight[:29], tokens, mask_id=29, k=20)
    assert torch.equal(outside.tokens, unmask_step(hidden, weight, tokens, mask_id=29, k=20).tokens)


@pytest.mark.parametrize("left", [0, 3])
def test_shifted_logits(left):
    """The token at i is read at i - 1, the first real one at itself; padding is never read."""
    hidden, weight, tokens = toy()
    tokens[:, left] = 29
    real = torch.arange(12).expand(2, 12) >= left
    hidden[~real] = NAN
    moved = hidden.roll(1, 1)
    moved[:, left] = hidden[:, left]
    options = {"mask_id": 29, "k": 20, "attention_mask": real}
    got = unmask_step(hidden, weight, tokens, logit_shift=1, **options)
    assert torch.equal(got.tokens, unmask_step(moved, weight, tokens, **options).tokens)
    assert torch.equal(got.revealed, (tokens == 29) & real)


def test_a_window_of_a_longer_sequence():
    """Positions from above 0: the noise is theirs, and a shift never reads another sequence's hidden states."""
    hidden, weight, tokens = toy(3)
    seeds, late = torch.tensor([5, 9]), torch.arange(12).expand(2, 12)[:, 4:]
    cut = hidden[:, 4:], weight, tokens[:, 4:]
    options = {"mask_id": 29, "temperature": 1.0, "k": 20, "logit_shift": 1}
    full = unmask_step(hidden, weight, tokens, row_seeds=seeds, **options)
    part = unmask_step(*cut, row_seeds=seeds, positions=late, **options)
    assert torch.equal(part.tokens[:, 1:], full.tokens[:, 5:])
    for b in ([0], [1]):
        alone = unmask_step(cut[0][b], weight, cut[2][b], row_seeds=seeds[b], positions=late[b], **options)
        assert torch.equal(alone.tokens, part.tokens[b])
    options = {"mask_id": 29, "policy": "ancestral", "steps": 3, "row_seeds": seeds}
    full = unmask_step(hidden, weight, tokens, generated=tokens == 29, **options)
    part = unmask_step(*cut, positions=late, generated=cut[2] == 29, **options)
    assert torch.equal(part.tokens, full.tokens[:, 4:]) and 0 < part.revealed.sum() < (cut[2] == 29).sum()


@pytest.mark.parametrize("name", ["confidence", "p2"])
def test_padding_is_not_generated(name):
    """Even where the pad id is the mask's and `generated` is every mask."""
    hidden, weight, tokens = toy(4)
    real = torch.arange(12).expand(2, 12) < torch.tensor([[7], [12]])
    tokens[~real] = 29
    options = {"mask_id": 29, "policy": name, "steps": 3, "attention_mask": real, "temperature": 0.0}
    got = unmask_step(hidden, weight, tokens, generated=tokens == 29, **options)
    want = unmask_step(hidden, weight, tokens, generated=(tokens == 29) & real, **options)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.remasked, want.remasked) and got.revealed.any()


@pytest.mark.parametrize("name", ["confidence", "random", "ancestral", "cap", "p2"])
def test_a_step_of_its_own_for_each_sequence(name):
    hidden, weight, tokens = toy(6)
    seeds, options = torch.tensor([5, 9]), {"mask_id": 29, "policy": EVERY[name], "steps": 4, "temperature": 1.0}
    generated = tokens == 29
    both = unmask_step(hidden, weight, tokens, step=torch.tensor([1, 2]), row_seeds=seeds, generated=generated,
                       **options)  # fmt: skip
    for b in (0, 1):
        rows = (x[b : b + 1] for x in (hidden, tokens))
        alone = unmask_step(next(rows), weight, next(rows), step=1 + b, row_seeds=seeds[b : b + 1],
                            generated=generated[b : b + 1], **options)  # fmt: skip
        assert torch.equal(alone.tokens, both.tokens[b : b + 1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("capacity", [None, 3])
def test_nothing_at_all(shape, capacity):
    empty, weight = torch.zeros(shape, dtype=torch.int64), torch.ones(30, 8)
    for policy in ("confidence", "random", "cap", "p2"):
        options = {"policy": EVERY[policy], "steps": 3, "generated": empty == 29, "capacity": capacity}
        assert unmask_step(torch.zeros(*shape, 8), weight, empty, mask_id=29, **options).tokens.shape == shape


@pytest.mark.parametrize("name", ["confidence", "eb", "first_hitting", "loop", "p2"])
def test_with_a_capacity_the_host_reads_nothing(name):
    """On the meta device, where no value can be read. (The kernels themselves: tests/gpu/test_unmask.py.)"""
    hidden, weight, tokens, flags = *(x.to("meta") for x in toy()), torch.ones(2, 12, device="meta").bool()
    options = {
        "mask_id": 29, "policy": EVERY[name], "step": torch.tensor(2, device="meta"), "steps": 5, "generated": flags,
        "attention_mask": flags, "eligible": flags, "eos_ids": (3,), "done": flags[:, 0].contiguous(),
        "logit_shift": 1, "cfg_hidden": hidden, "cfg_scale": 1.0, "temperature": 1.0, "impl": "torch",
    }  # fmt: skip
    assert unmask_step(hidden, weight, tokens, capacity=24, **options).tokens.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        unmask_step(hidden, weight, tokens, **options)  # it counts rows


def test_tokens_of_any_stride():
    hidden, weight, tokens = toy()
    turned = tokens.t().contiguous().t()
    want = unmask_step(hidden, weight, tokens, mask_id=29, k=3)
    assert torch.equal(unmask_step(hidden, weight, turned, mask_id=29, k=3).tokens, want.tokens)


def test_capacity_and_in_place():
    hidden, weight, tokens = toy()
    masked = (tokens == 29).flatten().nonzero()[:, 0]
    some = unmask_step(hidden, weight, tokens, mask_id=29, k=20, capacity=5)
    assert some.revealed.flatten().nonzero()[:, 0].tolist() == masked[:5].tolist()  # the head saw no more
    whole = unmask_step(hidden, weight, tokens, mask_id=29, k=20)
    mine, done = tokens.clone(), torch.tensor([False, True])
    out = unmask_step(hidden, weight, mine, mask_id=29, k=20, done=done, inplace=True, capacity=24)
    assert out.tokens is mine and out.done is done and done.tolist() == [True, True]
    assert torch.equal(mine[0], whole.tokens[0]) and torch.equal(mine[1], tokens[1])


def test_ends_and_blocks():
    """An EOS ends a sequence once nothing before it is masked; `eligible` keeps a step inside a block."""
    V, T = 6, 8
    logits = torch.full((1, T, V), -4.0)
    logits[0, torch.arange(T), torch.tensor([1, 2, 4, 1, 2, 1, 1, 1])] = torch.arange(8.0, 0, -1)
    x, done, generated = torch.full((1, T), 5), torch.zeros(1).bool(), torch.ones(1, T).bool()
    generated[0, 0], x[0, 0] = False, 4  # one in the prompt does not count
    for step in range(1, 4):
        out = unmask_from_logits(logits, x, mask_id=5, k=1, eos_ids=(4,), generated=generated, done=done)
        x, done = out.tokens, out.done
        assert x[0, :4].tolist() == [[4, 2, 5, 5], [4, 2, 4, 5], [4, 2, 4, 5]][step - 1] and done.tolist() == [step > 1]
    assert out.revealed.sum() == 0 and done.all()  # a sequence that is over is left alone
    block = torch.arange(T)[None] >= 4
    held = unmask_from_logits(logits, torch.full((1, T), 5), mask_id=5, k=2, eligible=block)
    assert held.revealed[0].nonzero()[:, 0].tolist() == [4, 5] and held.tokens[0, :4].tolist() == [5] * 4


@pytest.mark.parametrize("name", REVEALING)
def test_any_policy(name):
    """By step and steps, all that is masked is filled at the end; those that look at nothing take no k."""
    hidden, weight, tokens = toy(2)
    x, generated = tokens, tokens == 29
    for step in range(5):
        options = {"policy": REVEALING[name], "step": step, "steps": 5, "generated": generated, "mask_id": 29}
        x = unmask_step(hidden, weight, x, **options).tokens
    assert torch.equal(x != tokens, generated)
    if REVEALING[name].looks == "nothing":
        with pytest.raises(InputError, match="says itself which positions are revealed; it takes no k"):
            unmask_step(hidden, weight, tokens, k=3, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(2, 12)}, r"tokens is \[2, 12\] torch.float32; it must be int64 \[B, T\]"),
        ({"hidden": torch.zeros(2, 11, 8)}, r"hidden is \[2, 11, 8\]; for tokens \[2, 12\] it must be"),
        ({"head_weight": torch.zeros(30)}, r"head_weight is \[30\]; it must be \[V, D\]"),
        ({"head_weight": torch.zeros(30, 9)}, r"hidden is \[\d+, 8\] and weight \[30, 9\]"),
        ({"head_weight": None, "bias": torch.zeros(8)}, "leave bias out"),
        ({"mask_id": -1}, "mask_id is -1; it must be a whole number of at least 0"),
        ({"mask_id": None}, "mask_id is None"),
        ({"mask_id": 2**64}, r"mask_id is 18446744073709551616; it must be below 2\^63"),
        ({"k": None}, "how many tokens to reveal is not said: give k, threshold, or steps and generated"),
        ({"k": None, "steps": 4}, "give them as `generated`"),
        ({"k": torch.ones(3).long()}, r"k is \[3\] torch.int64; it must be \[2\]"),
        ({"k": -1}, "k is -1; it must be a whole number of at least 0"),
        ({"threshold": 0.5, "policy": "entropy"}, "threshold and policy were both given"),
        ({"threshold": "a"}, "threshold is 'a'; it must be a number"),
        ({"policy": "confidense"}, "unknown policy 'confidense'; did you mean 'confidence'"),
        ({"eos_ids": (3,)}, "give `generated` too"),
        ({"eligible": torch.ones(2, 12)}, r"eligible is \[2, 12\] torch.float32; it must be \[2, 12\] torch.bool"),
        ({"row_seeds": torch.ones(2)}, r"row_seeds is \[2\] torch.float32"),
        ({"cfg_scale": 1.0}, "takes the unconditional pass and a cfg_scale above 0"),
        (
            {"cfg_hidden": torch.zeros(2, 12, 9), "cfg_scale": 1.0},
            r"the unconditional pass is \[2, 12, 9\] torch.float32; it must be \[2, 12, 8\]",
        ),
        ({"temperature": -1.0}, "temperature is -1.0; it must be a number of at least 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"suppressed": (30,)}, "suppressed holds 30; ids go from 0 to 29"),
        ({"suppressed": 3}, "suppressed is 3; it must be a list"),
        ({"eos_ids": ("a",)}, "eos_ids holds 'a'; ids go from 0"),
        ({"head_weight": torch.zeros(0, 8)}, r"head_weight is \[0, 8\]; it must be \[V, D\]"),
        ({"capacity": 0}, "capacity is 0; it must be a whole number of at least 1"),
        ({"logit_shift": -1}, "logit_shift is -1"),
        ({"step": -1}, "step is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"impl": "cxx"}, "no impl 'cxx'"),
    ],
)
def test_refusals(change, words):
    hidden, weight, tokens = toy()
    with pytest.raises(InputError, match=words) as caught:
        unmask_step(**{"hidden": hidden, "head_weight": weight, "tokens": tokens, "mask_id": 29, "k": 2, **change})
    assert "\n" not in str(caught.value)


TENSORS = st.builds(
    lambda dtype, shape: torch.ones(shape, dtype=dtype),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
    st.lists(st.sampled_from([0, 1, 2, 12, 8, 30]), max_size=3),
)
EDGES = st.sampled_from([2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70])
LISTS = st.lists(st.integers(-1, 31) | EDGES, max_size=3)
WRONG = st.one_of(st.none(), st.integers(-3, 40), EDGES, st.floats(), st.text(max_size=3), LISTS, TENSORS)
NAMES = (
    "hidden", "head_weight", "tokens", "mask_id", "bias", "k", "threshold", "policy", "temperature", "top_k", "top_p",
    "seed", "row_seeds", "step", "steps", "positions", "attention_mask", "eligible", "generated", "confidence", "done",
    "logit_shift", "cfg_hidden", "cfg_scale", "schedule", "capacity", "impl", "suppressed", "eos_ids", "inplace",
)  # fmt: skip


def fuzz(arguments):
    """Any arguments: tokens of the right shape, or one clear sentence."""
    hidden, weight, tokens = toy()
    given = {"hidden": hidden, "head_weight": weight, "tokens": tokens, "mask_id": 29, "k": 2, **arguments}
    if isinstance(given.get("capacity"), int) and given["capacity"] > 10**6:
        return  # it would be a tensor of that length
    try:
        out = unmask_step(**given)
    except InputError as error:
        assert 10 < len(str(error)) < 400 and "\n" not in str(error)
    else:
        assert out.tokens.shape == out.revealed.shape == given["tokens"].shape


@given(arguments=st.dictionaries(st.sampled_from(NAMES), WRONG, max_size=2))
@settings(deadline=None, derandomize=True, max_examples=250)
def test_any_arguments(arguments):
    fuzz(arguments)


@pytest.mark.slow
@given(arguments=st.dictionaries(st.sampled_from(NAMES), WRONG, max_size=3))
@settings(deadline=None, max_examples=10_000)
def test_any_arguments_for_a_minute(arguments):
    fuzz(arguments)

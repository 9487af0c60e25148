"""generate: ancestral sampling against exact marginals, the confidence policy against a plain one, and the rest."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from loopmdm import random
from loopmdm.errors import InputError
from loopmdm.model.denoiser import Denoiser
from loopmdm.model.flops import forward_flops
from loopmdm.sampling.engine import Generation, generate, propose
from loopmdm.sampling.policies import POLICIES, Ancestral, Confidence, State, build

from .helpers import Table, ids, live, tiny

MASK = 10


@pytest.fixture(scope="module")
def model():
    """float64, so that a token cannot hang on how a batch was padded. Learned positions beside RoPE: under RoPE alone
    every position of an all-mask sequence looks the same, and rounding would decide between equal confidences."""
    return live(tiny("llama", boundary="anchored", positions="both"), dtype=torch.float64, head_scale=3.0)


# Ancestral sampling: the distribution


@pytest.fixture(scope="module")
def toy():
    """3 ids and the mask, 3 positions: 27 sequences, with logits that depend strongly on what is revealed."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return live(
        tiny("llama", vocab_size=4, start=0, length=1, positions="both", **small), seed=13, head_scale=2.0
    )  # of 40 seeds, the test below has most power here


def chances(model, state, temperature):
    """Each masked position's distribution, {position: [3]}, at a partly masked state."""
    with torch.no_grad():
        logits = model(torch.tensor([state]), num_loops=2).logits[0, :, :3].double() / temperature
    return {i: (logits[i].exp() / logits[i].exp().sum()).tolist() for i, token in enumerate(state) if token == 3}


def exact_distribution(model, start, steps, temperature=1.0, reveal=None):
    """Probabilities of the final sequences: dynamic programming over partly masked states.

    Step j goes from t = 1 - j/steps to s = t - 1/steps and reveals each masked position with
    probability (t - s) / t, at the last step with 1.
    """
    states, cache = {tuple(start): 1.0}, {}
    for j in range(steps):
        t, s = 1 - j / steps, 1 - (j + 1) / steps
        rate = (t - s) / t if reveal is None else reveal(j)
        following = {}
        for state, weight in states.items():
            masked = [i for i, token in enumerate(state) if token == 3]
            if state not in cache:
                cache[state] = chances(model, state, temperature)
            for chosen in itertools.product([False, True], repeat=len(masked)):
                p = weight * math.prod(rate if c else 1 - rate for c in chosen)
                shown = [i for i, c in zip(masked, chosen, strict=True) if c]
                if p == 0:
                    continue
                for values in itertools.product(range(3), repeat=len(shown)):
                    new, q = list(state), p
                    for i, value in zip(shown, values, strict=True):
                        new[i], q = value, q * cache[state][i][value]
                    following[tuple(new)] = following.get(tuple(new), 0.0) + q
        states = following
    assert sum(states.values()) == pytest.approx(1) and all(3 not in s for s in states)
    return states


def p_value(tokens, exact):
    """Chi-square test of rows against a distribution over rows; rare sequences (fewer than 5 expected) pooled."""
    counts = {}
    for row in map(tuple, tokens.tolist()):
        counts[row] = counts.get(row, 0) + 1
    assert counts.keys() <= exact.keys()
    n, statistic, cells, rest = len(tokens), 0.0, 0, [0.0, 0.0]
    for row, p in exact.items():
        if n * p < 5:
            rest[0], rest[1] = rest[0] + n * p, rest[1] + counts.get(row, 0)
        else:
            statistic, cells = statistic + (counts.get(row, 0) - n * p) ** 2 / (n * p), cells + 1
    if rest[0] > 1:
        statistic, cells = statistic + (rest[1] - rest[0]) ** 2 / rest[0], cells + 1
    return chi2.sf(statistic, cells - 1)


N = 20_000


def sample(model, start, steps, **changes):
    return generate(model, [start] * N, steps=steps, num_loops=2, policy="ancestral", **changes).tokens


@pytest.mark.parametrize(
    ("start", "steps", "temperature"),
    [
        ((3, 3, 3), 1, 1.0),
        ((3, 3, 3), 2, 1.0),
        ((3, 3, 3), 4, 1.0),
        ((3, 1, 3), 2, 1.0),
        ((3, 3, 3), 2, 2.0),
        ((3, 3, 3), 4, 0.5),
    ],
)
def test_ancestral_samples_have_the_exact_distribution(toy, start, steps, temperature):
    tokens = sample(toy, start, steps, temperature=temperature, seed=11)
    exact = exact_distribution(toy, start, steps, temperature)
    assert sum(p > 0.001 for p in exact.values()) >= 6
    assert p_value(tokens, exact) > 1e-4


def test_the_distribution_test_has_power(toy):
    """Samples of another number of steps, temperature or reveal rate are refused."""
    exact = exact_distribution(toy, (3, 3, 3), 2)
    assert p_value(sample(toy, (3, 3, 3), 1, seed=1), exact) < 1e-9
    assert p_value(sample(toy, (3, 3, 3), 4, seed=1), exact) < 1e-9
    assert p_value(sample(toy, (3, 3, 3), 2, seed=1, temperature=1.1), exact) < 1e-9

    class Hasty(Ancestral):
        def choose(self, state, confidence=None):
            if state.step == state.steps - 1:
                return state.masked
            noise = random.uniform(state.row_seeds, 7, state.step, torch.zeros_like(state.row_seeds), 3)
            return state.masked & (noise < 0.6)

    hasty = generate(toy, batch_size=N, max_new_tokens=3, steps=2, num_loops=2, policy=Hasty()).tokens
    assert p_value(hasty, exact) < 1e-9
    # and the test itself knows what these samples are
    assert p_value(hasty, exact_distribution(toy, (3, 3, 3), 2, reveal=lambda j: (0.6, 1.0)[j])) > 1e-4


def test_ancestral_reveal_times():
    """A token is revealed at step j with probability 1 / steps, whatever the model: geometric in disguise."""
    table = Table(torch.zeros(50, 4, 4), mask_id=3)
    out = generate(table, batch_size=400, max_new_tokens=50, steps=5, policy="ancestral")
    share = torch.bincount(out.revealed_at.flatten(), minlength=5).double() / out.generated
    assert (share - 0.2).abs().max() < 4.5 * math.sqrt(0.16 / 20_000)


# The confidence policy


def plain_confidence(model, start, steps, num_loops, temperature=0.0, seed=0):
    """One sequence in Python: n // S a step and one more in the first n % S; ties to the lower position."""
    tokens, revealed, nfe = list(start), [-1] * len(start), 0
    n = sum(t == model.mask_id for t in tokens)
    for step in range(steps):
        k = n // steps + (1 if step < n % steps else 0)
        if k == 0:
            continue
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([tokens]), None, num_loops)[0]
            weight, bias = model.head()
            logits = hidden @ weight.T + (0 if bias is None else bias)
        nfe += 1
        proposals = []
        for i, token in enumerate(tokens):
            if token != model.mask_id:
                continue
            row = logits[max(0, i - model.logit_shift)].tolist()
            row = [-math.inf if v in model.suppressed_ids else x for v, x in enumerate(row)]
            top = max(row)
            chance = [math.exp(x - top) for x in row]
            if temperature == 0:
                pick = chance.index(max(chance))
            else:
                soft = [math.exp((x - top) / temperature) for x in row]
                u = random.uniform(seed, random.SAMPLE_TOKEN, step, torch.tensor([0]), i + 1)[0, i].item() * sum(soft)
                pick = next(v for v in range(len(soft)) if sum(soft[: v + 1]) > u)
            proposals.append((chance[pick] / sum(chance), -i, pick))
        for _, minus, pick in sorted(proposals, reverse=True)[:k]:
            tokens[-minus], revealed[-minus] = pick, step
    return tokens, revealed, nfe


STARTS = [[MASK] * 9, [1, 2, 3, *[MASK] * 6], [MASK, 4, MASK, MASK, 0, 9, MASK], [5, MASK]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9, 30])
def test_confidence_against_a_plain_implementation(model, steps, temperature):
    for i, start in enumerate(STARTS):
        out = generate(model, start, steps=steps, num_loops=2, temperature=temperature, seed=i)
        tokens, revealed, nfe = plain_confidence(model, start, steps, 2, temperature, seed=i)
        assert out.tokens.tolist() == [tokens] and out.revealed_at.tolist() == [revealed]
        assert out.nfe == nfe == min(steps, start.count(MASK)) == len(out.loops_per_step)
        assert set(out.loops_per_step) == {2}


@pytest.mark.parametrize(("masked", "steps"), [(7, 3), (7, 7), (7, 8), (7, 1), (12, 5), (1, 4)])
def test_confidence_schedule(masked, steps):
    """n // S a step, one more in each of the first n % S; the steps left with none run no model."""
    table = Table(torch.randn(16, 6, 6), mask_id=5)
    out = generate(table, [[5] * masked, [5] * 3 + [0] * (masked + 1)], steps=steps)
    for row, n in ((0, masked), (1, 3)):
        shares = torch.bincount(out.revealed_at[row][out.revealed_at[row] >= 0], minlength=steps).tolist()
        assert shares == [n // steps + (j < n % steps) for j in range(steps)]
    assert out.nfe == len(table.calls) == min(steps, max(masked, 3))


def test_idle_steps():
    """A step that a policy declares idle runs no model and calls nobody back; Confidence's have k = 0 everywhere."""
    masked, logical = torch.ones(2, 9).bool(), torch.arange(9).expand(2, 9)
    for step, idle in ((0, False), (2, False), (3, True), (7, True)):
        state = State(masked, logical, torch.tensor([3, 1]), step, 8, torch.zeros(2).long())
        assert Confidence().idle(state) is idle and not Ancestral().idle(state)
        assert Confidence.count(state).tolist() == [int(step < 3), int(step < 1)]

    class EverySecond(Confidence):
        def idle(self, state):
            return state.step % 2 == 0

    table, steps = Table(torch.randn(6, 6, 6), mask_id=5), []
    out = generate(table, [5] * 6, steps=6, policy=EverySecond(), on_step=lambda step, *_: steps.append(step))
    assert steps == [1, 3, 5] and out.nfe == len(table.calls) == 3 and out.head_rows == 6 + 5 + 4


def test_ties_go_to_the_lower_position():
    flat = Table(torch.zeros(8, 5, 5), mask_id=4)
    out = generate(flat, [4, 0, 4, 4, 4], steps=4)
    assert out.revealed_at.tolist() == [[0, -1, 1, 2, 3]]
    assert out.tokens.tolist() == [[0, 0, 0, 0, 0]]  # and of tokens to the lower id


def test_confidence_is_the_probability_of_the_proposed_token():
    """Not that of the arg-max, and not tempered."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf], [3.0, 0.0, 0.0, -math.inf]], dtype=torch.float64)
    rows = torch.tensor([[True, False, True]])
    state = State(rows, torch.arange(3)[None], torch.tensor([2]), 0, 1, torch.tensor([5]))
    for temperature in (0.0, 0.3, 1.0, 50.0):
        token, confidence = propose(logits, rows, state, temperature)
        want = logits.softmax(-1).gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(confidence, want.float())
        assert (token < 3).all()
    assert propose(logits, rows, state, 0.0)[0].tolist() == [2, 0]


# Batches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["confidence", "ancestral"])
def test_a_sequence_does_not_depend_on_its_batch(model, policy, temperature):
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], [], [2, MASK, 3, MASK], [9, 9, 9]]
    settings_ = {"max_new_tokens": 6, "steps": 4, "policy": policy, "temperature": temperature, "num_loops": 3}
    batch = generate(model, prompts, seed=20, **settings_)
    assert batch.lengths.tolist() == [len(p) + 6 for p in prompts]
    alone = [generate(model, [p], seed=20 + i, **settings_) for i, p in enumerate(prompts)]
    for i, (row, one) in enumerate(zip(batch.sequences(), alone, strict=True)):
        assert row == one.sequences()[0]
        n = len(row)
        assert torch.equal(batch.revealed_at[i, :n], one.revealed_at[0])
        assert (batch.tokens[i, n:] == model.pad_id).all() and (batch.revealed_at[i, n:] == -1).all()
    order = [3, 0, 4, 1, 2]
    mixed = generate(model, [prompts[i] for i in order], row_seeds=[20 + i for i in order], **settings_)
    assert mixed.sequences() == [batch.sequences()[i] for i in order]


@pytest.mark.parametrize("policy", ["confidence", "ancestral"])
def test_seeds(model, policy):
    def run(**changes):
        given = {"max_new_tokens": 12, "steps": 4, "policy": policy, "temperature": 1.0, "batch_size": 3, **changes}
        return generate(model, **given).tokens

    base = run(seed=5)
    torch.manual_seed(123)
    assert torch.equal(base, run(seed=5))
    assert torch.equal(base[1:], run(seed=6)[:2])
    assert torch.equal(base, run(row_seeds=[5, 6, 7]))
    assert (run(seed=100) != base).any(-1).all()
    assert len({tuple(r) for r in base.tolist()}) == 3
    assert run(seed=2**64 - 1, batch_size=1).shape == (1, 12)


# What generate promises


@pytest.mark.parametrize("policy", ["confidence", "ancestral"])
def test_prompts_stay_and_masks_go(model, policy):
    prompt = ids(4, 8, masks=0.4).tolist()
    out = generate(model, prompt, max_new_tokens=3, steps=3, policy=policy, temperature=1.0)
    given_ = torch.tensor([p + [MASK] * 3 for p in prompt])
    keep = given_ != MASK
    assert torch.equal(out.tokens[keep], given_[keep])
    assert not (out.tokens == MASK).any()
    assert torch.equal(out.revealed_at >= 0, ~keep) and out.generated == int((~keep).sum())


def test_kinds_of_prompt(model):
    """One sequence or several, lists or tensors; the caller's tensor is left alone."""
    tensor = torch.tensor([[1, MASK, 2], [MASK, 3, 4]])
    kept = tensor.clone()
    want = generate(model, tensor, steps=2).tokens
    assert torch.equal(tensor, kept)
    assert torch.equal(want, generate(model, tensor.tolist(), steps=2).tokens)
    assert torch.equal(want, generate(model, [tuple(r) for r in tensor.tolist()], steps=2).tokens)
    assert torch.equal(want[:1], generate(model, tensor[0], steps=2).tokens)
    assert torch.equal(want[:1], generate(model, tensor[0].tolist(), steps=2).tokens)
    free = generate(model, None, max_new_tokens=4, batch_size=2, steps=2)
    assert free.tokens.shape == (2, 4) and free.tokens.dtype == torch.int64


def test_ancestral_runs_the_head_on_revealed_rows_alone(model):
    out = generate(model, STARTS, steps=3, num_loops=2, policy="ancestral")
    assert out.head_rows == out.generated == sum(s.count(MASK) for s in STARTS)
    looking = generate(model, [MASK] * 6, steps=3, num_loops=2)
    assert looking.head_rows == 6 + 4 + 2


def test_empty_ancestral_steps_are_free():
    table = Table(torch.zeros(4, 4, 4), mask_id=3)
    out = generate(table, [3, 3], steps=1000, policy="ancestral", seed=4)
    used = set(out.revealed_at.flatten().tolist())
    assert out.nfe == len(table.calls) == len(used) == len(out.loops_per_step) <= 2


@pytest.mark.parametrize("policy", ["confidence", "ancestral"])
def test_counts(model, policy):
    """nfe, FLOPs, tokens: B * forward_flops(T) a pass, at the padded length."""
    out = generate(model, [[1, 2, 3, 4], [1]], max_new_tokens=5, steps=3, num_loops=2, policy=policy)
    assert out.flops == out.nfe * 2 * forward_flops(model.config, 9, 2) > 0
    assert out.generated == 10 and out.seconds > 0
    assert out.tokens_per_second == pytest.approx(10 / out.seconds)
    assert Generation(out.tokens, out.lengths, out.revealed_at).tokens_per_second == 0


def test_loops(model):
    default = generate(model, [MASK] * 8, steps=4)
    assert default.loops_per_step == [3] * 4  # the model's max_loops
    assert torch.equal(default.tokens, generate(model, [MASK] * 8, steps=4, num_loops=3).tokens)
    seen = []
    handle = model.loop.register_forward_hook(lambda _, args, out: seen.append(args[1]))
    try:
        generate(model, [MASK] * 8, steps=2, num_loops=7)
    finally:
        handle.remove()
    assert seen == [7, 7]


@pytest.mark.parametrize("policy", ["confidence", "ancestral"])
def test_on_step(model, policy):
    """After each step that ran: its number, the tokens so far and what it revealed; together everything."""
    calls = []
    out = generate(
        model,
        [1, *[MASK] * 7],
        steps=5,
        policy=policy,
        on_step=lambda step, tokens, revealed: calls.append((step, tokens.clone(), revealed.clone())),
    )
    assert len(calls) == out.nfe and [c[0] for c in calls] == sorted({*out.revealed_at.flatten().tolist()} - {-1})
    masks = 7
    for step, tokens, revealed in calls:
        assert torch.equal(revealed, out.revealed_at == step)
        masks -= int(revealed.sum())
        assert int((tokens == MASK).sum()) == masks
        done = (out.revealed_at <= step) & (out.tokens != MASK)
        assert torch.equal(tokens[done], out.tokens[done])
    assert masks == 0


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    noisy = live(tiny("llama", dropout=0.5))
    want = generate(noisy, [MASK] * 6, steps=2).tokens
    noisy.train(training)
    assert torch.equal(generate(noisy, [MASK] * 6, steps=2).tokens, want)  # no dropout meanwhile
    assert noisy.training == training
    with pytest.raises(ZeroDivisionError):
        generate(noisy, [MASK] * 6, steps=2, on_step=lambda *_: 1 / 0)
    assert noisy.training == training
    assert all(p.grad is None for p in noisy.parameters())


# Temperature


def test_temperature_defaults(model):
    """Confidence takes the arg-max, ancestral samples; both can be told otherwise."""
    for policy, default in (("confidence", 0.0), ("ancestral", 1.0)):
        runs = {t: generate(model, [MASK] * 10, steps=3, policy=policy, temperature=t).tokens for t in (None, 0.0, 1.0)}
        assert torch.equal(runs[None], runs[default]) and not torch.equal(runs[0.0], runs[1.0])


def test_temperature_flattens():
    """Frequencies at temperature T are softmax(logits / T)."""
    logits = torch.tensor([0.0, 1.0, 2.5, 9.0])  # the last is the mask
    table = Table(logits.expand(1, 4, 4), mask_id=3)
    for temperature in (0.5, 1.0, 4.0):
        out = generate(table, [[3]] * N, steps=1, policy="ancestral", temperature=temperature)
        want = (logits[:3] / temperature).softmax(0)
        share = torch.bincount(out.tokens.flatten(), minlength=4)[:4] / N
        assert (share[:3] - want).abs().max() < 4.5 * 0.5 / N**0.5 and share[3] == 0
    cold = generate(table, [[3]] * 500, steps=1, policy="ancestral", temperature=1e-3)
    assert (cold.tokens == 2).all()


# Names, policies of one's own, any Denoiser


def test_peers_names(model):
    for names in (("confidence", "low_confidence", "maskgit_plus"), ("ancestral", "origin")):
        runs = [generate(model, [MASK] * 9, steps=3, policy=name) for name in names]
        assert all(torch.equal(r.tokens, runs[0].tokens) for r in runs)
    assert set(POLICIES) == {"confidence", "low_confidence", "maskgit_plus", "ancestral", "origin"}
    with pytest.raises(InputError, match="unknown policy 'confidense'; did you mean 'confidence'"):
        build("confidense")
    own = Confidence()
    assert build(own) is own


@dataclass
class LeftToRight:
    """A policy of one's own: the leftmost masked position of each sequence."""

    looks: bool = False
    temperature: float = 0.0

    def idle(self, state):
        return False

    def choose(self, state, confidence):
        return state.masked & (state.masked.cumsum(-1) == 1)


def test_a_policy_of_ones_own(model):
    out = generate(model, [[1, MASK, MASK], [MASK, 2, MASK]], steps=2, policy=LeftToRight())
    assert out.revealed_at.tolist() == [[-1, 0, 1], [0, -1, 1]] and out.head_rows == 4


@pytest.mark.parametrize("shift", [0, 1])
def test_any_denoiser(shift):
    """Ten lines of somebody's model; with a shift of 1 the token at i is read at i - 1 (position 0 at itself)."""
    table = Table(torch.randn(9, 6, 6), mask_id=5, logit_shift=shift, suppressed=(0,), max_length=9)
    assert isinstance(table, Denoiser)
    start = [5, 2, 5, 5, 5, 1, 5, 5]
    out = generate(table, start, max_new_tokens=1, steps=3)
    tokens, revealed, nfe = plain_confidence(table, [*start, 5], 3, 1)
    assert out.tokens.tolist() == [tokens] and out.revealed_at.tolist() == [revealed] and nfe == out.nfe
    assert out.flops == out.nfe * 900.0 and not {0, 5} & set(tokens)
    _, padding, loops, sigma = table.calls[1]
    assert padding is None and loops == 1
    torch.testing.assert_close(sigma, -torch.log(1 - 0.999 * torch.tensor([2 / 3])))


def test_padding_is_marked_for_the_denoiser():
    table = Table(torch.randn(5, 6, 6), mask_id=5)
    generate(table, [[1, 2, 3], [1]], max_new_tokens=2, steps=1)
    ids_, padding, _, _ = table.calls[0]
    assert padding.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert ids_[1].tolist() == [1, 5, 5, 0, 0]  # masks right after the prompt, then the pad id
    padded_with_masks = live(tiny(pad_token_id=MASK))
    out = generate(padded_with_masks, [[1, 2, 3], [1]], max_new_tokens=2, steps=2)
    assert out.generated == 4 and (out.tokens[1, 3:] == MASK).all() and out.revealed_at[1, 3:].tolist() == [-1, -1]


# Inputs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": [[1], 3], "max_new_tokens": 1}, "mixes ids and sequences"),
        ({"max_new_tokens": 3, "steps": 2.5}, "steps is 2.5; a whole number"),
        ({"max_new_tokens": 3, "steps": 0}, "steps is 0; a whole number of at least one denoising step"),
        ({"max_new_tokens": 3, "num_loops": 0}, "num_loops is 0; .*at least once"),
        ({"max_new_tokens": 3, "temperature": -0.1}, "temperature is -0.1; it must be a number of at least 0"),
        ({"max_new_tokens": 3, "policy": "greedy"}, "unknown policy 'greedy'"),
        ({"max_new_tokens": 3, "batch_size": 2, "row_seeds": [1]}, "1 row seeds were given for 2 sequences"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 3, "batch_size": 0}, "the batch is empty"),
        ({"max_new_tokens": 0}, "nothing to generate: no mask id in the prompt"),
        ({"prompt": [1, 2, 3]}, "nothing to generate"),
        (
            {"prompt": [1] * 60, "max_new_tokens": 5},
            "60 tokens with 5 new ones is longer than the model's 64",
        ),
        ({"prompt": [[1], [2] * 65], "max_new_tokens": 1}, "prompt of 65 tokens with 1 new"),
        ({"prompt": [1, 11], "max_new_tokens": 1}, r"the prompt holds 11; ids must be whole numbers in 0\.\.10"),
        ({"prompt": [-1], "max_new_tokens": 1}, "the prompt holds -1"),
        ({"prompt": [1.5], "max_new_tokens": 1}, "the prompt holds 1.5"),
        ({"prompt": ["a"], "max_new_tokens": 1}, "the prompt holds 'a'"),
        ({"prompt": torch.tensor([[[1]]]), "max_new_tokens": 1}, r"prompt is \[1, 1, 1\]; expected ids \[T\] or"),
        ({"prompt": torch.tensor(3), "max_new_tokens": 1}, r"prompt is \[\]; expected"),
        ({"max_new_tokens": 3, "seed": 2**64}, "seed is 18446744073709551616; it must be a whole number"),
    ],
)
def test_refusals(model, arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        generate(model, **arguments)
    assert "\n" not in str(caught.value)


@settings(max_examples=25)
@given(data=st.data())
def test_any_arguments(model, data):
    """Whatever is asked for: no mask left, prompts unchanged, never a suppressed id, counts that add up."""
    token = st.integers(0, 10)
    prompts = data.draw(st.lists(st.lists(token, max_size=8), min_size=1, max_size=3))
    new = data.draw(st.integers(0 if all(MASK in p for p in prompts) else 1, 6))
    steps, loops = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    temperature = data.draw(st.sampled_from([None, 0.0, 0.5, 1.0, 3.0]))
    suppressed = data.draw(st.sets(st.integers(0, 9), max_size=4))
    model.suppressed_ids = (MASK, *suppressed)
    try:
        out = generate(
            model,
            prompts,
            max_new_tokens=new,
            steps=steps,
            num_loops=loops,
            policy=policy,
            temperature=temperature,
            seed=data.draw(st.integers(0, 2**64 - 3)),
        )
    finally:
        model.suppressed_ids = (MASK,)
    masks = 0
    for row, (prompt, got) in enumerate(zip(prompts, out.sequences(), strict=True)):
        assert len(got) == len(prompt) + new
        for i, value in enumerate(got):
            given_ = prompt[i] if i < len(prompt) else MASK
            if given_ == MASK:
                masks += 1
                assert value not in suppressed and value != MASK and 0 <= out.revealed_at[row, i] < steps
            else:
                assert value == given_ and out.revealed_at[row, i] == -1
    assert out.generated == masks and out.nfe == len(out.loops_per_step) <= min(steps, masks)
    assert out.head_rows >= masks

"""Stochastic policies: samples against the exact distribution over sequences, by chi-square."""

import itertools
import math

import pytest
import torch
from scipy.stats import chi2

from loopmdm import random
from loopmdm.sampling.engine import generate
from loopmdm.sampling.policies import Ancestral, FirstHitting, Random
from loopmdm.sampling.remask import P2, ReMDM
from loopmdm.sampling.state import Move, Policy

from .helpers import live, tiny

MASK = 3
N = 12_000
FREE = (MASK, MASK, MASK)


def small(seed, head_scale):
    """3 ids and the mask, 3 positions: 27 sequences, with logits that depend strongly on what is revealed."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return live(tiny("llama", vocab_size=4, start=0, length=1, positions="both", **size), seed, head_scale=head_scale)


@pytest.fixture(scope="module")
def toy():
    return small(13, 2.0)  # of 40 seeds, the tests below have most power here


@pytest.fixture(scope="module")
def wavering():
    return small(14, 1.0)  # one on which P2 often thinks better of a token


# The exact distribution, by dynamic programming over partly masked states


class Chances:
    """Each position's distribution [3][3] at a partly masked state, kept once asked for."""

    def __init__(self, model, temperature=1.0):
        self.model, self.temperature, self.known = model, temperature, {}

    def __call__(self, tokens):
        if tokens not in self.known:
            with torch.no_grad():
                logits = self.model(torch.tensor([tokens]), num_loops=2).logits[0, :, :3].double() / self.temperature
            self.known[tokens] = logits.softmax(-1).tolist()
        return self.known[tokens]


def exact(model, steps, moves, start=FREE, temperature=1.0):
    """Probabilities of the final sequences of a policy that chooses positions first.

    `moves(j, tokens, memory)` yields (probability, positions revealed, positions remasked); memory holds for each
    position the probability that its token had when it was revealed.
    """
    chances, states = Chances(model, temperature), {(start, (None,) * len(start)): 1.0}
    for j in range(steps):
        following = {}
        for (tokens, memory), weight in states.items():
            p = chances(tokens)
            for probability, shown, hidden in moves(j, tokens, memory):
                if probability == 0:
                    continue
                for values in itertools.product(range(3), repeat=len(shown)):
                    new, kept, q = list(tokens), list(memory), weight * probability
                    for i in hidden:
                        new[i], kept[i] = MASK, None
                    for i, value in zip(shown, values, strict=True):
                        new[i], kept[i], q = value, round(p[i][value], 9), q * p[i][value]
                    key = (tuple(new), tuple(kept))
                    following[key] = following.get(key, 0.0) + q
        states = following
    return final(states)


def final(states):
    """The sum over memories; every sequence must be complete."""
    total = {}
    for (tokens, _), weight in states.items():
        total[tokens] = total.get(tokens, 0.0) + weight
    assert sum(total.values()) == pytest.approx(1) and all(MASK not in tokens for tokens in total)
    return total


def split(tokens):
    return [i for i, t in enumerate(tokens) if t == MASK], [i for i, t in enumerate(tokens) if t != MASK]


def subsets(chance):
    """Independent draws: {position: probability} -> (probability, positions drawn) of every outcome."""
    for drawn in itertools.product([False, True], repeat=len(chance)):
        p = math.prod(c if d else 1 - c for c, d in zip(chance.values(), drawn, strict=True))
        yield p, [i for i, d in zip(chance, drawn, strict=True) if d]


def reverse_process(steps, alpha=lambda t: 1 - t):
    """Step j goes from t = 1 - j/steps to s: each masked token is shown with (alpha_s - alpha_t) / (1 - alpha_t)."""

    def moves(j, tokens, memory):
        t, s = 1 - j / steps, 1 - (j + 1) / steps
        rate = 1.0 if j == steps - 1 else (alpha(s) - alpha(t)) / (1 - alpha(t))
        for p, shown in subsets(dict.fromkeys(split(tokens)[0], rate)):
            yield p, shown, []

    return moves


def uniform_positions(shares):
    """shares[j] of the masked positions at step j, every subset of that size alike."""

    def moves(j, tokens, memory):
        options = list(itertools.combinations(split(tokens)[0], shares[j]))
        for shown in options:
            yield 1 / len(options), list(shown), []

    return moves


EPS = 1e-3


def remasking(steps, strategy, eta, t_on=0.75, t_off=0.3, alpha_on=0.6):
    def alpha(t):
        if strategy != "loop":
            return 1 - (1 - EPS) * t
        if t > t_on:
            return EPS + (alpha_on - EPS) * (1 - t) / (1 - t_on)
        return alpha_on if t > t_off else 1 - (1 - alpha_on) * t / t_off

    def moves(j, tokens, memory):
        masked, filled = split(tokens)
        t, s = 1 - j / steps, 1 - (j + 1) / steps
        a_t, a_s, last = alpha(t), alpha(s), j == steps - 1
        most = min(1, (1 - a_s) / a_t)
        sigma = {"cap": min(eta, most), "rescale": eta * most, "conf": eta * most, "loop": min(eta, most)}[strategy]
        if last or (strategy == "loop" and not t_off < t <= t_on):
            sigma = 0.0
        ahead = 0.0 if strategy == "conf" else sigma
        show = 1.0 if last else (a_s - (1 - ahead) * a_t) / (1 - a_t)
        hide = dict.fromkeys(filled, sigma)
        if strategy == "conf" and filled:
            weights = {i: math.exp(-memory[i]) for i in filled}
            hide = {i: sigma * w / sum(weights.values()) for i, w in weights.items()}
        for p, shown in subsets(dict.fromkeys(masked, show)):
            for q, hidden in subsets(hide):
                yield p * q, shown, hidden

    return moves


def exact_p2(model, steps, eta):
    """P2 draws a token for every masked position, scores them and the filled ones, and keeps the best."""
    chances, states = Chances(model), {(FREE, None): 1.0}
    for j in range(steps):
        following = {}
        for (tokens, _), weight in states.items():
            p, (masked, filled) = chances(tokens), split(tokens)
            for values in itertools.product(range(3), repeat=len(masked)):
                full, q = list(tokens), weight
                for i, value in zip(masked, values, strict=True):
                    full[i], q = value, q * p[i][value]
                score = {i: math.log(p[i][full[i]]) * (eta if i in filled else 1) for i in range(3)}
                keep = sorted(range(3), key=lambda i: (-score[i], i))[: 3 - 3 * (steps - j - 1) // steps]
                new = tuple(full[i] if i in keep else MASK for i in range(3))
                following[new, None] = following.get((new, None), 0.0) + q
        states = following
    return final(states)


def p_value(tokens, distribution):
    """Chi-square test of rows against a distribution over rows; rare sequences (fewer than 5 expected) pooled."""
    counts = {}
    for row in map(tuple, tokens.tolist()):
        counts[row] = counts.get(row, 0) + 1
    assert counts.keys() <= distribution.keys()
    n, statistic, cells, rest = len(tokens), 0.0, 0, [0.0, 0.0]
    for row, p in distribution.items():
        if n * p < 5:
            rest[0], rest[1] = rest[0] + n * p, rest[1] + counts.get(row, 0)
        else:
            statistic, cells = statistic + (counts.get(row, 0) - n * p) ** 2 / (n * p), cells + 1
    if rest[0] > 1:
        statistic, cells = statistic + (rest[1] - rest[0]) ** 2 / rest[0], cells + 1
    return chi2.sf(statistic, cells - 1)


def sample(model, policy, steps, start=FREE, temperature=1.0, seed=11, **options):
    return generate(
        model, [start] * N, steps=steps, num_loops=2, policy=policy, temperature=temperature, seed=seed, **options
    )


# Ancestral sampling


@pytest.mark.parametrize(
    ("start", "steps", "temperature"),
    [(FREE, 1, 1.0), (FREE, 2, 1.0), (FREE, 4, 1.0), ((3, 1, 3), 2, 1.0), (FREE, 2, 2.0), (FREE, 4, 0.5)],
)
def test_ancestral_samples_have_the_exact_distribution(toy, start, steps, temperature):
    tokens = sample(toy, "ancestral", steps, start, temperature).tokens
    distribution = exact(toy, steps, reverse_process(steps), start, temperature)
    assert sum(p > 0.001 for p in distribution.values()) >= 6
    assert p_value(tokens, distribution) > 1e-4


def test_ancestral_on_another_schedule(toy):
    def cosine(t):
        return EPS + (1 - EPS) * (1 - math.cos(math.pi / 2 * (1 - t)))

    tokens = sample(toy, "ancestral", 2, schedule="cosine").tokens
    assert p_value(tokens, exact(toy, 2, reverse_process(2, cosine))) > 1e-4
    assert p_value(tokens, exact(toy, 2, reverse_process(2))) < 1e-6


def test_the_distribution_test_has_power(toy):
    """Samples of another number of steps, temperature or reveal rate are refused."""
    distribution = exact(toy, 2, reverse_process(2))
    assert p_value(sample(toy, "ancestral", 1).tokens, distribution) < 1e-9
    assert p_value(sample(toy, "ancestral", 4).tokens, distribution) < 1e-9
    assert p_value(sample(toy, "ancestral", 2, temperature=1.1).tokens, distribution) < 1e-9

    class Hasty(Ancestral):
        def choose(self, state, scores=None):
            return Move(state.masked & (state.last[:, None] | (state.noise(7) < 0.6)))

    hasty = sample(toy, Hasty(), 2).tokens
    assert p_value(hasty, distribution) < 1e-9
    # and the test itself knows what these samples are
    assert p_value(hasty, exact(toy, 2, reverse_process(2, lambda t: {1: 0, 0.5: 0.6, 0: 1}[t]))) > 1e-4


# Reveal-first against masked-rows-first


class LookingAncestral(Policy):
    """Ancestral sampling the usual way: logits at all masked rows, positions drawn afterwards."""

    looks, score, temperature = "masked", "confidence", 1.0

    def choose(self, state, scores):
        assert (scores[state.masked] > 0).all()
        chance = 1 / (state.steps - state.step)[:, None]
        return Move(state.masked & (state.noise(random.SAMPLE_POSITION) < chance))


def test_reveal_first_equals_masked_rows_first(toy):
    """In distribution (here even in every token, the noise being the same), with L rows of the head instead of more."""
    steps, length = 4, 3
    distribution = exact(toy, steps, reverse_process(steps))
    first, looking = sample(toy, "ancestral", steps), sample(toy, LookingAncestral(), steps)
    apart = sample(toy, LookingAncestral(), steps, seed=10**6)
    assert p_value(first.tokens, distribution) > 1e-4 and p_value(apart.tokens, distribution) > 1e-4
    assert torch.equal(first.tokens, looking.tokens)
    assert first.head_rows == N * length
    # t = 1, 3/4, 1/2, 1/4 is the share still masked at each step: 2.5 rows a position
    assert looking.head_rows == pytest.approx(N * length * 2.5, rel=0.02)
    assert first.flops < 0.95 * looking.flops  # sequences that reveal nothing stay out of a pass


@pytest.mark.parametrize("policy", ["ancestral", "first_hitting", "random", "left_to_right"])
def test_reveal_first_runs_the_head_on_each_position_once(toy, policy):
    assert generate(toy, [FREE] * 50, steps=4, num_loops=2, policy=policy).head_rows == 150


# Positions at random


def test_first_hitting_and_random_have_the_exact_distribution(toy):
    """One token at a time, any position alike: which is ancestral sampling with infinitely many steps."""
    limit = exact(toy, 3, uniform_positions([1, 1, 1]))
    hitting = sample(toy, FirstHitting(), None)
    assert hitting.nfe == 3 and hitting.head_rows == 3 * N
    assert p_value(hitting.tokens, limit) > 1e-4
    assert p_value(sample(toy, Random(), 3).tokens, limit) > 1e-4
    two = exact(toy, 2, uniform_positions([2, 1]))  # 3 tokens in 2 steps
    assert p_value(sample(toy, Random(), 2).tokens, two) > 1e-4
    assert p_value(sample(toy, FirstHitting(), 2).tokens, two) > 1e-4
    assert p_value(hitting.tokens, two) < 1e-6
    assert p_value(sample(toy, "left_to_right", 3).tokens, limit) < 1e-6
    assert p_value(sample(toy, "ancestral", 3).tokens, limit) < 1e-6


# Remasking


STRATEGIES = {"cap": 0.4, "rescale": 0.6, "conf": 1.0, "loop": 0.5}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_remdm_samples_have_the_exact_distribution(toy, strategy):
    steps, eta = 5, STRATEGIES[strategy]
    distribution = exact(toy, steps, remasking(steps, strategy, eta))
    tokens = sample(toy, ReMDM(strategy, eta, t_on=0.75, t_off=0.3, alpha_on=0.6), steps).tokens
    assert p_value(tokens, distribution) > 1e-4
    assert p_value(tokens, exact(toy, steps, reverse_process(steps))) < 1e-6


def test_remdm_strategies_are_told_apart(toy):
    """conf weights tokens by their confidence; cap and rescale differ; eta matters."""
    steps = 5
    tokens = sample(toy, ReMDM("cap", 0.4), steps).tokens
    for other in (remasking(steps, "rescale", 0.4), remasking(steps, "cap", 0.2), remasking(steps, "conf", 1.0)):
        assert p_value(tokens, exact(toy, steps, other)) < 1e-6
    nothing = sample(toy, ReMDM("cap", 0.0), steps)
    assert torch.equal(nothing.tokens, sample(toy, "ancestral", steps).tokens) and nothing.head_rows == 3 * N


@pytest.mark.parametrize("eta", [3.0, 1.0, 0.0])
def test_p2_samples_have_the_exact_distribution(wavering, eta):
    steps = 4
    distribution = exact_p2(wavering, steps, eta)
    tokens = sample(wavering, P2(eta), steps).tokens
    assert p_value(tokens, distribution) > 1e-4
    assert p_value(tokens, exact_p2(wavering, steps, {3.0: 1.0, 1.0: 0.0, 0.0: 1.0}[eta])) < 1e-6

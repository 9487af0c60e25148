"""Every policy against a plain one, choice for choice and ties included; then schedules, names and arguments."""

import itertools
import math

import pytest
import torch
from scipy.stats import kstest

from loopmdm import random
from loopmdm.diffusion.schedule import Cosine, Linear
from loopmdm.errors import InputError
from loopmdm.sampling.engine import generate
from loopmdm.sampling.policies import (
    POLICIES,
    Ancestral,
    Confidence,
    EntropyBound,
    Factor,
    FirstHitting,
    LeftToRight,
    Threshold,
    build,
)
from loopmdm.sampling.remask import P2, ReMDM
from loopmdm.sampling.state import Move, Policy, State

from .helpers import Table
from .samplers import EVERY, PATTERNS, REMASKING, REVEALING, Coarse, drawn

MASK = Coarse.mask_id


# Plain sampling of one sequence, with lists


def fp32(x):
    return torch.tensor(x, dtype=torch.float64).float().item()


class View:
    """What a rule reads: one sequence, one block, one step."""

    def __init__(self, **facts):
        self.__dict__.update(facts)

    def noise(self, stream):
        return random.uniform(self.seed, stream, self.clock, torch.tensor([0]), self.length)[0].tolist()

    def even(self):
        """k of this step when n tokens are spread over S steps."""
        return self.n // self.S + (1 if self.j < self.n % self.S else 0)

    def least(self):
        return 1 if self.S is None else max(1, math.ceil(len(self.masked) / (self.S - self.j)))

    def best(self, key, k):
        """The k masked positions of largest key; of equal ones the leftmost."""
        return sorted(self.masked, key=lambda i: (-fp32(key(i)), i))[:k]

    def grid(self):
        return 1 - self.j / self.S, 1 - (self.j + 1) / self.S

    # of the prediction at position i
    def confidence(self, i):
        return self.p[i][self.there[i]]

    def entropy(self, i):
        return -math.fsum(q * math.log(q) for q in self.p[i] if q > 0)

    def margin(self, i):
        first, second = sorted(self.p[i], reverse=True)[:2]
        return first - second


def linear(t):
    return 1 - (1 - 1e-3) * t


def ancestral(v):
    t, s = v.grid()
    noise = v.noise(random.SAMPLE_POSITION)
    return [i for i in v.masked if v.j == v.S - 1 or noise[i] < (t - s) / t], []


def first_hitting(v):
    noise = v.noise(random.HIT)
    return v.best(lambda i: noise[i], v.least()), []


def at_random(v):
    noise = v.noise(random.SAMPLE_POSITION)
    return v.best(lambda i: noise[i], v.even()), []


def left_to_right(v):
    return v.masked[: v.even()], []


def confidence(v):
    return v.best(v.confidence, v.even()), []


def margin(v):
    return v.best(v.margin, v.even()), []


def entropy(v):
    return v.best(lambda i: -v.entropy(i), v.even()), []


def threshold(v, tau=0.3):
    order = v.best(v.confidence, len(v.masked))
    sure = [i for i in order if fp32(v.confidence(i)) >= fp32(tau)]
    return order[: max(len(sure), v.least())], []


def factor(v, f=1.6):
    order, n = v.best(v.confidence, len(v.masked)), 0
    while n < len(order) and fp32(v.confidence(order[n])) >= 1 - f / (n + 2):
        n += 1
    return order[: max(n, v.least())], []


def entropy_bound(v, gamma=1.5):
    order = v.best(lambda i: -v.entropy(i), len(v.masked))
    accepted = []
    for i in order:
        entropies = [fp32(v.entropy(a)) for a in [*accepted, i]]
        if math.fsum(entropies) - max(entropies) > gamma:
            break
        accepted.append(i)
    return order[: max(len(accepted), v.least())], []


def remdm(strategy, eta, t_on=0.7, t_off=0.3, alpha_on=0.5):
    def alpha(t):
        if strategy != "loop":
            return linear(t)
        if t > t_on:  # from 1e-3 at t = 1 to alpha_on
            return 1e-3 + (alpha_on - 1e-3) * (1 - t) / (1 - t_on)
        return alpha_on if t > t_off else 1 - (1 - alpha_on) * t / t_off

    def rule(v):
        if v.j == v.S - 1:
            return list(v.masked), []
        t, s = v.grid()
        most = min(1, (1 - alpha(s)) / alpha(t))
        if strategy == "loop":
            sigma = min(eta, most) if t_off < t <= t_on else 0
        else:
            sigma = min(eta, most) if strategy == "cap" else eta * most
        weights = {i: math.exp(-v.memory[i]) for i in v.filled}
        show, hide = v.noise(random.SAMPLE_POSITION), v.noise(random.REMASK)
        ahead = 0 if strategy == "conf" else sigma  # masked tokens of conf are revealed as by MDLM
        chance = (alpha(s) - (1 - ahead) * alpha(t)) / (1 - alpha(t))
        remask = [
            i
            for i in v.filled
            if hide[i] < sigma * (weights[i] / math.fsum(weights.values()) if strategy == "conf" else 1)
        ]
        return [i for i in v.masked if show[i] < chance], remask

    return rule


def p2(eta):
    def rule(v):
        def score(i):
            return math.log(v.confidence(i)) * (1 if i in v.masked else eta)

        masked_after = math.floor(v.n * (v.S - v.j - 1) / v.S + 1e-9)
        both = sorted([*v.masked, *v.filled], key=lambda i: (fp32(-score(i)), i))
        kept = set(both[: v.n - masked_after])
        return [i for i in v.masked if i in kept], [i for i in v.filled if i not in kept]

    return rule


RULES = {
    "ancestral": ancestral,
    "first_hitting": first_hitting,
    "random": at_random,
    "left_to_right": left_to_right,
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "threshold": threshold,
    "factor": factor,
    "eb": entropy_bound,
    "cap": remdm("cap", 0.3),
    "rescale": remdm("rescale", 0.4),
    "conf": remdm("conf", 1.0),
    "loop": remdm("loop", 0.3),
    "p2": p2(1.0),
    "p2_eta": p2(0.5),
}
BLIND = {"ancestral", "first_hitting", "random", "left_to_right", "cap", "rescale", "conf", "loop"}
FIXED = {"confidence", "margin", "entropy"}


def predict(model, x, temperature, seed, clock):
    """(probabilities [T][V] without temperature, a drawn token for each position)."""
    logits = model.hidden(torch.tensor([x]))[0].tolist()
    model.calls.pop()
    picks, probabilities = [], []
    for i in range(len(x)):
        row = logits[max(0, i - model.logit_shift)]
        row = [-math.inf if v in model.suppressed_ids else a for v, a in enumerate(row)]
        weights = [math.exp(a) for a in row]
        probabilities.append([w / math.fsum(weights) for w in weights])
        picks.append(drawn(row, temperature, seed, clock, i))
    return probabilities, picks


def plan(blocks, steps):
    """(block, step in it, its steps) of each step; the first blocks take what does not divide."""
    sizes = [steps // blocks + (1 if b < steps % blocks else 0) for b in range(blocks)]
    return [(b, j, size) for b, size in enumerate(sizes) for j in range(size)]


def plain(model, start, name, steps, temperature, seed, block_length=None):
    """(tokens, revealed_at, steps that ran the model, rows of the head)."""
    x, revealed, memory, ran, rows = list(start), [-1] * len(start), {}, 0, 0
    where = [i for i, token in enumerate(start) if token == MASK]
    size = block_length or len(where)
    blocks = [where[a : a + size] for a in range(0, len(where), size)]
    timetable = plan(len(blocks), steps) if steps else None
    clock, since, before = 0, 0, 0
    while clock < steps if steps else MASK in x:
        if timetable:
            b, j, S = timetable[clock]
        else:
            b = next(b for b, block in enumerate(blocks) if any(x[i] == MASK for i in block))
            since = since + 1 if b == before and clock else 0
            before, j, S = b, since, None
        masked = [i for i in blocks[b] if x[i] == MASK]
        filled = [i for i in blocks[b] if x[i] != MASK]
        if masked or name in ("cap", "rescale", "conf", "loop"):
            p, picks = predict(model, x, temperature, seed, clock)
            there = [picks[i] if x[i] == MASK else x[i] for i in range(len(x))]
            view = View(
                masked=masked, filled=filled, p=p, there=there, memory=memory, j=j, S=S, n=len(blocks[b]), seed=seed,
                clock=clock, length=len(x),
            )  # fmt: skip
            if not (name in FIXED and view.even() == 0):
                reveal, remask = RULES[name](view)
                looked = len(reveal) if name in BLIND else len(blocks[b]) if name.startswith("p2") else len(masked)
                rows, ran = rows + looked, ran + (looked > 0)
                for i in reveal:
                    x[i], revealed[i], memory[i] = picks[i], clock, fp32(view.confidence(i))
                for i in remask:
                    x[i], revealed[i] = MASK, -1
        clock += 1
    return x, revealed, ran, rows


STARTS = [[MASK] * 9, [1, 2, 3, *[MASK] * 6], [MASK, 4, MASK, MASK, 0, 6, MASK], [5, MASK], [MASK] * 4]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", EVERY)
def test_against_a_plain_implementation(name, temperature):
    """Tokens, when each was revealed, passes and rows of the head, for every sequence by itself."""
    models = [Coarse(logit_shift=shift, suppressed=(2,)) for shift in (0, 1)]
    runs = [(3, None), (12, None), (7, 2), (None, 3), (None, None)]
    for steps, block_length in runs if EVERY[name].adaptive else runs[:3]:
        for seed, start in enumerate(STARTS):
            model = models[seed % 2]
            want = plain(model, start, name, steps, temperature, seed, block_length)
            out = generate(
                model, start, steps=steps, policy=EVERY[name], temperature=temperature, seed=seed,
                block_length=block_length,
            )  # fmt: skip
            got = (out.tokens[0].tolist(), out.revealed_at[0].tolist(), out.nfe, out.head_rows)
            assert got == want, (steps, block_length, start)
    assert all(model.calls for model in models)


def test_the_comparison_meets_ties():
    """Among the states that it visits many positions tie, in every score."""
    model = Coarse()
    for score in (View.confidence, View.margin, View.entropy):
        ties = 0
        for start in STARTS:
            p, picks = predict(model, start, 0.0, 0, 0)
            view = View(p=p, there=picks)
            keys = [fp32(score(view, i)) for i, token in enumerate(start) if token == MASK]
            ties += len(keys) - len(set(keys))
        assert ties >= 8


def test_scores_are_equal_or_far_apart():
    """So that rounding, in the order of a sum say, can decide no choice: within each score the patterns differ by more
    than 1e-4 (an id's probability by as much from another id's of another pattern)."""
    for never in ((7,), (2, 7)):
        seen = {View.entropy: [], View.margin: [], View.confidence: []}
        for row in PATTERNS.tolist():
            weights = [0.0 if v in never else math.exp(1.5 * a) for v, a in enumerate(row)]
            p = [w / math.fsum(weights) for w in weights]
            view = View(p=[p], there=[0])
            seen[View.entropy].append(view.entropy(0))
            seen[View.margin].append(view.margin(0))
            seen[View.confidence] += sorted({round(q, 12) for q in p if q})
        for values in seen.values():
            gaps = [b - a for a, b in itertools.pairwise(sorted(values))]
            assert all(gap > 1e-4 or gap < 1e-12 for gap in gaps)


def test_plain_rules_differ():
    """No two rules agree on all of it: a policy cannot pass with another's rule."""
    model, seen = Coarse(), {}
    for name in RULES:
        runs = tuple(str(plain(model, start, name, 4, 0.0, 3)[1]) for start in STARTS)
        assert runs not in seen, (name, seen[runs])
        seen[runs] = name


# Counts and steps


@pytest.mark.parametrize("policy", ["confidence", "margin", "entropy", "random", "left_to_right"])
@pytest.mark.parametrize(("masked", "steps"), [(7, 3), (7, 7), (7, 8), (7, 1), (12, 5), (1, 4)])
def test_even_schedule(masked, steps, policy):
    """n // S a step, one more in each of the first n % S, each row by itself; steps with none run no model."""
    table = Table(torch.randn(16, 6, 6), mask_id=5)
    out = generate(table, [[5] * masked, [5] * 3 + [0] * (masked + 1)], steps=steps, policy=policy)
    for row, n in ((0, masked), (1, 3)):
        shares = torch.bincount(out.revealed_at[row][out.revealed_at[row] >= 0], minlength=steps).tolist()
        assert shares == [n // steps + (j < n % steps) for j in range(steps)]
    assert out.nfe == len(table.calls) == min(steps, max(masked, 3))
    for ids, *_ in table.calls[min(steps, 3) :]:
        assert len(ids) == 1  # the shorter row is done, or has nothing to do


@pytest.mark.parametrize("policy", [Threshold(2.0), Factor(0.0), EntropyBound(0.0), FirstHitting()])
def test_adaptive_policies_take_as_many_steps_as_they_need(policy):
    """At the strictest setting one token a step; with fewer steps ceil(left / steps left), so that they end in time."""
    model = Coarse()
    assert generate(model, [[MASK] * 9, [MASK] * 2], policy=policy).nfe == 9
    for steps, shares in ((4, [3, 2, 2, 2]), (2, [5, 4]), (30, [1] * 9)):
        out = generate(model, [MASK] * 9, policy=policy, steps=steps)
        assert torch.bincount(out.revealed_at[0]).tolist() == shares
    loose = {Threshold: Threshold(0.0), Factor: Factor(100.0), EntropyBound: EntropyBound(1e3)}.get(type(policy))
    assert loose is None or generate(model, [MASK] * 9, policy=loose).nfe == 1


def test_bounds_are_inclusive():
    """A confidence equal to tau is revealed, an entropy sum equal to gamma accepted, a factor's bound met exactly."""
    even = torch.zeros(4, 5, 5, dtype=torch.float64)  # four ids of probability 1/4 at every position
    table = Table(even, mask_id=4)
    assert generate(table, [4] * 4, policy=Threshold(0.25)).nfe == 1
    assert generate(table, [4] * 4, policy=Threshold(0.25 + 1e-7)).nfe == 4
    nats = torch.tensor(math.log(4)).item()  # in fp32
    assert generate(table, [4] * 4, policy=EntropyBound(3 * nats)).nfe == 1
    assert generate(table, [4] * 4, policy=EntropyBound(3 * nats * (1 - 1e-12))).nfe == 2
    # 1/4 >= 1 - f/(n + 1) for n up to 3 when f = 3, for n up to 2 when f is less
    assert generate(table, [4] * 4, policy=Factor(3.0)).revealed_at.tolist() == [[0, 0, 0, 1]]
    assert generate(table, [4] * 4, policy=Factor(2.999)).revealed_at.tolist() == [[0, 0, 1, 1]]


def test_default_steps():
    model = Coarse()
    for name in ("confidence", "random"):
        assert generate(model, [MASK] * 100, policy=name).nfe == 64
    out = generate(model, [MASK] * 400, policy="ancestral", seed=1)
    assert out.nfe == 64 == len(set(out.revealed_at.flatten().tolist()))


def test_ties_go_to_the_lower_position():
    flat = Table(torch.zeros(8, 5, 5), mask_id=4)
    for policy in ("confidence", "margin", "entropy", "left_to_right", Threshold(0.9), Factor(0.0), EntropyBound(0.0)):
        out = generate(flat, [4, 0, 4, 4, 4], steps=4, policy=policy)
        assert out.revealed_at.tolist() == [[0, -1, 1, 2, 3]]
        assert out.tokens.tolist() == [[0, 0, 0, 0, 0]]  # and of tokens to the lower id


def test_idle_steps():
    """A step that a policy declares idle runs no model and calls nobody back; a sequence of its own that is idle stays
    out of the pass."""
    masked = torch.ones(2, 9).bool()

    def state(step):
        ones = torch.ones(2, dtype=torch.int64)
        return State(masked, masked, torch.tensor([3, 1]), ones * step, ones * 8, ones * 0, step, ones, masked, None)

    for step, idle in ((0, [False, False]), (1, [False, True]), (2, [False, True]), (3, [True, True])):
        assert Confidence().idle(state(step)).tolist() == idle
        assert state(step).even_share.tolist() == [int(step < 3), int(step < 1)]

    class EverySecond(Confidence):
        def idle(self, state):
            return state.step % 2 == 0

    table, steps = Table(torch.randn(6, 6, 6), mask_id=5), []
    out = generate(table, [5] * 6, steps=6, policy=EverySecond(), on_step=lambda step, *_: steps.append(step))
    assert steps == [1, 3, 5] and out.nfe == len(table.calls) == 3 and out.head_rows == 6 + 5 + 4


# Remasking


@pytest.mark.parametrize("name", REMASKING)
def test_remasking_happens_and_ends(name):
    """Filled tokens are masked again and filled anew; prompt tokens never; at the end no mask is left."""
    model, masks, shown = Coarse(), [], []
    start = [1, MASK, 2, *[MASK] * 9]
    steps = 12

    def watch(step, tokens, revealed):
        masks.append(int((tokens == MASK).sum()))
        shown.append(revealed.clone())

    out = generate(model, start, steps=steps, policy=EVERY[name], temperature=1.0, seed=2, on_step=watch)
    assert MASK not in out.tokens and out.tokens[0, 0] == 1 and out.tokens[0, 2] == 2
    assert sum(int(r.sum()) for r in shown) > out.generated == 10  # some were revealed twice
    if name.startswith("p2"):
        assert masks == [10 * (steps - j - 1) // steps for j in range(len(masks))]
    blocks = generate(model, start, steps=steps, policy=EVERY[name], temperature=1.0, seed=2, block_length=5)
    assert (blocks.revealed_at[0, [1, 3, 4, 5, 6]] < 6).all() and (blocks.revealed_at[0, 7:] >= 6).all()


def test_p2_without_eta_never_remasks():
    """Not even where a masked position before a filled one becomes as sure as it, with probability 1 in fp32."""

    class Unsure(Table):
        def hidden(self, input_ids, *rest):
            logits = super().hidden(input_ids, *rest)
            return torch.where((input_ids == self.mask_id).all() & (torch.arange(6) < 3)[:, None], 0.0, logits)

    sure = Unsure(100.0 * torch.eye(5).roll(1, 0).expand(6, 5, 5), mask_id=4)
    for model, mask in ((Coarse(), MASK), (sure, 4)):
        shown = []
        out = generate(
            model, [mask] * 6, steps=4, policy=P2(0.0), temperature=1.0,
            on_step=lambda step, tokens, r, shown=shown: shown.append(r.clone()),
        )  # fmt: skip
        assert [int(r.sum()) for r in shown] == [2, 1, 2, 1]  # floor(6 (3, 2, 1, 0) / 4) = 4, 3, 1, 0 masked
        assert mask not in out.tokens
    assert shown[0][0].tolist() == [False] * 3 + [True] * 2 + [False]


def test_a_policy_cannot_overstep():
    """What it reveals beyond the masked, or remasks beyond the filled, does not count; the prompt stays."""

    class Wild(Policy):
        remasks = True

        def __init__(self, *hiding):
            self.hiding = hiding

        def choose(self, state, scores):
            everything = torch.ones_like(state.masked)
            return Move(everything, everything if int(state.step[0]) in self.hiding else None)

    for policy in (Wild(0, 1), Wild(1)):
        out = generate(Coarse(), [1, MASK, 3, MASK], steps=6, policy=policy)
        assert out.tokens[0, [0, 2]].tolist() == [1, 3]
        assert out.revealed_at.tolist() == [[-1, 2, -1, 2]]  # shown, hidden, shown


# Times and schedules


def test_first_hitting_times():
    """t_n^... : the first time is the largest of n uniforms, and so on: (t / t before)^n is uniform, independently."""
    model, n, B = Coarse(), 5, 1500
    generate(model, [[MASK] * n] * B, policy="first_hitting", seed=5)
    times = [(1 - torch.exp(-sigma.double())) / (1 - 1e-3) for *_, sigma in model.calls]
    assert len(times) == n and all(t.shape == (B,) for t in times)
    before, uniforms = torch.ones(B, dtype=torch.float64), []
    for i, t in enumerate(times):
        uniforms.append((t / before) ** (n - i))
        assert kstest(uniforms[-1].numpy(), "uniform").pvalue > 1e-3
        before = t
    assert torch.corrcoef(torch.stack(uniforms)).triu(1).abs().max() < 0.1
    # another schedule tells other times of the same noise levels
    other = Coarse()
    generate(other, [[MASK] * n] * B, policy="first_hitting", seed=5, schedule="cosine")
    for (*_, a), (*_, b) in zip(model.calls, other.calls, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # and where much stays clean at t = 1 the times are those of what can be masked at all
    half = Coarse()
    generate(half, [[MASK] * n] * B, policy="first_hitting", seed=5, schedule=Linear(0.5))
    for (*_, sigma), t in zip(half.calls, times, strict=True):
        torch.testing.assert_close((1 - torch.exp(-sigma.double())) / 0.5, t, atol=1e-5, rtol=1e-4)


def test_first_hitting_times_of_blocks_are_their_own():
    model = Coarse()
    generate(model, [[MASK] * 4] * 400, policy="first_hitting", block_length=2, seed=7)
    t = [(1 - torch.exp(-sigma.double())) / (1 - 1e-3) for *_, sigma in model.calls]
    assert (t[1] < t[0]).all() and (t[3] < t[2]).all() and 0.2 < float((t[2] > t[1]).double().mean()) < 0.95
    assert abs(float(torch.corrcoef(torch.stack((t[0], t[2])))[0, 1])) < 0.2


def test_times_of_the_others():
    """1 - step / steps of the whole generation; without steps the share that is still masked."""
    model = Coarse()
    generate(model, [MASK] * 6, steps=3, block_length=2, schedule="cosine")
    want = Cosine().sigma(torch.tensor([1, 2 / 3, 1 / 3], dtype=torch.float64)).float()
    # blocks of one step reveal two tokens each
    assert torch.equal(torch.cat([sigma for *_, sigma in model.calls]), want)
    model = Coarse()
    generate(model, [3, *[MASK] * 4], policy=Threshold(2.0))
    want = -torch.log(1 - 0.999 * torch.tensor([1.0, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(torch.cat([sigma for *_, sigma in model.calls]), want)


def test_ancestral_follows_the_schedule():
    """P(revealed by step j) = (alpha_j - alpha_0) / (1 - alpha_0), whatever the model."""
    table, steps = Table(torch.zeros(50, 4, 4), mask_id=3), 5
    for schedule, alpha in (("linear", linear), ("cosine", lambda t: Cosine().alpha(torch.tensor(t)).item())):
        out = generate(table, batch_size=400, max_new_tokens=50, steps=steps, policy="ancestral", schedule=schedule)
        share = torch.bincount(out.revealed_at.flatten(), minlength=steps).double() / out.generated
        alphas = [alpha(1 - j / steps) for j in range(steps)] + [1.0]
        for j in range(steps):
            want = (alphas[j + 1] - alphas[j]) / (1 - alphas[0])
            assert abs(share[j] - want) < 4.5 * math.sqrt(want * (1 - want) / 20_000)


def test_confidences_are_kept_from_the_step_that_filled_a_position():
    table, seen = Table(torch.randn(4, 6, 6), mask_id=5), []

    class Remembering(LeftToRight):
        score = "confidence"

        def choose(self, state, scores=None):
            seen.append(state.confidence[0].tolist())
            return super().choose(state)

    generate(table, [5] * 4, steps=4, policy=Remembering())
    best = table.table[torch.arange(4), 5, :5].softmax(-1).max(-1).values.tolist()
    for step, held in enumerate(seen):
        assert held[:step] == pytest.approx(best[:step])


def test_the_loop_of_remdm_includes_its_beginning_and_not_its_end():
    """At eta = 1 and alpha_on = 1/2 a step inside hides all that is filled and shows all that is masked."""
    after = []
    generate(
        Coarse(),
        [MASK] * 40,
        steps=4,  # t = 1, 3/4, 1/2, 1/4
        policy=ReMDM("loop", 1.0, t_on=0.75, t_off=0.5, alpha_on=0.5),
        on_step=lambda step, tokens, revealed: after.append(tokens[0] == MASK),
    )
    assert 0 < int(after[0].sum()) < 40 and torch.equal(after[1], ~after[0])
    assert (after[2] <= after[1]).all()  # nothing is hidden again at t_off


# Names, arguments, policies of one's own


def test_peers_names():
    model = Coarse()
    same = (
        ("confidence", "low_confidence", "maskgit_plus"),
        ("ancestral", "ancestral_cache", "ddpm_cache", "origin"),
        ("margin", "topk_margin"),
    )
    for names in same:
        runs = [generate(model, [MASK] * 9, steps=3, policy=name) for name in names]
        assert all(torch.equal(r.tokens, runs[0].tokens) for r in runs)
    alone = {"first_hitting", "random", "left_to_right", "entropy", "threshold", "factor", "eb", "remdm", "p2"}
    assert set(POLICIES) == {name for names in same for name in names} | alone
    assert {type(p) for p in EVERY.values()} == set(POLICIES.values())


def test_build():
    assert build("threshold") == Threshold(0.9) and build("threshold:0.8") == Threshold(0.8)
    assert build("remdm:loop,eta=0.05") == ReMDM("loop", 0.05) and build("remdm:rescale,0.1") == ReMDM("rescale", 0.1)
    own = Confidence()
    assert build(own) is own
    for given, words in (
        ("confidense", "unknown policy 'confidense'; did you mean 'confidence'"),
        ("threshold:x", "tau of policy 'threshold' is 'x'; it must be a number"),
        ("threshold:nan", "tau is nan; it must be a number of at least 0"),
        ("threshold:0.8,0.9", "policy 'threshold' has no argument '0.9'; it takes tau"),
        ("eb:tau=0.1", "policy 'eb' has no argument 'tau'; it takes gamma"),
        ("confidence:3", "policy 'confidence' has no argument '3'; it takes none"),
        ("remdm:capp", "strategy is 'capp'; did you mean 'cap'"),
        (Threshold, "it must be a name or an object of a class derived from Policy"),
        (None.__class__(), "it must be a name or an object"),
    ):
        with pytest.raises(InputError, match=words):
            build(given)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Threshold(-1), "tau is -1; it must be a number of at least 0"),
        (lambda: Factor(math.inf), "factor is inf"),
        (lambda: EntropyBound("a"), "gamma is 'a'"),
        (lambda: P2(-0.5), "eta is -0.5; it must be a number of at least 0"),
        (lambda: P2("a"), "eta is 'a'; it must be a number"),
        (lambda: ReMDM("cap", "a"), "eta is 'a'; it must be a number"),
        (lambda: ReMDM("loop", t_on=None), "t_on is None; it must be a number"),
        (lambda: ReMDM("cap", 1.5), r"eta is 1.5; the remasking rate must be in \[0, 1\]"),
        (lambda: ReMDM("loop", t_on=0.2, t_off=0.3), "must satisfy 0 < t_off < t_on < 1"),
        (lambda: ReMDM("loop", alpha_on=1.0), "0 < alpha_on < 1"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(InputError, match=words):
        make()


class Rightmost(Policy):
    """A policy of one's own: the rightmost masked position of each sequence."""

    def choose(self, state, scores):
        assert scores is None
        after = state.masked.flip(-1).cumsum(-1).flip(-1)
        return Move(state.masked & (after == 1))


def test_a_policy_of_ones_own():
    out = generate(Coarse(), [[1, MASK, MASK], [MASK, 2, MASK]], steps=2, policy=Rightmost())
    assert out.revealed_at.tolist() == [[-1, 1, 0], [1, -1, 0]] and out.head_rows == 4


def test_what_policies_declare():
    """Those that choose without looking, and no others, run the head on revealed rows alone."""
    model = Coarse()
    for name, policy in EVERY.items():
        assert (policy.looks == "nothing") == (name in BLIND)
        assert policy.remasks == (name in REMASKING)
        out = generate(model, [MASK] * 8, steps=4, policy=policy, temperature=0.0)
        if name in BLIND and name in REVEALING:
            assert out.head_rows == 8
        elif name in FIXED:
            assert out.head_rows == 8 + 6 + 4 + 2
    assert Ancestral().temperature == 1.0 and Confidence().temperature == 0.0


def test_an_end_behind_a_mask_that_a_policy_left_cuts_nothing():
    logits = torch.zeros(4, 6, 6)
    logits[..., 3] = 5.0

    class Second(LeftToRight):
        def choose(self, state, scores=None):
            return Move(state.masked & (torch.arange(4) == 1))

    out = generate(Table(logits, mask_id=5), [5] * 4, steps=2, policy=Second(), eos_id=3)
    assert out.tokens.tolist() == [[5, 3, 5, 5]] and out.lengths.tolist() == [4]

"""generate: what it promises whatever the policy. Policies are in test_policies.py, tokens in test_filters.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopmdm.diffusion import Linear, nelbo
from loopmdm.errors import InputError
from loopmdm.model.denoiser import Denoiser
from loopmdm.model.depth import RelativeChange
from loopmdm.model.flops import forward_flops
from loopmdm.sampling.depth import DepthTable
from loopmdm.sampling.engine import Generation, generate
from loopmdm.sampling.policies import Threshold
from loopmdm.sampling.state import Move, Policy

from .helpers import Table, ids, live, tiny
from .samplers import EVERY, REMASKING, REVEALING, Coarse

MASK = 10


@pytest.fixture(scope="module")
def model():
    """float64, so that a token cannot hang on how a batch was padded. Learned positions beside RoPE: under RoPE alone
    every position of an all-mask sequence looks the same, and rounding would decide between equal confidences."""
    return live(tiny("llama", boundary="anchored", positions="both"), dtype=torch.float64, head_scale=3.0)


def same(batch, i, one, pad):
    """Row i of a batch is the result of a single run, and padding behind it."""
    n = int(one.lengths[0])
    assert int(batch.lengths[i]) == n and batch.sequences()[i] == one.sequences()[0]
    assert torch.equal(batch.revealed_at[i, :n], one.revealed_at[0, :n])
    assert (batch.tokens[i, n:] == pad).all() and (batch.revealed_at[i, n:] == -1).all()


# Batches and seeds

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [], [2, MASK, 3, MASK], [9, 9, 9]]
EVERYTHING = {
    "steps": 7, "block_length": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "suppress": [1], "cfg_scale": 1.5,
    "eos_id": (4, 7), "early_exit": RelativeChange(0.5),
}  # fmt: skip


@pytest.mark.parametrize("variant", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("name", EVERY)
def test_a_sequence_does_not_depend_on_its_batch(model, name, variant):
    options = {"max_new_tokens": 6, "steps": 4, "policy": EVERY[name], "num_loops": 3} | variant
    batch = generate(model, PROMPTS, seed=20, **options)
    for i, prompt in enumerate(PROMPTS):
        same(batch, i, generate(model, [prompt], seed=20 + i, **options), model.pad_id)
    if not variant:
        assert batch.lengths.tolist() == [len(p) + 6 for p in PROMPTS]
        order = [3, 0, 4, 1, 2]
        mixed = generate(model, [PROMPTS[i] for i in order], row_seeds=[20 + i for i in order], **options)
        assert mixed.sequences() == [batch.sequences()[i] for i in order]


@pytest.mark.parametrize("name", [n for n, p in EVERY.items() if p.adaptive])
@pytest.mark.parametrize("block_length", [None, 2])
def test_nor_without_steps(model, name, block_length):
    options = {"max_new_tokens": 5, "policy": EVERY[name], "num_loops": 2, "block_length": block_length}
    batch = generate(model, PROMPTS, seed=20, **options)
    for i, prompt in enumerate(PROMPTS):
        same(batch, i, generate(model, [prompt], seed=20 + i, **options), model.pad_id)


@pytest.mark.parametrize("name", ["confidence", "ancestral", "random", "first_hitting", "conf", "p2"])
def test_seeds(model, name):
    def run(**changes):
        given = {"max_new_tokens": 12, "steps": 4, "policy": EVERY[name], "temperature": 1.0, "batch_size": 3}
        return generate(model, **given, **changes).tokens

    base = run(seed=5)
    torch.manual_seed(123)
    assert torch.equal(base, run(seed=5))
    assert torch.equal(base[1:], run(seed=6)[:2])
    assert torch.equal(base, run(row_seeds=[5, 6, 7]))
    assert (run(seed=100) != base).any(-1).all()
    assert len({tuple(r) for r in base.tolist()}) == 3


def test_the_largest_seed(model):
    assert generate(model, max_new_tokens=3, policy="ancestral", seed=2**64 - 1).tokens.shape == (1, 3)


# Prompts


@pytest.mark.parametrize("name", EVERY)
def test_prompts_stay_and_masks_go(model, name):
    prompt = ids(4, 8, masks=0.4).tolist()
    out = generate(model, prompt, max_new_tokens=3, steps=3, num_loops=2, policy=EVERY[name], temperature=1.0)
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
    array = tensor.numpy()
    for same_ in (array, list(array), [list(row) for row in array], [row.clone() for row in tensor]):
        assert torch.equal(want, generate(model, same_, steps=2).tokens)
    assert torch.equal(want[:1], generate(model, array[0], steps=2).tokens)
    assert torch.equal(want[:1], generate(model, list(array[0]), steps=2).tokens)
    free = generate(model, None, max_new_tokens=4, batch_size=2, steps=2)
    assert free.tokens.shape == (2, 4) and free.tokens.dtype == torch.int64


def test_numpy_s_numbers(model):
    """Every whole number and list of them may be NumPy's."""
    given_ = {
        "prompt": [[1, 2], [3, 4]], "max_new_tokens": 6, "steps": 4, "num_loops": 2, "top_k": 5, "block_length": 3,
        "eos_id": 4, "suppress": [5], "row_seeds": [3, 2**64 - 1], "policy": "ancestral",
    }  # fmt: skip

    def numpy_s(value):
        if isinstance(value, list):
            return (
                np.array(value, dtype=np.uint64 if max(value) > 9 else None)
                if type(value[0]) is int
                else np.array(value)
            )
        return np.int64(value) if isinstance(value, int) else value

    want = generate(model, **given_).tokens
    assert torch.equal(want, generate(model, **{name: numpy_s(value) for name, value in given_.items()}).tokens)
    one = generate(model, max_new_tokens=4, policy="ancestral", seed=3).tokens
    assert torch.equal(one, generate(model, max_new_tokens=4, policy="ancestral", seed=np.int64(3)).tokens)
    tokens = ids(2, 5, masks=0)
    passes = [model.hidden(tokens, num_loops=n) for n in (2, np.int64(2))]
    losses = [nelbo(model, tokens, num_loops=n, seed=n, step=n, global_batch=n).loss for n in (2, np.int64(2))]
    assert torch.equal(*passes) and torch.equal(*losses)


def test_padding_is_marked_for_the_denoiser():
    table = Table(torch.randn(5, 6, 6), mask_id=5)
    generate(table, [[1, 2, 3], [1]], max_new_tokens=2, steps=1)
    ids_, padding, _, _ = table.calls[0]
    assert padding.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert ids_[1].tolist() == [1, 5, 5, 0, 0]  # masks right after the prompt, then the pad id
    padded_with_masks = live(tiny(pad_token_id=MASK))
    out = generate(padded_with_masks, [[1, 2, 3], [1]], max_new_tokens=2, steps=2)
    assert out.generated == 4 and (out.tokens[1, 3:] == MASK).all() and out.revealed_at[1, 3:].tolist() == [-1, -1]


def test_the_mask_never_wins():
    """LLaDA's sampler can choose the mask id, and then leaves masks in its output."""
    logits = torch.zeros(6, 4, 4)
    logits[..., 3] = 50.0
    table = Table(logits, mask_id=3)
    table.suppressed_ids = ()  # a model that forgets
    for policy in ("confidence", "ancestral", "p2"):
        assert 3 not in generate(table, [3] * 6, steps=3, policy=policy, temperature=1.0).tokens


# What it costs


def test_finished_sequences_leave_the_batch():
    """Rows that need nothing more do not reach the model, nor does the padding that they alone would need."""
    model = Coarse()
    generate(model, [[1] * 9 + [7], [7] * 6], steps=6, policy="left_to_right")
    assert [tuple(ids_.shape) for ids_, *_ in model.calls] == [(2, 10), (1, 6), (1, 6), (1, 6), (1, 6), (1, 6)]
    assert [padding is None for _, padding, *_ in model.calls] == [False] + [True] * 5


@pytest.mark.parametrize("name", ["ancestral", "random", "cap"])
def test_reveal_first_passes_hold_only_sequences_that_reveal(name):
    model, revealed = Coarse(), []
    out = generate(
        model, [[7] * 5, [7] * 4, [7] * 3, [7] * 2, [7]], steps=9, policy=EVERY[name], seed=3,
        on_step=lambda step, tokens, r: revealed.append(r.clone()),
    )  # fmt: skip
    entered = [len(ids_) for ids_, *_ in model.calls]
    assert entered == [int(r.any(-1).sum()) for r in revealed if r.any()]
    assert out.nfe == len(entered) and out.head_rows == sum(int(r.sum()) for r in revealed)
    widths = [ids_.shape[1] for ids_, *_ in model.calls]
    assert out.flops == sum(100.0 * n * w for n, w in zip(entered, widths, strict=True)) and min(entered) < 5
    assert (out.loops > 0).sum(-1).tolist() == entered


def test_empty_ancestral_steps_are_free():
    table = Table(torch.zeros(4, 4, 4), mask_id=3)
    out = generate(table, [3, 3], steps=200, policy="ancestral", seed=4)
    used = set(out.revealed_at.flatten().tolist())
    assert out.nfe == len(table.calls) == len(used) == len(out.loops_per_step) <= 2


@pytest.mark.parametrize("guided", [0, 1])
def test_counts(model, guided):
    """nfe, FLOPs, tokens: forward_flops(T) of each sequence in a pass, at the padded length; twice with guidance."""
    out = generate(model, [[1, 2, 3, 4], [1]], max_new_tokens=5, steps=3, num_loops=2, cfg_scale=float(guided))
    assert out.nfe == 3 and out.flops == 3 * 2 * forward_flops(model.config, 9, 2) * (1 + guided) > 0
    assert out.head_rows == 2 * (5 + 3 + 1)  # one head, guidance or not
    assert out.generated == 10 and out.seconds > 0
    assert out.tokens_per_second == pytest.approx(10 / out.seconds)
    assert Generation(out.tokens, out.lengths, out.revealed_at).tokens_per_second == 0


# Loops


def test_loops(model):
    default = generate(model, [MASK] * 8, steps=4)
    assert default.loops_per_step == [3] * 4  # the model's max_loops
    assert default.loops.tolist() == [[3]] * 4
    assert torch.equal(default.tokens, generate(model, [MASK] * 8, steps=4, num_loops=3).tokens)
    table = Table(torch.randn(8, 6, 6), mask_id=5)
    generate(table, [5] * 8, steps=2, num_loops=7)
    assert [loops for _, _, loops, _ in table.calls] == [7, 7]


@pytest.mark.parametrize("takes_depth", [True, False])
def test_loops_by_the_share_still_masked(model, takes_depth, monkeypatch):
    """A callable gets the share of each sequence's tokens that are masked and says each one's S; the passes make so
    many, FLOPs and the trace count them, and the tokens are those of every sequence by itself."""
    monkeypatch.setattr(type(model), "takes_depth", takes_depth, raising=False)
    asked, table = [], DepthTable((0, 0.3, 0.6, 1), (1, 2, 4))

    def depth(t):
        asked.append(t.tolist())
        return table(t)

    prompts = [[], [1, 2, 3, 4, 5, 6], [7]]
    options = {"max_new_tokens": 4, "steps": 4, "policy": "confidence"}
    batch = generate(model, prompts, num_loops=depth, **options)
    masks = [4, 3, 2, 1]
    assert asked == [[m / 4, m / 10, m / 5] for m in masks]
    want = [table(torch.tensor(t, dtype=torch.float64)).tolist() for t in asked]
    assert batch.loops.tolist() == want and {1, 2, 4} == {s for row in want for s in row}
    assert batch.loops_per_step == [sum(row) / 3 for row in want]
    assert batch.flops == pytest.approx(sum(forward_flops(model.config, 10, s) for row in want for s in row))
    for i, prompt in enumerate(prompts):
        same(batch, i, generate(model, [prompt], num_loops=table, **options), model.pad_id)
    one = generate(model, prompts, num_loops=DepthTable.constant(2), **options)
    assert torch.equal(one.tokens, generate(model, prompts, num_loops=2, **options).tokens)


def test_what_a_depth_callable_may_not_return(model):
    for wrong in (lambda t: 2, lambda t: t, lambda t: torch.tensor([2, 2]), lambda t: [2]):
        with pytest.raises(InputError, match=r"it must return int64 \[1\], an S for each sequence"):
            generate(model, max_new_tokens=2, num_loops=wrong)
    for S in (torch.tensor([0]), torch.tensor([-3])):
        with pytest.raises(InputError, match="at least once"):
            generate(model, max_new_tokens=2, num_loops=lambda t, S=S: S)


def test_early_exit(model):
    """Each sequence stops by itself, the trace says where, FLOPs follow; tau = 0 is the full depth."""
    prompts = [[1, 2, 3, 4], [5], [], [9, 8, 7, 6, 5]]
    options = {"max_new_tokens": 5, "steps": 3, "num_loops": 12}
    full = generate(model, prompts, **options)
    never = generate(model, prompts, early_exit=RelativeChange(0.0), **options)
    assert torch.equal(full.tokens, never.tokens) and full.flops == never.flops and full.loops.equal(never.loops)
    rule = RelativeChange(0.3)
    out = generate(model, prompts, early_exit=rule, **options)
    assert len(out.loops.unique()) > 1 and out.loops.min() >= 2 and out.flops < full.flops
    assert out.loops_per_step == out.loops.double().mean(-1).tolist()
    assert out.flops == pytest.approx(sum(forward_flops(model.config, 10, s) for s in out.loops.flatten().tolist()))
    for i, prompt in enumerate(prompts):
        one = generate(model, [prompt], early_exit=rule, **options)
        same(out, i, one, model.pad_id)
        assert one.loops[:, 0].tolist() == out.loops[:, i].tolist()
    guided = generate(model, prompts, early_exit=rule, cfg_scale=1.0, **options)
    assert guided.flops > out.flops and guided.loops.shape == (3, 4)
    with pytest.raises(InputError, match="early_exit needs a model that takes a Depth"):
        generate(Coarse(), [7], early_exit=rule)


# Guidance


class Guided:
    """Classifier-free guidance on logits, written plainly, as a Denoiser whose head is the identity."""

    pad_id, max_length, logit_shift = 0, None, 0

    def __init__(self, model, scale, given):
        self.model, self.scale, self.given = model, scale, given
        self.vocab_size, self.mask_id, self.max_loops = model.vocab_size, model.mask_id, model.max_loops
        self.suppressed_ids = model.suppressed_ids

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        def logits(x):
            weight, bias = self.model.head()
            hidden = self.model.hidden(x, attention_mask, num_loops)
            return hidden @ weight.T + (0 if bias is None else bias)

        blind = torch.where(self.given, self.mask_id, input_ids)
        conditional, unconditional = logits(input_ids), logits(blind)
        return unconditional + (self.scale + 1) * (conditional - unconditional)

    def head(self):
        return torch.eye(self.vocab_size, dtype=torch.float64), None

    def forward_flops(self, length, num_loops):
        return 0.0


class Keeper(Policy):
    """Confidence, keeping what it saw."""

    looks, score = "masked", "confidence"

    def __init__(self):
        self.seen = []

    def choose(self, state, scores):
        self.seen.append(scores[state.masked])
        return Move(state.masked & (state.masked.cumsum(-1) <= state.even_share[:, None]))


@pytest.mark.parametrize("backbone", ["llama", "dit"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_of_hidden_states_is_guidance_of_logits(backbone, scale):
    """In float64, biases and padding included: the same confidences and the same tokens."""
    model = live(tiny(backbone, positions="both"), dtype=torch.float64, head_scale=3.0)
    start = torch.tensor([[1, 2, MASK, 3, MASK, MASK, MASK], [4, MASK, MASK, MASK, 5, 6, MASK]])
    hidden, logits = Keeper(), Keeper()
    for temperature in (0.0, 1.0):
        a = generate(model, start, steps=3, policy=hidden, cfg_scale=scale, temperature=temperature)
        given_ = start != MASK
        b = generate(Guided(model, scale, given_), start, steps=3, policy=logits, temperature=temperature)
        assert torch.equal(a.tokens, b.tokens)
    for x, y in zip(hidden.seen, logits.seen, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)
    plain = Keeper()
    generate(model, start, steps=3, policy=plain)
    assert (plain.seen[0] - hidden.seen[0]).abs().max() > 1e-3


def test_what_guidance_masks():
    """One pass of 2B sequences: the second half sees the given tokens masked and the generated ones as they are.
    (LLaDA's own fails with padding.)"""
    model = Coarse()
    generate(model, [[1, 7, 2], [3]], max_new_tokens=1, steps=2, cfg_scale=1.0, policy="left_to_right")
    (first, padding, _, sigma), (second, *_) = model.calls
    assert first.tolist() == [[1, 7, 2, 7], [3, 7, 0, 0], [7, 7, 7, 7], [7, 7, 0, 0]]
    assert padding.tolist() == [[True] * 4, [True, True, False, False]] * 2 and sigma.shape == (4,)
    shown = second[0, 1].item()
    assert shown != 7 and second.tolist() == [[1, shown, 2, 7], [7, shown, 7, 7]]
    unguided = Coarse()
    a = generate(unguided, [[1, 7, 2], [3]], max_new_tokens=1, cfg_scale=0.0)
    b = generate(unguided, [[1, 7, 2], [3]], max_new_tokens=1)
    assert torch.equal(a.tokens, b.tokens) and all(len(ids_) <= 2 for ids_, *_ in unguided.calls)


# Blocks


def test_blocks():
    """Generated positions in order, so many a block; the steps shared out evenly, for each sequence by itself."""
    model = Coarse()
    out = generate(model, [[7, 1, 7, 7], [2]], max_new_tokens=4, block_length=3, steps=7)
    # 7 positions in 3 blocks: 3, 2 and 2 steps; 4 positions in 2 blocks: 4 and 3 steps
    first = out.revealed_at[0]
    assert sorted(first[[0, 2, 3]].tolist()) == [0, 1, 2]
    assert sorted(first[4:7].tolist()) == [3, 3, 4] and first[7] == 5
    second = out.revealed_at[1]
    assert sorted(second[1:4].tolist()) == [0, 1, 2] and second[4] == 4
    whole = generate(model, [[7, 1, 7, 7], [2]], max_new_tokens=4, steps=7)
    assert torch.equal(
        whole.tokens, generate(model, [[7, 1, 7, 7], [2]], max_new_tokens=4, steps=7, block_length=7).tokens
    )
    with pytest.raises(InputError, match="steps is 2, but there are 3 blocks; each needs at least one step"):
        generate(model, [7] * 7, block_length=3, steps=2)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [4, 11, None])
def test_blocks_in_order(name, steps):
    """No position of a block is filled before the block before it is full, whatever the policy."""
    if steps is None and not EVERY[name].adaptive:
        steps = 30
    out = generate(Coarse(), [[7] * 8] * 5, policy=EVERY[name], steps=steps, block_length=2, temperature=1.0)
    when = out.revealed_at.view(5, 4, 2)
    assert (when[:, 1:].min(-1).values > when[:, :-1].max(-1).values).all()


def test_more_blocks_than_the_usual_steps():
    """A step a block where no steps are given."""
    model = Coarse()
    out = generate(model, [[7] * 70, [7] * 3], block_length=1)
    assert out.nfe == 70 and out.revealed_at[0].tolist() == list(range(70))
    assert generate(model, [7] * 70, block_length=2).nfe == 64


def test_blocks_without_steps_follow_one_another_at_once():
    out = generate(Coarse(), [7] * 6, policy=Threshold(0.0), block_length=2)
    assert out.revealed_at.tolist() == [[0, 0, 1, 1, 2, 2]]


# Ends


def test_eos():
    """A sequence is over once an EOS is there and all before it is filled; what is behind is cut off."""
    logits = torch.full((8, 6, 6), -5.0)
    for i, token in enumerate([1, 2, 4, 1, 2, 4, 1, 1]):
        logits[i, :, token] = 5.0 - i  # left positions first; 4 ends
    table = Table(logits, mask_id=5)
    out = generate(table, [5] * 8, steps=8, eos_id=4)
    assert out.sequences() == [[1, 2, 4]] and out.nfe == 3 and out.generated == 3
    assert out.tokens.tolist() == [[1, 2, 4, 0, 0, 0, 0, 0]] and out.lengths.tolist() == [3]
    assert out.revealed_at.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]]
    assert generate(table, [5] * 8, steps=8, eos_id=3).lengths.tolist() == [8]  # not there: nothing is hard-coded
    assert generate(table, [5] * 8, steps=8).lengths.tolist() == [8]
    assert generate(table, [5] * 8, steps=8, eos_id=[3, 2]).sequences() == [[1, 2]]
    # right positions first: an EOS waits for what is before it
    late = Table(logits.clone(), mask_id=5)
    late.table = late.table + torch.arange(8.0)[:, None, None] * 2 * (late.table > -5)
    out = generate(late, [5] * 8, steps=8, eos_id=4)
    assert out.nfe == 8 and out.sequences() == [[1, 2, 4]]


def test_eos_in_a_prompt_or_before_given_tokens_does_not_count():
    logits = torch.full((8, 6, 6), -5.0)
    logits[..., 4] = 5.0
    table = Table(logits, mask_id=5)
    out = generate(table, [[4, 4, 5, 3, 5, 5], [1, 5, 5, 5, 5, 5]], steps=5, eos_id=4, policy="left_to_right")
    assert out.sequences() == [[4, 4, 4, 3, 4], [1, 4]]
    assert out.generated == 3


def test_sequences_that_are_over_leave_the_batch():
    logits = torch.zeros(6, 6, 6)
    logits[0, :, 4] = logits[1:, :, 1] = 9.0
    table = Table(logits, mask_id=5)
    out = generate(table, [[5] * 6, [2] + [5] * 5], steps=6, eos_id=4, policy="left_to_right")
    assert out.sequences() == [[4], [2, 1, 1, 1, 1, 1]]
    assert [len(ids_) for ids_, *_ in table.calls] == [2, 1, 1, 1, 1] and out.loops[:, 0].tolist() == [1, 0, 0, 0, 0]


# The rest


@pytest.mark.parametrize("name", EVERY)
def test_on_step(model, name):
    """After each step that ran or remasked: its number, the tokens so far and what it revealed."""
    calls = []
    out = generate(
        model,
        [1, *[MASK] * 7],
        steps=5,
        num_loops=1,
        policy=EVERY[name],
        on_step=lambda *call: calls.append(call),  # kept as they are: later steps do not write into them
    )
    before = torch.tensor([[1, *[MASK] * 7]])
    for _, tokens, revealed in calls:
        assert torch.equal(revealed, (before == MASK) & (tokens != MASK))
        before = tokens
    assert torch.equal(before, out.tokens)
    numbers = [c[0] for c in calls]
    assert numbers == sorted(set(numbers))
    last = torch.stack([torch.where(r, s, -1) for s, _, r in calls]).max(0).values
    assert torch.equal(last, out.revealed_at)
    if name in REVEALING:
        assert len(calls) == out.nfe
    else:
        assert len(calls) >= out.nfe and name in REMASKING


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    noisy = live(tiny("llama", dropout=0.5))
    want = generate(noisy, [MASK] * 6, steps=2).tokens
    noisy.train(training)
    assert torch.equal(generate(noisy, [MASK] * 6, steps=2).tokens, want)  # no dropout meanwhile
    assert noisy.training == training
    noisy.prelude.train(not training)  # a part may be frozen by itself
    with pytest.raises(ZeroDivisionError):
        generate(noisy, [MASK] * 6, steps=2, on_step=lambda *_: 1 / 0)
    assert noisy.prelude.training != training
    assert noisy.training == training
    assert all(p.grad is None for p in noisy.parameters())


def test_temperature_defaults(model):
    """Those that follow the reverse process sample, the others take the arg-max; all can be told otherwise."""
    for name, policy in EVERY.items():
        default = 1.0 if name in ("ancestral", "first_hitting", *REMASKING) else 0.0
        assert policy.temperature == default
    for policy, default in (("confidence", 0.0), ("ancestral", 1.0)):
        runs = {t: generate(model, [MASK] * 10, steps=3, policy=policy, temperature=t).tokens for t in (None, 0.0, 1.0)}
        assert torch.equal(runs[None], runs[default]) and not torch.equal(runs[0.0], runs[1.0])


@pytest.mark.parametrize("shift", [0, 1])
def test_any_denoiser(shift):
    """Ten lines of somebody's model; with a shift of 1 the token at i is read at i - 1 (position 0 at itself)."""
    table = Table(torch.randn(9, 6, 6), mask_id=5, logit_shift=shift, suppressed=(0,), max_length=9)
    assert isinstance(table, Denoiser)
    start = [5, 2, 5, 5, 5, 1, 5, 5, 5]
    out = generate(table, start, steps=1)
    for i, token in enumerate(start):
        seen = max(0, i - shift)
        row = table.table[seen, start[seen]].clone()
        row[[0, 5]] = -torch.inf
        assert out.tokens[0, i] == (int(row.argmax()) if token == 5 else token)
    assert out.flops == 900.0
    _, padding, loops, sigma = table.calls[0]
    assert padding is None and loops == 1
    torch.testing.assert_close(sigma, -torch.log(1 - 0.999 * torch.tensor([1.0])))


def test_time_conditioned_models_are_told_the_time():
    """Otherwise LoopMDM would refuse to run."""
    model = live(tiny("dit", time_conditioning=True))
    for policy in ("ancestral", "first_hitting", "threshold"):
        assert MASK not in generate(model, max_new_tokens=5, batch_size=2, policy=policy, cfg_scale=1.0).tokens
    with pytest.raises(InputError, match="sigma is not finite"):
        generate(model, max_new_tokens=5, schedule=Linear(0.0))


def test_each_sequence_is_told_its_own_time():
    """Also where guidance doubles the batch, or sequences of one S each make a pass of their own."""
    prompts = [[7] * 6, [1, 2, 7, 7, 7, 7], [3, 7, 7, 7, 7, 7]]
    options = {"policy": "first_hitting", "num_loops": DepthTable((0, 0.5, 0.7, 1), (1, 2, 3))}

    def told(prompts, seeds):
        model = Coarse()
        generate(model, prompts, row_seeds=seeds, **options)
        return {tuple(row): s for ids_, *_, sigma in model.calls for row, s in zip(ids_.tolist(), sigma, strict=True)}

    together = told(prompts, [4, 5, 6])
    alone = {row: s for i in range(3) for row, s in told([prompts[i]], [4 + i]).items()}
    assert len(alone) == 15 and together == alone
    guided = Coarse()
    generate(guided, prompts, cfg_scale=1.5, policy="first_hitting")
    for *_, sigma in guided.calls:
        conditional, blind = sigma.chunk(2)
        assert torch.equal(conditional, blind) and len(conditional.unique()) == len(conditional)


# Inputs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": [[1], 3], "max_new_tokens": 1}, "mixes ids and sequences"),
        ({"max_new_tokens": 3, "steps": 2.5}, "steps is 2.5; it must be a whole number of at least 1"),
        ({"max_new_tokens": 3, "steps": 0}, "steps is 0; it must be a whole number"),
        ({"max_new_tokens": 3, "num_loops": 0}, "num_loops is 0; .*at least once"),
        ({"max_new_tokens": 3, "temperature": -0.1}, "temperature is -0.1; it must be a number of at least 0"),
        ({"max_new_tokens": 3, "top_k": 0}, "top_k is 0"),
        ({"max_new_tokens": 3, "top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": 3, "policy": "greedy"}, "unknown policy 'greedy'"),
        ({"max_new_tokens": 3, "schedule": "linea"}, "no schedule 'linea'; did you mean 'linear'"),
        ({"max_new_tokens": 3, "block_length": 0}, "block_length is 0; it must be a whole number of at least 1"),
        ({"max_new_tokens": 3, "block_length": 1.5}, "block_length is 1.5"),
        ({"max_new_tokens": 3, "cfg_scale": -1.0}, "cfg_scale is -1.0; it must be a number of at least 0"),
        ({"max_new_tokens": 3, "cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"max_new_tokens": 3, "eos_id": 11}, r"eos_id holds 11; ids must be whole numbers in 0\.\.10"),
        ({"max_new_tokens": 3, "eos_id": [1, -1]}, "eos_id holds -1"),
        ({"max_new_tokens": 3, "batch_size": 2, "row_seeds": [1]}, "1 row seeds were given for 2 sequences"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 3, "batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"max_new_tokens": 3, "batch_size": 2.5}, "batch_size is 2.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'; it must be a whole number of at least 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"prompt": torch.zeros(0, 3).long(), "max_new_tokens": 3}, "the batch is empty"),
        ({"prompt": 5, "max_new_tokens": 3}, "prompt is 5; it must be a list"),
        ({"max_new_tokens": 3, "eos_id": MASK}, "eos_id is 10, the mask; it must be an id that the model can predict"),
        ({"max_new_tokens": 3, "eos_id": [1, MASK]}, "eos_id is 10, the mask"),
        ({"max_new_tokens": 3, "eos_id": 2.5}, "eos_id is 2.5; it must be a list"),
        ({"max_new_tokens": 3, "suppress": 5}, "suppress is 5; it must be a list"),
        ({"max_new_tokens": 3, "suppress": [11]}, r"suppress holds 11; ids must be whole numbers in 0\.\.10"),
        ({"max_new_tokens": 3, "row_seeds": 5}, "row_seeds is 5; it must be a list"),
        ({"max_new_tokens": 3, "row_seeds": ["a"]}, "seed is 'a'; it must be a whole number"),
        ({"max_new_tokens": 3, "seed": None}, "seed is None; it must be a whole number"),
        ({"max_new_tokens": 3, "seed": "x"}, "seed is 'x'"),
        ({"max_new_tokens": 3, "compat": 3}, "compat is 3"),
        ({"max_new_tokens": 0}, "nothing to generate: no mask id in the prompt"),
        ({"prompt": [1, 2, 3]}, "nothing to generate"),
        ({"prompt": [1] * 60, "max_new_tokens": 5}, "60 tokens with 5 new ones is longer than the model's 64"),
        ({"prompt": [[1], [2] * 65], "max_new_tokens": 1}, "prompt of 65 tokens with 1 new"),
        ({"prompt": [1, 11], "max_new_tokens": 1}, r"the prompt holds 11; ids must be whole numbers in 0\.\.10"),
        ({"prompt": [-1], "max_new_tokens": 1}, "the prompt holds -1"),
        ({"prompt": [1.5], "max_new_tokens": 1}, "the prompt holds 1.5"),
        ({"prompt": ["a"], "max_new_tokens": 1}, "the prompt holds 'a'"),
        ({"prompt": torch.tensor([[[1]]]), "max_new_tokens": 1}, r"prompt is \[1, 1, 1\]; expected ids \[T\] or"),
        ({"prompt": torch.tensor(3), "max_new_tokens": 1}, r"prompt is \[\]; expected"),
        ({"max_new_tokens": 3, "seed": 2**64}, "seed is 18446744073709551616; it must be a whole number"),
        ({"max_new_tokens": 3, "compat": "lada"}, "compat is 'lada'"),
        ({"max_new_tokens": 3, "compat": "llada", "eos_id": 3}, "compat='llada' has no eos_id"),
        ({"max_new_tokens": 3, "compat": "llada", "suppress": [3]}, "compat='llada' has no suppress"),
        ({"max_new_tokens": 3, "compat": "llada", "schedule": "cosine"}, "compat='llada' has no schedule"),
    ],
)
def test_refusals(model, arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        generate(model, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["confidence", "random", "eb", "p2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers(policy, temperature, broken):
    """A diverged model is told as one, not by tokens that mean nothing or an index out of range."""
    logits = torch.zeros(6, 6, 6)
    logits[..., 2] = broken
    with pytest.raises(InputError, match="the model's logits are not finite"):
        generate(Table(logits, mask_id=5), max_new_tokens=6, steps=3, policy=policy, temperature=temperature)


def test_compat_is_another_sampler(model):
    """Dispatched with its options; the tests of what it does are test_compat*.py."""
    out = generate(model, [1, 2], max_new_tokens=6, steps=3, compat="llada", block_length=6, seed=3)
    assert out.nfe == 3 and out.tokens[0, :2].tolist() == [1, 2]
    assert out.head_rows == 3 * 8  # the peer's: every position


@settings(max_examples=40)
@given(data=st.data())
def test_any_arguments(model, data):
    """Whatever is asked for: no mask left, prompts unchanged, never a suppressed id, counts that add up, and the same
    again from the same seeds."""
    token = st.integers(0, 10)
    prompts = data.draw(st.lists(st.lists(token, max_size=6), min_size=1, max_size=3))
    new = data.draw(st.integers(0 if any(MASK in p for p in prompts) else 1, 5))
    policy = data.draw(st.sampled_from(sorted(EVERY)))
    block_length = data.draw(st.none() | st.integers(1, 12))
    fewest = 1 if block_length is None else 12
    suppressed = data.draw(st.sets(st.integers(0, 9), max_size=4))
    eos = data.draw(st.none() | st.integers(0, 9))
    options = {
        "max_new_tokens": new,
        "steps": data.draw(st.none() | st.integers(fewest, 14)),
        "num_loops": data.draw(st.sampled_from([1, 2, DepthTable((0, 0.5, 1), (1, 2))])),
        "early_exit": data.draw(st.sampled_from([None, RelativeChange(0.5, min_loops=1)])),
        "policy": EVERY[policy],
        "temperature": data.draw(st.sampled_from([None, 0.0, 0.5, 3.0])),
        "top_k": data.draw(st.none() | st.integers(1, 12)),
        "top_p": data.draw(st.none() | st.floats(0.01, 1.0)),
        "suppress": sorted(suppressed),
        "block_length": block_length,
        "cfg_scale": data.draw(st.sampled_from([0.0, 1.5])),
        "eos_id": eos,
        "schedule": data.draw(st.sampled_from(["linear", "cosine"])),
    }
    seeds = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(prompts), max_size=len(prompts)))
    out = generate(model, prompts, row_seeds=seeds, **options)
    masks = 0
    for row, (prompt, got) in enumerate(zip(prompts, out.sequences(), strict=True)):
        start = [*prompt, *[MASK] * new]
        tail = max((i + 1 for i, t in enumerate(start) if t != MASK), default=0)  # where only generated tokens are
        end = next((i + 1 for i in range(tail, len(got)) if got[i] == eos), len(start))
        assert len(got) == end and (out.tokens[row, end:] == model.pad_id).all()
        for i, value in enumerate(got):
            if start[i] == MASK:
                masks += 1
                assert value not in suppressed and value != MASK and out.revealed_at[row, i] >= 0
            else:
                assert value == start[i] and out.revealed_at[row, i] == -1
        assert (out.revealed_at[row, end:] == -1).all()
    assert out.generated == masks <= out.head_rows
    assert out.nfe == len(out.loops_per_step) == len(out.loops)
    if options["steps"] is not None:
        assert out.nfe <= options["steps"] and out.revealed_at.max() < options["steps"]
    again = generate(model, prompts[::-1], row_seeds=seeds[::-1], **options)
    assert again.sequences() == out.sequences()[::-1]

"""The peers' samplers: every state against plain transcriptions (peers.py), and each stated limitation once."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from loopmdm.errors import InputError
from loopmdm.sampling import compat
from loopmdm.sampling.engine import generate

from . import peers
from .helpers import Table, live, tiny

MASK = 10
PROMPTS = {"even": [[1, 2, 3], [4, 5, 6]], "ragged": [[1, 2, 3, 4], [7, 8]], "holes": [[1, MASK, 3], [4, 5, MASK]]}


def table(seed=0, dtype=torch.float32, coarse=False, shift=0):
    logits = 2 * torch.randn(24, 11, 11, generator=torch.Generator().manual_seed(seed))
    return Table((logits.round() if coarse else logits).to(dtype), MASK, logit_shift=shift)


def network(shift=0, **changes):
    """A live model that attends, so that a state depends on all that came before."""
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "start": 0,
        "length": 1,
        "max_loops": 2,
    }
    config = tiny(positions="both", pad_token_id=0, **small, **changes)
    model = live(config, seed=3, dtype=torch.float64, head_scale=3.0)
    model.logit_shift = shift
    return model


MODELS = {
    "table": table,
    "ties": lambda shift=0: table(1, coarse=True, shift=shift),
    "bf16": lambda shift=0: table(2, torch.bfloat16, shift=shift),
    "network": network,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module", params=list(MODELS))
def shifted(request):
    return MODELS[request.param](shift=1)


def right(rows, new, model):
    """Prompts, masks, padding: what `run` takes."""
    T = max(len(r) for r in rows) + new
    tokens = [r + [model.mask_id] * new + [model.pad_id] * (T - new - len(r)) for r in rows]
    prompt_lengths = torch.tensor([len(r) for r in rows])
    return torch.tensor(tokens), prompt_lengths + new, prompt_lengths


def states(name, model, rows, new, **options):
    """(the state after each step, padded on the right; the Generation)."""
    seen = []
    result = compat.run(
        name, model, *right(rows, new, model), on_step=lambda step, x, revealed: seen.append(x), **options
    )
    assert torch.equal(seen[-1], result.tokens)
    return seen, result


def left(rows, new, model):
    """(ids padded on the left, bool real or None, first new column): what the transcriptions take."""
    start = max(len(r) for r in rows)
    ids = torch.tensor([[model.pad_id] * (start - len(r)) + r + [MASK] * new for r in rows])
    real = torch.tensor([[i >= start - len(r) for i in range(start + new)] for r in rows])
    return ids, None if bool(real.all()) else real, start


def logits_of(model):
    def call(ids, real=None, sigma=None):
        with torch.no_grad():
            logits = F.linear(model.hidden(ids, real, model.max_loops, sigma), *model.head())
        if model.logit_shift:
            logits = logits[:, [0, *range(logits.shape[1] - 1)]]
        return logits

    return call


def agree(found, expected, rows):
    """Step for step, the padding moved to the right."""
    expected = list(expected)
    assert len(found) == len(expected)
    T = expected[0].shape[1]
    pads = [max(len(r) for r in rows) - len(r) for r in rows]
    for step, (x, y) in enumerate(zip(found, expected, strict=True)):
        y = [row[n:] + row[:n] for row, n in zip(y.tolist(), pads, strict=True)]
        assert x.tolist() == y, f"step {step}"
        assert len(y[0]) == T


# Step for step


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("rule", ["low_confidence", "random"])
def test_llada(model, rows, rule):
    cuts = [(8, 8, 5), (8, 4, 6), (6, 2, 9)]
    for seed, ((temperature, cfg), (new, block, steps)) in enumerate(
        itertools.product([(0.0, 1.5), (0.7, 0.0)], cuts), start=5
    ):
        seen, _ = states(
            "llada", model, rows, new, steps=steps, block_length=block, temperature=temperature, cfg_scale=cfg,
            policy=rule, seed=seed,
        )  # fmt: skip
        ids, _, start = left(rows, new, model)
        torch.manual_seed(seed)
        options = {"steps": steps, "block": block, "temperature": temperature, "cfg": cfg, "rule": rule}
        agree(seen, peers.llada(logits_of(model), ids, start, MASK, **options), rows)


DREAM = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.2, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 3, "alg_temp": 0.5},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 4},
    {"top_k": 2, "top_p": 0.5, "alg_temp": 2.0},
]


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("rule", ["origin", "maskgit_plus", "topk_margin", "entropy"])
def test_dream(shifted, rows, rule):
    for seed, (options, (new, steps)) in enumerate(itertools.product(DREAM, [(6, 6), (7, 3)])):
        seen, _ = states("dream", shifted, rows, new, steps=steps, policy=rule, seed=seed, **options)
        ids, real, _ = left(rows, new, shifted)
        torch.manual_seed(seed)
        agree(seen, peers.dream(logits_of(shifted), ids, MASK, real, steps=steps, rule=rule, **options), rows)


@pytest.mark.parametrize("rule", ["ddpm", "ddpm_cache"])
@pytest.mark.parametrize("batch", [1, 3])
def test_mdlm(model, rule, batch):
    rows = [[], [1, 2], [3, MASK]][1:] if batch == 3 else [[]]
    for seed, steps in enumerate((1, 5, 20)):
        seen, result = states("mdlm", model, rows, 6, steps=steps, policy=rule, seed=seed)
        torch.manual_seed(seed)
        ids = left(rows, 6, model)[0]
        agree(seen, peers.mdlm(logits_of(model), ids, MASK, steps=steps, cached=rule == "ddpm_cache"), rows)
        assert not (result.tokens == MASK).any()


def test_mdlm_tells_the_time_and_keeps_no_prediction_then():
    model = live(tiny("dit", time_conditioning=True), seed=4, head_scale=3.0)
    for seed, rule in itertools.product(range(3), ("ddpm", "ddpm_cache")):
        seen, result = states("mdlm", model, [[], []], 5, steps=12, policy=rule, seed=seed)
        torch.manual_seed(seed)
        ids = left([[], []], 5, model)[0]
        cached = rule == "ddpm_cache"
        agree(seen, peers.mdlm(logits_of(model), ids, MASK, steps=12, cached=cached, conditioned=True), [[], []])
        assert result.nfe == 13


@pytest.mark.parametrize("rows", [PROMPTS["even"], PROMPTS["holes"]], ids=["even", "holes"])
@pytest.mark.parametrize("rule", ["greedy", "origin"])
def test_smdm(model, rows, rule):
    for seed, (temperature, cfg, (new, steps)) in enumerate(
        itertools.product((0.0, 0.7), (0.0, 1.5), [(6, 6), (5, 9)])
    ):
        seen, _ = states(
            "smdm", model, rows, new, steps=steps, temperature=temperature, cfg_scale=cfg, policy=rule, seed=seed
        )
        ids, _, start = left(rows, new, model)
        torch.manual_seed(seed)
        options = {"steps": steps, "temperature": temperature, "cfg": cfg, "rule": rule}
        agree(seen, peers.smdm(logits_of(model), ids, start, MASK, **options), rows)


def test_the_mask_of_smdm_may_be_any_id():
    """Its column is left out wherever it stands: a model with ids renamed makes the renamed choices."""
    first, last = table(3), table(3)
    renamed = [MASK, *range(MASK)]  # id v of `first` is id renamed[v] of `last`
    first.table = last.table[:, renamed][:, :, renamed]
    first.mask_id = 0
    kept = states("smdm", last, [[]], 8, steps=5, seed=1)[1].tokens
    start = (torch.zeros(1, 8, dtype=torch.int64), torch.tensor([8]), torch.tensor([0]))
    assert torch.tensor(renamed)[compat.run("smdm", first, *start, steps=5, seed=1).tokens].equal(kept)


# Limitations, each as its file states it


def favouring(scores, positions=24):
    """A Table with these logits {id: logit} everywhere, 0 elsewhere."""
    logits = torch.zeros(positions, 11, 11)
    for token, value in scores.items():
        logits[..., token] = value
    return Table(logits, MASK)


def test_llada_leaves_a_mask_where_the_mask_wins():
    model = favouring({MASK: 3.0, 4: 2.0})
    model.table[5, :, 4] = 9.0
    rows = [[1, 2, 3]]
    _, result = states("llada", model, rows, 4, steps=4)
    assert result.tokens.tolist() == [[1, 2, 3, MASK, MASK, 4, MASK]]
    assert result.generated == 1 and result.revealed_at.tolist() == [[-1, -1, -1, -1, -1, 0, -1]]
    assert generate(model, rows, max_new_tokens=4, steps=4).tokens.tolist() == [[1, 2, 3, 4, 4, 4, 4]]


def test_llada_does_not_count_masks_of_the_prompt():
    model = table(4)
    model.table[..., MASK] = -9.0
    _, result = states("llada", model, [[1, MASK, MASK, 2]], 4, steps=4)
    assert (result.tokens == MASK).sum() == 2
    assert not (generate(model, [1, MASK, MASK, 2], max_new_tokens=4, steps=4).tokens == MASK).any()


def test_llada_attends_to_padding_and_dream_does_not():
    for name, honoured in (("llada", False), ("dream", True)):
        model = table()
        states(name, model, PROMPTS["ragged"], 4, steps=2)
        assert all((real is not None) == honoured for _, real, _, _ in model.calls)
        ids, real, _, _ = model.calls[0]
        assert ids[1, :2].tolist() == [model.pad_id] * 2 and (
            not honoured or real[1].tolist() == [False] * 2 + [True] * 6
        )


def test_dream_idles_in_the_first_step_and_hurries_in_the_last():
    model = table(5, shift=1)
    model.table[..., MASK] = -9.0
    seen, _ = states("dream", model, [[1]], 8, steps=8, policy="entropy")
    masks = [8, *((x == MASK).sum().item() for x in seen)]
    assert masks[1] == 8 and masks[-1] == 0 and masks[-2] >= 2
    ours = generate(model, [[1]], max_new_tokens=8, steps=8, policy="entropy", temperature=0.0)
    assert sorted(ours.revealed_at[0].tolist()) == list(range(-1, 8))


def test_dream_takes_tokens_back_where_a_row_has_fewer_masks_than_the_mean():
    model = table(6, shift=1)
    model.table[..., MASK] = -9.0
    rows = [[MASK] * 6, [1, 2, 3, 4, 5, 6]]
    _, result = states("dream", model, rows, 2, steps=1, policy="maskgit_plus")  # 8 and 2 masks: 5 of each row
    lost = result.tokens[1] == MASK
    assert lost[:6].sum() == 3 and not lost[6:].any()
    assert (result.revealed_at[1] >= 0).tolist() == [False] * 6 + [True] * 2
    assert (result.tokens[0] == MASK).sum() == 3 and result.generated == 7


def test_dream_gives_up_the_draw_where_probabilities_do_not_sum_to_one():
    model = table(2, torch.bfloat16, shift=1)
    candidates = 2 * torch.randn(4000, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    probs = (candidates / 0.7).softmax(-1)
    sums = (probs / probs.sum(-1, keepdim=True)).sum(-1)
    model.table[3, MASK] = candidates[(sums != 1).nonzero()[0, 0]]  # what the token at 4 is read from
    refusals = []
    for seed in range(4):
        seen, _ = states("dream", model, [[1], [2]], 6, steps=5, temperature=0.7, policy="origin", seed=seed)
        ids = left([[1], [2]], 6, model)[0]
        torch.manual_seed(seed)
        options = {"steps": 5, "rule": "origin", "temperature": 0.7, "refusals": refusals}
        expected = peers.dream(logits_of(model), ids, MASK, None, **options)
        agree(seen, expected, [[1], [2]])
    assert {True, False} == set(refusals)


def test_smdm_rows_compete():
    model = favouring({3: 4.0})
    model.table[5:] = 0.1 * model.table[5:]  # the second half of the positions is unsure
    easy, hard = [[1, *[MASK] * 4, 5, 5, 5, 5], [1, 5, 5, 5, 5, *[MASK] * 4]]
    seen, _ = states("smdm", model, [easy, hard], 0, steps=2, temperature=0.0)
    assert (seen[0] == MASK).sum(-1).tolist() == [1, 4]  # int(8 * 0.499995)
    ours = generate(model, [easy, hard], steps=2)
    assert (ours.revealed_at == 0).sum(-1).tolist() == [2, 2]


def test_mdlm_never_picks_the_mask():
    for rule in ("ddpm", "ddpm_cache"):
        _, result = states("mdlm", favouring({MASK: 30.0, 4: 9.0}), [[]], 6, steps=3, policy=rule)
        assert (result.tokens == 4).all() and result.generated == 6


def test_mdlm_cache_changes_no_token():
    model = network()
    for seed in range(6):
        plain, dear = states("mdlm", model, [[]], 5, steps=30, policy="ddpm", seed=seed)
        kept, cheap = states("mdlm", model, [[]], 5, steps=30, seed=seed)
        assert all(map(torch.equal, plain, kept))
        changes = sum(not torch.equal(a, b) for a, b in itertools.pairwise([right([[]], 5, model)[0], *kept[:-1]]))
        assert dear.nfe == 31 and 3 <= cheap.nfe <= changes + 2
        assert cheap.head_rows == 5 * cheap.nfe and cheap.loops.shape == (cheap.nfe, 1)


class Wide:
    """A Denoiser of 100002 ids that always predicts `token`."""

    pad_id, suppressed_ids, logit_shift, max_loops, max_length = 0, (), 0, 1, None

    def __init__(self, token):
        self.vocab_size, self.mask_id = 100002, 100001
        self.weight = torch.zeros(self.vocab_size, 1)
        self.weight[token] = 40.0

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        return torch.ones(*input_ids.shape, 1)

    def head(self):
        return self.weight, None

    def forward_flops(self, length, num_loops):
        return 1.0


def test_mdlm_takes_a_neighbouring_large_id_for_no_change():
    """|100001 - 100000| is within allclose's relative 1e-5, so the stale prediction stays."""
    passes = {}
    for token in (100000, 5):
        seen, result = states("mdlm", Wide(token), [[]], 2, steps=4, seed=0)
        assert result.tokens.tolist() == [[token] * 2]
        assert sum(not torch.equal(a, b) for a, b in itertools.pairwise(seen[:-2])) >= 1
        passes[token] = result.nfe
    assert passes[100000] == 2 < passes[5]


# Against our own


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("block", [None, 8, 4, 2])
def test_our_greedy_confidence_is_lladas_when_the_mask_never_wins(block, cfg):
    model = network(head_bias=True)
    with torch.no_grad():
        model.lm_head.bias[MASK] = -1e6
    prompt = PROMPTS["even"]
    for steps in (4, 8, 12):
        options = {"max_new_tokens": 8, "steps": steps, "block_length": block, "cfg_scale": cfg}
        ours = generate(model, prompt, policy="confidence", temperature=0.0, **options)
        theirs = generate(model, prompt, compat="llada", **options)
        assert ours.tokens.equal(theirs.tokens) and ours.revealed_at.equal(theirs.revealed_at)
        assert ours.head_rows < theirs.head_rows


# What run does for all of them


def test_noise_is_torchs_and_torch_does_not_notice():
    model = table(7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for name in compat.PEERS:
        options = {"temperature": 1.0, "steps": 4, "seed": 9}
        first = states(name, model, [[1, 2]], 5, **options)[1].tokens
        torch.rand(3)
        assert states(name, model, [[1, 2]], 5, **options)[1].tokens.equal(first)
        others = [states(name, model, [[1, 2]], 5, **{**options, "seed": s})[1].tokens for s in range(4)]
        assert any(not t.equal(first) for t in others)
        torch.manual_seed(123)
        assert torch.get_rng_state().equal(before)
        states(name, model, [[1, 2]], 5, **options)
        assert torch.get_rng_state().equal(before)


def test_what_a_generation_says():
    model = table(8, shift=1)
    model.table[..., MASK] = -9.0
    seen = []
    result = generate(
        model, PROMPTS["ragged"], max_new_tokens=4, steps=4, cfg_scale=1.0, block_length=2, compat="llada", num_loops=3,
        on_step=lambda step, x, revealed: seen.append((step, x, revealed)),
    )  # fmt: skip
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and result.lengths.tolist() == [8, 6]
    assert result.nfe == 4 and result.head_rows == 4 * 2 * 2 * 8 and result.flops == 4 * 2 * 2 * 800
    assert result.loops_per_step == [3.0] * 4 and result.loops.tolist() == [[3, 3]] * 4 and result.generated == 8
    assert result.seconds > 0 and {c[2] for c in model.calls} == {3}
    at = torch.full_like(result.tokens, -1)
    for step, _, revealed in seen:
        at[revealed] = step
    assert result.revealed_at.equal(at) and sorted(at[1].tolist()) == [-1, -1, -1, -1, 0, 1, 2, 3]
    assert at[1, :2].tolist() == [-1, -1] and result.tokens[1, 6:].tolist() == [model.pad_id] * 2


def test_evaluation_mode_meanwhile():
    model = network().train()
    modes = []
    hidden = model.hidden
    model.hidden = lambda *args: modes.append(model.training) or hidden(*args)
    generate(model, [1], max_new_tokens=2, steps=2, compat="dream")
    assert modes == [False, False] and model.training


REFUSED = {
    "an unknown peer": ({"compat": "lada"}, "did you mean 'llada'"),
    "another's rule": ({"compat": "llada", "policy": "entropy"}, "has no policy 'entropy'"),
    "a policy object": ({"compat": "dream", "policy": object()}, "by name"),
    "top_p": ({"compat": "llada", "top_p": 0.9}, "no top_p"),
    "top_k": ({"compat": "smdm", "top_k": 3}, "no top_k"),
    "block_length": ({"compat": "dream", "block_length": 4}, "no block_length"),
    "cfg_scale": ({"compat": "mdlm", "cfg_scale": 1.0}, "no cfg_scale"),
    "temperature": ({"compat": "mdlm", "temperature": 0.5}, "no temperature"),
    "alg_temp": ({"compat": "llada", "policy": "random:0.5"}, "no alg_temp"),
    "alg_temp that is none": ({"compat": "dream", "policy": "entropy:high"}, "must be a number"),
    "eos_id": ({"compat": "llada", "eos_id": 3}, "no eos_id"),
    "row_seeds": ({"compat": "dream", "row_seeds": [1, 2]}, "no row_seeds"),
    "suppress": ({"compat": "dream", "suppress": [1]}, "no suppress"),
    "schedule": ({"compat": "mdlm", "schedule": "cosine"}, "no schedule"),
    "loops by depth table": ({"compat": "mdlm", "num_loops": lambda t: t.long() + 1}, "whole number of times"),
    "blocks that do not divide": ({"compat": "llada", "block_length": 3}, "equal blocks"),
    "steps that do not divide": ({"compat": "llada", "block_length": 2, "steps": 3}, "as many steps"),
    "no new tokens": ({"compat": "llada", "max_new_tokens": 0, "prompt": [1, MASK]}, "at least 1"),
    "nothing to fill": ({"compat": "smdm", "max_new_tokens": 0}, "nothing to generate"),
    "lengths": ({"compat": "mdlm", "prompt": PROMPTS["ragged"]}, "one length"),
    "a block of nothing": ({"compat": "llada", "block_length": 0}, "at least 1"),
    "a top_p that is no number": ({"compat": "dream", "top_p": "a"}, "top_p is 'a'; it must be a number"),
    "a name that is none": ({"compat": 3}, "compat is 3; known"),
    "a negative temperature": ({"compat": "dream", "temperature": -1.0}, "at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, message = REFUSED[case]
    options = {"prompt": [[1, 2], [3, 4]], "max_new_tokens": 4, "steps": 4, **options}
    with pytest.raises(InputError, match=message):
        generate(table(), options.pop("prompt"), **options)


def test_padding_that_looks_like_masks_is_refused():
    model = table()
    model.pad_id = MASK
    with pytest.raises(InputError, match="both id 10"):
        generate(model, PROMPTS["ragged"], max_new_tokens=4, steps=4, compat="llada")
    generate(model, PROMPTS["even"], max_new_tokens=4, steps=4, compat="llada")


def test_what_is_off_is_not_refused():
    for name in compat.PEERS:
        off = {"top_p": 1.0, "top_k": None, "cfg_scale": 0.0, "temperature": 1.0}
        assert generate(table(), [1, 2], max_new_tokens=4, steps=4, compat=name, **off).nfe >= 3


def test_alg_temp_follows_the_name():
    model = table(shift=1)
    found = generate(model, [1], max_new_tokens=6, steps=3, compat="dream", policy="entropy:alg_temp=2", seed=3).tokens
    assert found.equal(states("dream", model, [[1]], 6, steps=3, policy="entropy", alg_temp=2.0, seed=3)[1].tokens)
    assert not found.equal(states("dream", model, [[1]], 6, steps=3, policy="entropy", seed=3)[1].tokens)

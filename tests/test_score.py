"""Generative perplexity, entropy and distinct-n against their definitions; scorers of both kinds."""

import math
import sys

import pytest
import torch

from loopmdm.diffusion.bounds import likelihood
from loopmdm.errors import InputError
from loopmdm.lab.sample import load
from loopmdm.lab.score import (
    CausalScorer,
    LoopMDMScorer,
    build_scorer,
    distinct,
    generative_perplexity,
    unigram_entropy,
)

HF = "transformers is not installed (extra hf)"


def test_perplexity_is_over_all_tokens_not_over_samples():
    values = {"a": (2.0, 1), "bbbb": (2.0, 3)}
    score = generative_perplexity(["a", "bbbb"], values.__getitem__)
    assert score.nats == 1.0 and score.perplexity == pytest.approx(math.e) and score.tokens == 4
    assert score.bits_per_character == pytest.approx(4 / math.log(2) / 5)
    # ratio estimator: residuals 2 - 1 and 2 - 3, N / (N - 1) = 2
    assert score.error == pytest.approx(math.sqrt((1 + 1) * 2) / 4)
    assert generative_perplexity(["a"], values.__getitem__).error == math.inf


def test_the_error_is_that_of_repeated_draws():
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 50, (400, 30), generator=rng)
    nats = lengths * (2 + 0.5 * torch.randn(400, 30, generator=rng))
    scores = []
    for n, k in zip(nats.tolist(), lengths.tolist(), strict=True):
        rows = iter(zip(n, k, strict=True))
        scores.append(generative_perplexity(["x"] * 30, lambda _, rows=rows: next(rows)))
    spread = float(torch.tensor([s.nats for s in scores]).std())
    assert sum(s.error for s in scores) / 400 == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    ("samples", "answer", "message"),
    [
        ([], (1.0, 1), "no samples"),
        (["a"], (math.nan, 1), "nan nats"),
        (["a"], (math.inf, 1), "inf nats"),
        (["a"], (0.0, 0), "no token"),
    ],
)
def test_refusals(samples, answer, message):
    with pytest.raises(InputError, match=message):
        generative_perplexity(samples, lambda _: answer)


def test_entropy_is_of_each_sample_in_nats():
    assert unigram_entropy([[1, 2, 3, 4]]) == (pytest.approx(math.log(4)), math.inf)
    assert unigram_entropy([[1, 1], [2, 2]]) == (0.0, 0.0)  # each repeats itself, though together they have two tokens
    three_to_one = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    mean, error = unigram_entropy([[1, 1, 1, 2], [5]])
    assert mean == pytest.approx(three_to_one / 2) and error == pytest.approx(three_to_one / 2)
    with pytest.raises(InputError):
        unigram_entropy([])


def test_distinct_n_is_over_all_samples():
    samples = [[1, 2, 1, 2], [1, 2]]
    assert distinct(samples, 1) == 2 / 6
    assert distinct(samples, 2) == 2 / 4  # 12, 21, 12 | 12: no gram spans two samples
    assert distinct([[1]], 2) == 0.0


# a causal language model


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason=HF)
    from loopmdm.lab.data import build_tokenizer

    folder = tmp_path_factory.mktemp("causal")
    config = transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=build_tokenizer("byte", ""))
    tokenizer.save_pretrained(folder)
    return folder, model.eval()


def alone(model, ids, start, i):
    """-log p(ids[i] | ids[start:i]) by one pass of its own."""
    with torch.no_grad():
        return -float(model(torch.tensor([ids[start:i]])).logits[0, -1].log_softmax(-1)[ids[i]])


def test_causal_scorer_within_one_window(causal):
    folder, model = causal
    scorer = CausalScorer(str(folder))
    assert scorer.window == 16
    ids = scorer.tokenizer("hello world")["input_ids"]
    nats, tokens = scorer("hello world")
    assert tokens == len(ids) - 1 == 10
    assert nats == pytest.approx(sum(alone(model, ids, 0, i) for i in range(1, 11)), rel=1e-5)
    assert scorer("h") == scorer("") == (0.0, 0)


def test_causal_scorer_windows_score_each_token_once_with_half_a_window_of_context(causal):
    folder, model = causal
    scorer = CausalScorer(str(folder))
    ids = [(7 * i * i + 3) % 256 for i in range(37)]
    nats, tokens = scorer.score(ids)
    # 16 tokens, then pieces of 8 new ones that see the 8 before them
    starts = {i: 0 if i < 16 else 8 * (i // 8 - 1) for i in range(1, 37)}
    assert nats == pytest.approx(sum(alone(model, ids, starts[i], i) for i in starts), rel=1e-5) and tokens == 36


def test_causal_scorer_refuses(causal, tmp_path):
    with pytest.raises(InputError, match="no causal language model could be loaded from"):
        build_scorer(str(tmp_path))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers"):
        build_scorer("gpt2")


# another LoopMDM


def test_loopmdm_scorer_is_its_bound_over_all_tokens(checkpoint):
    scorer = build_scorer(str(checkpoint))
    assert isinstance(scorer, LoopMDMScorer) and "upper bound" in scorer.name and "S = 3" in scorer.name
    text = "the cat sat on the mat. the dog sat on the log. the end"  # more than the model's 40
    nats, tokens = scorer(text)
    assert tokens == len(text) == 55
    model, tokenizer = load(checkpoint)
    ids = torch.tensor(tokenizer.encode(text).ids)
    parts = [
        likelihood(model, ids[None, a:b], num_loops=3, bound="count", samples=40, seed=7).nats
        for a, b in ((0, 40), (40, 55))
    ]
    assert nats == pytest.approx(float(sum(parts)), rel=0.1)
    assert scorer("") == (0.0, 0)


def test_loopmdm_scorer_refuses(checkpoint):
    with pytest.raises(InputError, match="'Ω' is not in this model's vocabulary"):
        LoopMDMScorer(checkpoint)("Ω")

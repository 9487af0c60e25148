"""Measuring: the same masks for every S, rows against their definitions, texts as windows, budgets spent."""

import json
import math

import pytest
import torch

from loopmdm.diffusion.bounds import Likelihood, TimeProfile, likelihood, nelbo_by_time, rolling
from loopmdm.errors import InputError
from loopmdm.lab import measured
from loopmdm.lab.budget import spend, total
from loopmdm.lab.corpus import Corpus
from loopmdm.lab.data import build_tokenizer
from loopmdm.lab.evaluate import (
    check_comparable,
    compare_rows,
    default_loops,
    estimate,
    fill,
    generated,
    loop_rows,
    measure,
    nelbo_by_loops,
    solved,
    time_profile,
    time_rows,
)
from loopmdm.lab.sample import load

from .commands import TEXT
from .helpers import ids, live, tiny

VOCABULARY = 7
MASK = VOCABULARY - 1


class Fake:
    """A denoiser that records what it is shown and predicts token 0 with log-odds S everywhere."""

    mask_id = pad_id = MASK
    vocab_size, max_length, suppressed_ids, logit_shift, max_loops = VOCABULARY, None, (MASK,), 0, 4

    def __init__(self):
        self.seen = {}

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        self.seen.setdefault(num_loops, []).append(input_ids.clone())
        out = torch.zeros(*input_ids.shape, 1)
        out[..., 0] = num_loops
        return out

    def head(self):
        return torch.eye(VOCABULARY, 1), None

    def forward_flops(self, length, num_loops):
        return 100.0 * num_loops * length


# what training and the demo use


def test_packed_windows_are_measured_document_by_document():
    model = live(tiny(), dtype=torch.float64)
    tokens, documents = ids(6, 12, masks=0), torch.arange(12).expand(6, 12) // 5
    apart, across = (nelbo_by_loops(model, tokens, [2], document_ids=given) for given in (documents, None))
    want = likelihood(model, tokens, num_loops=[2], document_ids=documents)
    torch.testing.assert_close(apart, want.nats / 12 / math.log(2))
    assert (apart - across).abs().max() > 0.1


def test_every_s_sees_the_same_masks():
    model, tokens = Fake(), ids(10, 12, VOCABULARY, masks=0.0)
    nelbo_by_loops(model, tokens, [1, 3, 5], repeats=2, batch=4)
    assert set(model.seen) == {1, 3, 5}
    for shown in (model.seen[3], model.seen[5]):
        assert all(torch.equal(a, b) for a, b in zip(model.seen[1], shown, strict=True))


def test_bits_a_maskable_token_of_each_sequence():
    model = live(tiny())
    tokens = ids(9, 10, masks=0.0)
    maskable = torch.arange(10).expand(9, 10) >= torch.arange(9)[:, None]
    got = nelbo_by_loops(model, tokens, [1, 3], maskable=maskable, repeats=2, seed=5)
    want = likelihood(model, tokens, num_loops=[1, 3], samples=2, maskable=maskable, seed=5).nats
    torch.testing.assert_close(got, want / math.log(2) / maskable.sum(-1), rtol=1e-12, atol=0)
    assert got.shape == (2, 9) and got.dtype == torch.float64
    parts = nelbo_by_loops(model, tokens, [1, 3], maskable=maskable, repeats=2, seed=5, batch=2)
    torch.testing.assert_close(got, parts, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[0], got[1], rtol=1e-3)


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="no sequences"):
        nelbo_by_loops(Fake(), torch.zeros(0, 4, dtype=torch.int64), [1])


def test_estimate():
    got = estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert got.mean == 3.0
    assert got.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert estimate(torch.tensor([2.0])).error == math.inf


def test_fill_takes_the_arg_max_and_solved_counts_whole_rows():
    puzzles = torch.tensor([[1, MASK, 2], [MASK, 3, MASK]])
    made = fill(Fake(), puzzles, loops=2)
    assert made.tokens.tolist() == [[1, 0, 2], [0, 3, 0]] and made.nfe == 1 and made.loops_per_step == [2]
    share = solved(made.tokens, torch.tensor([[1, 0, 2], [0, 3, 1]]))
    assert share.mean == 0.5 and share.error == pytest.approx(math.sqrt(0.25 / 2))


# texts as windows


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


def test_windows_side_by_side_or_spread(checkpoint, model, text):
    whole = measured.read(checkpoint, *model, [text], length=16, limit=None)
    ids_ = model[1].encode(TEXT).ids
    assert (whole.tokens, whole.characters, whole.of) == (len(ids_), len(TEXT), len(ids_) // 16)
    assert whole.windows.flatten().tolist() == ids_[: whole.of * 16] and whole.whole is None
    few = measured.read(checkpoint, *model, [text], length=16, limit=5)
    assert few.windows.tolist() == [whole.windows[i].tolist() for i in (0, 36, 73, 109, 146)]
    assert "5 of 147 windows of 16 tokens, spread evenly" in few.describe()[0]
    assert measured.read(checkpoint, *model, [text], limit=5).length == 40  # no recipe: the model's longest
    short = measured.read(checkpoint, *model, [text], rolling=True, context=3)
    assert short.whole.tolist() == ids_ and "each after the first given the 3 tokens before it" in short.describe()[0]


def test_what_the_recipe_beside_a_model_tells(copy, text, tmp_path):
    run = tmp_path / "run"
    copy.rename(run.joinpath("model")) if run.mkdir() is None else None
    model = load(run)
    other = tmp_path / "other.txt"
    other.write_text(TEXT)
    assert measured.read(run, *model, [other]).trained_on is None
    assert "not known" in measured.read(run, *model, [other]).describe()[1]
    (run / "recipe.json").write_text(json.dumps({"length": 8, "data": [str(text)]}))
    for place in (run, run / "model"):
        found = measured.read(place, *model, [other])
        assert found.length == 8 and found.trained_on is False and len(found.describe()) == 1
    assert measured.read(run, *model, [text]).trained_on is True
    (run / "recipe.json").write_text(json.dumps({"length": 8, "data": [str(tmp_path)]}))
    found = measured.read(run, *model, [other])
    assert found.trained_on is True and "not figures of unseen text" in found.describe()[1]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"body": TEXT, "text": TEXT}))
    for spec in (str(lines), f"{lines}#body"):
        (run / "recipe.json").write_text(json.dumps({"data": [spec]}))
        assert measured.read(run, *model, [f"{lines}#body"]).trained_on is True
        assert measured.read(run, *model, [other]).trained_on is False


def test_a_corpus_is_unseen_only_by_the_run_that_held_its_text_out(text, tmp_path):
    corpus = Corpus.build([text], tmp_path / "corpus", "char")
    size = corpus.vocab_size
    live(tiny(vocab_size=size, mask_token_id=size - 1)).save_pretrained(tmp_path / "run" / "model")
    corpus.tokenizer.save(str(tmp_path / "run" / "model" / "tokenizer.json"))
    run = tmp_path / "run"
    model = load(run)

    def known(**recipe):
        (run / "recipe.json").write_text(json.dumps(recipe))
        return measured.read(run, *model, [tmp_path / "corpus"]).trained_on

    assert known(data=[str(text)], data_sha256=corpus.sha256) is False
    assert known(data=[str(text)], data_sha256="of another split") is True
    assert known(data=["elsewhere.txt"]) is False and known() is None


def test_documents_stay_apart_where_the_recipe_says_so(copy, tmp_path):
    run = tmp_path / "run"
    copy.rename(run.joinpath("model")) if run.mkdir() is None else None
    model, tokenizer = load(run)
    docs = [TEXT[i : i + 5 + i % 9] for i in range(0, 600, 15)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in [*docs, " "]))
    (run / "recipe.json").write_text(json.dumps({"length": 16, "packing": "documents"}))
    where = measured.read(run, model, tokenizer, [tmp_path / "docs.jsonl"])
    number = [i for i, d in enumerate(docs) for _ in d][: where.of * 16]
    want = torch.tensor(number).view(-1, 16)
    assert torch.equal(where.document_ids.diff(dim=1), want.diff(dim=1))
    bound = likelihood(model, where.windows, num_loops=[2], bound="count", samples=1, document_ids=want)
    assert torch.equal(measure(model, where, [2], samples=1).nats, bound.nats)
    edges = torch.linspace(1e-3, 1, 3, dtype=torch.float64)
    bins = nelbo_by_time(model, where.windows, [2], edges, document_ids=want)
    assert torch.equal(time_profile(model, where, [2], 2, samples=1).nats, bins.nats)
    assert "attention within each document" in where.describe()[0]


def test_a_run_measures_on_what_it_held_out(text, tmp_path):
    corpus = Corpus.build([text], tmp_path / "run" / "data", "char")
    size = corpus.vocab_size
    made = live(tiny(vocab_size=size, mask_token_id=size - 1, max_position_embeddings=40))
    made.save_pretrained(tmp_path / "run" / "model")
    corpus.tokenizer.save(str(tmp_path / "run" / "model" / "tokenizer.json"))
    run = tmp_path / "run"
    recipe = {"data": [str(text)], "data_sha256": corpus.sha256}
    (run / "recipe.json").write_text(json.dumps(recipe))
    found = measured.read(run, *load(run), length=10)
    held = torch.from_numpy(corpus.valid.tokens.astype("int64"))
    assert torch.equal(found.windows.flatten(), held[: found.of * 10]) and found.trained_on is False
    assert found.characters == corpus.meta["valid"]["characters"]
    # documents end in text read from files, too
    from_file = measured.read(run, *load(run), [text], length=10, rolling=True)
    assert from_file.tokens == len(TEXT) + 1 and int(from_file.whole[-1]) == corpus.eos_id
    with pytest.raises(InputError, match="made with another tokenizer"):
        Corpus.build([text], tmp_path / "byte", "byte")
        measured.read(run, *load(run), [tmp_path / "byte"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 41}, "at most the model's 40"),
        ({"limit": 0}, "windows is 0"),
        ({"rolling": True, "context": 40}, "context is 40"),
        ({"data": ["nowhere.txt"]}, "nowhere.txt"),
        ({"data": ["hf:some/set"]}, "is not a file"),
        ({"data": []}, "say what to measure on with --data"),
    ],
)
def test_texts_that_cannot_be_measured(checkpoint, model, text, options, message):
    with pytest.raises(InputError, match=message):
        measured.read(checkpoint, *model, **{"data": [text], **options})


def test_characters_that_the_model_does_not_know(checkpoint, model, tmp_path):
    (tmp_path / "strange.txt").write_text("the Ω")
    with pytest.raises(InputError, match="'Ω' is not in this model's vocabulary"):
        measured.read(checkpoint, *model, [tmp_path / "strange.txt"])


# rows of `loopmdm eval`


def a_likelihood(values, tokens, loops):
    nats = torch.tensor(values, dtype=torch.float64)[..., None]
    return Likelihood(tuple(loops), nats, torch.tensor(tokens), "time", torch.ones_like(nats))


def test_loop_rows_against_their_definitions(checkpoint, model, text):
    where = measured.read(checkpoint, *model, [text], length=16, limit=2)
    nats = [[10.0, 30.0], [6.0, 28.0]]
    first, second = loop_rows(model[0], where, a_likelihood(nats, [10, 10], [1, 2]))
    assert first["nats"] == 2.0 and first["gain"] == 0.0
    assert second["nats"] == pytest.approx(1.7) and second["bits"] == pytest.approx(1.7 / math.log(2))
    assert second["bits_per_character"] == pytest.approx(second["bits"] / where.characters_per_token)
    assert second["perplexity"] == pytest.approx(math.exp(1.7))
    # 40 and 34 nats of 20 tokens: S = 2 gains 4 and 2 nats, 0.3 a token, residuals 1 and -1
    assert second["gain"] == pytest.approx(0.3) and second["gain_error"] == pytest.approx(math.sqrt(2 * 2) / 20)
    assert second["error"] == pytest.approx(math.sqrt(2 * (11**2 + 11**2)) / 20)
    assert second["flops_per_token"] == model[0].forward_flops(16, 2) / 16 and second["layers"] == 6
    one = loop_rows(model[0], where, a_likelihood([[10.0], [6.0]], [10], [1, 2]))
    assert one[1]["error"] is None and one[1]["gain_error"] is None


def test_bits_a_character_follow_the_text_not_the_tokens(checkpoint, model, text):
    where = measured.read(checkpoint, *model, [text], length=16, limit=2)
    wide = measured.Measured(**{**vars(where), "characters": 3 * where.tokens})
    row = loop_rows(model[0], wide, a_likelihood([[10.0, 30.0]], [10, 10], [1]))[0]
    assert row["bits_per_character"] == pytest.approx(row["bits"] / 3)


def test_compare_rows_are_this_minus_the_other_at_its_own_s():
    mine = a_likelihood([[10.0, 30.0], [6.0, 28.0]], [10, 10], [1, 2])
    plain = a_likelihood([[11.0, 33.0]], [10, 10], [1])
    rows = compare_rows(mine, plain, [1, 1])
    assert [(r["loops"], r["other_loops"], r["other_nats"]) for r in rows] == [(1, 1, 2.2), (2, 1, 2.2)]
    assert [r["difference"] for r in rows] == pytest.approx([-0.2, -0.5])
    assert rows[0]["error"] == pytest.approx(math.sqrt(2 * 2) / 20)


def test_other_tokenizers_are_not_compared():
    check_comparable(build_tokenizer("char", "abc"), build_tokenizer("char", "abc"), "a", "b")
    with pytest.raises(InputError, match="a and b have different tokenizers"):
        check_comparable(build_tokenizer("char", "abc"), build_tokenizer("char", "abd"), "a", "b")


def test_measure_windows_or_the_whole_text(checkpoint, model, text):
    where = measured.read(checkpoint, *model, [text], length=16, limit=3)
    got = measure(model[0], where, [1, 2], bound="time", samples=2, seed=4)
    want = likelihood(model[0], where.windows, num_loops=[1, 2], bound="time", samples=2, seed=4)
    assert torch.equal(got.nats, want.nats)
    (text_ := measured.read(checkpoint, *model, [text], rolling=True, context=4, length=40))
    short = measured.Measured(**{**vars(text_), "whole": text_.whole[:100]})
    got = measure(model[0], short, [2], samples=1)
    want = rolling(model[0], short.whole, window=40, context=4, num_loops=[2], bound="count", samples=1)
    assert torch.equal(got.nats, want.nats) and int(got.tokens.sum()) == 100


def test_default_loops():
    assert default_loops(12) == [1, 2, 4, 8, 12, 24]
    assert default_loops(1) == [1] and default_loops(4) == [1, 2, 4, 8]


def test_time_rows(checkpoint, model, text):
    where = measured.read(checkpoint, *model, [text], length=16, limit=6)
    profile = time_profile(model[0], where, [1, 3], 4, samples=2)
    rows = time_rows(profile)
    assert len(rows["nats"]) == 4 and rows["loops"] == [1, 3] and rows["edges"][-1] == 1.0
    torch.testing.assert_close(torch.tensor(rows["nats"], dtype=torch.float64), profile.nats_per_token)
    for (first, deep), (zero, gain) in zip(rows["nats"], rows["gain"], strict=True):
        assert zero == 0.0 and gain == pytest.approx(first - deep)
    json.dumps(rows, allow_nan=False)
    with pytest.raises(InputError, match="bins is 0"):
        time_profile(model[0], where, [1], 0)


def test_generated_judges_samples_at_each_s_and_the_text(checkpoint, model, text):
    where = measured.read(checkpoint, *model, [text], length=16, limit=6)
    heard = []

    def scorer(sample):
        heard.append(sample)
        return 2.0 * len(sample), len(sample)

    found = generated(model[0], model[1], where, [1, 2], 3, steps=4, scorer=scorer, seed=1)
    assert [r["loops"] for r in found["rows"]] == [None, 1, 2] and len(heard) == 9
    assert all(sample in TEXT for sample in heard[:3])
    from loopmdm import generate

    for S, part in ((1, heard[3:6]), (2, heard[6:])):
        made = generate(model[0], batch_size=3, max_new_tokens=16, steps=4, num_loops=S, policy="ancestral", seed=1)
        assert part == [model[1].decode(row) for row in made.sequences()]
    assert all(r["perplexity"] == pytest.approx(math.exp(2)) for r in found["rows"])
    assert found["rows"][1]["flops"] < found["rows"][2]["flops"]
    json.dumps(found, allow_nan=False)
    assert "perplexity" not in generated(model[0], model[1], where, [1], 2, steps=2)["rows"][1]


# budgets


def a_profile(per_bin, N=8, noise=0.0):
    """A profile of windows of 10 tokens whose NELBO in bin b at column k is per_bin[b][k] nats a token."""
    mean = torch.tensor(per_bin, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    spread = noise * torch.randn(*mean.shape, N, generator=rng, dtype=torch.float64)
    bins = len(mean)
    edges = torch.linspace(0.001, 1, bins + 1, dtype=torch.float64)
    empty = torch.zeros(bins, N, dtype=torch.float64)
    nats = 10 * (mean[..., None] + spread)
    return TimeProfile(edges, (1, 2, 4), nats, torch.full((N,), 10), empty, nats)


COST = [1.0, 2.0, 4.0]


def test_spending_goes_where_the_gain_is():
    # the noisy half of t gains a lot from S = 4, the other nothing: 5/8 of the FLOPs buy all of it
    made = spend(a_profile([[2.0, 2.0, 2.0], [3.0, 2.5, 2.0]]), COST, 0.7)
    assert made.table.loops == (1, 4) and made.table.edges == (0.0, pytest.approx(0.5005), 1.0)
    assert made.share == pytest.approx(2.5 / 4) and made.nelbo == pytest.approx(2.0)
    # the same FLOPs as S = 2 in three quarters of the steps and S = 4 in the rest: 2.25 and 2.0
    name, nelbo, gain, error = made.same_cost
    assert name == "S = 2 in 75% of the steps, else 4" and nelbo == pytest.approx(2.1875)
    assert gain == pytest.approx(0.1875) and error == pytest.approx(0.0, abs=1e-9) and made.sure
    assert made.deepest[0] == "S = 4" and made.deepest[2] == pytest.approx(0.0)
    json.dumps(made.facts(), allow_nan=False)


def test_a_constant_of_exactly_that_cost_is_the_rival():
    made = spend(a_profile([[2.0, 1.5, 1.5], [3.0, 2.5, 2.5]]), COST, 0.5)
    assert made.table.loops == (2, 2) and made.same_cost[0] == "S = 2"
    assert made.same_cost[2] == 0.0 and not made.sure


def test_the_check_is_on_windows_that_did_not_choose():
    profile = a_profile([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    profile.nats[0, 2, ::2] -= 5.0  # S = 4 looks good in bin 0, on the half that chooses
    made = spend(profile, COST, 0.7)
    assert made.table.loops == (4, 1)
    assert made.nelbo == pytest.approx(2.0) and made.same_cost[2] == pytest.approx(0.0) and not made.sure


def test_noise_is_no_gain():
    made = spend(a_profile([[2.0, 2.0, 2.0]] * 6, N=40, noise=1.0), COST, 0.5)
    assert len(set(made.table.loops)) > 1 and made.same_cost[3] > 0 and not made.sure


def test_total_is_the_nelbo_of_a_table():
    profile = a_profile([[2.0, 1.0, 0.0], [4.0, 3.0, 1.0]])
    assert total(profile, [1, 2]).tolist() == pytest.approx([10 * (0.5 * 1.0 + 0.5 * 1.0)] * 8)


def test_too_few_windows():
    with pytest.raises(InputError, match="3 windows cannot be split"):
        spend(a_profile([[1.0, 1.0, 1.0]], N=3), COST, 0.5)

"""lm-eval's LM: numbers against enumeration, independence of the batch, until strings, and an evaluation offline."""

import json
import math

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install loopmdm[eval]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from tokenizers.decoders import Fuse  # noqa: E402

import loopmdm  # noqa: E402
from loopmdm.adapters.lm_eval import DiffusionLM  # noqa: E402
from loopmdm.errors import InputError  # noqa: E402

from .helpers import Table, live, tiny  # noqa: E402

LETTERS = "abcdefgh \n"
MASK = len(LETTERS)
DEVICE = "cpu" if torch.cuda.is_available() else "cuda:0"  # what lm-eval's command line passes where there is none


def spelling():
    """A tokenizer of single characters, ids 0..9; 10 is the mask."""
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = Fuse()
    return made


def asked(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("t", i, 1)) for i, a in enumerate(args)]


def said(model, **options):
    return DiffusionLM(model, spelling(), **{"samples": 8, "batch_size": 4, **options})


@pytest.fixture(scope="module")
def model():
    return live(tiny("llama", max_position_embeddings=24), head_scale=4.0)


REQUESTS = [
    ("abc ", "hd"),
    ("abc ", "ge"),
    ("", "bad"),
    ("ab", "c"),
    ("a" * 40, "bc"),
    ("abcd", "efgh" * 3),
    ("d", "ef"),
]


def test_one_token_is_exact(model):
    lm = said(model)
    ((score, greedy),) = lm.loglikelihood(asked("loglikelihood", ("abc", "d")))
    with torch.no_grad():
        logp = model(torch.tensor([[0, 1, 2, MASK]])).logits[0, 3].log_softmax(-1)
    assert math.isclose(score, logp[3].item(), rel_tol=1e-5) and greedy == (int(logp.argmax()) == 3)
    best = LETTERS[int(logp.argmax())]
    assert lm.loglikelihood(asked("loglikelihood", ("abc", best)))[0][1] is True


def test_the_bound_of_all_orders_by_enumeration():
    """A table model: with a sample for every count of masks, the mean over many seeds is the any-order bound."""
    table = torch.randn(8, 11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Table(table, MASK)
    want = sum(table[i, MASK, :10].log_softmax(-1)[v].item() for i, v in ((2, 3), (3, 4), (4, 5)))
    # logits at i depend on what i itself shows: a mask whenever it is counted, so every order gives the same sum
    scores = [
        said(model, samples=6, seed=s).loglikelihood(asked("loglikelihood", ("ab", "def")))[0][0] for s in range(60)
    ]
    mean, spread = torch.tensor(scores).mean(), torch.tensor(scores).std()
    assert abs(mean - want) < 4 * spread / math.sqrt(60) + 1e-6 and spread > 0.01


def test_a_request_does_not_depend_on_the_others(model):
    together = said(model).loglikelihood(asked("loglikelihood", *REQUESTS))
    assert [round(s, 4) for s, _ in together] == [
        round(said(model, batch_size=1).loglikelihood(asked("loglikelihood", r))[0][0], 4) for r in REQUESTS
    ]
    turned = said(model, batch_size=3).loglikelihood(asked("loglikelihood", *REQUESTS[::-1]))[::-1]
    assert [g for _, g in turned] == [g for _, g in together]
    for (a, _), (b, _) in zip(turned, together, strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)
    other = said(model, seed=1).loglikelihood(asked("loglikelihood", *REQUESTS))
    assert other[0][0] != together[0][0] and other[3][0] == pytest.approx(together[3][0], rel=1e-5)


def test_spaces_at_the_end_of_the_context_are_scored():
    lm = said(Table(torch.zeros(30, 11, 11), MASK))
    scores = lm.loglikelihood(asked("loglikelihood", ("ab ", "c"), ("ab", " c"), ("ab", "c"), ("  ", "c")))
    assert [round(s / math.log(10)) for s, _ in scores] == [-2, -2, -1, -3]


def test_what_is_too_long_is_cut_or_scored_in_parts():
    """Uniform predictions: every token costs log 10, however the text is divided."""
    model = Table(torch.zeros(8, 11, 11), MASK, max_length=8)
    lm = said(model)
    long = lm.loglikelihood(
        asked("loglikelihood", ("abc", "abcdefgh" * 4), ("a" * 50, "bc"), ("", "a" * 9), ("a", "b" * 7))
    )
    assert [round(s / math.log(10), 3) for s, _ in long] == [-32, -2, -9, -7]
    assert max(ids.shape[1] for ids, *_ in model.calls) <= 8
    text = "abcdefgh" * 3 + "ab"
    assert math.isclose(lm.loglikelihood_rolling(asked("r", (text,)))[0], -26 * math.log(10), rel_tol=1e-6)
    assert lm.loglikelihood_rolling(asked("r", ("",))) == [0.0]


def test_rolling_is_rolling(model):
    ids = torch.tensor([LETTERS.index(c) for c in "abcdefgh" * 5])
    want = loopmdm.rolling(model, ids, window=24, context=6, bound="count", samples=8, seed=3).nats.sum()
    got = said(model, context=6, seed=3).loglikelihood_rolling(asked("r", ("abcdefgh" * 5,)))[0]
    assert math.isclose(got, -want.item(), rel_tol=1e-6)


def test_greedy_is_greedy(model):
    lm = said(model, max_new_tokens=4, steps=4)
    (text,) = lm.generate_until(asked("generate_until", ("abc", {})))
    assert len(text) == 4
    found = lm.loglikelihood(
        asked("loglikelihood", ("abc", text), ("abc", text[:3] + ("a" if text[3] != "a" else "b")))
    )
    assert [g for _, g in found] == [True, False]
    assert said(model, is_greedy=False).loglikelihood(asked("loglikelihood", ("abc", text)))[0][1] is False


class Repeating(Table):
    """Writes `text` from position 2 on."""

    def __init__(self, text):
        table = torch.zeros(40, 11, 11)
        for i in range(40):
            table[i, :, LETTERS.index(text[(i - 2) % len(text)])] = 9.0
        super().__init__(table, MASK, max_length=40)


def test_until(model):
    lm = said(Repeating("abcd efgh\n"), max_new_tokens=20)
    ask = [{"until": ["\n"]}, {"until": "gh"}, {"until": ["zz", "fg", " e"]}, {}, {"max_gen_toks": 3}, {"until": [""]}]
    got = lm.generate_until(asked("generate_until", *(("ab", a) for a in ask)))
    assert got == ["abcd efgh", "abcd ef", "abcd", "abcd efgh\n" * 2, "abc", "abcd efgh\n" * 2]
    ended = said(Repeating("abcd efgh\n"), max_new_tokens=20, eos_id=LETTERS.index("e"))
    assert ended.generate_until(asked("generate_until", ("ab", {}))) == ["abcd "]


def test_generation_does_not_depend_on_the_batch(model):
    ask = [
        (c, {"do_sample": True, "temperature": 0.8, "max_gen_toks": 6}) for c in ("abc", "", "defgh", "a" * 60, "abc")
    ]
    together = said(model).generate_until(asked("generate_until", *ask))
    assert together == [said(model, batch_size=1).generate_until(asked("generate_until", a))[0] for a in ask]
    assert together[0] == together[4] and len(set(together)) >= 3
    cold = said(model).generate_until(asked("generate_until", ("abc", {"temperature": 0.8, "max_gen_toks": 6})))
    assert cold == said(model, seed=9).generate_until(asked("generate_until", ("abc", {"max_gen_toks": 6})))


def test_refusals(tmp_path, model):
    with pytest.raises(InputError, match="needs its tokenizer"):
        DiffusionLM(model)
    with pytest.raises(InputError, match=r"there is no .*tokenizer\.json"):
        DiffusionLM(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        DiffusionLM(model, tmp_path)
    for option in ({"samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"max_length": 1}):
        with pytest.raises(InputError, match="must be a whole number of at least"):
            said(model, **option)
    with pytest.raises(InputError, match="has no chat template"):
        said(model).apply_chat_template([{"role": "user", "content": "a"}])


def tasks(folder):
    """Three tasks on local JSON files: multiple choice, perplexity, generation."""
    rows = [{"q": q, "c": ["cd", "hh", "ef"], "a": a, "text": q * 4} for q, a in (("ab", 0), ("gh", 2), ("ac", 1))]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
    }
    return [
        {
            **common,
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{c}}",
            "doc_to_target": "{{a}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        {
            **common,
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {
            **common,
            "task": "write",
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "abcd",
            "generation_kwargs": {"until": [" "], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def test_simple_evaluate_offline(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm = said(model)
    ours = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(lm, tasks=tasks(tmp_path), **ours)
    results = found["results"]
    scores = [
        [lm.loglikelihood(asked("loglikelihood", (q, c)))[0][0] for c in ("cd", "hh", "ef")] for q in ("ab", "gh", "ac")
    ]
    best = [max(range(3), key=row.__getitem__) for row in scores]
    assert results["choose"]["acc,none"] == pytest.approx(sum(b == a for b, a in zip(best, (0, 2, 1), strict=True)) / 3)
    nats = -sum(lm.loglikelihood_rolling(asked("r", (q * 4,)))[0] for q in ("ab", "gh", "ac"))
    assert results["read"]["bits_per_byte,none"] == pytest.approx(nats / 24 / math.log(2), rel=1e-6)
    again = lm_eval.simple_evaluate(said(Repeating("abcd efgh\n")), tasks=tasks(tmp_path)[2:], **ours)
    assert again["results"]["write"]["exact_match,none"] == 1.0


def test_by_name_from_a_folder(tmp_path, model):
    model.save_pretrained(tmp_path / "run/model")
    spelling().save(str(tmp_path / "run/model/tokenizer.json"))
    made = get_model("loopmdm").create_from_arg_string(
        f"pretrained={tmp_path / 'run'},samples=8,num_loops=2",
        {"batch_size": 4, "device": DEVICE, "max_batch_size": None},
    )
    want = said(model, num_loops=2).loglikelihood(asked("loglikelihood", *REQUESTS[:2]))
    got = made.loglikelihood(asked("loglikelihood", *REQUESTS[:2]))
    assert [round(s, 5) for s, _ in got] == [round(s, 5) for s, _ in want]

"""loopmdm sample: text that is what generate makes, safe to print, and a sentence for everything that is wrong."""

import io
import json
import re

import pytest
from rich.console import Console

from loopmdm.lab import sample as module
from loopmdm.lab.corpus import Corpus
from loopmdm.lab.data import build_tokenizer, decode
from loopmdm.lab.sample import load, sample
from loopmdm.lab.watch import FRESH, MASKED, View, printable
from loopmdm.model.depth import RelativeChange
from loopmdm.model.lm import LoopMDM
from loopmdm.sampling.depth import DepthTable
from loopmdm.sampling.policies import POLICIES

from .commands import files, refused, run
from .helpers import live, randomize_, tiny


def test_sample_prints_text_and_one_line(capsys, checkpoint):
    words = ["--prompt", "the [red]cat", "--num-samples", "2", "--steps", "6", "--loops", "2", "--max-new-tokens", "10"]
    status, out, err = run(capsys, "sample", checkpoint, *words)
    assert status == 0, err
    assert out.count("the [red]cat") == 2  # no markup
    assert "--- sample 1, seed 0\n" in out and "--- sample 2, seed 1\n" in out
    last = out.splitlines()[-1]
    assert re.fullmatch(r"20 tokens, [\d,]+ tokens/s, nfe [1-6], mean loops 2\.00, [\d.]+ [kMG]FLOP", last)
    assert run(capsys, "sample", checkpoint / "model", *words)[1].splitlines()[:-1] == out.splitlines()[:-1]
    assert run(capsys, "sample", checkpoint, *words, "--seed", "5")[1].splitlines()[:-1] != out.splitlines()[:-1]


def test_sample_is_generate(capsys, checkpoint):
    import loopmdm

    model, tokenizer = load(checkpoint)
    want = loopmdm.generate(model, [[]], max_new_tokens=40, steps=3, policy="confidence", num_loops=3, seed=0)
    _, out, _ = run(capsys, "sample", checkpoint, "--steps", "3", "--policy", "confidence")  # fills the model's length
    assert out.rpartition("\n\n")[0] == printable(tokenizer.decode(want.tokens[0].tolist()))


def test_sample_leaves_room_for_the_prompt(checkpoint):
    texts, made = sample(checkpoint, "the dog sat on the log.")
    assert made.generated == 40 - 23 and texts[0].startswith("the dog sat on the log.") and len(texts[0]) == 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "Ω"], "'Ω' is not in this model's vocabulary"),
        (["--prompt", "the cat " * 6], "a prompt of 48 tokens with 1 new ones is longer than the model's 40"),
        (["--max-new-tokens", "41"], "longer than the model's 40"),
        (["--max-new-tokens", "0"], "nothing to generate"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--steps", "0"], "steps is 0"),
        (["--loops", "0"], "num_loops is 0"),
        (["--policy", "confident"], "did you mean 'confidence'"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--num-samples", "0"], "num_samples is 0"),
        (["--seed", str(2**64)], "seed is"),
        (["--loops", "1,4"], "--loops is '1,4'; it must be a whole number, or auto"),
        (["--loops", "auto"], "has no depth.json"),
        (["--early-exit", "-1"], "tau is -1.0"),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--block-length", "0"], "block_length is 0"),
        (["--cfg-scale", "-1"], "cfg_scale is -1.0"),
        (["--policy", "threshold:x"], "it must be a number"),
        (["--watch", "--pace", "-1"], "--pace is -1.0"),
        (["--watch", "--pace", "nan"], "--pace is nan"),
        (["--pace", "0.05"], "--pace goes with --watch"),
    ],
)
def test_sample_refuses(capsys, checkpoint, words, message):
    assert message in refused(capsys, "sample", checkpoint, *words)


def test_sample_refuses_other_folders(capsys, tmp_path):
    assert "there is no folder" in refused(capsys, "sample", tmp_path / "nowhere")
    assert "has no config.json" in refused(capsys, "sample", tmp_path)


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"model": 1}')


def other_tokenizer(folder):
    from loopmdm.lab.data import build_tokenizer

    build_tokenizer("byte", "").save(str(folder / "tokenizer.json"))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def foreign(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))


def garbled(folder):
    (folder / "config.json").write_text("{")


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or not a safetensors file"),
        (foreign, "its model_type is not 'loopmdm'"),
        (garbled, "cannot be read as JSON"),
        (other_shape, "the configuration says"),
        (broken_tokenizer, "is not a tokenizer"),
        (other_tokenizer, "they do not belong together"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    ],
)
def test_sample_refuses_damaged_checkpoints(capsys, copy, damage, message):
    damage(copy)
    before = files(copy)
    assert message in refused(capsys, "sample", copy)
    assert files(copy) == before


def test_printable():
    assert printable("a\x1b[31m\r\0\x9bé\n\t日\u202e👩\u200d👧\x7f") == (
        "a\\x1b[31m\\r\\x00\\x9bé\n\t日\\u202e👩\u200d👧\\x7f"
    )
    assert printable("\udc80 [red]\\x1b") == "\\udc80 [red]\\x1b"


def test_sample_escapes_what_would_move_the_cursor(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(module, "decode", lambda *_: "a\x1b[2Jb")
    _, out, _ = run(capsys, "sample", checkpoint, "--max-new-tokens", "1")
    assert out.startswith("a\\x1b[2Jb\n")


def test_options_reach_generate(capsys, checkpoint, monkeypatch):
    seen = {}

    def generate(model, prompt, **options):
        seen.update(options)
        return real(model, prompt, max_new_tokens=options["max_new_tokens"], on_step=options["on_step"])

    real = module.generate
    monkeypatch.setattr(module, "generate", generate)
    words = "--steps 5 --loops 2 --policy threshold:0.8 --temperature 0.5 --top-k 3 --top-p 0.9 --block-length 10"
    assert run(capsys, "sample", checkpoint, *words.split(), "--cfg-scale", "1.5", "--early-exit", "0.1")[0] == 0
    exit_rule = seen.pop("early_exit")
    assert isinstance(exit_rule, RelativeChange) and exit_rule.tau == 0.1
    wanted = {"steps": 5, "num_loops": 2, "policy": "threshold:0.8", "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    wanted |= {"block_length": 10, "cfg_scale": 1.5, "seed": 0, "max_new_tokens": 40, "eos_id": None}
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_offered_and_works(capsys, checkpoint, policy):
    status, out, err = run(capsys, "sample", checkpoint, "--policy", policy, "--steps", "4", "--max-new-tokens", "8")
    assert status == 0 and "8 tokens" in out, err
    assert policy in " ".join(run(capsys, "sample", "--help")[1].split())


def test_json(capsys, checkpoint):
    words = ["sample", checkpoint, "--num-samples", "2", "--seed", "3", "--steps", "4", "--max-new-tokens", "8"]
    status, out, _ = run(capsys, *words, "--json", "--watch")
    found = json.loads(out)
    assert status == 0 and [s["seed"] for s in found["samples"]] == [3, 4] and found["generated"] == 16
    model, tokenizer = load(checkpoint)
    assert [tokenizer.decode(s["tokens"]) for s in found["samples"]] == [s["text"] for s in found["samples"]]
    assert found["nfe"] == len(found["loops_per_step"]) <= 4
    assert 0 < found["flops"] <= 2 * found["nfe"] * model.forward_flops(8, 3)


def test_loops_auto_is_the_model_s_own_table(capsys, copy):
    words = ["sample", copy, "--steps", "4", "--max-new-tokens", "8", "--seed", "1"]
    assert "has no depth.json; `loopmdm schedule`" in refused(capsys, *words, "--loops", "auto")
    DepthTable((0, 0.5, 1), (1, 3)).save(copy / "depth.json")
    out = json.loads(run(capsys, *words, "--loops", "auto", "--json")[1])
    assert sorted(set(out["loops_per_step"])) == [1.0, 3.0] and out["loops_per_step"][0] == 3.0
    (copy / "depth.json").write_text("{}")
    assert "depth.json: a depth table is a JSON object" in refused(capsys, *words, "--loops", "auto")
    (copy / "depth.json").write_text(json.dumps({"edges": [0, 1], "loops": [0]}))
    assert "depth.json: a depth table's S is 0" in refused(capsys, *words, "--loops", "auto")


def with_documents(folder):
    """A checkpoint whose training text had documents."""
    tokenizer = build_tokenizer("char", "abc")
    live(tiny(vocab_size=5, mask_token_id=4, max_position_embeddings=40)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_its_own_mask(folder):
    """A checkpoint as LLaDA's and Dream's: the mask is one of the tokenizer's ids, those from 257 on are padding."""
    tokenizer = build_tokenizer("byte", "")
    tokenizer.add_special_tokens(["<mask>"])
    made = tiny(vocab_size=260, mask_token_id=256, pad_token_id=2, max_position_embeddings=40)
    randomize_(LoopMDM(made)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_mask_among_the_tokenizer_s_ids(capsys, tmp_path):
    folder = with_its_own_mask(tmp_path)
    model, tokenizer = load(folder)
    assert (model.mask_id, model.suppressed_ids) == (256, (256, 257, 258, 259))
    words = ["sample", folder, "--prompt", "ab", "--max-new-tokens", "30", "--num-samples", "8", "--json"]
    made = json.loads(run(capsys, *words)[1])["samples"]
    assert all(max(s["tokens"]) < 256 and s["text"] == tokenizer.decode(s["tokens"]) for s in made)
    assert all(s["text"].startswith("ab") for s in made)
    a, b = tokenizer.encode("ab").ids
    assert decode(tokenizer, [a, 256, 256, b, 259], None, 256) == "a▒▒b▒"
    assert "has no end of a document" in refused(capsys, *words, "--stop")
    drawn = frames(folder, prompt="a", max_new_tokens=20, steps=3)
    text = drawn[0][0].renderables[0].renderable
    masked = int((drawn[0][1] == 256).sum())
    assert text.plain.count("▒") == masked > 0 and "␃" not in text.plain
    (tmp_path / "text.txt").write_text("abc def.\n" * 30)
    few = ["--data", tmp_path / "text.txt", "--length", "16", "--windows", "6", "--samples", "1", "--loops", "1,2"]
    for command in (["eval", folder], ["schedule", folder, "--budget", "1"]):
        status, _, err = run(capsys, *command, *few)
        assert status == 0, err
    Corpus.build([tmp_path / "text.txt"], tmp_path / "corpus", tokenizer)
    assert "ends documents with id 257" in refused(capsys, "eval", folder, "--data", tmp_path / "corpus")


def test_ends_of_documents(capsys, checkpoint, tmp_path):
    folder = with_documents(tmp_path)
    words = ["sample", folder, "--max-new-tokens", "30", "--num-samples", "4", "--json"]
    whole = json.loads(run(capsys, *words)[1])["samples"]
    cut = json.loads(run(capsys, *words, "--stop")[1])["samples"]
    assert all(len(s["text"]) == 30 for s in whole) and any("␃" in s["text"] for s in whole)
    assert all("␃" not in s["text"][:-1] for s in cut) and any(len(s["text"]) < 30 for s in cut)
    assert "has no end of a document" in refused(capsys, "sample", checkpoint, "--stop")


# --watch


class Recorder(io.StringIO):
    def __init__(self):
        super().__init__()
        self.ends = []

    def flush(self):
        self.ends.append(len(self.getvalue()))


def terminal(height=24, width=60):
    return Console(
        file=Recorder(), force_terminal=True, width=width, height=height, legacy_windows=False, color_system="truecolor"
    )


def frames(folder, prompt="the cat", **options):
    """What the view drew at each step, as rich's objects, and the View."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        frame = View.frame

        def keep(self, step, tokens, revealed):
            drawn = frame(self, step, tokens, revealed)
            seen.append((drawn, tokens.clone(), revealed.clone()))
            return drawn

        patch.setattr(View, "frame", keep)
        sample(folder, prompt, watch=options.pop("console", terminal()), **options)
    return seen


def test_watch_shows_masks_new_tokens_and_a_footer(checkpoint):
    model, tokenizer = load(checkpoint)
    drawn = frames(checkpoint, max_new_tokens=20, steps=5, num_samples=2, num_loops=2)
    assert len(drawn) == 5
    for step, (group, tokens, revealed) in enumerate(drawn):
        *panels, footer = group.renderables
        left = int((tokens == model.mask_id).sum())
        assert footer.plain == f"step {step + 1} of 5 · S = 2 · {left} masked" and len(panels) == 2
        for i, panel in enumerate(panels):
            text = panel.renderable
            assert text.plain == decode(tokenizer, tokens[i].tolist())
            styles = [""] * len(text.plain)
            for span in text.spans:
                styles[span.start : span.end] = [span.style] * (span.end - span.start)
            wanted = [
                MASKED if t == model.mask_id else FRESH if new else ""
                for t, new in zip(tokens[i].tolist(), revealed[i].tolist(), strict=True)
            ]
            assert styles == wanted
    assert drawn[-1][0].renderables[-1].plain.endswith("· 0 masked")


def test_watch_says_how_s_varies(copy):
    DepthTable((0, 0.5, 1), (1, 3)).save(copy / "depth.json")
    footers = [g.renderables[-1].plain for g, *_ in frames(copy, max_new_tokens=20, steps=5, num_loops="auto")]
    assert "· S = 3 ·" in footers[0] and "· S = 1 ·" in footers[-1]
    footers = [g.renderables[-1].plain for g, *_ in frames(copy, max_new_tokens=20, steps=5, early_exit=0.1)]
    assert all("· S ≤ 3 ·" in f for f in footers)


def test_watch_fits_the_terminal(checkpoint):
    console = terminal(height=12, width=30)
    group, *_ = frames(checkpoint, max_new_tokens=30, steps=3, num_samples=9, console=console)[0]
    assert group.renderables[-1].plain.endswith("7 more samples not shown")
    assert len(console.render_lines(group)) <= 12


def test_watch_never_lets_the_model_s_text_act(checkpoint, monkeypatch):
    from loopmdm.lab import watch

    monkeypatch.setattr(watch, "decode", lambda *_: "[red]x\x1b[2J\x9b\x07")
    console = terminal()
    sample(checkpoint, "", max_new_tokens=10, steps=2, watch=console)
    drawn = console.file.getvalue()
    assert "\x1b[2J" not in drawn and "\x9b" not in drawn and "\x07" not in drawn
    assert "[red]x\\x1b[2J\\x9b\\x07" in re.sub(r"\x1b\[[0-9;]*m", "", drawn)


def test_watch_leaves_the_samples_alone_and_takes_no_time_from_them(checkpoint):
    texts, made = sample(checkpoint, "the", max_new_tokens=20, steps=4, watch=terminal(), pace=0.1)
    assert texts == sample(checkpoint, "the", max_new_tokens=20, steps=4)[0]
    assert 0 < made.seconds < 0.3  # at least 4 x 0.1 went by


def test_watch_without_a_terminal_prints_the_end_alone(capsys, checkpoint):
    words = ["sample", checkpoint, "--steps", "4", "--max-new-tokens", "12", "--num-samples", "2"]
    plain = run(capsys, *words)[1].rpartition("\n\n")[0]
    status, out, _ = run(capsys, *words, "--watch", "--pace", "0")
    assert status == 0 and out.rpartition("\n\n")[0] == plain and "\x1b" not in out

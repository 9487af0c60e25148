"""`loopmdm train`: what it makes and prints, and one clear sentence for everything that is wrong."""

import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
from dataclasses import fields

import pytest
import torch
from rich.console import Console

from loopmdm import cli
from loopmdm.cli import common
from loopmdm.config import PRESETS
from loopmdm.diffusion.bounds import likelihood
from loopmdm.errors import InputError
from loopmdm.lab import monitor, text_run
from loopmdm.lab.corpus import Corpus
from loopmdm.lab.data import build_tokenizer
from loopmdm.lab.feed import AnswerFeed
from loopmdm.lab.recipe import Recipe
from loopmdm.lab.sample import load
from loopmdm.lab.sft import SFTData
from loopmdm.lab.state import Checkpoints, read
from loopmdm.lab.text_run import Settings
from loopmdm.model.lm import LoopMDM

from .commands import QUICK, TEXT, files, lines, refused, run
from .helpers import live, tiny


def test_train_makes_what_it_says(capsys, text, trained, tmp_path):
    out = tmp_path / "[red]run"  # printed as it is, no markup
    status, printed, err = run(capsys, "train", "--data", text, "--out", out, *QUICK)
    assert status == 0, err
    assert f"loopmdm sample {out}\n" in printed and f"In {out}: model/" in printed
    made = {name for name in files(out) if not name.startswith(("data/", ".data"))}
    assert made == {
        "lock",
        "metrics.jsonl",
        "timing.jsonl",
        "recipe.json",
        *(f"model/{name}" for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json")),
        *(f"checkpoints/step-00000{step}/{name}" for step in (2, 4) for name in ("manifest.json", "state.pt")),
    }
    measured = lines(out / "metrics.jsonl")
    assert [row["step"] for row in measured] == [2, 4]
    assert list(measured[0]["valid_bits"]) == list(measured[0]["valid_error"]) == ["1", "2", "3"]
    assert not [key for row in measured for key in row if "second" in key or "time" in key]
    assert [row["step"] for row in lines(out / "timing.jsonl")] == [2, 4]
    # one line an evaluation, the unigram figure beside it
    unigram = json.loads((out / "recipe.json").read_text())["unigram_bits"]
    rows = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(rows) == 2 and all(f"(unigram {unigram:.3f})" in row for row in rows)
    shown = re.findall(r"S = (\d): ([\d.]+) ±", rows[-1])
    assert shown == [(S, f"{bits:.3f}") for S, bits in measured[-1]["valid_bits"].items()]

    clocked = ("timing.jsonl", "lock", *(name for name in files(out) if name.startswith("checkpoints/")))
    same = {name: held for name, held in files(out).items() if name not in clocked}
    assert same == {name: held for name, held in files(trained).items() if name in same}


def test_validation_bits_are_bits_a_character(capsys, text, tmp_path):
    words = ["--tokenizer", "bpe", "--vocab-size", "270"]
    assert run(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)[0] == 0
    model, tokenizer = load(tmp_path / "run")
    corpus = Corpus.open(tmp_path / "run" / "data")
    assert corpus.tokenizer.to_str() == tokenizer.to_str()
    assert corpus.characters_per_token > 1.1
    bits = lines(tmp_path / "run" / "metrics.jsonl")[-1]["valid_bits"]
    for S, got in bits.items():
        nats = float(likelihood(model, corpus.valid_windows(16, 128).tokens, num_loops=int(S), seed=0).nats_per_token)
        assert got == pytest.approx(nats / math.log(2) / corpus.characters_per_token, rel=1e-4)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_train_with_other_tokenizers(capsys, text, tmp_path, kind):
    words = ["--tokenizer", kind, "--eval-loops", "3,1", "--eval-windows", "2", "--ema", "0"]
    words += ["--vocab-size", "270"] if kind == "bpe" else []
    status, out, err = run(capsys, "train", "--data", text, text, "--out", tmp_path / "run", *QUICK, *words)
    assert status == 0, err
    assert list(lines(tmp_path / "run" / "metrics.jsonl")[0]["valid_bits"]) == ["1", "3"]
    model, tokenizer = load(tmp_path / "run")
    assert model.vocab_size == {"byte": 258, "bpe": 272}[kind] == tokenizer.get_vocab_size() + 2
    assert "model/ (the weights and" in out


def test_warns_when_loops_do_nothing(capsys, text, tmp_path, monkeypatch):
    one = ["--steps", "1", "--eval-every", "1"]  # a zero-initialised head after one step: S matters little yet
    _, out, _ = run(capsys, "train", "--data", text, "--out", tmp_path / "a", *QUICK, *one)
    assert "Warning: looping is not being used: at step 1, S = 3 gains 0.0000" in out
    assert "boundary=anchored" not in out  # it is
    _, out, _ = run(capsys, "train", "--data", text, "--out", tmp_path / "b", *QUICK, *one, "--set", "boundary=plain")
    assert "Train longer, or set boundary=anchored." in out
    _, out, _ = run(capsys, "train", "--data", text, "--out", tmp_path / "c", *QUICK, *one, "--loops", "1")
    assert "Warning" not in out and list(lines(tmp_path / "c" / "metrics.jsonl")[0]["valid_bits"]) == ["1"]

    noise = torch.rand(20, dtype=torch.float64)
    gains = torch.tensor([0.0, 0.1, 0.2])[:, None].expand(3, 20)
    for name, values, warned in (
        ("used", 3 + noise - gains, False),  # every sequence gains the same: sure, however noisy they are
        ("worse", 3 + noise + gains, True),
        ("unsure", 3 + noise - torch.stack([0 * noise, noise, 4 * (noise - noise.mean()) + 0.1]), True),
        ("tiny", 3 + noise - gains / 1000, True),
    ):
        monkeypatch.setattr(monitor, "nelbo_by_loops", lambda *a, values=values, **k: values)
        _, out, _ = run(capsys, "train", "--data", text, "--out", tmp_path / name, *QUICK, *one)
        assert ("looping is not being used" in out) == warned, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--lr", "0"], "lr is 0.0"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'"),
        (["--decay", "exponential"], "decay is 'exponential'"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--loops", "0"], "loops is 0"),
        (["--seed", "-99999999999999999999"], "seed is"),
        (["--preset", "tiny-lama"], "did you mean 'tiny-llama'"),
        (["--set", "start=3"], "the looped block covers layers 3..3, but the model has 3 layers"),
        (["--set", "max_loop=3"], "did you mean 'max_loops'"),
        (["--set", "vocab_size=99"], "vocab_size comes from the tokenizer, which makes it"),
        (["--set", "mask_token_id=0"], "mask_token_id comes from the tokenizer"),
        (["--tokenizer", "words"], "unknown tokenizer 'words'"),
        (["--tokenizer", "bpe", "--vocab-size", "100"], "starts from 256 bytes"),
        (["--length", "41"], "more than the model's max_position_embeddings = 40"),
        (["--length", "0"], "length is 0"),
        (["--length", "2000", "--set", "max_position_embeddings=2000"], "the text is too short"),
        (
            ["--batch-size", "6", "--accumulate", "4"],
            "not a multiple of processes x accumulate = 1 x 4",
        ),
        (["--eval-loops", "1,0"], "eval_loops is 0"),
        (["--eval-loops", ""], "--eval-loops is ''"),
        (["--eval-every", "0"], "eval_every is 0"),
        (["--save-every", "-1"], "save_every is -1"),
        (["--eval-windows", "0"], "eval_windows is 0"),
        (["--keep", "0"], "keep is 0"),
        (["--packing", "document"], "packing is 'document'; did you mean 'documents'?"),
        (["--spike-guard", "1"], "spike_guard is 1.0; it must be above 1"),
        (["--schedule", "cosin"], "did you mean 'cosine'"),
        (["--loop-distribution", "inverse"], "did you mean 'inverse_flops'"),
        (["--backprop-loops", "0"], "backprop_loops is 0"),
        (["--init", "nowhere"], "--init brings its own configuration and tokenizer; leave out --set"),
        (["--backprop-loops", "1", "--set", "also=2:1"], "backprop_loops needs a model with one looped block"),
        (["--sft", "--packing", "documents"], "sft holds its answers in memory"),
        (["--sft"], "is not a .jsonl file"),
        (["--t-start", "0.4"], "--t-start does nothing without --t-ramp; leave it out"),
        (["--t-ramp", "0.4"], "--t-ramp does nothing without --t-start; leave it out"),
        (["--vocab-size", "300"], "--vocab-size does nothing without --tokenizer bpe"),
        (["--vocab-size", "300", "--tokenizer", "byte"], "--vocab-size does nothing without --tokenizer bpe"),
        (["--prompt-key", "q"], "--prompt-key does nothing without --sft"),
        (["--answer-key", "a"], "--answer-key does nothing without --sft"),
        (["--matrix-lr", "0.1"], "--matrix-lr does nothing without --optimizer muon"),
        (["--decay", "constant", "--decay-share", "0.1"], "--decay-share does nothing with --decay constant"),
        (["--loops", "2", "--loop-distribution", "uniform"], "--loop-distribution does nothing with --loops"),
    ],
)
def test_train_refuses_before_it_makes_anything(capsys, text, tmp_path, words, message):
    status, out, err = run(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)
    assert status == 2 and message in err and err.count("\n") == 1
    late = ("comes from the tokenizer", "too short", "256 bytes")  # said when the text has been read
    assert any(text in message for text in late) or out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"", "is empty"), (b"a\0b", "NUL"), (b"\xff", "not UTF-8")]
)
def test_train_refuses_files(capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert message in refused(capsys, "train", "--data", tmp_path / "text", "--out", tmp_path / "run", *QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_a_run_that_did_not_begin(text, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(text_run.Corpus, "build", fail)
    with pytest.raises(error):
        text_run.train(tmp_path / "run", Recipe(), Settings(data=[str(text)], length=16))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_corpus_that_was_built_stays_unless_the_user_was_wrong(text, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(text_run, "Trainer", fail)
        text_run.train(tmp_path / "run", Recipe(steps=2), Settings(data=[str(text)], length=16))
    assert (tmp_path / "run" / "data" / "meta.json").exists() == (error is not InputError)
    if error is not InputError:
        assert text_run.resume(tmp_path / "run").step == 2


def test_train_never_touches_a_folder_that_holds_something(capsys, text, copy):
    before = files(copy)
    assert "already holds a run" in refused(capsys, "train", "--data", text, "--out", copy, *QUICK)
    assert files(copy) == before
    assert "cannot write to" in refused(capsys, "train", "--data", text, "--out", text, *QUICK)
    assert "cannot write to" in refused(capsys, "train", "--data", text, "--out", text / "below", *QUICK)
    assert text.read_text() == TEXT


def signals(monkeypatch, step, *numbers):
    """Send these signals to this process while the batch of a step (from 0) is made."""
    batch = Corpus.batch

    def interrupted(self, seed, at, index, **options):
        if at == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return batch(self, seed, at, index, **options)

    monkeypatch.setattr(Corpus, "batch", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(capsys, text, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    held = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    signals(monkeypatch, 2, number)
    status, printed, _ = run(capsys, "train", "--data", text, "--out", out, *QUICK, "--save-every", "100", "--ema", "0")
    assert status == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == held
    go_on = f"Go on with it: loopmdm train --resume {out}"
    assert f"Stopped after step 3 of 4; what was learnt so far is saved. {go_on}\n" in printed
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [2]  # no evaluation that the whole run has not
    assert Checkpoints(out / "checkpoints").steps() == [3]
    three, _ = load(out)
    monkeypatch.undo()
    assert run(capsys, "train", "--resume", out)[0] == 0
    assert not torch.equal(three.embed.weight, load(out)[0].embed.weight)


def test_a_second_ctrl_c_stops_at_once(capsys, text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    signals(monkeypatch, 2, signal.SIGTERM, signal.SIGINT)
    status, printed, err = run(capsys, "train", "--data", text, "--out", out, *QUICK)
    assert (status, err) == (130, "loopmdm: interrupted\n")
    assert f"Stopped at once in step 3; the checkpoint of step 2 is in {out}: loopmdm train --resume {out}" in printed
    assert Checkpoints(out / "checkpoints").steps() == [2]
    monkeypatch.undo()
    assert run(capsys, "train", "--resume", out)[0] == 0


def test_a_signal_that_the_process_ignores_stays_ignored(capsys, text, tmp_path, monkeypatch):
    """As under nohup, or in a shell's background."""
    signals(monkeypatch, 2, signal.SIGINT)
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK)[0] == 0
    finally:
        signal.signal(signal.SIGINT, held)


def test_ctrl_c_from_outside(text, tmp_path):
    """A real SIGINT to a real process, sent after its first evaluation."""
    command = [sys.executable, "-u", "-m", "loopmdm.cli", "train", "--data", text, "--out", tmp_path / "run", *QUICK]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "100000", "--save-every", "50000"],
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore SIGINT, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Sample from it: loopmdm sample" in rest
    load(tmp_path / "run")


def test_a_terminal_that_goes_away(text, tmp_path):
    """A hang-up: the step in progress ends and is saved, though nothing can be printed any more."""
    ours, theirs = os.openpty()

    def own_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "loopmdm.cli", "train", "--data", text, "--out", tmp_path / "run", *QUICK]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "100000", "--eval-every", "20", "--save-every", "50000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    try:
        shown = b""
        while b"validation" not in shown.partition(b"Training:")[2]:
            shown += os.read(ours, 4096)
        os.close(ours)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert len(Checkpoints(tmp_path / "run" / "checkpoints").steps()) == 1
    load(tmp_path / "run")


def test_divergence_keeps_the_last_checkpoint(capsys, text, tmp_path):
    words = ["--steps", "20", "--lr", "1e36", "--save-every", "1", "--eval-every", "20", "--clip", "1e9", "--ema", "0"]
    said = refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)
    assert re.search(
        r"(loss|norm) became (nan|inf) at step 1\d, the 10th update in a row that had to be skipped; lower the "
        r"learning rate; the checkpoint of step \d+ is in",
        said,
    )
    load(tmp_path / "run")


def test_a_full_disk_is_a_sentence(capsys, text, tmp_path, monkeypatch):
    def full(self, folder, **_):
        if Checkpoints(tmp_path / "run" / "checkpoints").steps() == [2, 4]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoopMDM, "save_pretrained", full)
    said = refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK)
    out = tmp_path / "run"
    assert said == (
        f"writing to {out} failed at step 4 (No space left on device); the checkpoint of step 4 is in {out}: "
        f"loopmdm train --resume {out}"
    )


@pytest.mark.slow
def test_two_processes_write_one_run(text, tmp_path):
    """With truncated backprop and the plain boundary, where the prelude has no gradient in some steps."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "loopmdm.cli"]
    words = ["train", "--data", str(text), *QUICK, "boundary=plain", "--steps", "6", "--accumulate", "2"]
    words += ["--backprop-loops", "1", "--checkpoint-loops", "--out"]
    assert cli.main([*words, str(tmp_path / "one")]) == 0
    for taken in (False, True):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *words, "two"], cwd=tmp_path, env=env, capture_output=True, text=True)
        if taken:
            assert done.returncode and "already holds a run" in done.stderr
        else:
            assert done.returncode == 0 and done.stdout.count("Sample from it") == 1, done.stderr
    assert len(read(tmp_path / "two" / "checkpoints" / "step-000006")["generators"]) == 2  # there were two
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert b["valid_bits"] == pytest.approx(a["valid_bits"], rel=1e-3)
        assert b["train_bits"] == pytest.approx(a["train_bits"], rel=1e-3)
        assert b["flops"] == a["flops"]


def test_presets_are_all_offered(capsys):
    _, out, _ = run(capsys, "train", "--help")
    assert all(name in "".join(out.split()) for name in PRESETS)
    assert "(default 0.0003)" in out and "--accumulate" in out


@pytest.mark.parametrize("kind", [Recipe, Settings])
def test_every_field_is_described_and_an_option(capsys, kind):
    names = {field.name for field in fields(kind)}
    assert set(common.described(kind)) == names
    _, out, _ = run(capsys, "train", "--help")
    assert [name for name in names if f"--{name.replace('_', '-')} " not in out.replace("\n", " ")] == []


def test_packing_schedules_and_a_shared_cache(capsys, monkeypatch, text, tmp_path):
    measured, seen = monitor.nelbo_by_loops, []

    def watched(*args, **options):
        seen.append(options["document_ids"])
        return measured(*args, **options)

    monkeypatch.setattr(monitor, "nelbo_by_loops", watched)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"body": line}) + "\n" for line in TEXT.splitlines()))
    words = ["--data", f"{jsonl}#body", "--valid", text, "--cache", tmp_path / "cache", "--packing", "documents"]
    ways = (
        "--schedule cosine --loop-distribution inverse_flops --backprop-loops 1 --checkpoint-loops --deep-supervision"
    )
    for name in ("a", "b"):
        status, out, err = run(capsys, "train", *words, "--out", tmp_path / name, *QUICK, *ways.split())
        assert status == 0, err
        assert ("reusing" in out) == (name == "b") and not (tmp_path / name / "data").exists()
    assert seen and all(documents is not None for documents in seen)
    a, b = (files(tmp_path / name) for name in "ab")
    assert a["metrics.jsonl"] == b["metrics.jsonl"] and a["model/model.safetensors"] == b["model/model.safetensors"]


def test_fine_tuning_on_answers(capsys, trained, tmp_path):
    """From a saved model: its tokenizer, prompts never masked, every answer's sequence weighing the same."""
    data = tmp_path / "qa.jsonl"
    rows = [{"q": f"the cat sat{'.' * (i % 3)}", "a": "the dog" if i % 2 else "on the log."} for i in range(45)]
    rows.append({"q": "the cat " * 9, "a": "too long"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = ["--sft", "--prompt-key", "q", "--answer-key", "a", "--init", trained, "--data", data]
    few = [*QUICK[:4], "--length", "30", "--warmup", "0", "--eval-every", "2", "--ema", "0"]
    status, out, err = run(capsys, "train", *ours, "--out", tmp_path / "run", *few)
    assert status == 0, err
    assert "Data: left out 1 of 46 pairs that do not fit in 30 tokens" in out
    assert "Answers: 30 to train on and 15 held out" in out and "bits a token" in out  # one of three prompts
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["average"] == "sequence"
    before, tokenizer = load(trained)
    after, same = load(tmp_path / "run")
    assert same.to_str() == tokenizer.to_str() and not torch.equal(before.embed.weight, after.embed.weight)

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    whole = files(tmp_path / "run")
    assert run(capsys, "train", "--resume", tmp_path / "run")[0] == 0
    again = files(tmp_path / "run")
    assert all(again[name] == whole[name] for name in ("metrics.jsonl", "model/model.safetensors"))
    assert "--sft True does not go" in refused(capsys, "train", "--resume", trained, "--sft")
    assert "has no key 'prompt'" in refused(
        capsys, "train", "--sft", "--data", data, "--out", tmp_path / "new", *few, "--init", trained
    )
    for name, value in (("--tokenizer", "bpe"), ("--preset", "tiny-dit"), ("--vocab-size", "300")):
        assert f"leave out {name}" in refused(capsys, "train", *ours, "--out", tmp_path / "new", *few, name, value)
    short = ["--length", "5", *few[:4]]
    assert "of 46 pairs 0 fit in 5 tokens" in refused(capsys, "train", *ours, "--out", tmp_path / "new", *short)
    assert not (tmp_path / "new").exists()


def test_answers_are_counted_and_prompts_are_not(tmp_path):
    data = tmp_path / "qa.jsonl"
    rows = [{"prompt": "ab" * (1 + i % 3), "answer": "c" * (1 + i % 4)} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    feed = AnswerFeed(SFTData.from_jsonl(data, "char", 12), seed=0, batch_size=4, windows=5)
    assert (len(feed.data.train), len(feed.valid.tokens), feed.vocab_size, feed.mask_id) == (16, 5, 5, 4)
    for step in range(4):
        got = feed.batch(step, torch.arange(4))
        for tokens, answer in zip(got.tokens.tolist(), got.maskable.tolist(), strict=True):
            asked = [t for t, counted in zip(tokens, answer, strict=True) if not counted]
            said = tokens[len(asked) :]
            assert asked and set(asked) <= {0, 1} and set(said) == {2, 3} and said.index(3) == said.count(2)
    rest = torch.arange(2, 4)
    for step in (0, 3):
        want = feed.data.batch(0, step, rest, batch_size=4).tokens
        assert torch.equal(feed.batch(step, torch.arange(4)).tokens[2:], want)
        assert torch.equal(feed.batch(step, rest).tokens, want)
    rows[-1]["prompt"] = "ba" * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert AnswerFeed(SFTData.from_jsonl(data, "char", 12), 0, 4, 5).sha256 != feed.sha256


def test_the_progress_bar_names_the_unit():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with monitor.bar(console, 0, 4, "token"):
        pass
    assert "bits a token" in console.file.getvalue()


def test_a_model_whose_ids_are_others_is_refused(capsys, text, trained, tmp_path):
    live(tiny(vocab_size=12)).save_pretrained(tmp_path / "model")
    build_tokenizer("char", "abcdefghij").save(str(tmp_path / "model" / "tokenizer.json"))
    words = ["--data", text, "--init", tmp_path / "model", "--out", tmp_path / "run", "--length", "16"]
    assert "is not among the tokenizer's 10" in refused(capsys, "train", *words)
    for letters in ("abcdefghijkl", "abcdefghijk", "abc"):  # the mask among the tokenizer's ids, next to them, far off
        build_tokenizer("char", letters).save(str(tmp_path / "model" / "tokenizer.json"))
        size = len(letters)
        assert refused(capsys, "train", *words) == (
            f"{tmp_path / 'model'} cannot be trained on text: a corpus takes its tokenizer's {size} ids, then {size} "
            f"as the end of a document and {size + 1} as the mask; the model has 12 ids, 11 as its mask"
        )
    assert not (tmp_path / "run").exists()
    status, _, err = run(capsys, "train", "--data", text, "--init", trained, "--out", tmp_path / "on", *QUICK[:8])
    assert status == 0, err

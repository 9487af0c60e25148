"""The command line: what each command makes and prints, and one clear sentence for everything that is wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from loopmdm import cli
from loopmdm.cli import common
from loopmdm.config import PRESETS, ModelConfig, preset
from loopmdm.diffusion import nelbo
from loopmdm.lab import text_run
from loopmdm.lab.data import TextData
from loopmdm.lab.train import Recipe
from loopmdm.model.lm import LoopMDM
from loopmdm.ops.contract import all_ops

TEXT = "the [red]cat[/red] sat on the mat.\nthe dog sat on the log.\n" * 40
SMALL = (
    "hidden_size=32 intermediate_size=48 num_hidden_layers=3 num_attention_heads=4 length=1 max_loops=3 "
    "max_position_embeddings=40 initializer_range=0.3"
)
QUICK = f"--steps 4 --batch-size 4 --length 16 --warmup 0 --eval-every 2 --set {SMALL}".split()


def run(capsys, *words):
    """(exit status, stdout, stderr) of `loopmdm WORDS`."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words):
    """The one sentence that `loopmdm WORDS` ends with."""
    status, _, err = run(capsys, *words)
    assert status == 2 and err.startswith("loopmdm: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("loopmdm: ").rstrip()


def shell(*words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "loopmdm.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run's folder; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", str(text), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained / "model", tmp_path / "copy"))


# The command line itself


def test_help_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from loopmdm.cli import main; status = main(['--help']); "
        "print(status, [m for m in ('torch', 'numpy', 'rich', 'accelerate', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_no_command_shows_the_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0 and "COMMAND" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and f"usage: loopmdm {command}" in out


def test_version(capsys):
    import loopmdm

    assert run(capsys, "--version")[:2] == (0, f"loopmdm {loopmdm.__version__}\n")


def test_bad_command_lines(capsys):
    assert refused(capsys, "trian") == "unknown command 'trian'; did you mean 'train'?"
    assert "required: --data, --out; see `loopmdm train --help`" in refused(capsys, "train")
    assert "unrecognized arguments: --jsn" in refused(capsys, "info", "--jsn")
    assert "invalid int value: 'x'" in refused(capsys, "flops", "--length", "x")


def test_a_terminal_of_few_characters(tmp_path):
    done = shell("flops", "--preset", "tiny-llama", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "p(S) \\u221d 1/F(S)" in done.stdout


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["flops"], 1)])
def test_a_reader_that_leaves(tmp_path, words, status):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "loopmdm.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (status, "")


def instead(monkeypatch, command, action):
    monkeypatch.setattr(import_module(f"loopmdm.cli.{command}"), "run", action)


def test_interrupted_elsewhere(capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    instead(monkeypatch, "info", stop)
    assert run(capsys, "info") == (130, "", "loopmdm: interrupted\n")


@pytest.mark.parametrize("package", ["tokenizers", "rich.console", "accelerate"])
def test_a_missing_package_names_the_extra(capsys, monkeypatch, text, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "loopmdm.lab.text_run")
    monkeypatch.delattr("loopmdm.lab.text_run")
    said = refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK)
    assert said == f'this needs {package.partition(".")[0]}; pip install "loopmdm[train]"'
    assert not (tmp_path / "run").exists()


def test_a_missing_package_of_the_demo_and_a_bug(capsys, monkeypatch):
    def missing(name):
        def action(_):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return action

    instead(monkeypatch, "demo", missing("rich.console"))
    assert refused(capsys, "demo") == 'this needs rich; pip install "loopmdm[demo]"'
    instead(monkeypatch, "demo", missing("elsewhere"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


# info, selfcheck, flops, demo


def test_info(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0 and all(name in out for name in all_ops())
    status, out, _ = run(capsys, "info", "--json")
    assert status == 0 and set(json.loads(out)["ops"]) == set(all_ops())


def test_selfcheck_reports_every_implementation(capsys):
    status, out, _ = run(capsys, "selfcheck")
    assert status == 0, out
    for name, op in all_ops().items():
        for impl in op.impls:
            found = re.search(rf"^{name} +{impl} .*(ok|not run: .+)$", out, re.MULTILINE)
            assert (found is None) == (impl == "torch"), (name, impl)
    assert re.search(r"against torch: [1-9]\d* ok, 0 failed, \d+ not run", out)


@pytest.mark.parametrize("how", ["differs", "dies"])
def test_selfcheck_fails(capsys, monkeypatch, how):
    def deviation(self, impl, device, dtype, seed=0):
        if how == "dies":
            raise RuntimeError("launch failed\nwith details")
        return 0.5

    monkeypatch.setattr(type(next(iter(all_ops().values()))), "deviation", deviation)
    status, out, _ = run(capsys, "selfcheck")
    assert status == 1 and re.search(r"\d+ ok, [1-9]\d* failed", out)
    wanted = "5.0e-01" if how == "differs" else "failed: RuntimeError: launch failed\n"
    assert wanted in out and "with details" not in out


def test_flops_of_the_paper_s_model(capsys):
    assert "169,627,218 parameters, 12 layers of which 1..2" in run(capsys, "flops", "--preset", "paper-170m")[1]
    counted = ["flops", "--set", "vocab_size=50257", "--length", "1024"]
    _, out, _ = run(capsys, *counted, "--convention", "head+embedding")
    assert "mean 6.500: 655,420\n" in out and "mean 5.724: 688,915\n" in out
    _, out, _ = run(capsys, *counted, "--baseline-steps", "2000000")
    assert "mean 6.500: 1,198,87" in out  # twice 599,438 and the rounding
    assert "mean 6.500: 599,438\n" in run(capsys, *counted)[1]


def test_flops_of_other_models(capsys):
    status, out, _ = run(capsys, "flops", "--preset", "tiny-llama", "--set", "max_loops=8", "start=0", "--loops", "1,5")
    assert status == 0 and "4 layers of which 0..1" in out and "U{1..8}" in out
    assert [row.split()[:2] for row in out.splitlines()[3:5]] == [["1", "4"], ["5", "12"]]
    once, five = (float(re.search(rf"^{S} +\d+ +([\d.]+) M", out, re.MULTILINE)[1]) for S in (1, 5))
    _, none, _ = run(capsys, "flops", "--preset", "tiny-llama", "--loops", "1,5", "--convention", "none")
    assert five > once and none != out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "paper-17m"], "unknown preset 'paper-17m'; did you mean 'paper-170m'?"),
        (["--set", "bondary=plain"], "unknown configuration key 'bondary'; did you mean 'boundary'?"),
        (["--set", "max_loops"], "--set takes KEY=VALUE, not 'max_loops'"),
        (["--set", "max_loops=two"], "max_loops is 'two'; it must be a whole number"),
        (["--set", "norm_eps=small"], "norm_eps is 'small'; it must be a number"),
        (["--set", "qkv_bias=maybe"], "qkv_bias is 'maybe'; it must be true or false"),
        (["--set", "max_loops=0"], "max_loops is 0"),
        (["--set", "start=11"], "the looped block covers layers 11..12, but the model has 12 layers"),
        (["--set", "start=-1"], "starts at layer -1"),
        (["--loops", "0"], "loops is 0"),
        (["--loops", "1,,2"], "--loops is '1,,2'; it must be whole numbers with commas between"),
        (["--length", "0"], "length is 0"),
        (["--baseline-steps", "0"], "baseline_steps is 0"),
        (["--convention", "heads"], "unknown FLOPs convention 'heads'; did you mean 'head'?"),
    ],
)
def test_flops_refuses(capsys, words, message):
    assert message in refused(capsys, "flops", *words)


def test_set_reads_values_by_the_field_s_type():
    words = "max_loops=6 loop.boundary=plain dropout=0.25 qkv_bias=True head_bias=no num_key_value_heads=None"
    got = common.overrides([*words.split(), "mask_token_id = 3", "norm=layernorm"])
    assert got == {
        "max_loops": 6,
        "boundary": "plain",
        "dropout": 0.25,
        "qkv_bias": True,
        "head_bias": False,
        "num_key_value_heads": None,
        "mask_token_id": 3,
        "norm": "layernorm",
    }
    config = preset("tiny-llama", **got)
    assert isinstance(config, ModelConfig) and config.loop.max_loops == 6 and config.dropout == 0.25


def test_demo_hands_its_options_over(capsys, monkeypatch):
    from loopmdm.lab import demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda **options: calls.append(options))
    assert run(capsys, "demo")[0] == 0
    words = "--task text --data a b --compare --seed 3 --scale 0.5 --out o"
    assert run(capsys, "demo", *words.split())[0] == 0
    none = {"task": None, "data": None, "compare": False, "seed": 0, "scale": 1.0, "out": None}
    assert calls == [none, {"task": "text", "data": ["a", "b"], "compare": True, "seed": 3, "scale": 0.5, "out": "o"}]


# train


def test_train_makes_what_it_says(capsys, text, trained, tmp_path):
    out = tmp_path / "[red]run"  # printed as it is, no markup
    status, printed, err = run(capsys, "train", "--data", text, "--out", out, *QUICK)
    assert status == 0, err
    assert f"loopmdm sample {out}\n" in printed and f"In {out}: model/" in printed
    assert set(files(out)) == {
        "metrics.jsonl",
        "timing.jsonl",
        "recipe.json",
        *(f"model/{name}" for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json")),
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

    same = {name: held for name, held in files(out).items() if name not in ("timing.jsonl",)}
    assert same == {name: held for name, held in files(trained).items() if name in same}


def test_validation_bits_are_bits_a_character(capsys, text, tmp_path):
    words = ["--tokenizer", "bpe", "--vocab-size", "270"]
    assert run(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)[0] == 0
    model, tokenizer = text_run.load(tmp_path / "run")
    corpus = TextData.from_text(TEXT, tokenizer, 16)
    assert corpus.characters_per_token > 1.1
    bits = lines(tmp_path / "run" / "metrics.jsonl")[-1]["valid_bits"]
    for S, got in bits.items():
        nats = float(nelbo(model, corpus.valid_windows(128), num_loops=int(S), seed=0).nelbo)
        assert got == pytest.approx(nats / math.log(2) / corpus.characters_per_token, rel=1e-4)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_train_with_other_tokenizers(capsys, text, tmp_path, kind):
    words = ["--tokenizer", kind, "--vocab-size", "270", "--eval-loops", "3,1", "--eval-windows", "2", "--ema", "0"]
    status, out, err = run(capsys, "train", "--data", text, text, "--out", tmp_path / "run", *QUICK, *words)
    assert status == 0, err
    assert list(lines(tmp_path / "run" / "metrics.jsonl")[0]["valid_bits"]) == ["1", "3"]
    model, tokenizer = text_run.load(tmp_path / "run")
    assert model.vocab_size == {"byte": 257, "bpe": 271}[kind] == tokenizer.get_vocab_size() + 1
    assert "model/ (the weights and" in out


def test_warns_when_loops_do_nothing(capsys, text, tmp_path, monkeypatch):
    one = ["--steps", "1", "--eval-every", "1"]  # a zero-initialised head after one step: S cannot matter yet
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
        monkeypatch.setattr(text_run, "nelbo_by_loops", lambda *a, values=values, **k: values)
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
        (["--length", "2000"], "the text is too short"),
        (
            ["--batch-size", "6", "--accumulate", "4"],
            "not a multiple of processes x accumulate = 1 x 4",
        ),
        (["--eval-loops", "1,0"], "eval_loops is 0"),
        (["--eval-loops", ""], "--eval-loops is ''"),
        (["--eval-every", "0"], "eval_every is 0"),
        (["--save-every", "-1"], "save_every is -1"),
        (["--eval-windows", "0"], "eval_windows is 0"),
    ],
)
def test_train_refuses_before_it_makes_anything(capsys, text, tmp_path, words, message):
    assert message in refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"", "is empty"), (b"a\0b", "NUL"), (b"\xff", "not UTF-8")]
)
def test_train_refuses_files(capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert message in refused(capsys, "train", "--data", tmp_path / "text", "--out", tmp_path / "run", *QUICK)
    assert not (tmp_path / "run").exists()


def test_train_never_touches_a_folder_that_holds_something(capsys, text, copy):
    before = files(copy)
    assert "already holds a run" in refused(capsys, "train", "--data", text, "--out", copy, *QUICK)
    assert files(copy) == before
    assert "cannot write to" in refused(capsys, "train", "--data", text, "--out", text, *QUICK)
    assert "cannot write to" in refused(capsys, "train", "--data", text, "--out", text / "below", *QUICK)
    assert text.read_text() == TEXT


def test_ctrl_c_saves(capsys, text, tmp_path, monkeypatch):
    batch = TextData.batch

    def stop(self, seed, step, index):
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, seed, step, index)

    monkeypatch.setattr(TextData, "batch", stop)
    out = tmp_path / "run"
    status, printed, _ = run(capsys, "train", "--data", text, "--out", out, *QUICK, "--save-every", "100", "--ema", "0")
    assert status == 130 and "Stopped after step 3 of 4; what was learnt so far is saved." in printed
    model, _ = text_run.load(out)
    monkeypatch.setattr(TextData, "batch", batch)
    run(capsys, "train", "--data", text, "--out", tmp_path / "full", *QUICK, "--ema", "0")
    full, _ = text_run.load(tmp_path / "full")
    assert not torch.equal(model.embed.weight, full.embed.weight)


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
    text_run.load(tmp_path / "run")


def test_divergence_keeps_the_last_checkpoint(capsys, text, tmp_path):
    words = ["--steps", "8", "--lr", "1e36", "--save-every", "1", "--clip", "1e9", "--ema", "0"]
    said = refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK, *words)
    assert re.search(
        r"(loss|norm) became (nan|inf) at step \d; lower the learning rate; the checkpoint of step \d is in", said
    )
    text_run.load(tmp_path / "run")


def test_a_full_disk_is_a_sentence(capsys, text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoopMDM, "save_pretrained", full)
    assert "No space left" in refused(capsys, "train", "--data", text, "--out", tmp_path / "run", *QUICK)


@pytest.mark.slow
def test_two_processes_write_one_run(text, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "loopmdm.cli"]
    words = ["train", "--data", str(text), *QUICK, "--steps", "6", "--accumulate", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("two", launch), ("one", [sys.executable, "-m", "loopmdm.cli"])):
        command = [*start, *words, "--out", name]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Sample from it") == 1
        if name == "two":
            taken = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert taken.returncode and "already holds a run" in taken.stderr
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == [2, 4, 6]
    for a, b in zip(one, two, strict=True):
        assert b["valid_bits"] == pytest.approx(a["valid_bits"], rel=1e-3)
        assert b["train_bits"] == pytest.approx(a["train_bits"], rel=1e-3)
        assert b["flops"] == a["flops"]


# sample


def test_sample_prints_text_and_one_line(capsys, trained):
    words = ["--prompt", "the [red]cat", "--num-samples", "2", "--steps", "6", "--loops", "2", "--max-new-tokens", "10"]
    status, out, err = run(capsys, "sample", trained, *words)
    assert status == 0, err
    assert out.count("the [red]cat") == 2  # no markup
    assert "--- sample 1, seed 0\n" in out and "--- sample 2, seed 1\n" in out
    last = out.splitlines()[-1]
    assert re.fullmatch(r"20 tokens, [\d,]+ tokens/s, nfe [1-6], mean loops 2\.00, [\d.]+ [kMG]FLOP", last)
    assert run(capsys, "sample", trained / "model", *words)[1].splitlines()[:-1] == out.splitlines()[:-1]
    assert run(capsys, "sample", trained, *words, "--seed", "5")[1].splitlines()[:-1] != out.splitlines()[:-1]


def test_sample_is_generate(capsys, trained):
    import loopmdm

    model, tokenizer = text_run.load(trained)
    want = loopmdm.generate(model, [[]], max_new_tokens=40, steps=3, policy="confidence", num_loops=3, seed=0)
    _, out, _ = run(capsys, "sample", trained, "--steps", "3", "--policy", "confidence")  # fills the model's length
    assert out.rpartition("\n\n")[0] == text_run.printable(tokenizer.decode(want.tokens[0].tolist()))


def test_sample_leaves_room_for_the_prompt(trained):
    texts, made = text_run.sample(trained, "the dog sat on the log.")
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
    ],
)
def test_sample_refuses(capsys, trained, words, message):
    assert message in refused(capsys, "sample", trained, *words)


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
    assert text_run.printable("a\x1b[31m\r\0\x9bé\n\t日\u202e👩\u200d👧\x7f") == (
        "a\\x1b[31m\\r\\x00\\x9bé\n\t日\\u202e👩\u200d👧\\x7f"
    )
    assert text_run.printable("\udc80 [red]\\x1b") == "\\udc80 [red]\\x1b"


def test_sample_escapes_what_would_move_the_cursor(capsys, trained, monkeypatch):
    monkeypatch.setattr(text_run, "decode", lambda *_: "a\x1b[2Jb")
    _, out, _ = run(capsys, "sample", trained, "--max-new-tokens", "1")
    assert out.startswith("a\\x1b[2Jb\n")


def test_presets_are_all_offered(capsys):
    _, out, _ = run(capsys, "train", "--help")
    assert all(name in "".join(out.split()) for name in PRESETS)
    assert "(default 0.0003)" in out and "--accumulate" in out


def test_every_recipe_field_is_described():
    assert set(common.described(Recipe)) == {field.name for field in fields(Recipe)}

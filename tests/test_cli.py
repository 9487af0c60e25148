"""The command line: what each command makes and prints, and one clear sentence for everything that is wrong."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

from loopmdm import cli
from loopmdm.cli import common
from loopmdm.config import ModelConfig, preset
from loopmdm.ops.contract import all_ops

from .commands import QUICK, refused, run, shell

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
    assert "--data and --out must be given, or --resume; see `loopmdm train --help`" in refused(capsys, "train")
    said = refused(capsys, "info", "--jsn")
    assert said == "unrecognized arguments: --jsn, perhaps --json; see `loopmdm info --help`"
    assert refused(capsys, "info", "x") == "unrecognized arguments: x; see `loopmdm info --help`"
    assert "--xyz; see `loopmdm --help`" in refused(capsys, "--xyz")
    assert "invalid int value: 'x'" in refused(capsys, "flops", "--length", "x")


def test_a_terminal_of_few_characters(tmp_path):
    done = shell("flops", "--preset", "tiny-llama", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "p(S) \\u221d 1/F(S)" in done.stdout


@pytest.mark.parametrize(("words", "statuses"), [(["--help"], {0, 1}), (["flops"], {1})])
def test_a_reader_that_leaves(tmp_path, words, statuses):
    """No traceback. Whether unread help is a failure hangs on Python's version and buffering."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "loopmdm.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode in statuses and done.stderr == ""


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
    for name in ("text_run", "data"):
        monkeypatch.delitem(sys.modules, f"loopmdm.lab.{name}")
        monkeypatch.delattr(f"loopmdm.lab.{name}")
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

"""Runs that go on: kill -9 at any moment, full disks, damaged checkpoints, two trainings in one folder."""

import builtins
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState

from loopmdm import cli
from loopmdm.errors import InputError
from loopmdm.lab import run as run_module
from loopmdm.lab import state as state_module
from loopmdm.lab.corpus import Corpus
from loopmdm.lab.data import build_tokenizer
from loopmdm.lab.run import RunFolder
from loopmdm.lab.sample import load
from loopmdm.lab.state import Checkpoints, read
from loopmdm.model import checkpoint as checkpoint_module
from loopmdm.model.lm import LoopMDM

from .commands import QUICK, TEXT, files, lines, refused, run
from .helpers import live, tiny

LONG = [*QUICK, "dropout=0.1", "--steps", "12", "--save-every", "3", "--accumulate", "2", "--ema", "0.9"]
WAYS = {
    "adamw": ["--lr", "3e-3", "--weight-decay", "0.1"],
    "muon": ["--optimizer", "muon", "--objective", "masked_mean", "--spike-guard", "1.5", "--batch-size", "8"],
}


def train(out, text, *words):
    return ["train", "--data", str(text), "--out", str(out), *LONG, *map(str, words)]


def forked(action):
    """Run `action` in a child of this process, silently; returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open(os.devnull, "w") as sink:
            for stream in (1, 2):
                os.dup2(sink.fileno(), stream)
        status = action() or 0
    finally:
        os._exit(status)


def ended(pid):
    """Exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """What two runs must agree on, bit for bit."""
    checkpoints = Checkpoints(folder / "checkpoints")
    state = read(checkpoints.path(checkpoints.steps()[-1]))
    del state["monitor"]["seconds"], state["monitor"]["logs"]["timing.jsonl"]  # the clock
    return {
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "steps": [line["step"] for line in lines(folder / "timing.jsonl")],
        "checkpoints": checkpoints.steps(),
        "state": flat(state),
    }


def flat(value, name=""):
    if isinstance(value, torch.Tensor):
        return {name: value.tolist()}
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return {name: value}
    return {k: v for key, item in value for k, v in flat(item, f"{name}.{key}").items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name] == want[name], name


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """Uninterrupted runs, made when first asked for; a function of the way's name."""
    made = {}

    def get(way):
        if way not in made:
            made[way] = tmp_path_factory.mktemp("whole") / "run"
            assert cli.main(train(made[way], text, *WAYS[way])) == 0
        return made[way]

    return get


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(way, text, whole, tmp_path, monkeypatch):
    def slow(self, seed, at, index, **options):
        time.sleep(0.01)
        return batch(self, seed, at, index, **options)

    batch = Corpus.batch
    want = outcome(whole(way))
    rng, out, kills = random.Random(5), tmp_path / "run", 0
    words = train(out, text, *WAYS[way])
    monkeypatch.setattr(Corpus, "batch", slow)  # 0.24 s at least, so that the first kill cannot be late
    for _ in range(4):
        pid = forked(lambda words=words: cli.main(words))
        while not (out / "recipe.json").exists():
            time.sleep(0.005)
        time.sleep(0.2 * rng.random())
        os.kill(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
        words = ["train", "--resume", str(out)]
    assert kills
    assert cli.main(words) == 0
    assert_same(outcome(out), want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [1, 4, 11])
def test_killed_in_a_step_and_resumed_equals_uninterrupted(way, step, text, whole, tmp_path, monkeypatch, capsys):
    """Before the first checkpoint, after it, and in the last step."""

    def killed(self, seed, at, index, **options):
        if at == step and int(index[0]):  # in the second micro-batch
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, seed, at, index, **options)

    batch = Corpus.batch
    monkeypatch.setattr(Corpus, "batch", killed)
    out = tmp_path / "run"
    assert ended(forked(lambda: cli.main(train(out, text, *WAYS[way])))) == -signal.SIGKILL
    monkeypatch.undo()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": ')  # a line cut short
    torch.manual_seed(99)
    status, printed, _ = run(capsys, "train", "--resume", out)
    assert status == 0 and ("there is no checkpoint yet" if step == 1 else f"from step {step // 3 * 3}") in printed
    assert_same(outcome(out), outcome(whole(way)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signalled_and_resumed_equals_uninterrupted(number, text, whole, tmp_path, monkeypatch):
    batch = Corpus.batch

    def signalled(self, seed, at, index, **options):
        if at == 6 and not int(index[0]):
            os.kill(os.getpid(), number)
        return batch(self, seed, at, index, **options)

    monkeypatch.setattr(Corpus, "batch", signalled)
    assert cli.main(train(tmp_path / "run", text, *WAYS["muon"])) == 128 + number
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [6, 7]
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    got, want = outcome(tmp_path / "run"), outcome(whole("muon"))
    assert_same(got, want)


# A save, interrupted everywhere

SAVING = [state_module.__file__, run_module.__file__, checkpoint_module.__file__, shutil.__file__]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """A kill of a process loses nothing of what it wrote; only a power cut would, and no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder after one save, the second save, and models 1 and 2 as `from_pretrained` gives them."""
    path = tmp_path_factory.mktemp("save") / "run"
    models = [live(tiny(vocab_size=12), seed=seed) for seed in (1, 2)]
    tokenizer = build_tokenizer("char", "abcdefghij")

    def save(folder, number):
        state = {"step": number, "weights": models[number - 1].embed.weight.detach(), "much": torch.zeros(20000)}
        folder.checkpoints(keep=1).save(number, state)
        folder.save(models[number - 1], tokenizer)

    with RunFolder(path, {"steps": 3}) as folder:
        save(folder, 1)
    return path, save, models


def traced(action, at, what):
    """Do `what` when `action` comes to its `at`-th line in the files that save; returns how many lines there were.

    A loop's lines count when they are met for the first, second and tenth time.
    """
    seen, visits = 0, Counter()

    def line(frame, event, _):
        nonlocal seen
        place = frame.f_code.co_filename, frame.f_lineno
        visits[place] += event == "line"
        if event == "line" and visits[place] in (1, 2, 10):
            seen += 1
            if seen == at:
                what()
        return line

    def call(frame, event, _):
        return line if frame.f_code.co_filename in SAVING else None

    sys.settrace(call)
    try:
        action()
    finally:
        sys.settrace(None)
    return seen


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def whole_after(path, save, models):
    """Check what an interrupted second save left, and that the run can go on; returns (checkpoint, model), 1 or 2."""
    model = load(path)[0]  # readable as it lies there
    held = next(i for i in (1, 2) if equal(model, models[i - 1]))
    with RunFolder.reopen(path) as folder:
        checkpoints = folder.checkpoints()
        state, complaints = checkpoints.newest()
        assert all(read(checkpoints.path(step)) for step in checkpoints.steps())  # the older one, too
        assert complaints == [] and torch.equal(state["weights"], models[state["step"] - 1].embed.weight)
        left = [p for p in path.rglob("*") if p.name.startswith((".partial-", ".save-"))]
        assert left == []
        save(folder, 2)
        assert folder.checkpoints().steps() == [2] and equal(load(path)[0], models[1])
    return state["step"], held


def test_a_kill_at_any_line_of_a_save(saved, tmp_path):
    """os._exit: nothing is tidied up, as after kill -9."""
    base, save, models = saved

    def second(path, at, what):
        with RunFolder.reopen(path) as folder:
            return traced(lambda: save(folder, 2), at, what)

    shutil.copytree(base, tmp_path / "count")
    count = second(tmp_path / "count", 0, None)
    assert count > 80
    found = []
    for at in range(1, count + 1):
        path = tmp_path / str(at)
        shutil.copytree(base, path)
        assert ended(forked(lambda path=path, at=at: second(path, at, lambda: os._exit(9)))) == 9
        found.append(whole_after(path, save, models))
        shutil.rmtree(path)
    assert found == sorted(found) and {(1, 1), (2, 1), (2, 2)} == set(found)


CALLS = [(os, name) for name in ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink")]
CALLS += [(builtins, "open"), (checkpoint_module, "save_file"), (torch, "save")]


def failing(monkeypatch, action, at):
    """Let the `at`-th call that writes, and all after it, meet a full disk; returns how many calls there were."""
    seen = 0

    def patch(owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal seen
            reads = name == "open" and owner is builtins and not set("wa+") & set(str((*args, "r")[1]))
            if not reads:
                seen += 1
                if at and seen >= at and name not in ("rmdir", "unlink", "rename"):
                    raise OSError(errno.ENOSPC, "No space left on device")
                if seen == at:
                    raise OSError(errno.EIO, "Input/output error")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    with monkeypatch.context() as monkeypatch:
        for owner, name in CALLS:
            patch(owner, name)
        action()
    return seen


def test_a_full_disk_at_any_call_of_a_save(saved, tmp_path, monkeypatch):
    base, save, models = saved
    shutil.copytree(base, tmp_path / "count")
    with RunFolder.reopen(tmp_path / "count") as folder:
        count = failing(monkeypatch, lambda: save(folder, 2), 0)
    assert count > 20
    found = []
    for at in range(1, count + 1):
        path = tmp_path / str(at)
        shutil.copytree(base, path)
        with RunFolder.reopen(path) as folder:
            try:
                failing(monkeypatch, lambda folder=folder: save(folder, 2), at)
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EIO)
        found.append(whole_after(path, save, models))
        shutil.rmtree(path)
    assert found == sorted(found) and {(1, 1), (2, 1), (2, 2)} == set(found)


def test_a_disk_that_fills_up_in_the_middle_of_a_file(saved, tmp_path):
    """A real limit on the size of files: torch's and safetensors' writers meet it in their own ways."""
    base, save, models = saved
    sizes = {p.stat().st_size for p in base.rglob("*") if p.is_file()}
    found = []
    for limit in sorted({0, 1, 700, 5000, *(s - 1 for s in sizes)}):
        path = tmp_path / str(limit)
        shutil.copytree(base, path)

        def second(path=path, limit=limit):
            with RunFolder.reopen(path) as folder:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                try:
                    save(folder, 2)
                except OSError as error:
                    return 5 if error.errno == errno.EFBIG or "File too large" in str(error) else 6

        status = ended(forked(second))
        found.append((status, whole_after(path, save, models)[0]))
    assert found[0] == (5, 1) and {status for status, _ in found} <= {0, 5}
    assert len([1 for status, _ in found if status == 5]) >= 5


def test_saving_another_model_over_a_former_one(tmp_path):
    """Where config.json changes, too, a kill at any line leaves one model or the other."""
    models = [live(tiny(), seed=1), live(tiny(boundary="anchored", norm_eps=0.1), seed=2)]
    models[0].save_pretrained(tmp_path / "base")

    def second(path, at, what):
        return traced(lambda: models[1].save_pretrained(path), at, what)

    shutil.copytree(tmp_path / "base", tmp_path / "count")
    found = []
    for at in range(1, second(tmp_path / "count", 0, None) + 1):
        path = tmp_path / str(at)
        shutil.copytree(tmp_path / "base", path)
        assert ended(forked(lambda path=path, at=at: second(path, at, lambda: os._exit(9)))) == 9
        got = LoopMDM.from_pretrained(path)
        which = [m.config == got.config and equal(m, got) for m in models]
        assert sum(which) == 1
        found.append(which.index(True))
        shutil.rmtree(path)
    assert found == sorted(found) and set(found) == {0, 1}
    # what a person changes in config.json afterwards counts
    path = tmp_path / "count"
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "norm_eps": 0.5}))
    assert LoopMDM.from_pretrained(path).config.norm_eps == 0.5


# Checkpoints


def test_rotation_keeps_the_newest_and_drops_later_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.steps() == [] and checkpoints.newest() == (None, [])
    for step in (10, 20, 1000000, 30):
        checkpoints.save(step, {"step": step})
    assert checkpoints.steps() == [20, 30] and checkpoints.newest() == ({"step": 30}, [])
    Checkpoints(tmp_path / "c", keep=1).save(30, {"step": 31})
    assert checkpoints.steps() == [30] and checkpoints.newest()[0] == {"step": 31}
    with pytest.raises(InputError, match="keep is 0"):
        Checkpoints(tmp_path / "c", keep=0)


def cut(path):
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-1])


def flipped(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def no_state(path):
    (path / "state.pt").unlink()


def no_manifest(path):
    (path / "manifest.json").unlink()


def odd_manifest(path):
    (path / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut, "state.pt is not as long as it was"),
        (flipped, "state.pt has changed"),
        (no_state, "No such file"),
        (no_manifest, "No such file"),
        (odd_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(capsys, whole, tmp_path, damage, why):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    damage(out / "checkpoints" / "step-000012")
    status, printed, _ = run(capsys, "train", "--resume", out)
    assert status == 0
    assert re.search(rf"^Note: {out}/checkpoints/step-000012 is damaged \(.*{why}.*\)\.$", printed, re.MULTILINE)
    assert "Going on from step 9." in printed
    assert_same(outcome(out), outcome(whole("adamw")))
    for name in ("step-000009", "step-000012"):
        damage(out / "checkpoints" / name)
    said = refused(capsys, "train", "--resume", out)
    assert f"no checkpoint in {out}/checkpoints can be read" in said and said.count(why) == 2


# Going on


def test_a_finished_run_has_nothing_left_to_do(capsys, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    shutil.rmtree(out / "model")  # as if the kill had come just before it was written
    status, printed, _ = run(capsys, "train", "--resume", out)
    assert status == 0 and "Going on from step 12." in printed
    assert_same(outcome(out), outcome(whole("adamw")))


def test_a_run_can_be_made_longer_where_nothing_depends_on_its_length(capsys, text, tmp_path):
    common = ["--decay", "constant", "--eval-every", "4", "--save-every", "4"]
    assert cli.main(train(tmp_path / "long", text, *common, "--steps", "8")) == 0
    assert cli.main(train(tmp_path / "short", text, *common, "--steps", "4")) == 0
    assert "fewer than the 4 of this run" in refused(capsys, "train", "--resume", tmp_path / "short", "--steps", "3")
    assert cli.main(["train", "--resume", str(tmp_path / "short"), "--steps", "8", "--keep", "1"]) == 0
    got, want = outcome(tmp_path / "short"), outcome(tmp_path / "long")
    assert got.pop("checkpoints") == [8] and want.pop("checkpoints") == [4, 8]
    assert_same(got, want)
    assert json.loads((tmp_path / "short" / "recipe.json").read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.5"], "--lr 0.5 does not go with --resume"),
        (["--lr", "0.5"], "whose run has 0.003; leave it out"),
        (["--set", "dropout=0.5"], "--set {'dropout': 0.5} does not go with"),
        (["--out", "elsewhere"], "whose run does not take it"),
        (["--data", "other.txt"], "other.txt'] does not go with"),
        (["--eval-loops", "1,2"], "--eval-loops [1, 2] does not go with"),
        (["--sft"], "--sft True does not go with"),
        (["--steps", "20"], "only with decay=constant and t_ramp=0 can a run be made longer"),
        (["--keep", "0"], "keep is 0"),
    ],
)
def test_other_settings_are_refused(capsys, whole, tmp_path, words, message):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    before = files(out)
    assert message in refused(capsys, "train", "--resume", out, *words)
    assert files(out) == before


def test_the_run_s_own_settings_may_be_repeated(capsys, text, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    words = train(out, text, *WAYS["adamw"], "--eval-loops", "1,2,3")
    words = words[: words.index("--out")] + words[words.index("--out") + 2 :]
    assert run(capsys, *words, "--resume", out)[0] == 0


def test_folders_that_hold_no_run(capsys, tmp_path, trained):
    assert "holds no run: there is no recipe.json" in refused(capsys, "train", "--resume", tmp_path)
    assert "holds no run" in refused(capsys, "train", "--resume", trained / "model")
    (tmp_path / "recipe.json").write_text("{")
    assert "cannot be read as JSON" in refused(capsys, "train", "--resume", tmp_path)
    (tmp_path / "recipe.json").write_text('{"steps": 0, "data": ["x"]}')
    assert "its recipe.json is not that of a text run (steps is 0" in refused(capsys, "train", "--resume", tmp_path)


def test_other_data_are_refused_and_missing_ones_made_again(capsys, text, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    cut(out / "checkpoints" / "step-000012")
    shutil.rmtree(out / "data")
    assert run(capsys, "train", "--resume", out)[0] == 0
    assert_same(outcome(out), outcome(whole("adamw")))
    shutil.rmtree(out / "data")
    Corpus.build([text], out / "data", "char", valid_share=0.1)
    assert "its data are not what they were when it began" in refused(capsys, "train", "--resume", out)


@pytest.mark.parametrize("way", ["cache", "init", "sft"])
def test_going_on_needs_nothing_from_outside(capsys, text, trained, tmp_path, monkeypatch, way):
    """Named by relative paths, then from another folder and with the tokenizer, the first model and the text gone."""
    home, elsewhere, out = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "run"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    shutil.copy(text, "t.txt")
    shutil.copytree(trained, "base")
    build_tokenizer("bpe", TEXT, 270).save("tok.json")
    pairs = [{"prompt": f"the cat {i}", "answer": "sat"} for i in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = {
        "cache": ["--data", "t.txt", "--cache", "cc", "--tokenizer", "tok.json", *QUICK],
        "init": ["--data", "t.txt", "--init", "base", *QUICK[: QUICK.index("--set")]],
        "sft": ["--sft", "--data", tmp_path / "qa.jsonl", "--tokenizer", "tok.json", *QUICK],
    }
    assert run(capsys, "train", *words[way], "--out", out)[0] == 0
    want = outcome(out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree("base")
    for name in ("t.txt", "tok.json"):
        os.unlink(name)
    monkeypatch.chdir(elsewhere)
    status, printed, err = run(capsys, "train", "--resume", out)
    assert status == 0 and "Going on from step 2." in printed, err
    assert_same(outcome(out), want)
    assert list(elsewhere.iterdir()) == []


def test_logs_that_have_lost_lines_and_other_threads_are_said(capsys, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    state = Checkpoints(out / "checkpoints").newest()[0]
    Checkpoints(out / "checkpoints").save(12, {**state, "threads": 7})
    (out / "metrics.jsonl").write_text("")
    _, printed, _ = run(capsys, "train", "--resume", out)
    assert re.search(r"Note: .*metrics.jsonl has lost \d+ bytes since the checkpoint was made\.", printed)
    assert "the run used 7 threads and has 1 now" in printed


def test_one_training_a_folder(capsys, text, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole("adamw"), out)
    read_end, write_end = os.pipe()

    def hold():
        folder = RunFolder.reopen(out)
        os.write(write_end, b"x")
        time.sleep(60)
        folder.close()

    pid = forked(hold)
    os.read(read_end, 1)
    try:
        said = refused(capsys, "train", "--resume", out)
        assert said == f"another training is writing to {out} (process {pid}); wait for it or end it"
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert run(capsys, "train", "--resume", out)[0] == 0


def test_tensorboard_has_every_step_once(capsys, text, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def board(folder):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    assert cli.main(train(tmp_path / "whole", text, "--tensorboard")) == 0
    batch = Corpus.batch

    def killed(self, seed, at, index, **options):
        if at == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, seed, at, index, **options)

    monkeypatch.setattr(Corpus, "batch", killed)
    assert ended(forked(lambda: cli.main(train(tmp_path / "run", text, "--tensorboard")))) == -signal.SIGKILL
    monkeypatch.undo()
    time.sleep(1.1)  # event files are named and read by the second, and a real process takes longer to start
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    got, want = board(tmp_path / "run"), board(tmp_path / "whole")
    assert got == want and [step for step, _ in got["train/grad_norm"]] == list(range(1, 13))
    assert [step for step, _ in got["valid/bits S=3"]] == [2, 4, 6, 8, 10, 12]


def test_two_processes_stop_together_and_go_on_exactly(text, whole, tmp_path, monkeypatch):
    """SIGTERM to the second process alone."""
    whole("adamw")  # what training imports is inherited by the children

    def launch(*words):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

        def process(rank):
            os.environ.update(common, RANK=rank, LOCAL_RANK=rank, ACCELERATE_USE_CPU="true")
            AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process
            return cli.main([str(word) for word in words])

        return [ended(pid) for pid in [forked(lambda rank=rank: process(rank)) for rank in "01"]]

    def signalled(self, seed, at, index, **options):
        if at == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, seed, at, index, **options)

    assert launch(*train(tmp_path / "whole", text, *WAYS["adamw"])) == [0, 0]
    batch = Corpus.batch
    monkeypatch.setattr(Corpus, "batch", signalled)
    assert launch(*train(tmp_path / "run", text, *WAYS["adamw"])) == [143, 143]
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [3, 5] and len(read(checkpoints.path(5))["generators"]) == 2
    assert launch("train", "--resume", tmp_path / "run") == [0, 0]
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))

"""The training loop: reproducible, the same however a step is shared out, and stoppable without loss."""

import copy
import functools
import json
import math
import os
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from loopmdm.diffusion import T_MIN, NELBOLoss, nelbo, sample_loops
from loopmdm.errors import InputError
from loopmdm.lab import train as train_module
from loopmdm.lab.corpus import Sequences
from loopmdm.lab.data import TextData, build_tokenizer
from loopmdm.lab.optim import SpikeGuard
from loopmdm.lab.recipe import Recipe
from loopmdm.lab.run import RunFolder
from loopmdm.lab.train import Trainer, accelerator_for, fit, micro_batch
from loopmdm.model.flops import inverse_flops_loops, training_flops
from loopmdm.model.lm import LoopMDM

from .helpers import live, tiny

TEXT = "the cat sat on the mat. the dog sat on the log. " * 60
FAST = {"steps": 4, "batch_size": 8, "lr": 3e-3, "warmup": 0, "ema": 0.0}


@pytest.fixture(scope="module")
def corpus():
    return TextData.from_text(TEXT, build_tokenizer("char", TEXT), 12)


def config(corpus, **changes):
    return tiny(**{"vocab_size": corpus.mask_id + 1, "boundary": "anchored", **changes})


def batches(corpus, seed=0):
    return lambda step, index: corpus.batch(seed, step, index)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(corpus, recipe, **changes):
    return weights(fit(live(config(corpus, **changes)), batches(corpus), recipe))


def test_loss_falls_and_the_average_beats_chance(corpus):
    torch.manual_seed(0)
    seen = []
    recipe = Recipe(steps=120, batch_size=16, optimizer="muon", lr=1e-2, warmup=10, ema=0.9)
    model = LoopMDM(config(corpus, initializer_range=0.3))
    average = fit(model, batches(corpus), recipe, on_step=lambda p: seen.append(p.nelbo))
    assert average is not model and not average.training
    assert seen[0] == pytest.approx(math.log(corpus.mask_id), abs=0.7)  # a zero head is uniform
    assert sum(seen[-20:]) / 20 < 0.75 * sum(seen[:5]) / 5
    held = nelbo(average, corpus.batch(1, 0, torch.arange(64)), num_loops=3).nelbo
    assert held < 0.6 * math.log(corpus.mask_id)


def test_equal_runs_are_bit_identical(corpus):
    recipe = Recipe(**{**FAST, "ema": 0.9})
    assert torch.equal(trained(corpus, recipe), trained(corpus, recipe))
    other = Recipe(**{**FAST, "ema": 0.9, "seed": 1})
    assert not torch.equal(trained(corpus, recipe), trained(corpus, other))


def sgd(monkeypatch):
    """Weights then differ by as much as gradients do; Adam would blow up rounding where a gradient is about 0."""
    monkeypatch.setattr(train_module, "build_optimizers", lambda m, *_: [torch.optim.SGD(m.parameters(), lr=0.1)])


@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_changes_nothing(corpus, monkeypatch, objective, accumulate):
    sgd(monkeypatch)
    unclipped = {**FAST, "clip": 1e9, "objective": objective}  # clipping would hide a wrong scale
    whole = trained(corpus, Recipe(**unclipped))
    parts = trained(corpus, Recipe(**unclipped, accumulate=accumulate))
    start = weights(live(config(corpus)))
    assert (whole - start).abs().max() > 1e-2
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
def test_one_step_is_the_gradient_of_the_loss(corpus, monkeypatch, objective):
    """Micro-batches included: the step is that of `nelbo` on the whole batch."""
    sgd(monkeypatch)
    model = live(config(corpus))
    before = weights(model)
    out = nelbo(model, corpus.batch(0, 0, torch.arange(8)), seed=0, step=0, objective=objective)
    gradient = torch.autograd.grad(out.loss, list(model.parameters()), materialize_grads=True)
    rates = []
    recipe = Recipe(**{**FAST, "steps": 1, "accumulate": 4, "clip": 1e9, "objective": objective})
    fit(model, batches(corpus), recipe, on_step=lambda p: rates.append(p.learning_rate))
    flat = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(weights(model), before - 0.1 * flat, rtol=0, atol=1e-6)
    assert rates == [FAST["lr"]]


def test_clipping_bounds_the_gradient_of_the_whole_step(corpus, monkeypatch):
    sgd(monkeypatch)
    model = live(config(corpus))
    before = weights(model)
    fit(
        model,
        batches(corpus),
        Recipe(**{**FAST, "steps": 1, "accumulate": 4, "clip": 0.01, "objective": "masked_mean"}),
    )
    assert float((weights(model) - before).norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_progress_tells_the_whole_step(corpus):
    model = live(config(corpus))
    seen = []
    data = batches(corpus)
    second = []

    def note(progress):
        seen.append(progress)
        if progress.step == 1:  # what the second step will see
            with torch.no_grad():
                second.append(float(nelbo(model, data(1, torch.arange(8)), seed=0, step=1).nelbo))

    fit(model, data, Recipe(**FAST, accumulate=4), on_step=note)
    assert seen[1].nelbo == pytest.approx(second[0], rel=1e-5)
    assert [p.step for p in seen] == [1, 2, 3, 4] and all(p.steps == 4 for p in seen)
    first = nelbo(live(config(corpus)), data(0, torch.arange(8)), seed=0, step=0)
    assert seen[0].nelbo == pytest.approx(float(first.nelbo), rel=1e-5)
    cost = [8 * training_flops(model.config, 12, p.result.num_loops) for p in seen]
    assert [p.flops for p in seen] == pytest.approx([sum(cost[: i + 1]) for i in range(4)])
    assert seen[0].average is model


def test_s_is_drawn_once_a_step_or_fixed(corpus):
    loops = []

    def note(progress):
        loops.append(progress.result.num_loops)

    fit(live(config(corpus)), batches(corpus), Recipe(**{**FAST, "steps": 12}), on_step=note)
    assert set(loops) == {1, 2, 3}
    loops.clear()
    fit(live(config(corpus)), batches(corpus), Recipe(**FAST, loops=5), on_step=note)
    assert loops == [5] * 4


def test_average_follows_the_weights(corpus):
    model, kept = live(config(corpus)), []
    recipe = Recipe(**{**FAST, "ema": 0.5})
    average = fit(model, batches(corpus), recipe, on_step=lambda p: kept.append(weights(model)))
    wanted = kept[0]
    for n in range(1, 4):
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * kept[n]
    torch.testing.assert_close(weights(average), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ctrl_c_returns_what_was_learnt(corpus, ema):
    model = live(config(corpus))
    before = weights(model)
    steps = []

    def stop(progress):
        steps.append(progress.step)
        if progress.step == 2:
            raise KeyboardInterrupt

    recipe = Recipe(**{**FAST, "steps": 50, "ema": ema, "decay": "constant"})
    made = fit(model, batches(corpus), recipe, on_step=stop)
    assert steps == [1, 2] and not made.training and not torch.equal(weights(made), before)
    two = Recipe(**{**FAST, "steps": 2, "ema": ema, "decay": "constant"})
    assert torch.equal(weights(made), trained(corpus, two))


def test_ctrl_c_in_the_middle_of_a_step_abandons_that_step(corpus):
    model, kept = live(config(corpus)), []

    def batch(step, index):
        if step == 2 and int(index[0]) == 4:  # the second micro-batch of the third step
            raise KeyboardInterrupt
        return corpus.batch(0, step, index)

    fit(model, batch, Recipe(**FAST, accumulate=2), on_step=lambda p: kept.append(weights(model)))
    assert len(kept) == 2 and torch.equal(weights(model), kept[-1])


@pytest.mark.parametrize("part", [0, 1])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(corpus, part):
    """In whichever micro-batch it happens. The step is skipped and counted; many in a row end the training."""
    model, seen = live(config(corpus)), []

    def batch(step, index):
        bad = (step == 2 or step > 3) and int(index[0]) == 4 * part
        model.loop.boundary.eps = math.nan if bad else model.config.norm_eps
        return corpus.batch(0, step, index)

    with pytest.raises(
        InputError, match=r"loss became nan at step 14, the 10th update in a row .*lower the learning rate"
    ):
        recipe = Recipe(**{**FAST, "steps": 50, "ema": 0.9}, accumulate=2, loops=2)
        fit(model, batch, recipe, on_step=lambda p: seen.append((p.skipped, weights(model), weights(p.average))))
    assert [skipped for skipped, _, _ in seen] == [0, 0, 1, 1, *range(2, 11)]
    for last in (1, 2):
        assert torch.equal(seen[1][last], seen[2][last]) and torch.equal(seen[3][last], seen[-1][last])
        assert not torch.equal(seen[2][last], seen[3][last])


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(corpus):
    model = live(config(corpus))
    before = weights(model)
    model.lm_head.weight.register_hook(lambda g: g / 0)
    with pytest.raises(InputError, match=r"gradient's norm became (inf|nan) at step 10"):
        fit(model, batches(corpus), Recipe(**{**FAST, "steps": 11}))
    assert torch.equal(weights(model), before)


def test_a_spike_is_skipped_and_leaves_no_trace(corpus):
    """A gradient 50 times the usual, at step 21: with the guard as if the step had not been."""
    model, seen, factor = live(config(corpus)), [], 1.0
    model.lm_head.weight.register_hook(lambda g: g * factor)

    def batch(step, index):
        nonlocal factor
        factor = 50.0 if step == 20 else 1.0
        return corpus.batch(0, step, index)

    recipe = Recipe(**{**FAST, "steps": 24, "objective": "masked_mean"}, spike_guard=5.0)
    fit(model, batch, recipe, on_step=lambda p: seen.append((p.skipped, weights(model), p.grad_norm)))
    assert [skipped for skipped, _, _ in seen] == [0] * 20 + [1] * 4
    assert torch.equal(seen[19][1], seen[20][1]) and not torch.equal(seen[20][1], seen[21][1])
    assert seen[20][2] > 5 * seen[19][2]


def test_the_guard_against_its_definition():
    guard = SpikeGuard(3.0)
    norms = [1.0 + i % 3 for i in range(SpikeGuard.LEAST - 1)]
    assert [guard.refuses(1.0, n) for n in [*norms[:-1], 100.0, norms[-1]]] == [None] * SpikeGuard.LEAST
    assert guard.refuses(1.0, 6.0) is None  # 3 times the median, no more
    assert guard.refuses(1.0, 6.01) == "the gradient's norm became 6.01, 3 times the usual"
    assert (guard.skipped, guard.in_a_row) == (1, 1) and 6.01 not in guard.norms
    other = SpikeGuard(3.0)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    for n in range(200):
        assert guard.refuses(1.0, 1.0 + n / 1000) is None
    assert guard.in_a_row == 0 and guard.norms == [1.0 + n / 1000 for n in range(200)][-SpikeGuard.WINDOW :]
    assert SpikeGuard().refuses(1.0, 1e30) is None and "inf" in SpikeGuard().refuses(math.inf, 1.0)


def test_fp16_s_scaler_serves_every_optimizer(corpus):
    """Loss scaling changes nothing; an overflow is skipped by the scaler, which is not the guard's to count."""

    def run(scaled, overflow=False):
        model = live(config(corpus))
        trainer = Trainer(model, Recipe(**{**FAST, "optimizer": "muon", "clip": 1e9}))
        if scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            if overflow:
                model.lm_head.weight.register_hook(lambda g: g / 0)
            engine = trainer.accelerator = copy.copy(trainer.accelerator)
            engine.scaler = scaler
            trainer.optimizers = [AcceleratedOptimizer(o.optimizer, scaler=scaler) for o in trainer.optimizers]
            engine.backward = lambda loss: scaler.scale(loss).backward()

            def clip(parameters, bound):
                for optimizer in trainer.optimizers:
                    scaler.unscale_(optimizer.optimizer)
                return torch.nn.utils.clip_grad_norm_(parameters, bound)

            engine.clip_grad_norm_ = clip
        trainer.run(batches(corpus))
        return weights(model), trainer

    plain, scaled = run(False)[0], run(True)[0]
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)
    stuck, trainer = run(True, overflow=True)
    assert torch.equal(stuck, weights(live(config(corpus)))) and trainer.guard.skipped == 0
    assert trainer.accelerator.scaler.get_scale() == 8.0 / 2 ** FAST["steps"]


def test_the_recipe_s_ways_reach_the_loss_and_the_flops(corpus, monkeypatch):
    seen = []

    def spy(model, tokens, **options):
        seen.append(options)
        return nelbo(model, tokens, **options)

    monkeypatch.setattr(train_module, "NELBOLoss", functools.partial(NELBOLoss, function=spy))
    model = live(config(corpus))
    ways = {"backprop_loops": 1, "checkpoint_loops": True, "deep_supervision": True, "loops": 3}
    recipe = Recipe(**{**FAST, "steps": 2}, schedule="cosine", average="sequence", **ways)
    flops = []
    fit(model, batches(corpus), recipe, on_step=lambda p: flops.append(p.flops))
    depth = seen[0].pop("depth")
    assert (depth.backprop_loops, depth.checkpoint, depth.every) == (1, True, True)
    assert {k: seen[0][k] for k in ("schedule", "average", "num_loops")} == {
        "schedule": "cosine",
        "average": "sequence",
        "num_loops": 3,
    }
    one = 8 * training_flops(model.config, 12, 3, grad_loops=1, recompute=True, every=True)
    assert flops == pytest.approx([one, 2 * one]) and one != 8 * training_flops(model.config, 12, 3)
    seen.clear()
    fit(live(config(corpus)), batches(corpus), Recipe(**FAST))
    assert seen[0]["depth"] is None


def test_loops_drawn_by_a_function_or_by_cost(corpus):
    loops = []

    def note(progress):
        loops.append(progress.result.num_loops)

    fit(live(config(corpus)), batches(corpus), Recipe(**FAST), on_step=note, loops=lambda step: 4 - step)
    assert loops == [4, 3, 2, 1]
    with pytest.raises(InputError, match="loops is 0"):
        fit(live(config(corpus)), batches(corpus), Recipe(**FAST), loops=lambda step: step)
    model = live(config(corpus))
    draw = Trainer(model, Recipe(**FAST, loop_distribution="inverse_flops"), length=12).loops
    want = inverse_flops_loops(model.config, 12, 3)
    assert want[1] > want[3] and [draw(s) for s in range(50)] == [sample_loops(want, 0, s) for s in range(50)]


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["nelbo", "masked_mean"])
def test_masks_are_passed_on_and_normalised_over_the_step(corpus, monkeypatch, objective, average):
    """Sequences of unequal length in micro-batches: the step is that of `nelbo` on all of them at once."""
    sgd(monkeypatch)
    model = live(config(corpus))
    before = weights(model)

    def batch(step, index):
        real = torch.arange(12) < (3 + index)[:, None]
        maskable = torch.arange(12) % 4 != (index % 4)[:, None]
        documents = (torch.arange(12) >= 2).long().expand(len(index), 12)
        return Sequences(corpus.batch(0, step, index), real, maskable, documents)

    all_, seen = batch(0, torch.arange(8)), []
    out = nelbo(model, **all_._asdict(), seed=0, step=0, objective=objective, average=average)
    gradient = torch.autograd.grad(out.loss, list(model.parameters()), materialize_grads=True)
    recipe = Recipe(
        **{**FAST, "steps": 1, "accumulate": 4, "clip": 1e9, "objective": objective, "average": average},
    )
    fit(model, batch, recipe, on_step=seen.append)
    flat = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(weights(model), before - 0.1 * flat, rtol=0, atol=1e-6)
    assert seen[0].nelbo == pytest.approx(float(out.nelbo), rel=1e-5)
    assert seen[0].grad_norm == pytest.approx(float(flat.norm()), rel=1e-4)


def test_batch_size_must_divide():
    recipe = Recipe(batch_size=10, accumulate=4)
    with pytest.raises(InputError, match="batch_size 10 is not a multiple of processes x accumulate = 1 x 4"):
        micro_batch(recipe, 1)
    assert micro_batch(Recipe(batch_size=24, accumulate=4), 2) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"matrix_lr": math.inf}, "matrix_lr is inf"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; did you mean 'adamw'"),
        ({"decay": "linaer"}, "did you mean 'linear'"),
        ({"objective": "elbo"}, "did you mean 'nelbo'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"warmup": -1}, "warmup is -1"),
        ({"decay_share": 1.5}, "decay_share is 1.5"),
        ({"t_ramp": -0.1}, "t_ramp is -0.1"),
        ({"t_start": 0.0}, "t_start is 0.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"loops": 0}, "loops is 0"),
        ({"backprop_loops": 0}, "backprop_loops is 0"),
        ({"loop_distribution": "inverse"}, "did you mean 'inverse_flops'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"average": "tokens"}, "did you mean 'token'"),
        ({"spike_guard": 1.0}, "spike_guard is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"beta2": 1.0}, "beta2 is 1.0"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_recipe_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        Recipe(**changes)


def test_t_range_ramps():
    recipe = Recipe(steps=100, t_start=0.4, t_ramp=0.5)
    assert recipe.t_range(0) == (T_MIN, 0.4)
    assert recipe.t_range(25) == pytest.approx((T_MIN, 0.7))
    assert recipe.t_range(50) == recipe.t_range(99) == (T_MIN, 1.0)
    assert Recipe().t_range(0) == (T_MIN, 1.0)


def test_precision_that_cannot_be_had(corpus, monkeypatch):
    import accelerate

    def refuse(**_):
        raise ValueError("fp16 mixed precision requires a GPU")

    monkeypatch.setattr(accelerate, "Accelerator", refuse)
    with pytest.raises(InputError, match="precision 'fp16' cannot be used here: fp16 mixed precision requires a GPU"):
        accelerator_for(Recipe(precision="fp16"), config(corpus))


def test_the_environment_does_not_change_the_step(corpus, monkeypatch):
    sgd(monkeypatch)
    want = trained(corpus, Recipe(**FAST))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert torch.equal(trained(corpus, Recipe(**FAST)), want)


def test_sharded_training_is_refused(corpus, monkeypatch):
    import accelerate

    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    said = r"on one process or as DDP \(torchrun\), .*; this is FSDP$"
    with pytest.raises(InputError, match=said):
        Trainer(live(config(corpus)), Recipe(**FAST), accelerator=sharded)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: sharded)
    with pytest.raises(InputError, match=said):
        accelerator_for(Recipe(**FAST), config(corpus))

    def missing(**_):
        raise ImportError("DeepSpeed is not installed")

    monkeypatch.setattr(accelerate, "Accelerator", missing)
    with pytest.raises(InputError, match=r"as DDP .*: DeepSpeed is not installed$"):
        accelerator_for(Recipe(**FAST), config(corpus))


def test_processes_wait_for_the_one_that_tokenises(corpus):
    handler = accelerator_for(Recipe(**FAST), config(corpus)).init_handler
    assert handler.to_kwargs() == {"timeout": timedelta(days=1)}


def test_run_folder(tmp_path, corpus):
    folder = RunFolder(tmp_path / "new" / "run", {"steps": 3})
    assert json.loads((folder.path / "recipe.json").read_text()) == {"steps": 3}
    folder.log(step=1, loss=0.5)
    folder.log(step=2, loss=0.25)
    folder.clock(step=1, seconds=2.0)
    assert [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    model = live(config(corpus))
    saved = folder.save(model, corpus.tokenizer)
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert torch.equal(weights(LoopMDM.from_pretrained(saved)), weights(model))


def test_run_folder_touches_nothing_that_is_there(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("old\n")
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder(tmp_path / "run", {})
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "old\n"
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot write to"):
            RunFolder(path, {})
    assert RunFolder.check(tmp_path / "free") and not (tmp_path / "free").exists()


def test_a_failed_save_leaves_the_former_checkpoint(tmp_path, corpus, monkeypatch):
    folder = RunFolder(tmp_path / "run", {})
    model = live(config(corpus))
    folder.save(model, corpus.tokenizer)
    held = {p.name: p.read_bytes() for p in (folder.path / "model").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loopmdm.model.checkpoint.save_file", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        folder.save(live(config(corpus), seed=1), corpus.tokenizer)
    assert {p.name: p.read_bytes() for p in (folder.path / "model").iterdir()} == held


SHARED = """
import torch
from loopmdm.config import LoopConfig, ModelConfig
from loopmdm.lab import train
from loopmdm.lab.data import TextData, build_tokenizer
from loopmdm.model.lm import LoopMDM

torch.manual_seed(0)
text = "the cat sat on the mat. the dog sat on the log. " * 60
corpus = TextData.from_text(text, build_tokenizer("char", text), 12)
loop = LoopConfig(1, 1, max_loops=3, boundary="anchored")
config = ModelConfig(corpus.mask_id + 1, 32, 3, 4, 40, initializer_range=0.3, loop=loop)
train.build_optimizers = lambda model, *_: [torch.optim.SGD(model.parameters(), lr=0.1)]
seen = []
for objective in ("nelbo", "masked_mean"):
    model = LoopMDM(config)
    recipe = train.Recipe(steps=8, batch_size=8, accumulate=2, warmup=0, ema=0.5, clip=1e9, objective=objective)
    engine = train.accelerator_for(recipe, config)
    made = train.fit(model, lambda step, index: corpus.batch(0, step, index), recipe, accelerator=engine,
                     on_step=lambda p: seen.append([p.result.num_loops, p.nelbo]))
    seen.append(torch.cat([p.detach().flatten() for p in made.parameters()]).tolist())
"""
SAVE = """
import sys
torch.save([engine.num_processes, seen], f"{sys.argv[1]}.{engine.process_index}")
"""


def test_two_processes_equal_one(tmp_path, monkeypatch):
    """DDP over gloo: the same S, t and masks, the same weights; S = 1 leaves the boundary's gain without gradient."""
    (tmp_path / "shared.py").write_text(SHARED + SAVE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "shared.py", "result"],
            cwd=tmp_path,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    monkeypatch.setattr(train_module, "build_optimizers", train_module.build_optimizers)  # put back what SHARED sets
    alone = {}
    exec(compile(SHARED, "shared.py", "exec"), alone)
    for process in running:
        complaint = process.communicate()[1]
        assert process.returncode == 0, complaint
    assert alone["engine"].num_processes == 1 and 1 in [row[0] for row in alone["seen"][:8]]
    for rank in "01":
        processes, seen = torch.load(tmp_path / f"result.{rank}")
        assert processes == 2
        for a, b in zip(alone["seen"], seen, strict=True):
            torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-5, atol=1e-6)

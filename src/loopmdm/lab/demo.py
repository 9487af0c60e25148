"""`loopmdm demo`: train a small LoopMDM, watch it denoise loop by loop, and measure what the loops bought.

Act 1 (Sudoku, addition) has one right answer to each puzzle; act 2 is text. Each act leaves metrics, a
checkpoint, `results.json` and plots in its folder. The sentences after a table are chosen by its numbers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..config import LoopConfig
from ..errors import InputError, nearest
from ..model.flops import forward_flops, mean_loops, training_flops, uniform_loops
from ..model.lm import LoopMDM
from ..sampling.engine import generate
from . import plots, show
from .data import decode
from .evaluate import SEVERAL, Estimate, estimate, fill, nelbo_by_loops, solved
from .tasks import Puzzles
from .tasks.addition import Addition
from .tasks.sudoku import Sudoku
from .tasks.text import LENGTH, Text
from .train import Progress, Recipe, RunFolder, fit

TASKS = ("sudoku", "text", "addition")
LONGER = 3.0
"""How much longer an act trains when it is asked for alone."""
EVALUATIONS = 6
"""Lines printed during a training."""


def run(
    task: str | None = None,
    data: Sequence[str | Path] | None = None,
    compare: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo and return its results (also written to `OUT/*/results.json`).

    Args:
        task: "sudoku", "text" or "addition", trained three times longer; None runs Sudoku and text.
        data: text files for the text act (implies it).
        compare: also train an unlooped model of the same size with the same training FLOPs.
        seed: of data, weights and noise.
        scale: multiplies training steps.
        out: run folder; None makes `runs/demo-<time>`.

    Raises:
        InputError: an unknown task, unreadable data, a folder that already holds something.
    """
    if data and task not in (None, "text"):
        raise InputError(f"--data gives text to the text act; it does not go with --task {task}")
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}{nearest(task, TASKS)}")
    if not 0 < scale < math.inf:
        raise InputError(f"scale is {scale}; it must be above 0 and finite")
    names = ["text"] if data else [task] if task else ["sudoku", "text"]
    scale *= LONGER if data or task else 1.0
    folder = RunFolder.check(out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}")
    console = console or Console(highlight=False, width=None if Console().is_terminal else 100)

    started = time.perf_counter()
    results: dict[str, Any] = {}
    for name in names:
        if name == "text":
            results[name] = _text_act(Text(seed, scale, data), folder / name, compare, console)
        else:
            made: Puzzles = Sudoku(seed, scale) if name == "sudoku" else Addition(seed, scale)
            results[name] = _puzzle_act(made, folder / name, compare, console)
    show.closing(console, folder, names, compare, time.perf_counter() - started)
    return results


def _puzzle_act(task: Puzzles, folder: Path, compare: bool, console: Console) -> dict[str, Any]:
    show.heading(console, task.title, task.config, task.recipe)
    run_folder = RunFolder(folder, dataclasses.asdict(task.recipe))
    watch = slice(0, 100)

    def probe(model: LoopMDM, loops: int) -> Estimate:
        return solved(fill(model, task.puzzles[watch], loops).tokens, task.answers[watch])

    model, training = _train(task, task.recipe, run_folder, console, probe, "solved", percent=True)
    run_folder.save(model)
    rows = [_puzzle_row(model, task, S, "looped") for S in task.final]
    if compare:
        plain, recipe = _unlooped(task)
        plain_model, plain_training = _train(plain, recipe, None, console, probe, "solved", percent=True)
        training["unlooped"] = plain_training
        rows.append(_puzzle_row(plain_model, task, 1, "unlooped"))
    show.puzzle_table(console, task, rows)

    loops = tuple(S for S in (1, 2, 4, 8, 12) if 2 * task.config.loop.max_loops >= S)
    filled = {S: fill(model, task.puzzles[:2], S).tokens.cpu() for S in loops}
    show.loop_by_loop(console, task, filled, item=0)
    results = {"task": task.name, "title": task.title, "training": training, "rows": rows}
    show.puzzle_verdict(console, task, rows, compare)
    run_folder.write_results(results)
    plots.loops(folder / "loops.png", results, task.unit)
    plots.training(folder / "training.png", results)
    if task.name == "sudoku":
        plots.grids(folder / "grid.png", task.puzzles[:2], task.answers[:2], filled)
    return results


def _puzzle_row(model: LoopMDM, task: Puzzles, loops: int, label: str) -> dict[str, Any]:
    blanks = task.puzzles == model.mask_id
    bits = estimate(nelbo_by_loops(model, task.answers, [loops], maskable=blanks)[0])
    made = fill(model, task.puzzles, loops)
    exact = solved(made.tokens, task.answers)
    several = solved(fill(model, task.puzzles, loops, SEVERAL).tokens, task.answers)
    return {
        "model": label,
        "loops": loops,
        "layers": model.config.depth(loops),
        "nelbo_bits": bits.mean,
        "nelbo_error": bits.error,
        "solved": exact.mean,
        "solved_error": exact.error,
        "solved_in_steps": several.mean,
        "mflop": made.flops / len(task.puzzles) / 1e6,
        "tokens_per_second": made.tokens_per_second,
    }


def _text_act(task: Text, folder: Path, compare: bool, console: Console) -> dict[str, Any]:
    show.heading(console, task.title, task.config, task.recipe)
    run_folder = RunFolder(folder, dataclasses.asdict(task.recipe))
    windows = task.data.valid_windows(256)
    per_character = 1 / task.data.characters_per_token

    def probe(model: LoopMDM, loops: int) -> Estimate:
        return estimate(nelbo_by_loops(model, windows[::4], [loops])[0] * per_character)

    model, training = _train(
        task, task.recipe, run_folder, console, probe, "bits a character", tokenizer=task.data.tokenizer
    )
    run_folder.save(model, task.data.tokenizer)
    rows = _text_rows(model, windows, task.final, per_character, "looped")
    if compare:
        plain, recipe = _unlooped(task)
        plain_model, training["unlooped"] = _train(plain, recipe, None, console, probe, "bits a character")
        rows += _text_rows(plain_model, windows, (1,), per_character, "unlooped")
    show.text_table(console, rows, task.data.unigram_bits)

    with show.live_text(console) as update:
        sample = generate(
            model,
            max_new_tokens=LENGTH,
            steps=LENGTH // 2,
            policy="ancestral",
            seed=task.recipe.seed,
            on_step=lambda step, tokens, _: update(step + 1, decode(task.data.tokenizer, tokens[0].tolist())),
        )
    results = {
        "task": task.name,
        "title": task.title,
        "unigram_bits": task.data.unigram_bits,
        "training": training,
        "rows": rows,
        "sample": decode(task.data.tokenizer, sample.sequences()[0]),
    }
    show.text_verdict(console, rows, task.data.unigram_bits, compare)
    run_folder.write_results(results)
    plots.loops(folder / "loops.png", results, "character")
    plots.training(folder / "training.png", results)
    return results


def _text_rows(
    model: LoopMDM, windows: Tensor, loops: Sequence[int], per_character: float, label: str
) -> list[dict[str, Any]]:
    values = nelbo_by_loops(model, windows, loops, repeats=2) * per_character
    rows = []
    for S, bits in zip(loops, values, strict=True):
        mean, paired = estimate(bits), estimate(values[0] - bits)
        speed = generate(model, batch_size=16, max_new_tokens=LENGTH, steps=16, num_loops=S, policy="ancestral")
        rows.append(
            {
                "model": label,
                "loops": S,
                "layers": model.config.depth(S),
                "nelbo_bits": mean.mean,
                "nelbo_error": mean.error,
                "gain": paired.mean,
                "gain_error": paired.error if loops[0] != S else 0.0,
                "mflop": forward_flops(model.config, LENGTH, S) / 1e6,
                "tokens_per_second": speed.tokens_per_second,
            }
        )
    return rows


class _Unlooped:
    """A task with the same model unlooped: its batches and probes are the original's."""

    def __init__(self, task: Puzzles | Text) -> None:
        self.task, self.probe = task, (1,)
        loop = LoopConfig(task.config.loop.start, task.config.loop.length, max_loops=1)
        self.config = dataclasses.replace(task.config, loop=loop)

    def batch(self, step: int, index: Tensor) -> Tensor:
        return self.task.batch(step, index)


def _unlooped(task: Puzzles | Text) -> tuple[_Unlooped, Recipe]:
    """The same layers applied once, trained for as many more steps as its cheaper steps allow."""
    plain, length = _Unlooped(task), task.config.max_position_embeddings
    mean = mean_loops(uniform_loops(task.config.loop.max_loops))
    ratio = training_flops(task.config, length, mean) / training_flops(plain.config, length, 1)
    return plain, dataclasses.replace(task.recipe, steps=round(task.recipe.steps * ratio))


def _train(
    task: Puzzles | Text | _Unlooped,
    recipe: Recipe,
    folder: RunFolder | None,
    console: Console,
    probe: Any,
    measure: str,
    percent: bool = False,
    tokenizer: Any = None,
) -> tuple[LoopMDM, dict[str, Any]]:
    """Train, printing the probe's measure at a few steps; returns the averaged model and the curve."""
    torch.manual_seed(recipe.seed)
    model = LoopMDM(task.config)
    curve: list[dict[str, Any]] = []
    done: dict[str, Any] = {"step": 0, "tflop": 0.0}
    label = "unlooped" if isinstance(task, _Unlooped) else "looped"
    checks = {round(recipe.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    with show.training(console, recipe.steps, label) as advance:

        def on_step(progress: Progress) -> None:
            done.update(step=progress.step, tflop=progress.flops / 1e12)
            result = progress.result
            loss = float(result.loss.detach())
            advance(progress, loss)
            if folder is not None:
                folder.log(
                    step=progress.step,
                    loss=loss,
                    nelbo=float(result.nelbo),
                    num_loops=result.num_loops,
                    flops=progress.flops,
                    learning_rate=progress.learning_rate,
                )
                folder.clock(step=progress.step, seconds=progress.seconds)
            if progress.step in checks:
                point: dict[str, Any] = {
                    "step": progress.step,
                    "tflop": progress.flops / 1e12,
                    "seconds": progress.seconds,
                }
                point[measure] = {S: probe(progress.average, S).mean for S in task.probe}
                curve.append(point)
                show.checkpoint(console, label, point, measure, percent)

        started = time.perf_counter()
        model = fit(model, task.batch, recipe, on_step=on_step)
    seconds = time.perf_counter() - started
    if done["step"] < recipe.steps:  # Ctrl-C: keep what was learnt, claim nothing
        saved = f"; its weights are in {folder.save(model, tokenizer)}" if folder is not None else ""
        console.print(f"Stopped after step {done['step']} of {recipe.steps}, {label}{saved}.")
        raise KeyboardInterrupt
    return model, {**done, "seconds": seconds, "measure": measure, "curve": curve}

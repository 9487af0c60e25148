"""What the demo prints: headings, progress, tables, grids, and verdicts chosen by the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..config import ModelConfig
from ..model.lm import LoopMDM
from .evaluate import SEVERAL
from .tasks import Puzzles
from .train import Recipe

Rows = Sequence[dict[str, Any]]


def heading(console: Console, title: str, config: ModelConfig, recipe: Recipe) -> None:
    """The task, the model and the training in three lines."""
    loop = config.loop
    parameters = sum(p.numel() for p in LoopMDM(config).parameters())
    coda = config.num_hidden_layers - loop.start - loop.length
    console.print(Rule(title, style="bold"))
    console.print(
        f"Model: {parameters:,} parameters, width {config.hidden_size}, {loop.start} prelude + {loop.length} looped + "
        f"{coda} coda layers, {loop.boundary} boundary."
    )
    console.print(
        f"Training: {recipe.steps} steps of {recipe.batch_size} sequences; each step visits the looped layers S times, "
        f"S drawn from 1..{loop.max_loops}. More visits add compute, never parameters."
    )


@contextmanager
def training(console: Console, steps: int, label: str) -> Iterator[Callable[[Any, float], None]]:
    """A progress bar; on something that is no terminal, only the checkpoints' lines."""
    bar = Progress(
        TextColumn(f"training, {label}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("S = {task.fields[loops]:<2} loss {task.fields[loss]:.3f}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=steps, loops=0, loss=float("nan"))
        yield lambda progress, loss: bar.update(
            task, completed=progress.step, loops=progress.result.num_loops, loss=loss
        )


def checkpoint(console: Console, label: str, point: dict[str, Any], measure: str, percent: bool) -> None:
    values = ", ".join(
        f"S = {loops}: {100 * value:.0f}%" if percent else f"S = {loops}: {value:.2f}"
        for loops, value in point[measure].items()
    )
    console.print(
        f"  {label}, step {point['step']:>5}  {point['seconds']:>5.0f} s  {point['tflop']:.2f} TFLOP   "
        f"{measure}: {values}"
    )


def puzzle_table(console: Console, task: Puzzles, rows: Rows) -> None:
    table = Table(title=f"{len(task.puzzles)} unseen puzzles, all {task.unit}s filled in one denoising step")
    names = (
        "model",
        "S",
        "layers applied",
        "solved exactly",
        f"same, in {SEVERAL} steps",
        f"NELBO, bits a {task.unit}",
    )
    for name in (*names, "MFLOP a pass"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_column("tokens/s", justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["loops"]),
            str(row["layers"]),
            f"{100 * row['solved']:.1f} ± {100 * row['solved_error']:.1f} %",
            f"{100 * row['solved_in_steps']:.1f} %",
            f"{row['nelbo_bits']:.3f} ± {row['nelbo_error']:.3f}",
            f"{row['mflop']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    console.print(table)


def text_table(console: Console, rows: Rows, unigram_bits: float) -> None:
    table = Table(title=f"Held-out text; letter frequencies alone cost {unigram_bits:.2f} bits a character")
    for name in ("model", "S", "layers applied", "NELBO, bits a character", "gain over S = 1, paired", "MFLOP a pass"):
        table.add_column(name, justify="left" if name == "model" else "right")
    table.add_column("tokens/s", justify="right")
    for row in rows:
        gain = "" if row["loops"] == 1 else f"{row['gain']:.3f} ± {row['gain_error']:.3f}"
        table.add_row(
            row["model"],
            str(row["loops"]),
            str(row["layers"]),
            f"{row['nelbo_bits']:.3f} ± {row['nelbo_error']:.3f}",
            gain,
            f"{row['mflop']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
        )
    console.print(table)


def loop_by_loop(console: Console, task: Puzzles, filled: dict[int, Tensor], item: int) -> None:
    """One unseen puzzle after each S: given symbols plain, right ones green, wrong ones red with '!'."""
    puzzle, answer = task.puzzles[item], task.answers[item]
    mask = task.config.mask_token_id
    clue = [token != mask for token in puzzle.tolist()]
    panels = [Panel("\n".join(task.lines(puzzle.tolist(), [True] * len(clue), clue)), title="puzzle", expand=False)]
    for loops, tokens in filled.items():
        wrong = (tokens[item] != answer).tolist()
        title = f"{loops} loop{'s' if loops > 1 else ''}: {sum(wrong)} wrong"
        panels.append(Panel("\n".join(task.lines(tokens[item].tolist(), clue, wrong)), title=title, expand=False))
    console.print("The first unseen puzzle, one denoising step each, more and more loops ([red]![/] = wrong):")
    console.print(Columns(panels))


@contextmanager
def live_text(console: Console) -> Iterator[Callable[[int, str], None]]:
    """A sample as it is unmasked; on something that is no terminal, a line each time a quarter is done."""
    console.print("One sample, unmasked from nothing (▒ = still masked):")
    if console.is_terminal:
        with Live(console=console, refresh_per_second=20) as live:
            yield lambda step, text: live.update(Panel(Text(text), title=f"step {step}"))
        return
    printed = [-1]

    def update(step: int, text: str) -> None:
        quarter = 4 * text.count("▒") // max(1, len(text))
        if quarter != printed[0] or "▒" not in text:
            printed[0] = quarter
            console.print(Text(f"  step {step:>3}: {text!r}"))

    yield update


def puzzle_verdict(console: Console, task: Puzzles, rows: Rows, compare: bool) -> None:
    """Sentences that the table supports, and what it does not show."""
    looped = {row["loops"]: row for row in rows if row["model"] == "looped"}
    once, trained = looped[1], looped[max(S for S in looped if task.config.loop.max_loops >= S)]
    deepest = looped[max(looped)]
    spread = 2 * (once["solved_error"] ** 2 + trained["solved_error"] ** 2) ** 0.5
    if trained["solved"] - once["solved"] > max(spread, 0.01):
        console.print(
            f"Same weights, one denoising step: {_percent(once)} solved with one visit of the looped layers, "
            f"{_percent(trained)} with {trained['loops']}, {_percent(deepest)} with {deepest['loops']} "
            f"(training never went past {task.config.loop.max_loops})."
        )
    else:
        console.print(
            f"[yellow]The loops bought nothing here: {_percent(once)} at S = 1, {_percent(trained)} at "
            f"S = {trained['loops']}.[/] Either training was too short, or the looped block settles after one visit."
        )
    _unlooped_verdict(console, trained, rows, lambda row: f"{_percent(row)} solved")
    console.print(
        f"With {SEVERAL} denoising steps instead of one: {_percent(once, 'solved_in_steps')} at S = 1, "
        f"{_percent(trained, 'solved_in_steps')} at S = {trained['loops']}. More steps are another way to buy depth."
    )
    missing = [] if compare else ["how an unlooped model with the same training FLOPs does (--compare trains one)"]
    console.print(f"Not shown: {'; '.join([*missing, 'how much the seed decides'])}.", style="dim")


def text_verdict(console: Console, rows: Rows, unigram_bits: float, compare: bool) -> None:
    looped = {row["loops"]: row for row in rows if row["model"] == "looped"}
    best = min(looped.values(), key=lambda row: row["nelbo_bits"])
    below = unigram_bits - best["nelbo_bits"]
    if below > 0:
        console.print(
            f"The model is {below:.2f} bits a character under the letter frequencies (best at S = {best['loops']})."
        )
    else:
        console.print("[yellow]The model has not got below the letter frequencies yet; train longer.[/]")
    if best["loops"] > 1 and best["gain"] > 2 * best["gain_error"]:
        console.print(
            f"Looping helps by {best['gain']:.3f} ± {best['gain_error']:.3f} bits at S = {best['loops']} against S = 1 "
            "of the same weights."
        )
    else:
        console.print("[yellow]Looping made no measurable difference on this text.[/]")
    _unlooped_verdict(console, best, rows, lambda row: f"{row['nelbo_bits']:.3f} bits a character")
    missing = (
        "that this holds at another size; the paper's gains are at 170M parameters and far longer training"
        if compare
        else "how an unlooped model with the same training FLOPs does: --compare trains one, and at this size it has "
        "won in every run we made"
    )
    console.print(f"Not shown: {missing}.", style="dim")


def _unlooped_verdict(console: Console, looped: dict[str, Any], rows: Rows, say: Callable[[Any], str]) -> None:
    for row in rows:
        if row["model"] == "unlooped":
            console.print(
                f"An unlooped model of the same size and training FLOPs: {say(row)}; "
                f"looped at S = {looped['loops']}: {say(looped)}."
            )


def _percent(row: dict[str, Any], measure: str = "solved") -> str:
    return f"{100 * row[measure]:.0f}%"


def closing(console: Console, folder: Path, names: Sequence[str], compare: bool, seconds: float) -> None:
    console.print(Rule(style="bold"))
    console.print(f"Took {seconds:.0f} s. In {folder}: metrics, results.json, checkpoints and plots")
    for name in names:
        console.print(f"  {folder / name}/loops.png, training.png{', grid.png' if name == 'sudoku' else ''}, model/")
    console.print("What to try next:")
    tries = []
    if not compare:
        tries.append("loopmdm demo --task sudoku --compare     an unlooped model with the same training FLOPs")
    if "text" in names:
        tries.append(f"loopmdm sample {folder / 'text' / 'model'} --max-new-tokens 64 --loops 2")
    tries += [
        "loopmdm demo --data FILE                 your own text, three times longer",
        "loopmdm demo --task addition             carries that must travel",
    ]
    for line in tries:
        console.print("  " + line, highlight=False, markup=False, soft_wrap=True)

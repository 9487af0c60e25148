"""Pictures: the demo's (quality against S, FLOPs and training, Sudoku grids) and what `loopmdm eval` measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..errors import InputError
from . import bench
from .measured import HELD_OUT

LOOPED, UNLOOPED, LIMIT = "#1f5fa8", "#c2571a", "#888888"


def loops(path: Path, results: dict[str, Any], unit: str) -> None:
    """NELBO, and the solve rate where there is one, against S (left) and against inference FLOPs (right)."""
    rows = results["rows"]
    measures = [("nelbo_bits", "nelbo_error", f"NELBO (bits a {unit})", 1.0)]
    if "solved" in rows[0]:
        measures.insert(0, ("solved", "solved_error", "solved in one step (%)", 100.0))
    if "gain" in rows[0]:  # the bars of the NELBO are mostly the text's own spread, which pairing takes out
        measures.append(("gain", "gain_error", "gain over S = 1 of the\nsame weights, paired (bits)", 1.0))
    figure, axes = plt.subplots(len(measures), 2, figsize=(9, 3.4 * len(measures)), squeeze=False, sharey="row")
    for (value, error, label, factor), (left, right) in zip(measures, axes, strict=True):
        for axis, x in ((left, "loops"), (right, "mflop")):
            for name, colour, marker in (("looped", LOOPED, "o-"), ("unlooped", UNLOOPED, "D")):
                chosen = [row for row in rows if row["model"] == name]
                if chosen and not (name == "unlooped" and value == "gain"):
                    axis.errorbar(
                        [row[x] for row in chosen],
                        [factor * row[value] for row in chosen],
                        [factor * row[error] for row in chosen],
                        fmt=marker,
                        color=colour,
                        capsize=3,
                        label=name if name == "looped" else "unlooped, same size and training FLOPs",
                    )
            axis.set_xlabel("S, visits of the looped layers" if x == "loops" else "MFLOP a forward pass")
            axis.grid(alpha=0.25)
        left.set_ylabel(label)
        if value == "solved":
            left.set_ylim(-3, 103)
        elif value == "nelbo_bits" and max(r[value] for r in rows) > 10 * min(r[value] for r in rows):
            left.set_yscale("log")
        left.set_xticks([row["loops"] for row in rows if row["model"] == "looped"])
        if value == "nelbo_bits" and "unigram_bits" in results:
            right.text(0.98, 0.95, f"letter frequencies alone: {results['unigram_bits']:.2f} bits", ha="right",
                       va="top", transform=right.transAxes, color=LIMIT)  # fmt: skip
    axes[0][0].legend(loc="best", frameon=False)
    _save(figure, path, results["title"])


def training(path: Path, results: dict[str, Any]) -> None:
    """The watched measure against training FLOPs, one line for each S."""
    run = results["training"]
    measure, percent = run["measure"], run["measure"] == "solved"
    figure, axis = plt.subplots(figsize=(6.5, 4))
    _curve(axis, run, "looped, S = {}", LOOPED, percent)
    if "unlooped" in run:
        _curve(axis, run["unlooped"], "unlooped", UNLOOPED, percent)
    if "unigram_bits" in results:
        axis.axhline(results["unigram_bits"], color=LIMIT, linestyle=":", label="letter frequencies")
    axis.set_xlabel("training TFLOP")
    axis.set_ylabel("solved in one step (%)" if percent else f"NELBO ({measure})")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    _save(figure, path, results["title"])


def _curve(axis: Axes, run: dict[str, Any], label: str, colour: str, percent: bool) -> None:
    if not run["curve"]:
        return
    depths = list(run["curve"][0][run["measure"]])
    for i, S in enumerate(depths):
        axis.plot(
            [point["tflop"] for point in run["curve"]],
            [(100 if percent else 1) * point[run["measure"]][S] for point in run["curve"]],
            marker="o",
            color=colour,
            linestyle="-" if i == len(depths) - 1 else "--",
            alpha=1.0 if i == len(depths) - 1 else 0.55,
            label=label.format(S),
        )


def grids(path: Path, puzzles: Tensor, answers: Tensor, filled: dict[int, Tensor]) -> None:
    """Sudoku grids, one row a puzzle, one column an S: given digits black, right ones blue, wrong ones on red."""
    blank = int(puzzles.max())
    columns = [("puzzle", puzzles), *((f"S = {S}", tokens) for S, tokens in filled.items())]
    figure, axes = plt.subplots(
        len(puzzles), len(columns), figsize=(2.1 * len(columns), 2.5 * len(puzzles)), squeeze=False
    )
    for item, row in enumerate(axes):
        for axis, (title, tokens) in zip(row, columns, strict=True):
            clue = puzzles[item] != blank
            wrong = (tokens[item] != answers[item]) & (tokens[item] != blank)
            axis.set(xlim=(0, 6), ylim=(6, 0), aspect="equal", xticks=[], yticks=[])
            suffix = "" if title == "puzzle" else f": {int(wrong.sum())} wrong"
            axis.set_title(title + suffix, fontsize=10)
            for i in range(7):
                axis.axhline(i, color="black", linewidth=1.6 if i % 2 == 0 else 0.4)
                axis.axvline(i, color="black", linewidth=1.6 if i % 3 == 0 else 0.4)
            for index, token in enumerate(tokens[item].tolist()):
                r, c = divmod(index, 6)
                if wrong[index]:
                    axis.add_patch(plt.Rectangle((c, r), 1, 1, color="#f2b8b0"))
                if token != blank:
                    colour = "black" if clue[index] else LOOPED
                    axis.text(c + 0.5, r + 0.53, str(token + 1), ha="center", va="center", color=colour)
    _save(figure, path, "Unseen Sudoku, one denoising step, more and more loops")


def evaluation(path: Path, report: dict[str, Any]) -> None:
    """What is in a report of `loopmdm eval`: NELBO and paired gain by S, by t, against another model, samples."""
    rows = report["rows"]
    draw: list[Callable[[Axes], None]] = [lambda axis: _bound(axis, rows)]
    if len(rows) > 1:
        draw.append(lambda axis: _gain(axis, rows))
    if "compare" in report:
        draw.append(lambda axis: _against(axis, report["compare"]))
    if "by_time" in report:
        draw += [
            lambda axis: _time(axis, report["by_time"], "nats"),
            lambda axis: _time(axis, report["by_time"], "gain"),
        ]
    if "generated" in report:
        kinds = ("perplexity", "entropy") if report["generated"]["scorer"] else ("entropy",)
        draw += [partial(_samples, found=report["generated"], measure=kind) for kind in kinds]
    columns = min(2, len(draw))
    lines = -(-len(draw) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis, one in zip(axes.flat, draw, strict=False):
        one(axis)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(draw) :]:
        axis.axis("off")
    measured = report["measured_on"]
    held_out = measured["files"][0].startswith(HELD_OUT)
    names = [Path(name).name for name in measured["files"]]
    where = "its held-out text" if held_out else ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    unseen = " (training text)" if measured["trained_on"] else ""
    _save(figure, path, f"{report['model']['folder']} on {where}{unseen}; bars are standard errors")


def _bound(axis: Axes, rows: list[dict[str, Any]]) -> None:
    loops = [r["loops"] for r in rows]
    axis.errorbar(loops, [r["nats"] for r in rows], _bars(r["error"] for r in rows), fmt="o-", color=LOOPED, capsize=3)
    _loop_axis(axis, loops)
    axis.set_ylabel("likelihood bound (nats a token)")


def _gain(axis: Axes, rows: list[dict[str, Any]]) -> None:
    flops = [r["flops_per_token"] / 1e6 for r in rows]
    bars = _bars(r["gain_error"] for r in rows)
    axis.errorbar(flops, [r["gain"] for r in rows], bars, fmt="o-", color=LOOPED, capsize=3)
    for x, r in zip(flops, rows, strict=True):
        axis.annotate(f"S = {r['loops']}", (x, r["gain"]), textcoords="offset points", xytext=(4, -12), fontsize=8)
    axis.axhline(0, color=LIMIT, linewidth=0.8)
    axis.margins(x=0.12, y=0.15)
    axis.set_xlabel("forward FLOPs a token (MFLOP)")
    axis.set_ylabel(f"gain over S = {rows[0]['loops']}, paired\n(nats a token)")


def _against(axis: Axes, compare: dict[str, Any]) -> None:
    rows = compare["rows"]
    loops = [r["loops"] for r in rows]
    bars = _bars(r["error"] for r in rows)
    axis.errorbar(loops, [r["difference"] for r in rows], bars, fmt="o-", color=UNLOOPED, capsize=3)
    axis.axhline(0, color=LIMIT, linewidth=0.8)
    _loop_axis(axis, loops)
    axis.set_ylabel(f"this model minus {Path(compare['folder']).name}, paired\n(nats a token; below 0 is better)")


def _time(axis: Axes, found: dict[str, Any], measure: str) -> None:
    edges, loops = found["edges"], found["loops"]
    middle = [(a + b) / 2 for a, b in pairwise(edges)]
    errors = found["error" if measure == "nats" else "gain_error"]
    for i, S in enumerate(loops):
        if measure == "gain" and i == 0:
            continue
        shade = 0.3 + 0.7 * (i + 1) / len(loops)
        axis.errorbar(
            middle,
            [row[i] for row in found[measure]],
            _bars(row[i] for row in errors),
            fmt="o-",
            markersize=4,
            capsize=2,
            color=LOOPED,
            alpha=shade,
            label=f"S = {S}",
        )
    axis.set_xlabel("t (share of tokens masked)")
    axis.set_xlim(0, 1)
    if measure == "gain":
        axis.axhline(0, color=LIMIT, linewidth=0.8)
    axis.set_ylabel(
        "NELBO given t (nats a token)" if measure == "nats" else f"gain over S = {loops[0]}\n(nats a token)"
    )
    if len(loops) > (measure == "gain"):
        axis.legend(frameon=False, fontsize=8)


def _samples(axis: Axes, found: dict[str, Any], measure: str) -> None:
    text, *rows = found["rows"]
    loops = [r["loops"] for r in rows]
    if measure == "perplexity":  # its error is relative: that of nats a token
        bars = _bars(r["error"] if r["error"] is None else r["error"] * r["perplexity"] for r in rows)
        axis.errorbar(loops, [r["perplexity"] for r in rows], bars, fmt="o-", color=LOOPED, capsize=3)
    else:
        bars = _bars(r["entropy_error"] for r in rows)
        axis.errorbar(loops, [r["entropy"] for r in rows], bars, fmt="o-", color=LOOPED, capsize=3)
    axis.axhline(text[measure], color=LIMIT, linestyle=":", label="the text itself")
    _loop_axis(axis, loops)
    axis.set_ylabel("generative perplexity" if measure == "perplexity" else "entropy of a sample's tokens (nats)")
    axis.legend(frameon=False, fontsize=8)


def _loop_axis(axis: Axes, loops: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(loops, [str(S) for S in loops])
    axis.minorticks_off()
    axis.set_xlabel("S, visits of the looped layers")


def _bars(errors: Iterable[float | None]) -> list[float]:
    return [0.0 if error is None else error for error in errors]


COLUMN = 56  # lines of a column of `ratios`


def ratios(path: Path, results: dict[str, Any]) -> None:
    """Times faster than the reference, with intervals: a line an arm under its group's name, columns side by side."""
    found = {name: [r for r in rows if "ratio" in r] for name, rows in bench.groups(results["rows"]).items()}
    every = [row for rows in found.values() for row in rows]
    if not every:
        raise InputError("there is no ratio to draw: every row is a reference's own")
    columns: list[list[str | dict[str, Any]]] = [[]]
    for name, rows in found.items():
        if columns[-1] and len(columns[-1]) + 1 + len(rows) > COLUMN:
            columns.append([])
        columns[-1] += [name, *rows] if rows else []
    lines = max(map(len, columns))
    height = 1.6 + 0.2 * lines
    reach = 0.8 * min(1, *(row["ratio_low"] for row in every)), 1.9 * max(1, *(row["ratio_high"] for row in every))
    figure, axes = plt.subplots(1, len(columns), figsize=(max(8.0, 6.4 * len(columns)), height), squeeze=False)
    for axis, column in zip(axes[0], columns, strict=True):
        _ratios(axis, column, reach)
        axis.set_ylim(lines - 0.4, -0.8)
    handles = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in (LOOPED, UNLOOPED, LIMIT)]
    names = ["faster than the reference", "slower", "cannot be told apart"]
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False, fontsize=9)
    what = "Times faster than the reference, and where a repeated run has them"
    _save(figure, path, f"{what}\n{bench.title(results)}", 0.4 / height)


def _ratios(axis: Axes, column: list[str | dict[str, Any]], reach: tuple[float, float]) -> None:
    """Names of groups above their arms, the interval of each arm, its ratio at the right."""
    edge = axis.get_yaxis_transform()
    small: dict[str, Any] = {"transform": edge, "fontsize": 7.5, "va": "center"}
    for y, line in enumerate(column):
        if isinstance(line, str):
            axis.text(-0.4, y, line, fontweight="bold", backgroundcolor="white", **small)
            continue
        low, middle, high = (line[key] for key in ("ratio_low", "ratio", "ratio_high"))
        colour = LOOPED if low > 1 else UNLOOPED if high < 1 else LIMIT
        axis.plot([low, high], [y, y], color=colour, linewidth=2)
        axis.plot(middle, y, "o", color=colour, markersize=4)
        axis.text(-0.02, y, line["arm"], ha="right", **small)
        axis.text(0.99, y, f"{middle:.2f}", ha="right", **small)
    axis.set_xscale("log")
    axis.set_xlim(reach)
    marks = [2.0**n for n in range(math.ceil(math.log2(reach[0])), math.floor(math.log2(reach[1])) + 1)]
    axis.set_xticks(marks, [f"{mark:g}x" for mark in marks], fontsize=8)
    axis.minorticks_off()
    axis.set_yticks([])
    axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axis.axvline(1, color=LIMIT, linewidth=0.8)
    axis.spines[["left", "right", "top"]].set_visible(False)


def _save(figure: Any, path: Path, title: str, below: float = 0.0) -> None:
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)

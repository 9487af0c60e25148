"""The demo end to end on very short trainings: what it prints and leaves, and that its sentences follow its numbers."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from loopmdm.errors import InputError
from loopmdm.lab import demo, show
from loopmdm.lab.evaluate import solved
from loopmdm.lab.tasks.sudoku import Sudoku
from loopmdm.model.lm import LoopMDM


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def said(screen: Console) -> str:
    return screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def short_sudoku():
    return Sudoku(seed=0, scale=0.01, grids=60, puzzles=12)


def test_puzzle_act_leaves_a_run(short_sudoku, tmp_path):
    screen = console()
    results = demo._puzzle_act(short_sudoku, tmp_path / "sudoku", True, screen)
    text = said(screen)
    assert "12 unseen puzzles" in text and "unlooped" in text and "12 loops" in text
    folder = tmp_path / "sudoku"
    for name in (
        "results.json",
        "metrics.jsonl",
        "timing.jsonl",
        "recipe.json",
        "loops.png",
        "training.png",
        "grid.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "results.json").read_text())["rows"] == results["rows"]
    rows = results["rows"]
    assert [r["loops"] for r in rows] == [*short_sudoku.final, 1] and rows[-1]["model"] == "unlooped"
    # equal training FLOPs, up to the draw of S in so few steps
    steps = results["training"]["unlooped"]["step"] / results["training"]["step"]
    assert steps == pytest.approx(9 / 4, abs=0.13)
    again = LoopMDM.from_pretrained(folder / "model")
    assert again.config == short_sudoku.config
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and "seconds" not in lines[0]


def test_text_act_leaves_a_run(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("she sells [red]sea[/] shells on the sea shore. " * 300)  # markup in the data is text
    screen = console()
    demo.run(data=[file], scale=0.002, out=tmp_path / "run", console=screen)
    text = said(screen)
    assert "letter frequencies alone cost" in text and "still masked" in text and "Not shown" in text
    assert (tmp_path / "run/text/model/tokenizer.json").exists()
    assert set(json.loads((tmp_path / "run/text/results.json").read_text())["sample"]) <= set(file.read_text())


def row(model: str, loops: int, share: float, **more: float) -> dict[str, object]:
    error = (share * (1 - share) / 400) ** 0.5
    return {"model": model, "loops": loops, "solved": share, "solved_error": error, "solved_in_steps": 0.93, **more}


def test_puzzle_verdict_follows_the_numbers(short_sudoku):
    screen = console()
    show.puzzle_verdict(
        screen, short_sudoku, [row("looped", 1, 0.01), row("looped", 6, 0.8), row("looped", 12, 0.9)], False
    )
    assert "1% solved with one visit" in said(screen) and "80% with 6, 90% with 12" in said(screen)
    screen = console()
    show.puzzle_verdict(
        screen, short_sudoku, [row("looped", 1, 0.01), row("looped", 6, 0.011), row("looped", 12, 0.0)], False
    )
    assert "The loops bought nothing" in said(screen)
    screen = console()
    rows = [row("looped", 1, 0.0), row("looped", 6, 0.8), row("unlooped", 1, 0.2)]
    show.puzzle_verdict(screen, short_sudoku, rows, True)
    assert "same size and training FLOPs: 20% solved; looped at S = 6: 80% solved" in said(screen)
    assert "4 denoising steps instead of one: 93% at S = 1" in said(screen) and "--compare" not in said(screen)


def text_row(loops: int, bits: float, gain: float, error: float) -> dict[str, object]:
    return {"model": "looped", "loops": loops, "nelbo_bits": bits, "gain": gain, "gain_error": error}


def test_text_verdict_follows_the_numbers():
    screen = console()
    show.text_verdict(screen, [text_row(1, 3.0, 0, 0), text_row(4, 2.9, 0.1, 0.01)], 4.6, False)
    assert "1.70 bits a character under" in said(screen) and "0.100 ± 0.010" in said(screen)
    screen = console()
    show.text_verdict(screen, [text_row(1, 4.7, 0, 0), text_row(4, 4.69, 0.01, 0.01)], 4.6, False)
    assert "not got below" in said(screen) and "no measurable difference" in said(screen)


def test_grids_mark_wrong_cells_without_colour(short_sudoku):
    answer = short_sudoku.answers[0].tolist()
    clue = [i < 6 for i in range(36)]
    wrong = [i == 7 for i in range(36)]
    lines = short_sudoku.lines(answer, clue, wrong)
    assert sum(line.count("!") for line in lines) == 1 and "!" in lines[1]


def test_solved_counts_whole_rows():
    answers = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    tokens = torch.tensor([[1, 2], [3, 0], [5, 6], [7, 8]])
    exact = solved(tokens, answers)
    assert exact.mean == 0.75 and exact.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "sudoko"}, "did you mean 'sudoku'"),
        ({"task": "sudoku", "data": ["x.txt"]}, "does not go with --task sudoku"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"data": ["no such file"]}, "cannot read no such file"),
    ],
)
def test_refusals(arguments, words, tmp_path):
    with pytest.raises(InputError, match=words):
        demo.run(**arguments, out=tmp_path / "run", console=console())
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="already holds a run"):
        demo.run(out=tmp_path, console=console())
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_ctrl_c_keeps_the_weights_and_claims_nothing(short_sudoku, tmp_path, monkeypatch):
    def interrupted(step: int, index: torch.Tensor) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return Sudoku.batch(short_sudoku, step, index)

    monkeypatch.setattr(short_sudoku, "batch", interrupted, raising=False)
    screen = console()
    with pytest.raises(KeyboardInterrupt):
        demo._puzzle_act(short_sudoku, tmp_path / "sudoku", False, screen)
    assert "Stopped after step 2 of 4" in said(screen) and "unseen puzzles" not in said(screen)
    assert LoopMDM.from_pretrained(tmp_path / "sudoku/model").config == short_sudoku.config
    assert not (tmp_path / "sudoku/results.json").exists()


def test_a_text_too_short_to_measure_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("she sells sea shells on the sea shore. " * 45)
    with pytest.raises(InputError, match="too short to measure on"):
        demo.run(data=[file], out=tmp_path / "run", console=console())

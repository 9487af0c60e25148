"""Sudoku, addition and text: what the demo trains on and scores with is what it says it is."""

from __future__ import annotations

import random as python_random

import pytest
import torch

from loopmdm.errors import InputError
from loopmdm.lab.tasks.addition import BLANK as DIGIT_BLANK
from loopmdm.lab.tasks.addition import DIGITS, EQUALS, PLUS, Addition
from loopmdm.lab.tasks.sudoku import BLANK, Sudoku, canonical_grids, make_puzzle, solutions
from loopmdm.lab.tasks.text import Text


@pytest.fixture(scope="module")
def sudoku() -> Sudoku:
    return Sudoku(seed=3, grids=200, puzzles=25)


def legal(grid: list[int]) -> bool:
    """Rows, columns and 2x3 boxes each hold six different digits; written without the solver's tables."""
    rows = [grid[6 * r : 6 * r + 6] for r in range(6)]
    columns = [grid[c::6] for c in range(6)]
    boxes = [
        [grid[6 * (top + i) + left + j] for i in (0, 1) for j in (0, 1, 2)] for top in (0, 2, 4) for left in (0, 3)
    ]
    return all(sorted(unit) == [0, 1, 2, 3, 4, 5] for unit in rows + columns + boxes)


def count_by_force(puzzle: list[int]) -> int:
    """Number of solutions by trying every digit in reading order."""
    if BLANK not in puzzle:
        return int(legal(puzzle))
    i = puzzle.index(BLANK)
    r, c = divmod(i, 6)
    total = 0
    for digit in range(6):
        box = [6 * (r // 2 * 2 + y) + c // 3 * 3 + x for y in (0, 1) for x in (0, 1, 2)]
        seen = [puzzle[6 * r + k] for k in range(6)] + [puzzle[6 * k + c] for k in range(6)] + [puzzle[k] for k in box]
        if digit not in seen:
            total += count_by_force([*puzzle[:i], digit, *puzzle[i + 1 :]])
    return total


def canonical(grid: list[int]) -> tuple[int, ...]:
    names = {digit: position for position, digit in enumerate(grid[:6])}
    return tuple(names[d] for d in grid)


def test_training_grids_are_legal_different_and_canonical(sudoku):
    grids = [tuple(g) for g in sudoku.train.tolist()]
    assert len(set(grids)) == 200
    assert all(legal(list(g)) and g[:6] == (0, 1, 2, 3, 4, 5) for g in grids)


def test_puzzles_have_22_blanks_and_one_solution(sudoku):
    for puzzle, answer in zip(sudoku.puzzles.tolist(), sudoku.answers.tolist(), strict=True):
        assert puzzle.count(BLANK) == 22 and legal(answer)
        assert all(p in (BLANK, a) for p, a in zip(puzzle, answer, strict=True))
        assert solutions(puzzle) == [answer]
    assert all(count_by_force(puzzle) == 1 for puzzle in sudoku.puzzles[:5].tolist())


def test_solver_finds_every_solution():
    rng = python_random.Random(0)
    grid = list(canonical_grids(1, seed=0)[0])
    several = 0
    for _ in range(6):
        holes = rng.sample(range(36), 20)
        puzzle = [BLANK if i in holes else d for i, d in enumerate(grid)]
        found = solutions(puzzle, limit=1000)
        assert len(found) == len({tuple(f) for f in found}) == count_by_force(puzzle)
        several += len(found) > 1
    assert several, "no example had more than one solution"
    assert solutions([0, 0] + [BLANK] * 34) == []


def test_a_puzzle_that_cannot_be_made_is_none():
    assert make_puzzle(canonical_grids(1, seed=0)[0], blanks=36, rng=python_random.Random(0)) is None


def test_no_test_grid_was_seen_in_training_under_any_relabelling(sudoku):
    seen = {tuple(g) for g in sudoku.train.tolist()}
    assert not seen & {canonical(a) for a in sudoku.answers.tolist()}
    for step in range(20):
        for grid in sudoku.batch(step, torch.arange(16)).tolist():
            assert legal(grid) and canonical(grid) in seen


def test_sudoku_batches_are_functions_of_step_and_index(sudoku):
    whole = sudoku.batch(5, torch.arange(8))
    assert torch.equal(whole[4:], sudoku.batch(5, torch.arange(4, 8)))
    assert not torch.equal(whole, sudoku.batch(6, torch.arange(8)))
    assert not torch.equal(whole, Sudoku(seed=4, grids=200, puzzles=1).batch(5, torch.arange(8)))


def test_relabelling_is_even_and_independent_of_the_grid(sudoku):
    """First rows are permutations of 0..5: every digit equally likely in every cell, whichever half of the training
    grids it is drawn from (5 standard errors)."""
    batch = sudoku.batch(0, torch.arange(6000))
    place = {tuple(g): i for i, g in enumerate(sudoku.train.tolist())}
    early = torch.tensor([place[canonical(g)] < len(place) // 2 for g in batch.tolist()])
    assert 2500 < int(early.sum()) < 3500
    for half in (early, ~early):
        first = batch[half, :6]
        share = torch.stack([(first == d).double().mean(0) for d in range(6)])
        assert (share - 1 / 6).abs().max() < 5 * (5 / 36 / len(first)) ** 0.5


def test_addition_is_true_and_test_pairs_are_held_out():
    task = Addition(seed=1, puzzles=50)

    def read(row: list[int]) -> tuple[int, int, int]:
        text = "".join({PLUS: "+", EQUALS: "="}.get(t, str(t)) for t in row)
        left, total = text.split("=")
        a, b = left.split("+")
        assert len(a) == len(b) == DIGITS and len(total) == DIGITS + 1
        return int(a), int(b), int(total)

    pairs = set()
    for row in task.answers.tolist():
        a, b, total = read(row)
        assert a + b == total
        pairs.add((a, b))
    assert ((task.puzzles == DIGIT_BLANK).sum(1) == DIGITS + 1).all()
    assert torch.equal(task.puzzles[:, : 2 * DIGITS + 2], task.answers[:, : 2 * DIGITS + 2])
    batch = task.batch(0, torch.arange(64))
    for row in batch.tolist():
        a, b, total = read(row)
        assert a + b == total and (a, b) not in pairs
    assert torch.equal(batch[32:], task.batch(0, torch.arange(32, 64)))


def test_a_held_out_pair_is_moved_on():
    task = Addition(seed=1, puzzles=5)
    a, b = task._draw(1, torch.arange(3))
    task.held_out = {(int(a[0]), int(b[0])), (int(a[0]), int(b[0]) + 1)}
    again = task._draw(1, torch.arange(3))
    assert int(again[1][0]) == int(b[0]) + 2 and torch.equal(again[1][1:], b[1:])


def test_text_task(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("the cat sat on the mat. " * 400)
    task = Text(seed=0, files=[file])
    assert task.config.vocab_size == task.data.mask_id + 1 == len(set("the cat sat on the mat. ")) + 1
    assert task.batch(0, torch.arange(4)).shape == (4, 64)
    with pytest.raises(InputError, match="cannot read"):
        Text(files=[tmp_path / "missing"])


def test_python_topics_are_english_enough():
    data = Text().data
    assert 4.4 < data.unigram_bits < 4.9 and len(data.train) > 400_000

"""6x6 Sudoku (boxes of 2 rows by 3 columns): full grids to train on, unseen puzzles with one solution to test on.

Digits 1..6 are ids 0..5, the blank is the mask. Grids are kept in canonical form (first row 1..6), of
which there are 39,168; the digits are relabelled at random at each draw. Test puzzles come from
canonical grids that training does not hold, so no relabelling of a test grid was ever seen.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import random
from . import short_recipe, small_model, symbol

SIDE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
CELLS = SIDE * SIDE
BLANK = SIDE  # id of the mask; ids 0..5 are the digits 1..6
VOCABULARY = SIDE + 1
_ALL = (1 << SIDE) - 1


def _units() -> list[tuple[int, int, int]]:
    """(row, column, box) of each cell."""
    return [
        (c // SIDE, c % SIDE, (c // SIDE // BOX_ROWS) * (SIDE // BOX_COLUMNS) + c % SIDE // BOX_COLUMNS)
        for c in range(CELLS)
    ]


UNITS = _units()


def solutions(puzzle: Sequence[int], limit: int = 2, rng: python_random.Random | None = None) -> list[list[int]]:
    """Up to `limit` solutions of a puzzle (ids 0..5, BLANK for empty), cells of fewest candidates first."""
    rows, columns, boxes = [_ALL] * SIDE, [_ALL] * SIDE, [_ALL] * SIDE
    grid, empty = list(puzzle), []
    for cell, digit in enumerate(puzzle):
        r, c, b = UNITS[cell]
        if digit == BLANK:
            empty.append(cell)
            continue
        bit = 1 << digit
        if not rows[r] & columns[c] & boxes[b] & bit:
            return []
        rows[r] ^= bit
        columns[c] ^= bit
        boxes[b] ^= bit
    found: list[list[int]] = []

    def search() -> None:
        best, options = -1, 0
        fewest = SIDE + 1
        for i, cell in enumerate(empty):
            r, c, b = UNITS[cell]
            allowed = rows[r] & columns[c] & boxes[b]
            count = allowed.bit_count()
            if count < fewest:
                best, options, fewest = i, allowed, count
                if count <= 1:
                    break
        if best < 0:
            found.append(list(grid))
            return
        if not options:
            return
        cell = empty.pop(best)
        r, c, b = UNITS[cell]
        digits = [d for d in range(SIDE) if options >> d & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << digit
            grid[cell] = digit
            rows[r] ^= bit
            columns[c] ^= bit
            boxes[b] ^= bit
            search()
            rows[r] ^= bit
            columns[c] ^= bit
            boxes[b] ^= bit
            if len(found) >= limit:
                break
        grid[cell] = BLANK
        empty.insert(best, cell)

    search()
    return found


def canonical_grids(count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` different full grids whose first row is 1..6."""
    rng = python_random.Random(seed)
    start = [*range(SIDE), *[BLANK] * (CELLS - SIDE)]
    grids: dict[tuple[int, ...], None] = {}
    while len(grids) < count:
        grids[tuple(solutions(start, limit=1, rng=rng)[0])] = None
    return list(grids)


def make_puzzle(grid: Sequence[int], blanks: int, rng: python_random.Random) -> list[int] | None:
    """Empty `blanks` cells of a full grid so that it stays the only solution; None if the random order gets stuck."""
    puzzle, removed = list(grid), 0
    for cell in rng.sample(range(CELLS), CELLS):
        if removed == blanks:
            break
        digit, puzzle[cell] = puzzle[cell], BLANK
        if len(solutions(puzzle, limit=2)) == 1:
            removed += 1
        else:
            puzzle[cell] = digit
    return puzzle if removed == blanks else None


def relabel(grids: Tensor, noise: Tensor) -> Tensor:
    """grids int64 [B, any] (BLANK stays), noise [B, 6] -> each row's digits permuted in the order of its noise."""
    permutation = torch.cat((noise.argsort(-1), torch.full((len(grids), 1), BLANK)), dim=1)
    return permutation.gather(1, grids)


class Sudoku:
    """The Sudoku task of one seed (a `Puzzles`).

    Attributes:
        train: int64 [grids, 36], canonical.
        puzzles, answers: int64 [puzzles, 36], `blanks` cells of each puzzle being BLANK; unique solutions.
    """

    name, title, unit = "sudoku", "6x6 Sudoku, 22 blanks, one solution, never seen in training", "blank"
    probe: tuple[int, ...] = (1, 6)
    final: tuple[int, ...] = (1, 2, 4, 6, 8, 12)

    def __init__(
        self, seed: int = 0, scale: float = 1.0, grids: int = 6000, puzzles: int = 400, blanks: int = 22
    ) -> None:
        self.config = small_model(VOCABULARY, CELLS)
        self.recipe = short_recipe(377 * scale, seed)
        self.seed = seed
        rng = python_random.Random(seed)
        pool = canonical_grids(grids + puzzles, seed)
        self.train = torch.tensor(pool[:grids])
        made = []
        for grid in pool[grids:]:
            puzzle = None
            while puzzle is None:
                puzzle = make_puzzle(grid, blanks, rng)
            made.append([*puzzle, *grid])
        noise = random.uniform(seed, random.DATA, 0, torch.arange(puzzles), SIDE)
        both = relabel(torch.tensor(made), noise)
        self.puzzles, self.answers = both[:, :CELLS], both[:, CELLS:]

    def batch(self, step: int, index: Tensor) -> Tensor:
        """Relabelled grids int64 [len(index), 36], a function of (seed, step, global sample index)."""
        noise = random.uniform(self.seed, random.DATA, step + 1, index, 1 + SIDE)
        return relabel(self.train[(noise[:, 0] * len(self.train)).long()], noise[:, 1:])

    def lines(self, tokens: list[int], clue: list[bool], wrong: list[bool]) -> list[str]:
        rows = []
        for start in range(0, CELLS, SIDE):
            symbols = [
                symbol("." if tokens[i] == BLANK else str(tokens[i] + 1), clue[i], wrong[i])
                for i in range(start, start + SIDE)
            ]
            rows.append("".join(symbols[:BOX_COLUMNS]) + "| " + "".join(symbols[BOX_COLUMNS:]))
            if start // SIDE % BOX_ROWS == BOX_ROWS - 1 and start + SIDE < CELLS:
                rows.append("-" * (2 * BOX_COLUMNS) + "+" + "-" * (2 * BOX_COLUMNS + 1))
        return rows

"""`loopmdm sample --watch`: the denoising as it happens, several samples at once; text made safe for a terminal."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from tokenizers import Tokenizer
from torch import Tensor

from ..sampling.engine import Loops
from .data import decode

MASKED, FRESH, KNOWN = "dim", "bold black on green", ""
FRAME = 4
"""Rows that a panel of one line of text and the footer take."""


class View:
    """`on_step` of a generation; without a terminal it only counts.

    Attributes:
        seconds: spent on showing, so that it can be taken out of the generation's time.
    """

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        mask_id: int,
        eos_id: int | None,
        live: Live | None,
        pace: float,
    ) -> None:
        self.console, self.tokenizer, self.live, self.pace = console, tokenizer, live, pace
        self.mask_id, self.eos_id = mask_id, eos_id
        self.seconds, self.last = 0.0, 0.0
        self.loops: int | Tensor = 0
        self.steps: int | None = None
        self.exits = False

    def noting(self, num_loops: Loops, steps: int | None, exits: bool) -> Loops:
        """What a generation is asked for, for the footer: S, or a function of t that leaves a note of its answer."""
        self.steps, self.exits = steps, exits
        if isinstance(num_loops, int):
            self.loops = num_loops
            return num_loops

        def noted(t: Tensor) -> Tensor:
            self.loops = num_loops(t)
            return self.loops

        return noted

    def __call__(self, step: int, tokens: Tensor, revealed: Tensor) -> None:
        if self.live is None:
            return
        started = time.perf_counter()
        self.live.update(self.frame(step, tokens, revealed), refresh=True)
        time.sleep(max(0.0, self.pace - (time.perf_counter() - self.last)))
        self.last = time.perf_counter()
        self.seconds += self.last - started

    def frame(self, step: int, tokens: Tensor, revealed: Tensor) -> RenderableType:
        """As many samples as the terminal has room for, and a footer."""
        rows, fresh = tokens.tolist(), revealed.tolist()
        shown = max(1, min(len(rows), (self.console.height - 1) // FRAME))
        room = max(3, (self.console.height - 2) // shown)
        panels: list[RenderableType] = []
        for i in range(shown):
            text = styled(self.tokenizer, rows[i], fresh[i], self.mask_id, self.eos_id)
            lines = len(text.wrap(self.console, max(1, self.console.width - 4)))
            panels.append(Panel(text, title=f"sample {i + 1}", title_align="left", height=min(room, lines + 2)))
        words = [f"step {step + 1}" + (f" of {self.steps}" if self.steps else ""), self._depth()]
        words.append(f"{int((tokens == self.mask_id).sum())} masked")
        if shown < len(rows):
            words.append(f"{len(rows) - shown} more samples not shown")
        return Group(*panels, Text(" · ".join(words), style="dim", no_wrap=True))

    def _depth(self) -> str:
        if isinstance(self.loops, Tensor):
            low, high = (int(S) for S in self.loops.aminmax())
            return f"S = {low}" if low == high else f"S = {low}..{high}"
        return f"S {'≤' if self.exits else '='} {self.loops}"


def styled(tokenizer: Tokenizer, row: list[int], fresh: list[bool], mask_id: int, eos_id: int | None) -> Text:
    """Ids and which of them are new -> text: masks dim, new tokens highlighted. It cannot hold markup or controls."""

    def style(i: int) -> str:
        return MASKED if row[i] == mask_id else FRESH if fresh[i] else KNOWN

    runs = ((key, [row[i] for i in group]) for key, group in groupby(range(len(row)), style))
    return Text.assemble(*((printable(decode(tokenizer, run, eos_id, mask_id)), key) for key, run in runs))


@contextmanager
def watching(
    console: Console | None, tokenizer: Tokenizer, mask_id: int, eos_id: int | None, pace: float
) -> Iterator[View]:
    """A live view on a terminal; anywhere else, or without a console, a View that shows nothing."""
    console = console or Console(quiet=True)
    if not console.is_terminal or console.quiet:
        yield View(console, tokenizer, mask_id, eos_id, None, pace)
        return
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        yield View(console, tokenizer, mask_id, eos_id, live, pace)


def printable(text: str) -> str:
    """Text in which control characters, but for newline and tab, are spelt out: safe for a terminal.

    Zero-width joiners stay, since scripts and emoji need them.
    """
    keep = "\n\t\u200c\u200d"
    return "".join(c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else repr(c)[1:-1] for c in text)

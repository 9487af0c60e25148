"""What happens after each step of `loopmdm train`: progress, evaluation, logs, TensorBoard, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .evaluate import BITS, estimate, nelbo_by_loops
from .feed import Feed
from .run import RunFolder
from .train import Progress, Trainer

USED = 1e-3
"""Loops whose NELBO is within this share of the first one's count as unused, however small the error is."""


class Board(Protocol):
    """What is used of torch's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Monitor:
    """`on_step` of a training run. Its own time is kept out of timing.jsonl; only the main process has a folder.

    Args:
        feed: validation sequences, their units, and the tokenizer to be saved beside the model.
        loops: S of the evaluations.
        say: prints a line.

    Attributes:
        step: steps done; saved: step of the last checkpoint that this process made.
        advance: the progress bar's.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder | None,
        *,
        feed: Feed,
        loops: Sequence[int],
        eval_every: int,
        save_every: int,
        keep: int,
        board: Board | None,
        say: Callable[[str], None],
    ) -> None:
        self.trainer, self.folder, self.recipe = trainer, folder, trainer.recipe
        self.feed, self.loops = feed, loops
        self.eval_every, self.save_every, self.keep = eval_every, save_every, keep
        self.board, self.say = board, say
        self.advance: Callable[[Progress, float], None] = lambda progress, bits: None
        self.step, self.saved, self.evaluated, self.watching = trainer.step, -1, 0, 0.0
        self.recent: list[float] = []
        self.latest = torch.zeros(0)

    def __call__(self, progress: Progress) -> None:
        self.step = progress.step
        bits = progress.nelbo * BITS / self.feed.units
        if math.isfinite(bits):
            self.recent.append(bits)
        self.advance(progress, bits)
        started = time.perf_counter()
        if self.folder is not None:
            self._scalars({"bits": bits, "grad_norm": progress.grad_norm, "num_loops": progress.result.num_loops})
            self._scalars({"learning_rate": progress.learning_rate, "skipped": progress.skipped})
            if progress.step == progress.steps or progress.step % self.eval_every == 0:
                self.evaluate(self.folder, progress)
        if progress.last or progress.step % self.save_every == 0:
            self.save(progress.seconds - self.watching)
        self.watching += time.perf_counter() - started

    def evaluate(self, folder: RunFolder, progress: Progress) -> None:
        valid = self.feed.valid
        values = nelbo_by_loops(
            progress.average,
            valid.tokens,
            self.loops,
            maskable=valid.maskable,
            document_ids=valid.document_ids,
            seed=self.recipe.seed,
        )
        self.latest, self.evaluated = values / self.feed.units, progress.step
        estimates = {S: estimate(v) for S, v in zip(self.loops, self.latest, strict=True)}
        trained = sum(self.recent) / len(self.recent) if self.recent else math.nan
        self.recent = []
        folder.log(
            step=progress.step,
            flops=progress.flops,
            learning_rate=progress.learning_rate,
            skipped=progress.skipped,
            train_bits=trained if math.isfinite(trained) else None,
            valid_bits={str(S): e.mean for S, e in estimates.items()},
            # one window has no standard error, and JSON no infinity
            valid_error={str(S): e.error if math.isfinite(e.error) else None for S, e in estimates.items()},
        )
        tokens = progress.step * self.recipe.batch_size * self.feed.length
        seconds = progress.seconds - self.watching
        folder.clock(step=progress.step, seconds=seconds, tokens_per_second=tokens / seconds)
        for S, e in estimates.items():
            if self.board is not None:
                self.board.add_scalar(f"valid/bits S={S}", e.mean, progress.step)
        measured = "  ".join(f"S = {S}: {e.mean:.3f} ± {e.error:.3f}" for S, e in estimates.items())
        unigram = "" if self.feed.unigram_bits is None else f" (unigram {self.feed.unigram_bits:.3f})"
        self.say(
            f"step {progress.step:>{len(str(progress.steps))}}  {progress.flops:.2e} FLOPs  train {trained:.3f}  "
            f"validation {measured}  bits a {self.feed.unit}{unigram}"
        )

    def save(self, seconds: float) -> None:
        """A checkpoint to go on from, then the model that `from_pretrained` reads. Every process must call it."""
        state = self.trainer.state_dict()
        if self.folder is None:
            return
        if self.board is not None:
            self.board.flush()
        own = {"recent": self.recent, "seconds": seconds, "logs": self.folder.lengths()}
        state |= {"monitor": own, "threads": torch.get_num_threads()}
        self.folder.checkpoints(self.keep).save(self.step, state)
        self.folder.save(self.trainer.average, self.feed.tokenizer)
        self.saved = self.step

    def restore(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from what `save` added to the state; returns a sentence for what cannot be as it was."""
        own = state["monitor"]
        self.step, self.recent, self.trainer.seconds = self.trainer.step, list(own["recent"]), own["seconds"]
        notes = self.folder.truncate(own["logs"]) if self.folder is not None else []
        if state["threads"] != torch.get_num_threads():
            notes.append(
                f"the run used {state['threads']} threads and has {torch.get_num_threads()} now, so the last digits of "
                "its numbers will differ"
            )
        return notes

    def conclude(self, hint: str, stopped: bool) -> None:
        """Say what was made and how to go on, and warn when the loops do nothing."""
        folder, say = self.folder, self.say
        assert folder is not None
        if self.board is not None:
            self.board.close()
        say("")
        if stopped:
            say(
                f"Stopped after step {self.step} of {self.recipe.steps}; what was learnt so far is saved. "
                f"Go on with it: loopmdm train --resume {folder.path}"
            )
        if self.evaluated and self.loops[-1] > self.loops[0]:
            gain = estimate(self.latest[0] - self.latest[-1])
            if gain.mean <= max(2 * gain.error, USED * float(self.latest[0].mean())):
                say(
                    f"Warning: looping is not being used: at step {self.evaluated}, S = {self.loops[-1]} gains "
                    f"{gain.mean:z.4f} ± {gain.error:.4f} bits a {self.feed.unit} over S = {self.loops[0]}. Train "
                    f"longer{hint}."
                )
        weights = "weight average" if self.recipe.ema else "weights"
        say(
            f"In {folder.path}: model/ (the {weights} and the tokenizer), checkpoints/, metrics.jsonl, timing.jsonl, "
            "recipe.json"
        )
        say(f"Sample from it: loopmdm sample {folder.path}")

    def _scalars(self, values: Mapping[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, self.step)


@contextmanager
def bar(console: Console, start: int, steps: int, unit: str) -> Iterator[Callable[[Progress, float], None]]:
    """A progress bar on a terminal; elsewhere the evaluations' lines are the progress."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    state = TextColumn("S = {task.fields[loops]:<2} {task.fields[bits]:.3f} bits a " + unit, markup=False)
    disabled = not console.is_terminal or console.quiet
    with Bar(*columns, state, console=console, transient=True, disable=disabled) as shown:
        task = shown.add_task("", total=steps, completed=start, loops=0, bits=math.nan)

        def advance(progress: Progress, bits: float) -> None:
            shown.update(task, completed=progress.step, loops=progress.result.num_loops, bits=bits)

        yield advance

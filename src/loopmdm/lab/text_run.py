"""What `loopmdm train` and `loopmdm sample` do: train a LoopMDM on text files, and print text from it."""

from __future__ import annotations

import dataclasses
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from tokenizers import Tokenizer
from torch import Tensor

from ..config import ModelConfig, check_loops, preset
from ..errors import InputError, nearest
from ..model.checkpoint import CONFIG_FILE
from ..model.lm import LoopMDM
from ..sampling.engine import Generation, generate
from .data import TOKENIZERS, TextData, build_tokenizer, decode, encode, read_text
from .evaluate import BITS, estimate, nelbo_by_loops
from .train import TOKENIZER_FILE, Progress, Recipe, RunFolder, accelerator_for, fit, micro_batch

USED = 1e-3
"""Loops whose NELBO is within this share of the first one's count as unused, however small the error is."""
NEW_TOKENS = 128


@dataclass(frozen=True)
class Trained:
    """A finished or interrupted run: its folder's `model/`, and the steps done of those asked for."""

    model: Path
    step: int
    steps: int


def train(
    data: Sequence[str | Path],
    out: str | Path,
    recipe: Recipe,
    *,
    tokenizer: str = "char",
    vocab_size: int = 4096,
    preset_name: str = "tiny-llama",
    overrides: Mapping[str, Any] | None = None,
    length: int = 128,
    eval_every: int | None = None,
    save_every: int | None = None,
    eval_loops: Sequence[int] | None = None,
    eval_windows: int = 128,
    console: Console | None = None,
) -> Trained:
    """Train on text files and leave `metrics.jsonl`, `timing.jsonl`, `recipe.json` and `model/` in a new folder.

    Everything that can be checked is checked before the folder is made. Under a launcher only the main process
    evaluates, prints and writes. Ctrl-C saves what was learnt. A run whose loss stops being finite keeps its last
    checkpoint.

    Args:
        tokenizer, vocab_size: "char", "byte" or "bpe" (of at most that many ids).
        preset_name, overrides: the model; its vocabulary is the tokenizer's and the mask.
        length: tokens a window.
        eval_every, save_every: steps; None is a tenth of the run, and as often as evaluations.
        eval_loops: S of the evaluations; None is powers of two up to the model's S_max, or the recipe's S.
        eval_windows: validation windows an evaluation, at most.

    Raises:
        InputError: whatever is wrong with the arguments, the files or the folder; a loss that is not finite.
    """
    overrides = dict(overrides or {})
    preset(preset_name, **overrides)
    if tokenizer not in TOKENIZERS:
        raise InputError(f"unknown tokenizer {tokenizer!r}{nearest(tokenizer, TOKENIZERS)}")
    eval_every = max(1, recipe.steps // 10) if eval_every is None else eval_every
    save_every = eval_every if save_every is None else save_every
    for name, value in (("eval_every", eval_every), ("save_every", save_every), ("eval_windows", eval_windows)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    RunFolder.check(out)

    text = read_text(data)
    corpus = TextData.from_text(text, build_tokenizer(tokenizer, text, vocab_size), length)
    config = _configuration(preset_name, overrides, corpus)
    loops = _eval_loops(eval_loops, recipe, config)
    engine = accelerator_for(recipe, config)
    micro_batch(recipe, engine.num_processes)
    torch.manual_seed(recipe.seed)
    model = LoopMDM(config)

    engine.wait_for_everyone()  # every process has seen that the folder is free
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    console.quiet = not engine.is_main_process
    facts = {
        "preset": preset_name,
        "set": overrides,
        "tokenizer": tokenizer,
        "unigram_bits": corpus.unigram_bits,
        "length": length,
        "eval_loops": loops,
    }
    settings = {**dataclasses.asdict(recipe), "data": [str(f) for f in data], **facts}
    folder = RunFolder(out, settings) if engine.is_main_process else None
    _announce(console, corpus, model, recipe)
    windows = corpus.valid_windows(eval_windows)
    watch = _Watch(folder, corpus, recipe, loops, windows, eval_every, save_every, console, _hint(config))
    with _bar(console, recipe.steps) as watch.advance:
        try:
            made = fit(
                model,
                lambda step, index: corpus.batch(recipe.seed, step, index),
                recipe,
                on_step=watch,
                accelerator=engine,
            )
        except InputError as error:
            kept = f"; the checkpoint of step {watch.saved} is in {folder.path}" if folder and watch.saved else ""
            raise InputError(f"{error}{kept}") from None
    if folder is not None:
        folder.save(made, corpus.tokenizer)
        watch.conclude()
    return Trained(Path(out) / "model", watch.step, recipe.steps)


class _Watch:
    """What happens after a step: progress, evaluation, checkpoint. Its own time is kept out of timing.jsonl."""

    def __init__(
        self,
        folder: RunFolder | None,
        corpus: TextData,
        recipe: Recipe,
        loops: Sequence[int],
        windows: Tensor,
        eval_every: int,
        save_every: int,
        console: Console,
        hint: str,
    ) -> None:
        self.folder, self.corpus, self.recipe, self.loops, self.windows = folder, corpus, recipe, loops, windows
        self.eval_every, self.save_every, self.console = eval_every, save_every, console
        self.advance: Callable[[Progress, float], None] = lambda progress, bits: None
        self.bits_per_nat = BITS / corpus.characters_per_token
        self.step, self.saved, self.evaluated, self.watching = 0, 0, 0, 0.0
        self.recent: list[float] = []
        self.latest = torch.zeros(0)
        self.hint = hint

    def __call__(self, progress: Progress) -> None:
        self.step = progress.step
        self.recent.append(progress.nelbo * self.bits_per_nat)
        self.advance(progress, self.recent[-1])
        if self.folder is None:
            return
        started, last = time.perf_counter(), progress.step == progress.steps
        if last or progress.step % self.eval_every == 0:
            self.evaluate(self.folder, progress)
        if last or progress.step % self.save_every == 0:
            self.folder.save(progress.average, self.corpus.tokenizer)
            self.saved = progress.step
        self.watching += time.perf_counter() - started

    def evaluate(self, folder: RunFolder, progress: Progress) -> None:
        values = nelbo_by_loops(progress.average, self.windows, self.loops, seed=self.recipe.seed)
        self.latest, self.evaluated = values / self.corpus.characters_per_token, progress.step
        estimates = [estimate(v) for v in self.latest]
        trained = sum(self.recent) / len(self.recent)
        self.recent = []
        folder.log(
            step=progress.step,
            flops=progress.flops,
            learning_rate=progress.learning_rate,
            train_bits=trained,
            valid_bits={str(S): e.mean for S, e in zip(self.loops, estimates, strict=True)},
            # one window has no standard error, and JSON no infinity
            valid_error={
                str(S): e.error if math.isfinite(e.error) else None for S, e in zip(self.loops, estimates, strict=True)
            },
        )
        tokens, seconds = progress.step * self.recipe.batch_size * self.corpus.length, progress.seconds - self.watching
        folder.clock(step=progress.step, seconds=seconds, tokens_per_second=tokens / seconds)
        measured = "  ".join(
            f"S = {S}: {e.mean:.3f} ± {e.error:.3f}" for S, e in zip(self.loops, estimates, strict=True)
        )
        self.console.print(
            f"step {progress.step:>{len(str(progress.steps))}}  {progress.flops:.2e} FLOPs  train {trained:.3f}  "
            f"validation {measured}  bits a character (unigram {self.corpus.unigram_bits:.3f})"
        )

    def conclude(self) -> None:
        """Say what was made, and warn when the loops do nothing."""
        folder, say = self.folder, self.console.print
        assert folder is not None
        say("")
        if self.step < self.recipe.steps:
            say(f"Stopped after step {self.step} of {self.recipe.steps}; what was learnt so far is saved.")
        if self.evaluated and self.loops[-1] > self.loops[0]:
            gain = estimate(self.latest[0] - self.latest[-1])
            if gain.mean <= max(2 * gain.error, USED * float(self.latest[0].mean())):
                say(
                    f"Warning: looping is not being used: at step {self.evaluated}, S = {self.loops[-1]} gains "
                    f"{gain.mean:.4f} ± {gain.error:.4f} bits a character over S = {self.loops[0]}. Train longer"
                    f"{self.hint}."
                )
        weights = "weight average" if self.recipe.ema else "weights"
        say(f"In {folder.path}: model/ (the {weights} and the tokenizer), metrics.jsonl, timing.jsonl, recipe.json")
        say(f"Sample from it: loopmdm sample {folder.path}")


def _configuration(name: str, overrides: Mapping[str, Any], corpus: TextData) -> ModelConfig:
    fixed = {"vocab_size": corpus.mask_id + 1, "mask_token_id": corpus.mask_id}
    for key, value in fixed.items():
        if overrides.get(key, value) != value:
            raise InputError(f"{key} comes from the tokenizer, which makes it {value}; {overrides[key]!r} does not fit")
    config = preset(name, **{**overrides, **fixed})
    if corpus.length > config.max_position_embeddings:
        raise InputError(
            f"length is {corpus.length}, more than the model's max_position_embeddings = "
            f"{config.max_position_embeddings}; shorten it or set max_position_embeddings={corpus.length}"
        )
    return config


def _hint(config: ModelConfig) -> str:
    """What else makes loops count, beside longer training (seen in small models)."""
    ideas = ["boundary=anchored"] if config.loop.boundary == "plain" else []
    ideas += ["initializer_range=0.3"] if config.initializer_range < 0.1 and config.hidden_size < 512 else []
    return f", or set {' and '.join(ideas)}" if ideas else ""


def _eval_loops(wanted: Sequence[int] | None, recipe: Recipe, config: ModelConfig) -> list[int]:
    if wanted is not None:
        if not wanted:
            raise InputError("eval_loops is empty; give at least one S")
        return sorted({check_loops(S, "eval_loops") for S in wanted})
    if recipe.loops is not None:
        return [recipe.loops]
    top = config.loop.max_loops
    return [2**i for i in range(top.bit_length()) if 2**i < top] + [top]


def _announce(console: Console, corpus: TextData, model: LoopMDM, recipe: Recipe) -> None:
    config, loop = model.config, model.config.loop
    coda = config.num_hidden_layers - loop.start - loop.length
    seen = f"S = {recipe.loops}" if recipe.loops is not None else f"S drawn from 1..{loop.max_loops}"
    console.print(
        f"Text: {len(corpus.train):,} training and {len(corpus.valid):,} validation tokens of {config.vocab_size - 1} "
        f"kinds, {corpus.characters_per_token:.2f} characters a token; character frequencies alone cost "
        f"{corpus.unigram_bits:.3f} bits a character."
    )
    console.print(
        f"Model: {sum(p.numel() for p in model.parameters()):,} parameters, {loop.start} prelude + {loop.length} "
        f"looped + {coda} coda layers, {loop.boundary} boundary, {seen}."
    )
    console.print(f"Training: {recipe.steps} steps of {recipe.batch_size} windows of {corpus.length} tokens.")


@contextmanager
def _bar(console: Console, steps: int) -> Iterator[Callable[[Progress, float], None]]:
    """A progress bar on a terminal; elsewhere the evaluations' lines are the progress."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    state = TextColumn("S = {task.fields[loops]:<2} {task.fields[bits]:.3f} bits a character", markup=False)
    with Bar(*columns, state, console=console, transient=True, disable=not console.is_terminal or console.quiet) as bar:
        task = bar.add_task("", total=steps, loops=0, bits=math.nan)

        def advance(progress: Progress, bits: float) -> None:
            bar.update(task, completed=progress.step, loops=progress.result.num_loops, bits=bits)

        yield advance


def load(folder: str | Path) -> tuple[LoopMDM, Tokenizer]:
    """Model and tokenizer from a run's folder or from the `model/` in it.

    Raises:
        InputError: no checkpoint there, a damaged or foreign one, or a tokenizer that does not fit the model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give one that `loopmdm train` made")
    if not (path / CONFIG_FILE).exists() and (path / "model" / CONFIG_FILE).exists():
        path = path / "model"
    model = LoopMDM.from_pretrained(path)
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise InputError(
            f"{path} has no {TOKENIZER_FILE}; sampling text needs the tokenizer that the model learnt with"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{file} is not a tokenizer ({error})") from None
    size = tokenizer.get_vocab_size()
    if (model.vocab_size, model.mask_id) != (size + 1, size):
        raise InputError(
            f"the tokenizer has {size} ids, the model {model.vocab_size} of which {model.mask_id} is the mask; "
            f"they do not belong together (expected {size + 1} and {size})"
        )
    return model, tokenizer


def sample(
    folder: str | Path,
    prompt: str = "",
    *,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    steps: int = 64,
    num_loops: int | None = None,
    policy: str = "ancestral",
    temperature: float | None = None,
    seed: int = 0,
) -> tuple[list[str], Generation]:
    """Texts that start with the prompt, and how they came about; sample i is drawn with seed + i.

    Args:
        max_new_tokens: None is 128, or as many as the model's length leaves room for.
        The rest: see `loopmdm.generate`.

    Raises:
        InputError: as `load`, a prompt that the tokenizer cannot spell or that is too long, or a bad option.
    """
    if num_samples < 1:
        raise InputError(f"num_samples is {num_samples}; it must be at least 1")
    if temperature is not None and not math.isfinite(temperature):
        raise InputError(f"temperature is {temperature}; it must be a finite number of at least 0")
    model, tokenizer = load(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = encode(tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(NEW_TOKENS, model.config.max_position_embeddings - len(ids)))
    made = generate(
        model,
        [ids] * num_samples,
        max_new_tokens=max_new_tokens,
        steps=steps,
        num_loops=num_loops,
        policy=policy,
        temperature=temperature,
        seed=seed,
    )
    return [decode(tokenizer, row) for row in made.sequences()], made


def printable(text: str) -> str:
    """Text in which control characters, but for newline and tab, are spelt out: safe for a terminal.

    Zero-width joiners stay, since scripts and emoji need them.
    """
    keep = "\n\t\u200c\u200d"
    return "".join(c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else repr(c)[1:-1] for c in text)

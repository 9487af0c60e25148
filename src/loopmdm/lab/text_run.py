"""What `loopmdm train` does: train a LoopMDM on text, or go on with a run that was stopped or killed."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from tokenizers import Tokenizer

from ..config import ModelConfig, check_loops, preset
from ..errors import InputError, nearest
from ..model.lm import LoopMDM
from .corpus import PACKINGS, Corpus
from .data import TOKENIZER_FILE, TOKENIZERS, load_tokenizer
from .feed import AnswerFeed, CorpusFeed, Feed
from .monitor import Board, Monitor, bar
from .prepare import META
from .recipe import Recipe
from .run import CHECKPOINTS, RunFolder, Stop, read_recipe
from .sample import load
from .sft import SFTData
from .state import Checkpoints, read
from .train import Trainer, accelerator_for, micro_batch

if TYPE_CHECKING:
    from accelerate import Accelerator

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a text run is made of, beside its recipe.

    Attributes:
        data: text or .jsonl files (compressed or not), folders of them, hf:OWNER/NAME (`sources.expand`).
        valid: text to validate on instead of a part of the data.
        cache: where the tokenised text lies, to be shared by runs; None is `data/` in the run's folder.
        tokenizer: "char", "byte", "bpe", or the path of a tokenizer.json.
        vocab_size: ids of a bpe tokenizer, at most.
        packing: "stream" windows read across the ends of documents; in "documents" attention stays within each.
        sft: fine-tune on answers: the data are JSON lines with a prompt, which is never masked, and an answer.
        prompt_key: of such lines.
        answer_key: of such lines.
        preset: the model; its vocabulary comes from the tokenizer.
        set: fields of the model's configuration.
        init: a saved model to start from instead; the tokenizer is its own.
        length: tokens a window.
        eval_every: steps; None is a tenth of the run.
        save_every: steps; None is as eval_every.
        eval_loops: S of the evaluations; None is powers of two up to the model's S_max, or the recipe's S.
        eval_windows: validation windows an evaluation, at most.
        keep: checkpoints that stay.
        tensorboard: also write events for TensorBoard, in `tensorboard/`.
    """

    data: Sequence[str] = ()
    valid: Sequence[str] = ()
    cache: str | None = None
    tokenizer: str = "char"
    vocab_size: int = 4096
    packing: str = "stream"
    sft: bool = False
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    preset: str = "tiny-llama"
    set: Mapping[str, Any] = field(default_factory=dict)
    init: str | None = None
    length: int = 128
    eval_every: int | None = None
    save_every: int | None = None
    eval_loops: Sequence[int] | None = None
    eval_windows: int = 128
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("eval_every", "save_every", "eval_windows", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        if self.length < 1:
            raise InputError(f"length is {self.length}; a window takes at least one token")
        if not self.data:
            raise InputError("no text file was given")
        if self.packing not in PACKINGS:
            raise InputError(f"packing is {self.packing!r}{nearest(self.packing, PACKINGS)}")
        if self.sft and (self.valid or self.cache or self.packing != "stream"):
            raise InputError("sft holds its answers in memory, one a sequence; leave out valid, cache and packing")
        if self.init is not None and self.set:
            raise InputError("init brings the model's configuration; leave out set and preset")
        if self.init is None:
            preset(self.preset, **self.set)


@dataclass(frozen=True)
class Trained:
    """A finished or interrupted run: its folder's `model/`, the steps done of those asked for, and the signal that
    ended it, if one did."""

    model: Path
    step: int
    steps: int
    signal: int | None = None


def train(out: str | Path, recipe: Recipe, settings: Settings, *, console: Console | None = None) -> Trained:
    """Train on text and leave metrics.jsonl, timing.jsonl, recipe.json, model/ and checkpoints/ in a new folder.

    Under a launcher only the main process evaluates, prints and writes. Ctrl-C, SIGTERM and SIGHUP let the step in
    progress end and save everything; `resume` goes on from there.

    Raises:
        InputError: whatever is wrong with the arguments, the files or the folder (which is then not made); a loss
            that is not finite, several steps in a row; a disk that cannot be written. The last two leave the last
            checkpoint.
    """
    RunFolder.check(out)
    start = _start(settings)
    _check(recipe, settings, start)
    engine = accelerator_for(recipe, start)
    micro_batch(recipe, engine.num_processes)
    engine.wait_for_everyone()  # every process has seen that the folder is free
    held = _recorded(recipe, settings)
    folder = RunFolder(out, held) if engine.is_main_process else None
    try:
        run = _Run(Path(out), folder, recipe, settings, engine, console)
        if folder is not None:
            folder.save_tokenizer(run.feed.tokenizer)
            folder.write_recipe(held | run.facts())
    except BaseException as error:  # the run has not begun; Ctrl-C while a corpus is built, too
        made = (Path(out) / "data" / META).is_file() and not isinstance(error, InputError)
        if folder is not None and not made:  # a corpus that took hours stays, and --resume finds it
            folder.discard()
        raise
    with run:
        return run.go(None, [])


def resume(
    path: str | Path, *, steps: int | None = None, keep: int | None = None, console: Console | None = None
) -> Trained:
    """Go on with a run from its newest checkpoint that reads, exactly as it would have gone on by itself.

    Exactly: on the same number of processes and threads. What the logs say of later steps is cut off first. Tokenizer
    and configuration are the run's own: with a checkpoint, a tokenizer's file or an `init` may be gone.

    Args:
        path: the run's folder.
        steps: a new last step, where the recipe does not depend on it.
        keep: checkpoints that stay, from now on.

    Raises:
        InputError: no run there, another process in it, no checkpoint that reads, other data than before, and what
            `train` raises.
    """
    path, held = Path(path), read_recipe(Path(path))
    recipe, settings = _read(path, held)
    if steps is not None and steps != recipe.steps:
        if recipe.decay != "constant" or recipe.t_ramp:
            raise InputError(
                f"steps cannot become {steps}: this run's learning rate or noise follows its {recipe.steps} steps; "
                "only with decay=constant and t_ramp=0 can a run be made longer"
            )
        if steps < recipe.steps:
            raise InputError(f"steps cannot become {steps}, fewer than the {recipe.steps} of this run")
        recipe = dataclasses.replace(recipe, steps=steps)
    if keep is not None:
        settings = dataclasses.replace(settings, keep=keep)
    config = ModelConfig.from_dict(held["config"]) if "config" in held else None
    engine = accelerator_for(recipe, config or _start(settings))
    folder = RunFolder.reopen(path) if engine.is_main_process else None
    state, notes = _newest(path, folder, settings.keep, engine)
    sha256 = held.get("data_sha256")
    with _Run(path, folder, recipe, settings, engine, console, config if state is not None else None, sha256) as run:
        if sha256 not in (None, run.feed.sha256):
            raise InputError(f"{path} cannot go on: its data are not what they were when it began")
        if folder is not None:
            folder.write_recipe(held | _recorded(recipe, settings) | run.facts())
        return run.go(state, notes)


class _Run:
    """A text run about to go: data, model, trainer and monitor. A context manager that frees the folder.

    Args:
        config: of a run whose weights come from a checkpoint.
        sha256: of the data that it began with.
    """

    def __init__(
        self,
        path: Path,
        folder: RunFolder | None,
        recipe: Recipe,
        settings: Settings,
        engine: Accelerator,
        console: Console | None,
        config: ModelConfig | None = None,
        sha256: str | None = None,
    ) -> None:
        self.path, self.folder, self.recipe, self.settings, self.engine = path, folder, recipe, settings, engine
        self.console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self.console.quiet = not engine.is_main_process
        made = _initial(settings.init) if settings.init is not None and config is None else None
        tokenizer = _tokenizer(path, settings) if made is None else made[1]
        self.feed = _open_feed(path, recipe, settings, engine, tokenizer, sha256, self.console.print)
        torch.manual_seed(recipe.seed)
        self.model = LoopMDM(config or _configuration(settings, self.feed)) if made is None else made[0]
        self.config = self.model.config
        self.loops = _eval_loops(settings.eval_loops, recipe, self.config)
        self.eval_every = settings.eval_every or max(1, recipe.steps // 10)
        self.save_every = settings.save_every or self.eval_every
        self.trainer = Trainer(self.model, recipe, accelerator=engine, length=settings.length)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.folder.close()

    def facts(self) -> dict[str, Any]:
        """What recipe.json holds beside what was asked for; a resumed run takes the first three from it."""
        return {
            "eval_every": self.eval_every,
            "save_every": self.save_every,
            "eval_loops": self.loops,
            "unigram_bits": self.feed.unigram_bits,
            "data_sha256": self.feed.sha256,
            "config": self.config.to_dict(),
        }

    def go(self, state: Mapping[str, Any] | None, notes: list[str]) -> Trained:
        """Train from the state, or from the start."""
        folder, recipe, say = self.folder, self.recipe, self.console.print
        _announce(say, self.feed, self.model, recipe)
        if state is not None:
            notes = notes + self.trainer.load_state_dict(state)
        monitor = self._monitor()
        if state is not None:
            notes += monitor.restore(state)
            say(f"Going on from step {self.trainer.step}.")
        for note in notes:
            say(f"Note: {note}.")
        shown = bar(self.console, self.trainer.step, recipe.steps, self.feed.unit)
        with Stop(self.console) as stop, shown as monitor.advance:
            try:
                self.trainer.run(self.feed.batch, monitor, stop)
                if folder is not None and monitor.saved != self.trainer.step:  # it had been finished before
                    folder.save(self.trainer.average, self.feed.tokenizer)
            except InputError as error:
                raise InputError(f"{error}{self._kept()}") from None
            except OSError as error:
                what = f"writing to {self.path} failed at step {monitor.step} ({error.strerror or error})"
                raise InputError(f"{what}{self._kept()}") from error
            except KeyboardInterrupt:
                say(f"Stopped at once in step {monitor.step + 1}{self._kept()}")
                raise
        stopped = self.trainer.step < recipe.steps
        if folder is not None:
            monitor.conclude(_hint(self.config), stopped)
        by = (stop.signal or signal.SIGTERM) if stopped else None  # another process may have been told to stop
        return Trained(self.path / "model", self.trainer.step, recipe.steps, by)

    def _monitor(self) -> Monitor:
        return Monitor(
            self.trainer,
            self.folder,
            feed=self.feed,
            loops=self.loops,
            eval_every=self.eval_every,
            save_every=self.save_every,
            keep=self.settings.keep,
            board=self._board(),
            say=self.console.print,
        )

    def _board(self) -> Board | None:
        if self.folder is None or not self.settings.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        # what an earlier process wrote of steps that will come again is not shown
        purge = self.trainer.step + 1 if self.trainer.step else None
        return SummaryWriter(str(self.path / "tensorboard"), purge_step=purge)

    def _kept(self) -> str:
        if self.folder is None:
            return ""
        steps = self.folder.checkpoints().steps()
        if not steps:
            return "; no checkpoint had been saved yet"
        return f"; the checkpoint of step {steps[-1]} is in {self.path}: loopmdm train --resume {self.path}"


def _recorded(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    return {**dataclasses.asdict(recipe), **dataclasses.asdict(settings)}


def _read(path: Path, held: Mapping[str, Any]) -> tuple[Recipe, Settings]:
    """The recipe and settings of a run's recipe.json."""

    def of(kind: Any) -> Any:
        return kind(**{f.name: held[f.name] for f in dataclasses.fields(kind) if f.name in held})

    try:
        return of(Recipe), of(Settings)
    except (InputError, TypeError) as error:
        raise InputError(f"{path} cannot go on: its recipe.json is not that of a text run ({error})") from None


def _newest(
    path: Path, folder: RunFolder | None, keep: int, engine: Accelerator
) -> tuple[dict[str, Any] | None, list[str]]:
    """The state that all processes go on from, and what to say about it; the main process chooses."""
    from accelerate.utils import broadcast_object_list

    checkpoints = Checkpoints(path / CHECKPOINTS, keep)
    state: dict[str, Any] | None = None
    notes: list[str] = []
    if folder is not None:
        state, notes = checkpoints.newest()
        if state is None:
            folder.truncate({})
            notes.append("there is no checkpoint yet, so the run starts from its beginning")
    chosen = [state["step"] if state is not None else None]
    if engine.num_processes > 1:
        broadcast_object_list(chosen)
        if folder is None and chosen[0] is not None:
            state = read(checkpoints.path(chosen[0]))
    return state, notes


def _start(settings: Settings) -> ModelConfig:
    """The configuration of a new run, but for the ids that come from its data."""
    return preset(settings.preset, **settings.set) if settings.init is None else _initial(settings.init)[0].config


def _initial(folder: str) -> tuple[LoopMDM, Tokenizer]:
    """Model and tokenizer to start from.

    Raises:
        InputError: as `load`, or ids that are not those of a corpus, as in many converted checkpoints.
    """
    model, tokenizer = load(folder)
    size = tokenizer.get_vocab_size()
    if (model.vocab_size, model.mask_id) != (size + 2, size + 1):
        raise InputError(
            f"{folder} cannot be trained on text: a corpus takes its tokenizer's {size} ids, then {size} as the end of "
            f"a document and {size + 1} as the mask; the model has {model.vocab_size} ids, {model.mask_id} as its mask"
        )
    return model, tokenizer


def _tokenizer(path: Path, settings: Settings) -> Tokenizer | str:
    """The run's own if it came from elsewhere and has been kept, else what was asked for."""
    if settings.init is None and settings.tokenizer in TOKENIZERS:
        return settings.tokenizer
    for kept in (path / "model" / TOKENIZER_FILE, path / "data" / TOKENIZER_FILE):
        if kept.is_file():
            return load_tokenizer(kept)
    return settings.tokenizer if settings.init is None else _initial(settings.init)[1]


def _built(settings: Settings, place: Path, sha256: str | None) -> bool:
    """Whether the run's corpus is there: in its own folder whichever lies there, in a shared one that of this sum."""
    if settings.cache is None:
        return (place / META).exists()
    with suppress(InputError):
        return Corpus.open(place).sha256 == sha256
    return False


def _open_feed(
    path: Path,
    recipe: Recipe,
    settings: Settings,
    engine: Accelerator,
    tokenizer: Tokenizer | str,
    sha256: str | None,
    say: Say,
) -> Feed:
    """The run's data; the main process builds a corpus if there is none."""
    if settings.sft:
        pairs = SFTData.from_jsonl(
            settings.data,
            tokenizer,
            settings.length,
            settings.prompt_key,
            settings.answer_key,
            vocab_size=settings.vocab_size,
            progress=lambda line: say(f"Data: {line}"),
        )
        return AnswerFeed(pairs, recipe.seed, recipe.batch_size, settings.eval_windows)
    place = Path(settings.cache) if settings.cache is not None else path / "data"
    if engine.is_main_process and not _built(settings, place, sha256):
        Corpus.build(
            settings.data,
            place,
            tokenizer,
            vocab_size=settings.vocab_size,
            valid_sources=settings.valid,
            progress=lambda line: say(f"Data: {line}"),
        )
    engine.wait_for_everyone()
    corpus = Corpus.open(place)
    return CorpusFeed(corpus, recipe.seed, recipe.batch_size, settings.length, settings.packing, settings.eval_windows)


def _configuration(settings: Settings, feed: Feed) -> ModelConfig:
    fixed = {"vocab_size": feed.vocab_size, "mask_token_id": feed.mask_id}
    for key, value in fixed.items():
        if settings.set.get(key, value) != value:
            asked = settings.set[key]
            raise InputError(f"{key} comes from the tokenizer, which makes it {value}; {asked!r} does not fit")
    return preset(settings.preset, **{**settings.set, **fixed})


def _check(recipe: Recipe, settings: Settings, config: ModelConfig) -> None:
    """What can be said before a large corpus is tokenised."""
    tokenizer = settings.tokenizer
    if tokenizer not in TOKENIZERS and not Path(tokenizer).exists():
        raise InputError(f"unknown tokenizer {tokenizer!r}, which is no file either{nearest(tokenizer, TOKENIZERS)}")
    length, longest = settings.length, config.max_position_embeddings
    if length > longest:
        raise InputError(
            f"length is {length}, more than the model's max_position_embeddings = {longest}; shorten it or set "
            f"max_position_embeddings={length}"
        )
    if recipe.backprop_loops is not None and config.loop.also:
        raise InputError(
            f"backprop_loops needs a model with one looped block; this one has {len(config.loop.runs)}; leave it out"
        )
    _eval_loops(settings.eval_loops, recipe, config)


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


def _announce(say: Say, feed: Feed, model: LoopMDM, recipe: Recipe) -> None:
    config, loop = model.config, model.config.loop
    coda = config.num_hidden_layers - loop.start - loop.length
    seen = f"S = {recipe.loops}" if recipe.loops is not None else f"S drawn from 1..{loop.max_loops}"
    say(feed.summary)
    say(
        f"Model: {sum(p.numel() for p in model.parameters()):,} parameters, {loop.start} prelude + {loop.length} "
        f"looped + {coda} coda layers, {loop.boundary} boundary, {seen}."
    )
    say(f"Training: {recipe.steps} steps of {recipe.batch_size} sequences of {feed.length} tokens.")

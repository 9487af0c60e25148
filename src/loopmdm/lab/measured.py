"""What `loopmdm eval` and `loopmdm schedule` measure on: windows of a text or answers, and what to say about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import InputError
from ..model.lm import LoopMDM
from .corpus import Corpus, Part, spread
from .data import encode
from .feed import AnswerFeed
from .prepare import META, Split, split_runs
from .sample import eos_id, model_folder
from .sft import SFTData
from .sources import HUB, FileSource, expand, is_json_lines

RECIPE_FILE = "recipe.json"
HELD_OUT = "the validation part of"


class Origin(NamedTuple):
    """Where text is from: files or data sets of the hub, and the digest of the data that held it out, if any did."""

    names: tuple[str, ...]
    held_out_of: str | None = None

    def trained_on(self, recipe: dict[str, Any] | None) -> bool | None:
        """Whether a run of this recipe saw the text, or may have; None without a recipe."""
        if recipe is None or not isinstance(recipe.get("data"), list):
            return None
        if self.held_out_of is not None and self.held_out_of == recipe.get("data_sha256"):
            return False
        known = {_place(str(spec)) for spec in recipe["data"]}
        return any(not known.isdisjoint((place, *place.parents)) for place in map(_place, self.names))


@dataclass(frozen=True)
class Measured:
    """A text as windows of token ids, or prompts with answers, and the model that is to read it.

    Attributes:
        files: what was read.
        characters, tokens: of all of it. Of answers: None, and the tokens counted in `windows`.
        length: tokens a window.
        windows: int64 [n, length], side by side or spread evenly.
        of: how many there would be.
        documents: int64 [n, length], equal within a document; None for answers.
        maskable: bool [n, length], True on answers and what fills the row after them; None for text.
        whole: all ids in order [tokens], to be measured token by token; None if only `windows` are.
        context: tokens that a window of `whole` is given from the one before.
        dropped: pairs that are too long for a window.
        origin: where it is from.
        folder: of the model.
        packing: how the model was trained to read: "stream", or "documents", attention within each.
        trained_on: whether the model's recipe names some of it; None if there is no recipe beside the model.
    """

    files: tuple[str, ...]
    characters: int | None
    tokens: int
    length: int
    windows: Tensor
    of: int
    origin: Origin
    documents: Tensor | None = None
    maskable: Tensor | None = None
    whole: Tensor | None = None
    context: int = 0
    dropped: int = 0
    folder: str = ""
    packing: str = "stream"
    trained_on: bool | None = None

    def read_by(self, folder: str | Path) -> Measured:
        """The same for the model of this folder: windows packed as its training packed them.

        Raises:
            InputError: a text to be measured token by token, by a model that reads each document by itself.
        """
        recipe = read_recipe(folder)
        packing = (recipe or {}).get("packing", "stream")
        if packing == "documents" and self.whole is not None:
            raise InputError(
                f"--rolling reads across documents and {folder} was trained with --packing documents; leave it out"
            )
        trained_on = self.origin.trained_on(recipe)
        return dataclasses.replace(self, folder=str(folder), packing=packing, trained_on=trained_on)

    @property
    def document_ids(self) -> Tensor | None:
        """`documents` where attention stays within each."""
        return self.documents if self.packing == "documents" else None

    @property
    def characters_per_token(self) -> float | None:
        return None if self.characters is None else self.characters / self.tokens

    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "files": list(self.files),
            "characters": self.characters,
            "tokens": self.tokens,
            "length": self.length,
            "windows": None if self.whole is not None else len(self.windows),
            "context": self.context,
            "packing": self.packing,
            "answers": self.maskable is not None,
            "trained_on": self.trained_on,
        }

    def describe(self) -> list[str]:
        """Sentences on what is measured."""
        what = self._text() if self.maskable is None else self._answers()
        return [f"Measured on {', '.join(self.files)}: {what}.", *self.seen()]

    def _text(self) -> str:
        each = f"({self.characters_per_token:.2f} characters each)"
        size = f"{self.characters:,} characters, {self.tokens:,} tokens {each}"
        if self.whole is not None:
            given = f", each after the first given the {self.context} tokens before it" if self.context else ""
            part = f"all of it, in windows of {self.length} tokens{given}"
        elif len(self.windows) < self.of:
            part = f"{len(self.windows)} of {self.of:,} windows of {self.length} tokens, spread evenly"
        else:
            part = f"{self.of} windows of {self.length} tokens"
        return f"{size}; {part}" + ("" if self.document_ids is None else ", attention within each document")

    def _answers(self) -> str:
        part = "" if len(self.windows) == self.of else f" of {self.of:,}, spread evenly"
        long = f" ({self.dropped} more are too long)" if self.dropped else ""
        return (
            f"{len(self.windows)} answers{part}{long}, {self.tokens:,} tokens with the ends of documents that fill "
            f"their rows of {self.length}; prompts are given"
        )

    def seen(self) -> list[str]:
        """A sentence, unless the model did not see the text in training."""
        if self.trained_on:
            return [
                f"The recipe of {self.folder} names that text to train on, so its figures are not figures of unseen "
                "text; those of the part that training held out are in its metrics.jsonl."
            ]
        if self.trained_on is None:
            return [f"Whether {self.folder} was trained on that text is not known: there is no recipe.json beside it."]
        return []


def read(
    folder: str | Path,
    model: LoopMDM,
    tokenizer: Tokenizer,
    data: Sequence[str | Path] = (),
    *,
    length: int | None = None,
    limit: int | None = 256,
    rolling: bool = False,
    context: int = 0,
) -> Measured:
    """Read text with a model's tokenizer: files, or the validation part of a corpus folder.

    A run that was fine-tuned on answers reads JSON lines as it did in training: prompts, which are given, and answers.

    Args:
        folder: of the model or its run, whose recipe tells its window, its packing and its training text.
        data: files, folders of them, or one corpus folder; none is what the run itself held out.
        length: tokens a window; None is the recipe's, or the model's longest.
        limit: windows, at most; None is all of them.
        rolling: measure every token of the text once, with `context` tokens given from the window before.

    Raises:
        InputError: unreadable files, text that the tokenizer cannot spell, numbers out of range, or `rolling` where
            the model reads answers, or each document by itself.
    """
    recipe = read_recipe(folder) or {}
    longest = model.config.max_position_embeddings
    if length is None:
        known = recipe.get("length")
        length = min(known, longest) if isinstance(known, int) and known > 0 else longest
    if not 1 <= length <= longest:
        raise InputError(f"length is {length}; it must be at least 1 and at most the model's {longest}")
    if limit is not None and limit < 1:
        raise InputError(f"windows is {limit}; it must be at least 1")
    answers = bool(recipe.get("sft"))
    if not data and not answers:
        data = [_own(folder, recipe)]
    if len(data) == 1 and (Path(data[0]) / META).is_file():
        part, characters, name, origin = _held_out(model, tokenizer, Path(data[0]))
        return _windows(part, characters, (name,), origin, length, limit, rolling, context).read_by(folder)
    sources = _files(data or recipe.get("data", ()))
    names = tuple(str(s.path) for s in sources)
    if answers and all(is_json_lines(s.path) for s in sources):
        if rolling:
            raise InputError(f"--rolling reads running text and {folder} was fine-tuned on answers; leave it out")
        return _pairs(folder, recipe, tokenizer, names, not data, length, limit).read_by(folder)
    part, characters = _documents(tokenizer, sources, eos_id(model, tokenizer))
    return _windows(part, characters, names, Origin(names), length, limit, rolling, context).read_by(folder)


def _windows(
    part: Part,
    characters: int,
    files: tuple[str, ...],
    origin: Origin,
    length: int,
    limit: int | None,
    rolling: bool,
    context: int,
) -> Measured:
    length = min(length, len(part))
    if rolling and not 0 <= context < length:
        raise InputError(f"context is {context}; it must be at least 0 and below the window of {length} tokens")
    of = len(part) // length
    rows = part.windows(spread(of, limit) * length, length, "documents")
    return Measured(
        files=files,
        characters=characters,
        tokens=len(part),
        length=length,
        windows=rows.tokens,
        of=of,
        origin=origin,
        documents=rows.document_ids,
        whole=torch.from_numpy(part.tokens.astype(np.int64)) if rolling else None,
        context=context if rolling else 0,
    )


def _pairs(
    folder: str | Path,
    recipe: dict[str, Any],
    tokenizer: Tokenizer,
    files: tuple[str, ...],
    held_out: bool,
    length: int,
    limit: int | None,
) -> Measured:
    """Prompts with answers: those that the run held out, or all that are in the files."""
    keys = (str(recipe.get(name, name.removesuffix("_key"))) for name in ("prompt_key", "answer_key"))
    data = SFTData.from_jsonl(files, tokenizer, length, *keys)
    sha256 = AnswerFeed(data, 0, 1, 1).sha256
    if held_out and sha256 != recipe.get("data_sha256"):
        raise InputError(
            f"{', '.join(files)} in rows of {length} tokens is not what {folder} was trained on, so what it held out "
            "is not known; give held-out pairs with --data FILE"
        )
    pairs = data.valid if held_out else torch.arange(len(data.starts))
    rows = data.rows(pairs[spread(len(pairs), limit)])
    assert rows.maskable is not None
    return Measured(
        files=tuple(f"{HELD_OUT} {name}" for name in files) if held_out else files,
        characters=None,
        tokens=int(rows.maskable.sum()),
        length=length,
        windows=rows.tokens,
        of=len(pairs),
        origin=Origin(files, sha256 if held_out else None),
        maskable=rows.maskable,
        dropped=0 if held_out else data.dropped,
    )


def _held_out(model: LoopMDM, tokenizer: Tokenizer, folder: Path) -> tuple[Part, int, str, Origin]:
    """A corpus's validation part, its characters, what to call it, and where it is from."""
    corpus = Corpus.open(folder)
    if corpus.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"the corpus {folder} was made with another tokenizer than the model's; build one with the model's"
        )
    if corpus.eos_id != eos_id(model, tokenizer):
        raise InputError(
            f"the corpus {folder} ends documents with id {corpus.eos_id}, which means nothing to this model; give the "
            "text itself with --data FILE"
        )
    made = corpus.meta["request"]
    names = tuple(str(s.get("path") or s.get("hub")) for s in made["valid_sources"] or made["sources"])
    characters = int(corpus.meta["valid"]["characters"])
    return corpus.valid, characters, f"{HELD_OUT} {folder}", Origin(names, corpus.sha256)


def _own(folder: str | Path, recipe: dict[str, Any]) -> Path:
    """The corpus that a run was trained on."""
    places = [model_folder(folder).parent / "data"]
    if recipe.get("cache"):
        places.insert(0, Path(str(recipe["cache"])))
    found = next((place for place in places if (place / META).is_file()), None)
    if found is None:
        raise InputError(
            f"there is no corpus with held-out text beside {folder}; say what to measure on with --data FILE"
        )
    return found


def _files(data: Sequence[str | Path]) -> list[FileSource]:
    sources = expand(data)
    strange = next((s.spec for s in sources if not isinstance(s, FileSource)), None)
    if strange is not None:
        raise InputError(f"{strange} is not a file; evaluation reads text files, JSON lines and folders of them")
    return [s for s in sources if isinstance(s, FileSource)]


def _documents(tokenizer: Tokenizer, sources: Sequence[FileSource], eos: int | None) -> tuple[Part, int]:
    """All documents, tokenised and ended as in training, and their characters."""
    ids: list[int] = []
    starts: list[int] = []
    characters = 0
    for run in split_runs(sources, Split(0.0)):
        if not run.text:
            continue
        if run.first:
            starts.append(len(ids))
        ids += encode(tokenizer, run.text) + ([eos] if run.end and eos is not None else [])
        characters += len(run.text)
    if not ids:
        raise InputError("there is no text to measure")
    return Part("given", np.array(ids, np.int64), np.array(starts, np.int64)), characters


def read_recipe(folder: str | Path) -> dict[str, Any] | None:
    """A run's recipe, from the run's folder or the model/ in it; None if there is none."""
    path = model_folder(folder)
    for place in (path.parent, path):
        try:
            found = json.loads((place / RECIPE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _place(spec: str) -> Path:
    """The file or folder behind FILE.jsonl#key; a data set of the hub by its name."""
    path = Path(spec)
    if "#" in spec and not path.exists():
        path = Path(spec.rpartition("#")[0])
    return path if spec.startswith(HUB) else path.resolve()

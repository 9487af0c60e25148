"""What `loopmdm eval` and `loopmdm schedule` measure on: windows of a text, and what to say about where it is from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import InputError
from ..model.lm import LoopMDM
from .corpus import Corpus, spread
from .data import encode
from .prepare import META
from .sample import eos_id, model_folder
from .sources import FileSource, expand

RECIPE_FILE = "recipe.json"
HELD_OUT = "the validation part of"


@dataclass(frozen=True)
class Measured:
    """A text as windows of token ids.

    Attributes:
        files: what was read.
        characters, tokens: of all of it.
        length: tokens a window.
        windows: int64 [n, length], side by side or spread evenly.
        of: how many there would be.
        whole: all ids in order [tokens], to be measured token by token; None if only `windows` are.
        context: tokens that a window of `whole` is given from the one before.
        trained_on: whether the model's recipe names one of the files; None if there is no recipe beside it.
    """

    files: tuple[str, ...]
    characters: int
    tokens: int
    length: int
    windows: Tensor
    of: int
    whole: Tensor | None
    context: int
    trained_on: bool | None

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens

    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "files": list(self.files),
            "characters": self.characters,
            "tokens": self.tokens,
            "length": self.length,
            "windows": None if self.whole is not None else len(self.windows),
            "context": self.context,
            "trained_on": self.trained_on,
        }

    def describe(self) -> list[str]:
        """Sentences on what is measured."""
        size = (
            f"{self.characters:,} characters, {self.tokens:,} tokens ({self.characters_per_token:.2f} characters each)"
        )
        if self.whole is not None:
            given = f", each after the first given the {self.context} tokens before it" if self.context else ""
            part = f"all of it, in windows of {self.length} tokens{given}"
        elif len(self.windows) < self.of:
            part = f"{len(self.windows)} of {self.of:,} windows of {self.length} tokens, spread evenly"
        else:
            part = f"{self.of} windows of {self.length} tokens"
        lines = [f"Measured on {', '.join(self.files)}: {size}; {part}."]
        if self.trained_on:
            lines.append(
                "This model was trained on that text, so these are not figures of unseen text; those of the part that "
                "training held out are in its metrics.jsonl."
            )
        elif self.trained_on is None:
            lines.append("Whether the model was trained on that text is not known: there is no recipe.json beside it.")
        return lines


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

    Args:
        folder: of the model or its run, whose recipe tells its window and its training text.
        data: files, folders of them, or one corpus folder; none is the run's own corpus, so what it held out.
        length: tokens a window; None is the recipe's, or the model's longest.
        limit: windows, at most; None is all of them.
        rolling: measure every token of the text once, with `context` tokens given from the window before.

    Raises:
        InputError: unreadable files, text that the tokenizer cannot spell, or numbers out of range.
    """
    recipe = read_recipe(folder)
    longest = model.config.max_position_embeddings
    if length is None:
        known = recipe.get("length") if recipe else None
        length = min(known, longest) if isinstance(known, int) and known > 0 else longest
    if not 1 <= length <= longest:
        raise InputError(f"length is {length}; it must be at least 1 and at most the model's {longest}")
    if limit is not None and limit < 1:
        raise InputError(f"windows is {limit}; it must be at least 1")
    data = data or [_own(folder, recipe)]
    if len(data) == 1 and (Path(data[0]) / META).is_file():
        names: tuple[str, ...] = (f"{HELD_OUT} {data[0]}",)
        ids, characters = _held_out(tokenizer, Path(data[0]))
        trained_on: bool | None = False
    else:
        sources = [s if isinstance(s, FileSource) else _no_hub(s.spec) for s in expand(data)]
        names, trained_on = tuple(str(s.path) for s in sources), _trained_on(recipe, sources)
        ids, characters = _ids(tokenizer, sources, eos_id(model, tokenizer))
    length = min(length, len(ids))
    if rolling and not 0 <= context < length:
        raise InputError(f"context is {context}; it must be at least 0 and below the window of {length} tokens")
    windows = ids[: len(ids) // length * length].view(-1, length)
    of = len(windows)
    windows = windows[spread(of, limit)]
    return Measured(
        files=names,
        characters=characters,
        tokens=len(ids),
        length=length,
        windows=windows,
        of=of,
        whole=ids if rolling else None,
        context=context if rolling else 0,
        trained_on=trained_on,
    )


def _held_out(tokenizer: Tokenizer, folder: Path) -> tuple[Tensor, int]:
    """Ids and characters of a corpus's validation part."""
    corpus = Corpus.open(folder)
    if corpus.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"the corpus {folder} was made with another tokenizer than the model's; build one with the model's"
        )
    return torch.from_numpy(corpus.valid.tokens.astype("int64")), int(corpus.meta["valid"]["characters"])


def _own(folder: str | Path, recipe: dict[str, Any] | None) -> Path:
    """The corpus that a run was trained on."""
    places = [model_folder(folder).parent / "data"]
    if recipe and recipe.get("cache"):
        places.insert(0, Path(str(recipe["cache"])))
    found = next((place for place in places if (place / META).is_file()), None)
    if found is None:
        raise InputError(
            f"there is no corpus with held-out text beside {folder}; say what to measure on with --data FILE"
        )
    return found


def _no_hub(spec: str) -> FileSource:
    raise InputError(f"{spec} is not a file; evaluation reads text files, JSON lines and folders of them")


def _ids(tokenizer: Tokenizer, sources: Sequence[FileSource], eos: int | None) -> tuple[Tensor, int]:
    """Ids of all documents, each ended as in training, and characters."""
    ids: list[int] = []
    characters = 0
    for source in sources:
        text = []
        for piece in source.pieces():
            text.append(piece.text)
            if piece.last:
                document = "".join(text)
                characters += len(document)
                ids += encode(tokenizer, document) + ([] if eos is None else [eos])
                text = []
    if not characters:
        raise InputError("there is no text to measure")
    return torch.tensor(ids, dtype=torch.int64), characters


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


def _trained_on(recipe: dict[str, Any] | None, sources: Sequence[FileSource]) -> bool | None:
    if recipe is None or not isinstance(recipe.get("data"), list):
        return None
    known = {Path(str(name)).resolve() for name in recipe["data"]}
    return any(s.path.resolve() in known or not known.isdisjoint(s.path.resolve().parents) for s in sources)

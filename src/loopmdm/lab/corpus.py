"""Corpora larger than memory: tokens in a folder, mapped into memory, and windows in an order that needs no state.

A folder holds `train.bin` and `valid.bin` (ids, uint16 or uint32), `train.idx` and `valid.idx` (where documents start,
int64), `tokenizer.json`, and `meta.json` (counts, checksums, and what it was made from). Ids: the tokenizer's, then
the end of a document, then the mask.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .. import random
from ..errors import InputError, nearest
from .data import TOKENIZER_FILE, load_tokenizer
from .prepare import FILES, FORMAT, META, PARTS, digest, prepare, request, sha256
from .sources import expand
from .state import lock

PACKINGS = ("stream", "documents")


class Sequences(NamedTuple):
    """A batch: tokens int64 [b, T]; the rest bool or int64 [b, T], or None where every position is alike.

    Attributes:
        attention_mask: True on real tokens.
        maskable: True where the loss may mask.
        document_ids: equal within a document (`LoopMDM.forward`).
    """

    tokens: Tensor
    attention_mask: Tensor | None = None
    maskable: Tensor | None = None
    document_ids: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """Tokens of one part, on disk: `tokens` [N], and `starts`, where its documents (or stretches of one) begin."""

    name: str
    tokens: NDArray[Any]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def windows(self, starts: Tensor, length: int, packing: str) -> Sequences:
        """Runs of `length` tokens from `starts`; the last token is followed by the first."""
        if packing not in PACKINGS:
            raise InputError(f"packing is {packing!r}{nearest(packing, PACKINGS)}")
        rows = np.empty((len(starts), length), np.int64)
        ids = np.zeros_like(rows) if packing == "documents" else None
        for i, start in enumerate(starts.tolist()):
            head = min(length, len(self) - start)
            rows[i, :head] = self.tokens[start : start + head]
            rows[i, head:] = self.tokens[: length - head]
            if ids is not None:
                for first, stop, offset in ((start, start + head, start), (0, length - head, -head)):
                    low, high = np.searchsorted(self.starts, (first, stop))
                    ids[i, self.starts[low:high] - offset] = 1
        tokens = torch.from_numpy(rows)
        return Sequences(tokens, document_ids=None if ids is None else torch.from_numpy(ids.cumsum(1)))

    def check(self, length: int) -> None:
        if length < 1:
            raise InputError(f"length is {length}; a window takes at least one token")
        if len(self) < length:
            raise InputError(
                f"the text is too short: its {self.name} part has {len(self)} tokens, a window takes {length}; give "
                "more text or a shorter length"
            )


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus, opened for reading.

    Attributes:
        train, valid: its two parts.
        meta: what `meta.json` says.
        characters_per_token: of the validation part, ends of documents being tokens without characters; bits a
            token / this = bits a character.
        unigram_bits: what knowing the training text's character frequencies alone costs on validation, bits a
            character.
    """

    folder: Path
    train: Part
    valid: Part
    tokenizer: Tokenizer
    meta: dict[str, Any]

    @property
    def eos_id(self) -> int:
        """The id after each document's last token."""
        return int(self.meta["eos_id"])

    @property
    def mask_id(self) -> int:
        return int(self.meta["mask_id"])

    @property
    def vocab_size(self) -> int:
        """Ids a model of this corpus needs: the tokenizer's, the end of a document, the mask."""
        return int(self.meta["vocab_size"])

    @property
    def sha256(self) -> str:
        """Of its files' checksums."""
        return hashlib.sha256(json.dumps(self.meta["files"], sort_keys=True).encode()).hexdigest()

    @property
    def characters_per_token(self) -> float:
        return float(self.meta["characters_per_token"])

    @property
    def unigram_bits(self) -> float:
        return float(self.meta["unigram_bits"])

    @classmethod
    def build(
        cls,
        sources: Sequence[str | Path],
        folder: str | Path,
        tokenizer: Tokenizer | str | Path,
        *,
        vocab_size: int = 4096,
        valid_share: float = 0.05,
        valid_sources: Sequence[str | Path] = (),
        progress: Callable[[str], None] | None = None,
    ) -> Corpus:
        """Tokenise text into `folder`, or reuse what lies there if it was made from the same.

        Under a launcher the main process builds, the others wait for it and `open`. The folder appears whole or not
        at all; while one process builds, another that wants the same folder waits. Files count as the same by path,
        size and time of change, data sets of the hub by name.

        Args:
            sources: see `sources.expand`.
            tokenizer: "char" (of all the text), "byte", "bpe" (of at most `vocab_size` ids, its merges from the
                training part), a `tokenizer.json` or its folder, or a Tokenizer.
            valid_share: what is held out: whole documents by hash, or where there are fewer than 20, places spread
                over each.
            valid_sources: text to validate on instead.
            progress: called with a line now and then.

        Raises:
            InputError: bad sources, tokenizer or share; text to validate on that is among the sources; a folder that
                holds something else; a full disk.
        """
        if not 0 < valid_share < 1:
            raise InputError(f"valid_share is {valid_share}; it must be between 0 and 1")
        say, folder = progress or (lambda line: None), Path(folder)
        text, held = expand(sources), expand(valid_sources) if valid_sources else []
        wanted, made = request(text, held, tokenizer, vocab_size, valid_share)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder, say):
                old = _reusable(folder)
                if old is not None and old.meta["request"] == wanted:
                    say(f"reusing {folder}: {len(old.train):,} training tokens")
                    return old
                partial = folder.with_name(f".{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    prepare(partial, text, held, made, vocab_size, valid_share, wanted, say)
                    _replace(folder, partial)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> Corpus:
        """Map a corpus into memory.

        Args:
            verify: also read everything and compare checksums; sizes are always compared.

        Raises:
            InputError: no corpus there, one of another version, or a damaged one.
        """
        folder = Path(folder)
        meta = _meta(folder)
        for name, facts in meta["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
                raise _damaged(folder, f"{name} {found}")
            if (verify or name == TOKENIZER_FILE) and sha256(path) != facts["sha256"]:
                raise _damaged(folder, f"{name} is not what was written")
        dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        train, valid = (
            Part(name, np.memmap(folder / f"{part}.bin", dtype, "r"), np.memmap(folder / f"{part}.idx", "<i8", "r"))
            for part, name in zip(PARTS, ("training", "validation"), strict=True)
        )
        return cls(folder, train, valid, load_tokenizer(folder / TOKENIZER_FILE), meta)

    def batch(
        self, seed: int, step: int, index: Tensor, *, batch_size: int, length: int, packing: str = "stream"
    ) -> Sequences:
        """Training windows, a function of seed, step and index alone.

        Sample step * batch_size + index walks through the windows of an epoch, which lie side by side from a place
        that changes with the epoch, in an order that changes too; what is left over at the end waits for
        another epoch.

        Args:
            index: int64 [b], in [0, batch_size).
            packing: "stream": a window reads across ends of documents. "documents": the same windows, with
                document_ids that keep attention within each document.
        """
        self.train.check(length)
        return self.train.windows(self.places(seed, step * batch_size + index, length), length, packing)

    def places(self, seed: int, number: Tensor, length: int) -> Tensor:
        """Where the windows of these sample numbers start, int64 [b]."""
        tokens = len(self.train)
        count = tokens // length
        epoch = number // count
        window = random.permuted(number % count, count, seed, epoch)
        return (random.shift(tokens, seed, epoch) + window * length) % tokens

    def valid_windows(self, length: int, limit: int | None = None, packing: str = "stream") -> Sequences:
        """Validation windows side by side, [n, length]; `limit` of them spread evenly."""
        self.valid.check(length)
        count = len(self.valid) // length
        return self.valid.windows(spread(count, limit) * length, length, packing)


def spread(count: int, limit: int | None = None) -> Tensor:
    """The numbers below `count`, or `limit` of them spread evenly; int64."""
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).long()


def _meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_bytes())
        said = meta.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise InputError(f"{folder} is not a corpus: it has no {META} that can be read") from None
    if not isinstance(meta, dict) or digest(meta) != said:
        raise _damaged(folder, f"{META} is not what was written")
    if meta["format"] != FORMAT:
        raise InputError(f"the corpus {folder} is of format {meta['format']}, not {FORMAT}; build it again")
    return meta


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"the corpus {folder} is damaged: {what}; remove it and build it again")


def _reusable(folder: Path) -> Corpus | None:
    """What lies there, if it can be read; None where a new corpus may be put."""
    if not folder.exists():
        return None
    strange = next((f.name for f in folder.iterdir() if f.name not in FILES), None) if folder.is_dir() else folder.name
    if strange is not None:
        raise InputError(f"{folder} holds {strange!r}, which is no part of a corpus; name another folder or remove it")
    try:
        return Corpus.open(folder)
    except InputError:
        return None


def _replace(folder: Path, new: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `.NAME.lock` beside the folder; the system lets go of it when the process ends, however that happens."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        if not lock(file):
            say(f"waiting for another process that builds {folder}")
            lock(file, wait=True)
        yield

"""Building a corpus folder: which text is held out, the tokenizer, and one streaming pass that writes the tokens.

No pass holds more than a few pieces of text (`sources.PIECE`) and, for BPE, its sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from ..errors import InputError
from .data import TOKENIZER_FILE, TOKENIZERS, build_tokenizer, load_tokenizer, spells_characters
from .sources import FileSource, HubSource

FORMAT = 1
META = "meta.json"
PARTS = ("train", "valid")
SPOOL = ".spool."
FILES = (META, TOKENIZER_FILE, *(f"{part}.{end}" for part in PARTS for end in ("bin", "idx")))

BLOCKS = 20
SURE = 20
"""Documents that validation is expected to get at least where documents fall to it by chance."""
SAMPLE_BYTES = 50_000_000
"""UTF-8 bytes of training text, at most, that BPE learns its merges from."""
BATCH = 1 << 18
"""Characters that are tokenised at once."""
EVERY = 10.0
"""Seconds between signs of life."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """Which text is held out, a function of the text alone.

    Attributes:
        limit: documents whose hash (`text_hash`, of their first piece) is at most this are validation; copies of a
            document so fall to one side.
        lengths: characters of each document where these are too few for that: then validation is the middle of each
            of a document's 20 blocks, `share` of it.
    """

    share: float
    limit: int = -1
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.lengths is not None:
            return f"{self.share:.1%} of the text, in {BLOCKS} places spread over each document"
        return f"{self.share:.1%} of the documents, chosen by their hash" if self.share else "documents of their own"

    def edges(self, document: int) -> list[int]:
        """Where validation begins and ends in turn, in characters of the document; empty: one side has it all."""
        if self.lengths is None:
            return []
        size = self.lengths[document] // BLOCKS
        cut = max(1, round(size * self.share))
        first = (size - cut) // 2
        return [b * size + first + e for b in range(BLOCKS) for e in (0, cut)] if size > cut else []


class Run(NamedTuple):
    """Text of one document and one part: `first` begins such a stretch, `end` ends the document; "" for a blank one."""

    part: str
    text: str
    first: bool
    end: bool


def request(
    sources: Sequence[FileSource | HubSource],
    valid: Sequence[FileSource | HubSource],
    tokenizer: Tokenizer | str | Path,
    vocab_size: int,
    share: float,
) -> tuple[dict[str, Any], Tokenizer | str]:
    """What a corpus is made from, as JSON: equal requests make equal corpora. Also the kind of tokenizer or itself.

    Raises:
        InputError: a bad tokenizer; text to validate on that is also trained on.
    """
    chosen: dict[str, Any]
    _apart(sources, valid)
    if isinstance(tokenizer, str) and tokenizer in TOKENIZERS:
        chosen = {"kind": tokenizer} | ({"vocab_size": vocab_size} if tokenizer == "bpe" else {})
    else:
        tokenizer = load_tokenizer(tokenizer)
        chosen = {"sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}
    wanted = {
        "sources": [s.fingerprint() for s in sources],
        "valid_sources": [s.fingerprint() for s in valid],
        "valid_share": None if valid else share,
        "tokenizer": chosen,
    }
    return wanted, tokenizer


def _apart(sources: Sequence[FileSource | HubSource], valid: Sequence[FileSource | HubSource]) -> None:
    trained = {source.place for source in sources}
    for source in valid:
        if source.place in trained:
            raise InputError(f"{source.place} is among the text to train on, so it cannot be validated on; take it out")


def prepare(
    folder: Path,
    sources: Sequence[FileSource | HubSource],
    valid: Sequence[FileSource | HubSource],
    tokenizer: Tokenizer | str,
    vocab_size: int,
    share: float,
    wanted: dict[str, Any],
    say: Say,
) -> None:
    """Write a corpus into an existing empty folder, `meta.json` last."""
    text, held = _spooled(sources, folder, "text", say), _spooled(valid, folder, "valid", say)
    split = Split(0.0) if held else plan(text, share)

    def runs() -> Iterator[Run]:
        yield from split_runs(text, split)
        yield from (run._replace(part="valid") for run in split_runs(held, split))

    if isinstance(tokenizer, str):
        if tokenizer != "byte":
            say(f"reading the text for its {'characters' if tokenizer == 'char' else 'BPE merges'}")
        if tokenizer == "bpe":
            tokenizer = build_tokenizer("bpe", sample(r.text for r in runs() if r.part == "train"), vocab_size)
        else:
            tokenizer = build_tokenizer(tokenizer, (r.text for r in runs()) if tokenizer == "char" else "", vocab_size)
    eos = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if eos + 2 <= 1 << 16 else "<u4")
    say("tokenising")
    encode, spoke = encoder(tokenizer), time.monotonic()
    writers = {part: _Writer(folder, part, dtype, eos) for part in PARTS}
    try:
        for batch in _batches(runs()):
            for run, ids in zip(batch, encode([r.text for r in batch]), strict=True):
                writers[run.part].add(run, ids)
            if time.monotonic() - spoke > EVERY:
                spoke = time.monotonic()
                say(f"tokenised {sum(w.characters for w in writers.values()):,} characters")
    finally:
        for writer in writers.values():
            writer.close()
    train, kept = writers["train"], writers["valid"]
    for writer in writers.values():
        if not writer.characters:
            name = "training" if writer is train else "validation"
            raise InputError(f"the text leaves nothing for {name}; give more text, or another valid_share than {share}")
    if [s.fingerprint() for s in (*sources, *valid)] != [*wanted["sources"], *wanted["valid_sources"]]:
        raise InputError("a text file changed while it was read; build the corpus again")
    for spool in folder.glob(SPOOL + "*"):
        spool.unlink()
    _write(folder / TOKENIZER_FILE, tokenizer.to_str().encode())
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256(folder / n)} for n in FILES if n != META}
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": eos + 2,
        "eos_id": eos,
        "mask_id": eos + 1,
        "split": str(split),
        **{w.part: {"tokens": w.tokens, "documents": w.documents, "characters": w.characters} for w in (train, kept)},
        "blank_documents": train.blank + kept.blank,
        "characters_per_token": kept.characters / kept.tokens,
        "unigram_bits": unigram_bits(train.seen, kept.seen),
        "files": files,
        "request": wanted,
    }
    _write(folder / META, json.dumps({**meta, "sha256": digest(meta)}, indent=1).encode())


def plan(sources: Sequence[FileSource], share: float) -> Split:
    """How validation is held out; reads no further than the documents that settle it."""
    hashes: list[int] = []
    lengths: list[int] = []
    for run in split_runs(sources, Split(0.0)):
        if not run.text:
            continue
        if run.first:
            hashes.append(text_hash(run.text))
            lengths.append(0)
            if len(hashes) * share >= SURE:
                return Split(share, limit=int(share * 2**64))
        lengths[-1] += len(run.text)
    if not hashes:
        raise InputError("there is no text in what was given, only blank documents")
    if len(hashes) < SURE:
        return Split(share, lengths=tuple(lengths))
    return Split(share, limit=sorted(hashes)[max(1, round(len(hashes) * share)) - 1])


def split_runs(sources: Sequence[FileSource], split: Split) -> Iterator[Run]:
    """The documents' text in order, cut where it changes sides."""
    document, place, part, edges = -1, 0, "train", list[int]()
    for piece in (piece for source in sources for piece in source.pieces()):
        if place == 0:
            if piece.last and not piece.text.strip():
                yield Run("train", "", True, True)
                continue
            document += 1
            edges = split.edges(document)
            part = "valid" if split.limit >= 0 and text_hash(piece.text) <= split.limit else "train"
        start, stop = place, place + len(piece.text)
        while place < stop:
            passed = bisect_right(edges, place)
            until = min(stop, edges[passed]) if passed < len(edges) else stop
            side = PARTS[passed % 2] if edges else part
            first = place == 0 or (passed > 0 and edges[passed - 1] == place)
            yield Run(side, piece.text[place - start : until - start], first, piece.last and until == stop)
            place = until
        if piece.last:
            place = 0


def sample(texts: Iterable[str]) -> list[str]:
    """Texts drawn evenly from all of them, at most SAMPLE_BYTES: thinned to half whenever there are more."""
    kept: list[tuple[int, bytes]] = []
    size, limit = 0, 2**64
    for number, text in enumerate(texts):
        lot = text_hash(str(number))
        if lot >= limit:
            continue
        kept.append((lot, text.encode()))
        size += len(kept[-1][1])
        while size > SAMPLE_BYTES and len(kept) > 1:
            limit //= 2
            kept = [k for k in kept if k[0] < limit] or kept[:1]
            size = sum(len(raw) for _, raw in kept)
    return [raw.decode() for _, raw in kept]


def encoder(tokenizer: Tokenizer) -> Callable[[list[str]], Iterator[NDArray[np.int64]]]:
    """Token ids of texts; character and byte tokenizers by table, which is 20 times as fast and gives the same ids."""
    if spells_characters(tokenizer):
        table = np.full(0x110000, -1)
        for symbol, id_ in tokenizer.get_vocab().items():
            table[ord(symbol)] = id_

        def characters(texts: list[str]) -> Iterator[NDArray[np.int64]]:
            for text in texts:
                ids = table[_codes(text)]
                if len(ids) and ids.min() < 0:
                    strange = text[int(ids.argmin())]
                    raise InputError(f"the character {strange!r} is not among the tokenizer's {(table >= 0).sum()}")
                yield ids

        return characters
    if tokenizer.get_vocab_size() == 256 and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        every = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x800))))
        raw, ids = np.frombuffer(every.encode(), np.uint8), tokenizer.encode(every, add_special_tokens=False).ids
        if len(raw) == len(ids):
            by_byte = np.zeros(256, np.int64)
            by_byte[raw] = ids
            return lambda texts: (by_byte[np.frombuffer(text.encode(), np.uint8)] for text in texts)

    def general(texts: list[str]) -> Iterator[NDArray[np.int64]]:
        for made in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(made.ids, np.int64)

    return general


def unigram_bits(train: NDArray[np.int64], valid: NDArray[np.int64]) -> float:
    """As `data.cross_entropy_bits`, from counts by code point."""
    size = max(len(train), len(valid))
    train, valid = (np.pad(counts, (0, size - len(counts))) for counts in (train, valid))
    total = train.sum() + ((train + valid) > 0).sum()
    return float(-(valid * np.log2((train + 1) / total)).sum() / valid.sum())


def digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer:
    """One part's files: `.bin`, the ids, and `.idx`, where each of its stretches of text starts (int64)."""

    def __init__(self, folder: Path, part: str, dtype: np.dtype[Any], eos: int) -> None:
        self.part, self.dtype, self.eos = part, dtype, np.array([eos], dtype).tobytes()
        self.tokens = self.documents = self.characters = self.blank = 0
        self.seen = np.zeros(128, np.int64)
        self.ids: BinaryIO = (folder / f"{part}.bin").open("wb")
        self.starts: BinaryIO = (folder / f"{part}.idx").open("wb")

    def add(self, run: Run, ids: NDArray[np.int64]) -> None:
        if not run.text:
            self.blank += 1
            return
        if run.first:
            self.starts.write(np.array([self.tokens], "<i8").tobytes())
            self.documents += 1
        self.ids.write(ids.astype(self.dtype).tobytes() + (self.eos if run.end else b""))
        self.tokens += len(ids) + run.end
        self.characters += len(run.text)
        counts = np.bincount(_codes(run.text))
        if len(counts) > len(self.seen):
            self.seen = np.pad(self.seen, (0, len(counts) - len(self.seen)))
        self.seen[: len(counts)] += counts

    def close(self) -> None:
        for file in (self.ids, self.starts):
            file.flush()
            os.fsync(file.fileno())
            file.close()


def _batches(runs: Iterable[Run]) -> Iterator[list[Run]]:
    batch, size = [], 0
    for run in runs:
        batch.append(run)
        size += len(run.text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _spooled(sources: Sequence[FileSource | HubSource], folder: Path, name: str, say: Say) -> list[FileSource]:
    files = []
    for number, source in enumerate(sources):
        if isinstance(source, HubSource):
            say(f"downloading {source.spec}")
            source = source.spool(folder / f"{SPOOL}{name}.{number}.jsonl")
        files.append(source)
    return files


def text_hash(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

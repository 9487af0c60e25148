"""Where text comes from: files, folders, compressed JSON lines and Hugging Face data sets, as a stream of documents."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ..errors import InputError, nearest

PIECE = 1 << 16
"""A longer document comes in pieces of PIECE to 2 * PIECE characters."""

KEY = "text"
HUB = "hf:"
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
SUFFIXES = tuple(s + c for s in (".txt", ".md", ".jsonl") for c in ("", *OPENERS))


class Piece(NamedTuple):
    """A run of a document's characters; `last` ends the document."""

    text: str
    last: bool


@dataclass(frozen=True)
class FileSource:
    """A file: JSON lines (one document a line, its text under `key`) or else UTF-8 text (one document)."""

    path: Path
    key: str = KEY

    @property
    def place(self) -> str:
        """The same for every name of the file."""
        return str(self.path.resolve())

    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the file is the one that was read before."""
        facts = _stat(self.path)
        return {"path": str(self.path), "key": self.key, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}

    def pieces(self) -> Iterator[Piece]:
        """Its documents, piece by piece; a document without text is one blank piece.

        Raises:
            InputError: an unreadable, empty, binary or damaged file, or a bad line; it names the file and line.
        """
        if not is_json_lines(self.path):
            yield from _pieces(_text_chunks(self.path))
            return
        for place, row in json_rows(self.path):
            text = field(row, self.key, place)
            yield from _pieces(text[i : i + PIECE] for i in range(0, max(1, len(text)), PIECE))


@dataclass(frozen=True)
class HubSource:
    """A split of a Hugging Face data set: `hf:owner/name[:config][:split][#key]`; the split is "train" if not said."""

    spec: str

    @property
    def place(self) -> str:
        return self.spec

    def fingerprint(self) -> dict[str, Any]:
        return {"hub": self.spec}

    def spool(self, path: Path) -> FileSource:
        """Read it once from the network into a file of JSON lines, which can then be read as often as needed.

        Raises:
            InputError: the `datasets` package is missing, or the data set, split or key cannot be had.
        """
        address, _, key = self.spec.removeprefix(HUB).partition("#")
        name, *rest = address.split(":")
        if not name or len(rest) > 2:
            raise InputError(f"{self.spec} is not of the form {HUB}owner/name[:config][:split][#key]")
        known = len(rest) == 1 and rest[0] in ("train", "validation", "test")
        config = rest[0] if rest and not known else None
        split = rest[-1] if known or len(rest) == 2 else "train"
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                f"reading {self.spec} takes the `datasets` package; install it with: pip install datasets"
            ) from None
        try:
            with open(path, "w", encoding="utf-8") as file:
                for number, row in enumerate(load_dataset(name, config, split=split, streaming=True), 1):
                    text = field(row, key or KEY, f"{self.spec} row {number}")
                    file.write(json.dumps({KEY: text}) + "\n")
        except InputError:
            raise
        except Exception as error:  # offline, no such data set, no such split: each library layer has its own type
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot read {self.spec}: {reason}") from None
        return FileSource(path)


def expand(specs: Sequence[str | Path]) -> list[FileSource | HubSource]:
    """The files and data sets behind what a user names.

    Args:
        specs: a text or `.jsonl` file, either compressed (.xz, .gz, .bz2) or not; `path.jsonl#key` for another key
            than "text"; a folder, read recursively in sorted order; `hf:owner/name[:config][:split][#key]`.

    Raises:
        InputError: nothing is there, or a folder holds no file of a known kind.
    """
    if isinstance(specs, (str, Path)):
        specs = [specs]
    found: list[FileSource | HubSource] = []
    for spec in map(str, specs):
        if spec.startswith(HUB):
            found.append(HubSource(spec))
            continue
        path, key = Path(spec), KEY
        if "#" in spec and not path.exists():
            name, _, key = spec.rpartition("#")
            path = Path(name)
        if not path.is_dir():
            _stat(path)
            found.append(FileSource(path, key))
            continue
        files = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not files:
            raise InputError(f"the folder {path} has no file that ends in {', '.join(SUFFIXES)}")
        found += [FileSource(file, key) for file in files]
    if not found:
        raise InputError("no text file was given")
    return found


def is_json_lines(path: Path) -> bool:
    plain = path.with_suffix("") if path.suffix.lower() in OPENERS else path
    return plain.suffix.lower() == ".jsonl"


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place ("file line 3") for messages; blank lines are passed over.

    Raises:
        InputError: an unreadable or empty file, or a line that is not a JSON object.
    """
    empty = True
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        empty, place = False, f"{path} line {number}"
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise InputError(f"{place} is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{place} is not a JSON object but {type(row).__name__}")
        yield place, row
    if empty:
        raise InputError(f"{path} is empty")


def field(row: dict[str, Any], key: str, place: str) -> str:
    """The text under `key`, or an InputError that names the place."""
    if key not in row:
        raise InputError(f"{place} has no key {key!r}{nearest(key, row) if row else ''}")
    text = row[key]
    if not isinstance(text, str):
        raise InputError(f"{place}: {key!r} is not text but {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise InputError(f"{place}: {key!r} is not UTF-8 text (character {error.start})") from None
    return text


def _pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > 2 * PIECE:
            cut = _seam(held)
            yield Piece(held[:cut], False)
            held = held[cut:]
    yield Piece(held, True)


def _seam(text: str) -> int:
    """Where to cut so that byte-level BPE gives both sides the ids it gives the whole: between letter and white space.

    Its words start with their white space, so no word spans such a place. Text without one is cut anywhere.
    """
    end = 2 * PIECE
    while (place := max(text.rfind(" ", PIECE, end), text.rfind("\n", PIECE, end))) > 0:
        if text[place - 1].isalnum():
            return place
        end = place
    return PIECE


def _text_chunks(path: Path) -> Iterator[str]:
    decoder, read, blank = codecs.getincrementaldecoder("utf-8")(), 0, True
    for raw in _blocks(path):
        if b"\0" in raw:
            raise InputError(f"{path} is not text: it holds NUL bytes")
        start = read - len(decoder.getstate()[0])
        read += len(raw)
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {start + error.start}); convert it first") from None
        blank = blank and not text.strip()
        yield text
    if rest := len(decoder.getstate()[0]):
        raise InputError(f"{path} is not UTF-8 text (byte {read - rest}); convert it first")
    if blank:
        raise InputError(f"{path} is empty")


def _blocks(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield from _guarded(path, iter(lambda: file.read(PIECE), b""))


def _lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        yield from _guarded(path, file)


def _guarded(path: Path, parts: Iterable[bytes]) -> Iterator[bytes]:
    """Reading errors (a damaged archive, a failing disk) as one sentence."""
    try:
        yield from parts
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged, or no {path.suffix} file ({error})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _opened(path: Path) -> IO[bytes]:
    try:
        return cast(IO[bytes], OPENERS.get(path.suffix.lower(), open)(path, "rb"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None

"""Text in, token windows out: reading files, tokenizers, and batches that are functions of (seed, step, index)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .. import random
from ..errors import InputError, nearest

TOKENIZERS = ("char", "byte", "bpe")
TOKENIZER_FILE = "tokenizer.json"
MASK_SYMBOL = "▒"
END_SYMBOL = "␃"


def read_text(paths: Iterable[str | Path]) -> str:
    """Concatenate UTF-8 text files; a missing, empty or binary one is an InputError."""
    parts = []
    for path in map(Path, paths):
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        if b"\0" in raw:
            raise InputError(f"{path} is not text: it holds NUL bytes")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
        if not text.strip():
            raise InputError(f"{path} is empty")
        parts.append(text)
    if not parts:
        raise InputError("no text file was given")
    return "\n\n".join(parts)


def build_tokenizer(kind: str, text: str | Iterable[str], vocab_size: int = 4096) -> Tokenizer:
    """A tokenizer for `text` (one or several); the mask is not in it, its id comes after the tokenizer's.

    Args:
        kind: "char" (one id a character of the text), "byte" (256 ids), or "bpe" (byte-level BPE trained
            on the text, at most `vocab_size` ids).
    """
    texts = [text] if isinstance(text, str) else text
    if kind == "char":
        symbols = sorted(set().union(*texts))
        tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(symbols)}, unk_token=symbols[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte":
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    elif kind == "bpe":
        if vocab_size < len(alphabet):
            raise InputError(f"a BPE vocabulary of {vocab_size} is too small; it starts from {len(alphabet)} bytes")
        tokenizer = Tokenizer(models.BPE())
    else:
        raise InputError(f"unknown tokenizer {kind!r}{nearest(kind, TOKENIZERS)}")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator((line for part in texts for line in part.splitlines(keepends=True)), trainer)
    return tokenizer


def load_tokenizer(path: str | Path | Tokenizer) -> Tokenizer:
    """A `tokenizer.json`, the one in a folder or a copy of the given one, truncation and padding switched off.

    Raises:
        InputError: nothing there, not a tokenizer, or ids with holes (the mask's id could then not follow them).
    """
    if isinstance(path, Tokenizer):
        file, tokenizer = Path(TOKENIZER_FILE), Tokenizer.from_str(path.to_str())
    else:
        file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            kinds = ", ".join(TOKENIZERS)
            raise InputError(f"there is no tokenizer {file}; give one of {kinds} or the path of a {TOKENIZER_FILE}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise InputError(f"{file} is not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size, highest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=-1)
    if size != highest + 1:
        raise InputError(f"{file} has {size} ids but its highest is {highest}; ids must be 0, 1, 2, ... without holes")
    return tokenizer


def spells_characters(tokenizer: Tokenizer) -> bool:
    """Whether it is a "char" tokenizer: an id a character, and none for any other."""
    return isinstance(tokenizer.model, models.WordLevel) and isinstance(tokenizer.decoder, decoders.Fuse)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids; text that the tokenizer cannot spell is an InputError that names the character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not UTF-8: it holds {text[error.start]!r} at position {error.start}") from None
    if spells_characters(tokenizer):
        known = tokenizer.get_vocab()
        strange = next((c for c in text if c not in known), None)
        if strange is not None:
            raise InputError(f"the character {strange!r} is not in this model's vocabulary of {len(known)} characters")
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Iterable[int], eos_id: int | None = None, mask_id: int | None = None) -> str:
    """Text of ids; masks (`mask_id`, and what the tokenizer lacks) show as a shaded box, `eos_id` as "␃"."""
    size, pieces, run = tokenizer.get_vocab_size(), [], []
    for token in ids:
        if token < size and token != mask_id:
            run.append(token)
            continue
        pieces += [tokenizer.decode(run), END_SYMBOL if token == eos_id else MASK_SYMBOL]
        run = []
    return "".join([*pieces, tokenizer.decode(run)])


@dataclass(frozen=True)
class TextData:
    """One corpus as token ids, its tail held out.

    Attributes:
        train, valid: int64 [N] and [M].
        length: tokens a window.
        characters_per_token: on the validation part; bits a token / this = bits a character.
        unigram_bits: entropy of the validation text's characters under the training text's frequencies (add-one),
            bits a character: what knowing letter frequencies alone costs.
    """

    train: Tensor
    valid: Tensor
    length: int
    tokenizer: Tokenizer
    characters_per_token: float
    unigram_bits: float

    @classmethod
    def from_text(cls, text: str, tokenizer: Tokenizer, length: int, valid_share: float = 0.05) -> TextData:
        """Split off `valid_share` of the text in 20 blocks spread over it, so that both parts are alike."""
        if length < 1:
            raise InputError(f"length is {length}; a window takes at least one token")
        train_text, valid_text = _hold_out(text, valid_share)
        train, valid = (torch.tensor(encode(tokenizer, part)) for part in (train_text, valid_text))
        for name, part in (("training", train), ("validation", valid)):
            if len(part) < length:
                raise InputError(
                    f"the text is too short: its {name} part has {len(part)} tokens, a window takes {length}; give "
                    "more text or a shorter length"
                )
        return cls(
            train, valid, length, tokenizer, len(valid_text) / len(valid), cross_entropy_bits(train_text, valid_text)
        )

    @property
    def mask_id(self) -> int:
        return self.tokenizer.get_vocab_size()

    def batch(self, seed: int, step: int, index: Tensor) -> Tensor:
        """Windows of the training text at random places, int64 [len(index), length]."""
        coarse, fine = random.uniform(seed, random.DATA, step, index, 2).double().unbind(1)
        place = coarse - 2.0**-24 + fine * 2.0**-23  # 46 bits: 23 would skip places of a long text
        starts = (place * (len(self.train) - self.length + 1)).long()
        return self.train[starts[:, None] + torch.arange(self.length)]

    def valid_windows(self, limit: int | None = None) -> Tensor:
        """Validation windows side by side, int64 [n, length]; `limit` of them spread evenly."""
        windows = self.valid[: len(self.valid) // self.length * self.length].view(-1, self.length)
        if limit is not None and len(windows) > limit:
            windows = windows[torch.linspace(0, len(windows) - 1, limit).long()]
        return windows


def _hold_out(text: str, share: float, blocks: int = 20) -> tuple[str, str]:
    size = len(text) // blocks
    cut = max(1, round(size * share))
    pieces = [text[i * size : (i + 1) * size if i < blocks - 1 else len(text)] for i in range(blocks)]
    return "".join(p[:-cut] for p in pieces), "".join(p[-cut:] for p in pieces)


def cross_entropy_bits(train: str, valid: str) -> float:
    """Bits a character of `valid` under `train`'s add-one character frequencies."""
    counts, seen = Counter(train), Counter(valid)
    total = len(train) + len(counts.keys() | seen.keys())
    return -sum(n * math.log2((counts[c] + 1) / total) for c, n in seen.items()) / len(valid)

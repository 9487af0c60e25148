"""What `loopmdm train` trains on: windows of a corpus, or prompts with answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import random
from ..errors import InputError
from .corpus import Corpus, Sequences
from .data import TOKENIZERS, build_tokenizer, encode, load_tokenizer
from .sources import FileSource, expand, field, is_json_lines, json_rows

HELD_OUT = 20
"""One of so many answers is kept for validation."""


class Feed(Protocol):
    """Training batches, validation sequences, and what a model for them needs to know.

    Attributes:
        length: tokens a sequence.
        vocab_size, mask_id: the model's.
        valid: sequences to evaluate on.
        units: of the text, to a token; bits a token / this = bits a `unit`.
        unigram_bits: what frequencies alone cost, bits a unit, if that is known.
        sha256: of the data; a run that goes on must have the same.
        summary: a sentence.
    """

    length: int
    tokenizer: Tokenizer
    vocab_size: int
    mask_id: int
    valid: Sequences
    unit: str
    units: float
    unigram_bits: float | None
    sha256: str
    summary: str

    def batch(self, step: int, index: Tensor) -> Sequences: ...


class CorpusFeed:
    """Windows of a `Corpus` (a `Feed`)."""

    unit = "character"

    def __init__(self, corpus: Corpus, seed: int, batch_size: int, length: int, packing: str, windows: int) -> None:
        self.corpus, self.seed, self.batch_size = corpus, seed, batch_size
        self.length, self.packing = length, packing
        self.tokenizer, self.vocab_size, self.mask_id = corpus.tokenizer, corpus.vocab_size, corpus.mask_id
        corpus.train.check(length)
        self.valid = corpus.valid_windows(length, windows, packing)
        self.units = corpus.characters_per_token
        self.unigram_bits: float | None = corpus.unigram_bits
        self.sha256 = hashlib.sha256(json.dumps(corpus.meta["files"], sort_keys=True).encode()).hexdigest()
        self.summary = (
            f"Text: {len(corpus.train):,} training and {len(corpus.valid):,} validation tokens of "
            f"{self.vocab_size - 1} kinds, {self.units:.2f} characters a token; held out: {corpus.meta['split']}; "
            f"character frequencies alone cost {corpus.unigram_bits:.3f} bits a character."
        )

    def batch(self, step: int, index: Tensor) -> Sequences:
        return self.corpus.batch(
            self.seed, step, index, batch_size=self.batch_size, length=self.length, packing=self.packing
        )


@dataclass
class Answers:
    """Prompts with their answers, each filled up with ends of document (LLaDA, arXiv 2502.09992): tokens int32
    [N, length], and how many of them are prompt, int64 [N]."""

    tokens: Tensor
    prompts: Tensor

    def rows(self, index: Tensor) -> Sequences:
        tokens = self.tokens[index].long()
        answer = torch.arange(tokens.shape[1]) >= self.prompts[index][:, None]
        return Sequences(tokens, maskable=answer)


class AnswerFeed:
    """Prompts and answers from JSON lines (a `Feed`). Prompts are never masked; answers and their filling are counted.

    Args:
        sources: `.jsonl` files, compressed or not, or folders of them.
        tokenizer: as in `Corpus.build`.
        prompt_key, answer_key: where a line has them.

    Raises:
        InputError: another kind of file, a line without the keys, or no line that fits into `length`.
    """

    unit, units = "token", 1.0
    unigram_bits: float | None = None

    def __init__(
        self,
        sources: Sequence[str | Path],
        tokenizer: Tokenizer | str,
        vocab_size: int,
        seed: int,
        batch_size: int,
        length: int,
        windows: int,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.seed, self.batch_size, self.length = seed, batch_size, length
        texts = [pair for source in expand(sources) for pair in _pairs(source, prompt_key, answer_key)]
        if isinstance(tokenizer, str):
            both = (text for pair in texts for text in pair)
            made = (
                build_tokenizer(tokenizer, both, vocab_size) if tokenizer in TOKENIZERS else load_tokenizer(tokenizer)
            )
        else:
            made = tokenizer
        self.tokenizer, end = made, made.get_vocab_size()
        self.vocab_size, self.mask_id = end + 2, end + 1
        rows, prompts = [], []
        for prompt, answer in texts:
            ids, rest = encode(made, prompt), [*encode(made, answer), end]
            if len(ids) + len(rest) <= length:
                rows.append([*ids, *rest] + [end] * (length - len(ids) - len(rest)))
                prompts.append(len(ids))
        if len(rows) < 2:
            raise InputError(
                f"{len(rows)} of {len(texts)} prompts with answers fit into length {length}; make it longer"
            )
        if len(rows) < len(texts):
            say(f"Note: {len(texts) - len(rows)} of {len(texts)} prompts with answers are longer than {length} tokens")
        every = torch.arange(len(rows))
        held = every % min(HELD_OUT, len(rows)) == 0
        data = torch.tensor(rows, dtype=torch.int32), torch.tensor(prompts)
        self.train = Answers(*(part[~held] for part in data))
        kept = Answers(*(part[held] for part in data))
        self.valid = kept.rows(torch.linspace(0, len(kept.tokens) - 1, min(windows, len(kept.tokens))).long())
        self.sha256 = hashlib.sha256(b"".join(part.numpy().tobytes() for part in data)).hexdigest()
        self.summary = (
            f"Answers: {len(self.train.tokens):,} to train on and {len(kept.tokens):,} held out, "
            f"{self.vocab_size - 1} kinds of tokens."
        )

    def batch(self, step: int, index: Tensor) -> Sequences:
        """Every answer once an epoch, in an order of its own; a function of the seed, step and global sample index."""
        number, count = step * self.batch_size + index, len(self.train.tokens)
        return self.train.rows(random.permuted(number % count, count, self.seed, number // count))


def _pairs(source: object, prompt_key: str, answer_key: str) -> list[tuple[str, str]]:
    if not isinstance(source, FileSource) or not is_json_lines(source.path):
        name = source.path if isinstance(source, FileSource) else source
        raise InputError(f"{name} is not a .jsonl file; prompts with answers come as one JSON object a line")
    return [(field(row, prompt_key, place), field(row, answer_key, place)) for place, row in json_rows(source.path)]

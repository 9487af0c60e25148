"""What `loopmdm train` trains on: windows of a corpus, or prompts with answers."""

from __future__ import annotations

import hashlib
from typing import Protocol

from tokenizers import Tokenizer
from torch import Tensor

from .corpus import Corpus, Sequences
from .sft import SFTData


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
        self.sha256 = corpus.sha256
        self.summary = (
            f"Text: {len(corpus.train):,} training and {len(corpus.valid):,} validation tokens of "
            f"{self.vocab_size - 1} kinds, {self.units:.2f} characters a token; held out: {corpus.meta['split']}; "
            f"character frequencies alone cost {corpus.unigram_bits:.3f} bits a character."
        )

    def batch(self, step: int, index: Tensor) -> Sequences:
        return self.corpus.batch(
            self.seed, step, index, batch_size=self.batch_size, length=self.length, packing=self.packing
        )


class AnswerFeed:
    """Prompts with answers (a `Feed`); bits are of the answers' tokens and the ends of documents behind them."""

    unit, units = "token", 1.0
    unigram_bits: float | None = None

    def __init__(self, data: SFTData, seed: int, batch_size: int, windows: int) -> None:
        self.data, self.seed, self.batch_size = data, seed, batch_size
        self.length, self.tokenizer = data.length, data.tokenizer
        self.vocab_size, self.mask_id = data.vocab_size, data.mask_id
        self.valid = data.valid_windows(windows)
        content = (self.tokenizer.to_str().encode(), data.ids.tobytes(), data.starts.tobytes())
        self.sha256 = hashlib.sha256(b"".join(content)).hexdigest()
        self.summary = (
            f"Answers: {len(data.train):,} to train on and {len(data.valid):,} held out, {self.vocab_size - 1} kinds "
            "of tokens; bits count the answers and the ends of documents behind them."
        )

    def batch(self, step: int, index: Tensor) -> Sequences:
        return self.data.batch(self.seed, step, index, batch_size=self.batch_size)

"""Supervised fine-tuning data: prompts that are never masked, and answers with their padding, which are learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .. import random
from ..errors import InputError
from .corpus import Sequences, spread
from .data import TOKENIZERS, build_tokenizer, load_tokenizer
from .prepare import encoder, text_hash
from .sources import FileSource, HubSource, expand, field, is_json_lines, json_rows


@dataclass(frozen=True)
class SFTData:
    """Prompts and answers in memory, each pair a row of `length` tokens: prompt, answer, ends of documents.

    The loss is on the answer and on what fills the row after it (so a model learns where to stop); one such token at
    least ends every answer.

    Attributes:
        ids: all pairs' tokens, prompt then answer, uint32 [N].
        starts: where each pair's prompt, its answer and the next pair begin, int64 [pairs, 3].
        train, valid: numbers of the pairs of each part, int64.
        dropped: pairs that were too long for `length`.
    """

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    train: Tensor
    valid: Tensor
    length: int
    tokenizer: Tokenizer
    eos_id: int
    dropped: int

    @property
    def mask_id(self) -> int:
        return self.eos_id + 1

    @property
    def vocab_size(self) -> int:
        return self.eos_id + 2

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path | Sequence[str | Path],
        tokenizer: Tokenizer | str | Path,
        length: int,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        *,
        vocab_size: int = 4096,
        valid_share: float = 0.05,
        progress: Callable[[str], None] | None = None,
    ) -> SFTData:
        """Read JSON lines (compressed or not); pairs with the prompts of lowest hash are validation.

        Prompt and answer are tokenised apart, as sampling will see them; put what separates them into the prompt.

        Args:
            path: one or several files, or folders of them.
            tokenizer, vocab_size: as in `Corpus.build`; BPE learns its merges from the training pairs.

        Raises:
            InputError: a bad file, line or share; too few pairs that fit.
        """
        if not 0 < valid_share < 1:
            raise InputError(f"valid_share is {valid_share}; it must be between 0 and 1")
        sources = expand([path] if isinstance(path, (str, Path)) else path)
        pairs = [pair for source in sources for pair in _pairs(source, prompt_key, answer_key)]
        hashes = [text_hash(prompt) for prompt, _ in pairs]
        several = sorted(set(hashes))
        limit = several[max(1, round(len(several) * valid_share)) - 1]
        if isinstance(tokenizer, str) and tokenizer in TOKENIZERS:
            seen = (text for p, h in zip(pairs, hashes, strict=True) if h > limit or tokenizer == "char" for text in p)
            tokenizer = build_tokenizer(tokenizer, seen, vocab_size)
        else:
            tokenizer = load_tokenizer(tokenizer)
        encode, rows, starts, held, end = encoder(tokenizer), [], [], [], 0
        for pair, number in zip(pairs, hashes, strict=True):
            prompt, answer = encode(list(pair))
            size = len(prompt) + len(answer)
            if size >= length:
                continue
            rows += [prompt.astype(np.uint32), answer.astype(np.uint32)]
            starts.append((end, end + len(prompt), end + size))
            held.append(number <= limit)
            end += size
        dropped, part = len(pairs) - len(held), np.array(held)
        if dropped and progress:
            progress(f"left out {dropped} of {len(pairs)} pairs that do not fit in {length} tokens")
        if not 0 < sum(held) < len(held):
            raise InputError(
                f"of {len(pairs)} pairs {len(held)} fit in {length} tokens, {sum(held)} of them held out; both "
                "training and validation need some: give more pairs or a greater length"
            )
        train, valid = (torch.from_numpy(side.nonzero()[0]) for side in (~part, part))
        eos = tokenizer.get_vocab_size()
        return cls(np.concatenate(rows), np.array(starts, np.int64), train, valid, length, tokenizer, eos, dropped)

    def batch(self, seed: int, step: int, index: Tensor, *, batch_size: int) -> Sequences:
        """Training pairs, every one once an epoch; a function of seed, step and index alone (`Corpus.batch`)."""
        number, count = step * batch_size + index, len(self.train)
        return self.rows(self.train[random.permuted(number % count, count, seed, number // count)])

    def valid_windows(self, limit: int | None = None) -> Sequences:
        """Validation pairs, or `limit` of them spread evenly."""
        return self.rows(self.valid[spread(len(self.valid), limit)])

    def rows(self, pairs: Tensor) -> Sequences:
        """tokens and maskable [len(pairs), length]."""
        tokens = np.full((len(pairs), self.length), self.eos_id, np.int64)
        maskable = np.ones(tokens.shape, bool)
        for i, (prompt, answer, end) in enumerate(self.starts[pairs.numpy()].tolist()):
            tokens[i, : end - prompt] = self.ids[prompt:end]
            maskable[i, : answer - prompt] = False
        return Sequences(torch.from_numpy(tokens), maskable=torch.from_numpy(maskable))


def _pairs(source: FileSource | HubSource, prompt_key: str, answer_key: str) -> Iterator[tuple[str, str]]:
    if not isinstance(source, FileSource) or not is_json_lines(source.path):
        name = source.path if isinstance(source, FileSource) else source.spec
        raise InputError(f"{name} is not a .jsonl file; prompts and answers are read from JSON lines")
    for place, row in json_rows(source.path):
        prompt, answer = field(row, prompt_key, place), field(row, answer_key, place)
        if not answer:
            raise InputError(f"{place}: {answer_key!r} is empty")
        yield prompt, answer

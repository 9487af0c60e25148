"""Judging samples by another model: generative perplexity, beside the entropy that a low one may have cost.

A sampler that repeats itself looks good to any language model, so a perplexity is never reported alone (as
Zheng et al., arXiv 2409.02908, and ReMDM, arXiv 2503.00307, show).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from ..diffusion.bounds import rolling
from ..errors import InputError
from .data import encode
from .sample import is_run, load

Scorer = Callable[[str], tuple[float, int]]
"""text -> (negative log-likelihood in nats, tokens that it is the sum over). Any callable will do."""
CORRUPTIONS = 16
"""Of each window that a `LoopMDMScorer` reads, spread over the mask counts."""


@dataclass(frozen=True)
class Score:
    """What `generative_perplexity` found.

    Attributes:
        perplexity: exp of all nats over all of the scorer's tokens; with `error` 0.1 read it as +- 10%.
        nats: the same before exp, nats a token of the scorer.
        error: standard error of `nats` over the samples; infinite for one sample.
        tokens: tokens scored.
        bits_per_character: all bits over all characters, which does not depend on the scorer's tokenizer.
    """

    perplexity: float
    nats: float
    error: float
    tokens: int
    bits_per_character: float


def generative_perplexity(samples: Sequence[str], scorer: Scorer) -> Score:
    """Perplexity of texts under a scorer, one number for all of them (MDLM, arXiv 2406.07524, sec. 5).

    Raises:
        InputError: no sample, none that has a token to score, or a score that is not finite.
    """
    if not samples:
        raise InputError("there are no samples to score")
    scored = [scorer(text) for text in samples]
    for nats, tokens in scored:
        if not math.isfinite(nats) or tokens < 0:
            raise InputError(f"the scorer gave {nats} nats for {tokens} tokens; a finite number is needed")
    total, tokens = math.fsum(n for n, _ in scored), sum(k for _, k in scored)
    if not tokens:
        raise InputError("the samples hold no token that the scorer scores; they are too short")
    mean, N = total / tokens, len(samples)
    spread = math.fsum((n - mean * k) ** 2 for n, k in scored)  # of a ratio of sums, to first order
    error = math.sqrt(spread * N / (N - 1)) / tokens if N > 1 else math.inf
    characters = sum(map(len, samples))
    return Score(math.exp(min(mean, 700.0)), mean, error, tokens, total / math.log(2) / max(1, characters))


def unigram_entropy(samples: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Entropy of the token frequencies within a sample, nats: mean over samples (as MDLM's successors report it), and
    its standard error, infinite for one sample."""
    if not samples:
        raise InputError("there are no samples to measure")
    values = [_entropy(s) for s in samples]
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _entropy(tokens: Iterable[int]) -> float:
    counts = Counter(tokens).values()
    total = sum(counts)
    return math.fsum(-n / total * math.log(n / total) for n in counts)


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams of all samples as a share of all of them (Li et al., arXiv 1510.03055); 0 if there is none."""
    grams = [tuple(s[i : i + n]) for s in samples for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


class CausalScorer:
    """A Hugging Face causal LM, by name or local path (extra `hf`).

    Text longer than the model is read in windows; each token is scored once, with at least half a window of context.
    The first token has no context and is not scored, as in MDLM.

    Raises:
        InputError: transformers cannot load it.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForCausalLM.from_pretrained(name)
        except Exception as error:  # OSError offline, ValueError for no causal LM, whatever a damaged file raises
            raise InputError(f"no causal language model could be loaded from {name!r} ({_first_line(error)})") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).eval()
        self.name = f"{name}, a causal language model"
        self.window = getattr(self.model.config, "max_position_embeddings", None) or 1024

    def __call__(self, text: str) -> tuple[float, int]:
        return self.score(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @torch.no_grad()
    def score(self, ids: Sequence[int]) -> tuple[float, int]:
        """Nats and number of tokens 1.. of `ids`."""
        total, done = 0.0, 1
        while done < len(ids):
            start = 0 if done == 1 else max(0, done - self.window // 2)
            piece = torch.tensor([ids[start : start + self.window]], device=self.device)
            logits = self.model(piece).logits[0].float()
            fresh = slice(done - start, piece.shape[1])
            total += float(F.cross_entropy(logits[:-1][fresh.start - 1 :], piece[0, fresh], reduction="sum"))
            done = start + piece.shape[1]
        return total, max(0, len(ids) - 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


class LoopMDMScorer:
    """Another LoopMDM checkpoint at its S_max. What it gives is the likelihood *bound*: at least the true nats.

    Text longer than the model is read in windows side by side; every token is scored.

    Args:
        folder: a run's folder, or the model/ in it.
        seed: of the corruptions.
    """

    def __init__(self, folder: str | Path, *, seed: int = 0) -> None:
        self.model, self.tokenizer = load(folder)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.seed = seed
        self.name = f"{folder}, a LoopMDM at S = {self.model.max_loops}; its likelihood bound, so an upper bound"

    def __call__(self, text: str) -> tuple[float, int]:
        ids = torch.tensor(encode(self.tokenizer, text), dtype=torch.int64)
        if not len(ids):
            return 0.0, 0
        measured = rolling(self.model, ids, bound="count", samples=CORRUPTIONS, seed=self.seed)
        return float(measured.nats.sum()), len(ids)


def build_scorer(name: str, *, seed: int = 0) -> LoopMDMScorer | CausalScorer:
    """A LoopMDMScorer for a folder that `loopmdm train` made, else a CausalScorer."""
    return LoopMDMScorer(name, seed=seed) if is_run(name) else CausalScorer(name)

"""Measuring a model: NELBO at several S on the same masks, by noise level, against another model; exact solves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..diffusion.bounds import Likelihood, TimeProfile, likelihood, nelbo_by_time, ratio, rolling
from ..diffusion.loss import T_MIN
from ..errors import InputError
from ..model.denoiser import Denoiser
from ..model.lm import LoopMDM
from ..sampling.engine import Generation, generate
from .corpus import spread
from .measured import Measured
from .score import Scorer, distinct, generative_perplexity, unigram_entropy

BITS = 1 / math.log(2)
SEVERAL = 4
"""Denoising steps of the demo's column that asks what is left of the loops' gain when steps are several."""
POLICY = "ancestral"
"""Of the samples that `loopmdm eval` judges."""


@dataclass(frozen=True)
class Estimate:
    """Mean over sequences and its standard error."""

    mean: float
    error: float


def nelbo_by_loops(
    model: Denoiser,
    sequences: Tensor,
    loops: Sequence[int],
    *,
    maskable: Tensor | None = None,
    document_ids: Tensor | None = None,
    repeats: int = 1,
    batch: int = 64,
    seed: int = 0,
) -> Tensor:
    """NELBO of each sequence at each S, bits a maskable token, float64 [len(loops), N].

    `likelihood` with its "time" bound: the masks are the same for every S (and for every model given the same seed),
    so that differences pair.
    """
    if not len(sequences):
        raise InputError("there is nothing to evaluate: no sequences")
    measured = likelihood(
        model,
        sequences,
        num_loops=loops,
        samples=repeats,
        maskable=maskable,
        document_ids=document_ids,
        seed=seed,
        batch=batch,
    )
    return measured.nats * BITS / measured.tokens.clamp(min=1)


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of independent values [N]."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), error)


def fill(model: Denoiser, puzzles: Tensor, loops: int, steps: int = 1) -> Generation:
    """Fill all masks of puzzles [N, T] by arg-max in `steps` denoising steps at S = loops."""
    return generate(model, puzzles, steps=steps, num_loops=loops, policy="confidence", temperature=0.0)


def solved(tokens: Tensor, answers: Tensor) -> Estimate:
    """Share of rows [N, T] that equal their answer in every cell, and its binomial standard error."""
    share = float((tokens.cpu() == answers).all(-1).double().mean())
    return Estimate(share, math.sqrt(share * (1 - share) / len(answers)))


# `loopmdm eval`: each function returns what goes into its JSON


def default_loops(max_loops: int) -> list[int]:
    """1, 2, 4, ... up to S_max, S_max, and twice S_max: does it still improve past what training saw?"""
    return sorted({2**i for i in range(max_loops.bit_length())} | {max_loops, 2 * max_loops}) if max_loops > 1 else [1]


def measure(
    model: LoopMDM, text: Measured, loops: Sequence[int], *, bound: str = "count", samples: int = 4, seed: int = 0
) -> Likelihood:
    """Likelihood bounds of a text's windows at each S, all on the same masks."""
    if text.whole is not None:
        return rolling(
            model,
            text.whole,
            window=text.length,
            context=text.context,
            num_loops=list(loops),
            bound=bound,
            samples=samples,
            seed=seed,
        )
    return likelihood(
        model,
        text.windows,
        num_loops=list(loops),
        bound=bound,
        samples=samples,
        maskable=text.maskable,
        document_ids=text.document_ids,
        seed=seed,
    )


def loop_rows(model: LoopMDM, text: Measured, found: Likelihood) -> list[dict[str, Any]]:
    """One row an S: bounds in nats, bits and perplexity, FLOPs, and the paired gain over the first S."""
    first = found.at(found.loops[0])
    each = text.characters_per_token
    rows = []
    for S in found.loops:
        here = found.at(S)
        nats, gain = float(here.nats_per_token), first.difference(here)
        rows.append(
            {
                "loops": S,
                "layers": model.config.depth(S),
                "flops_per_token": model.forward_flops(text.length, S) / text.length,
                "nats": nats,
                "error": finite(here.error),
                "bits": nats * BITS,
                "bits_per_character": None if each is None else nats * BITS / each,
                "perplexity": math.exp(min(nats, 700.0)),
                "gain": float(gain.mean),
                "gain_error": finite(gain.error),
            }
        )
    return rows


def check_comparable(tokenizer: Tokenizer, other: Tokenizer, name: str | Path, other_name: str | Path) -> None:
    """Nats a token compare only where the tokens are the same."""
    if tokenizer.to_str() != other.to_str():
        raise InputError(
            f"{name} and {other_name} have different tokenizers, so their nats a token do not compare; evaluate both "
            "and compare bits a character"
        )


def place(model: LoopMDM) -> str:
    """Move a model to the GPU if there is one; the device's name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    return device


def compare_rows(found: Likelihood, other: Likelihood, its: Sequence[int]) -> list[dict[str, Any]]:
    """One row an S: the other model's bound at its own S, and this model's minus the other's on the same masks."""
    rows = []
    for S, theirs in zip(found.loops, its, strict=True):
        held = other.at(theirs)
        gap = found.at(S).difference(held)
        rows.append(
            {
                "loops": S,
                "other_loops": theirs,
                "other_nats": float(held.nats_per_token),
                "difference": float(gap.mean),
                "error": finite(gap.error),
            }
        )
    return rows


def time_profile(
    model: LoopMDM, text: Measured, loops: Sequence[int], bins: int, *, samples: int = 4, seed: int = 0
) -> TimeProfile:
    """NELBO in `bins` bins of t of equal width, at each S on the same masks."""
    if bins < 1:
        raise InputError(f"bins is {bins}; it must be at least 1")
    edges = torch.linspace(T_MIN, 1.0, bins + 1, dtype=torch.float64)
    return nelbo_by_time(
        model,
        text.windows,
        list(loops),
        edges,
        samples=samples,
        maskable=text.maskable,
        document_ids=text.document_ids,
        seed=seed,
    )


def time_rows(profile: TimeProfile) -> dict[str, Any]:
    """NELBO given t in each bin, nats a token [bins][S], and its paired gain over the first S."""
    gain, gain_error = ratio(profile.nats[:, :1] - profile.nats, profile.tokens)
    return {
        "edges": profile.edges.tolist(),
        "loops": list(profile.loops),
        "nats": profile.nats_per_token.tolist(),
        "error": finite(profile.error),
        "gain": gain.tolist(),
        "gain_error": finite(gain_error),
        "masked_nats": finite(profile.masked_ce),
    }


def generated(
    model: LoopMDM,
    tokenizer: Tokenizer,
    text: Measured,
    loops: Sequence[int],
    count: int,
    *,
    steps: int = 64,
    scorer: Scorer | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Samples at each S, as long as the text's windows: perplexity under a scorer, entropy, distinct n-grams, FLOPs.

    The first row judges as many windows of the text itself, what a perfect model's samples would look like. The noise
    is the same for every S.
    """
    windows = text.windows[spread(len(text.windows), count)]
    rows = [{"loops": None, "flops": None, **_judged(windows.tolist(), tokenizer, scorer)}]
    for S in loops:
        made = generate(
            model,
            batch_size=count,
            max_new_tokens=text.length,
            steps=steps,
            num_loops=S,
            policy=POLICY,
            seed=seed,
        )
        rows.append({"loops": S, "flops": made.flops, **_judged(made.sequences(), tokenizer, scorer)})
    return {
        "samples": count,
        "length": text.length,
        "steps": steps,
        "policy": POLICY,
        "scorer": None if scorer is None else getattr(scorer, "name", repr(scorer)),
        "rows": rows,
    }


def _judged(samples: list[list[int]], tokenizer: Tokenizer, scorer: Scorer | None) -> dict[str, Any]:
    entropy, error = unigram_entropy(samples)
    found: dict[str, Any] = {"entropy": entropy, "entropy_error": _nulls(error)}
    found |= {f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)}
    if scorer is not None:
        size = tokenizer.get_vocab_size()
        score = generative_perplexity([tokenizer.decode([t for t in s if t < size]) for s in samples], scorer)
        found |= {"perplexity": score.perplexity, "nats": score.nats, "error": _nulls(score.error)}
        found |= {"tokens": score.tokens, "bits_per_character": score.bits_per_character}
    return found


def finite(values: Tensor) -> Any:
    """Numbers for JSON, which has no infinity: the error of a single window, say, is null."""
    return _nulls(values.tolist())


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return value if math.isfinite(value) else None

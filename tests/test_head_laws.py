"""The hierarchical draw is exact: whole distributions by chi-square over many runs, and the far tail by count."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from loopmdm.ops import head_stats as module
from loopmdm.ops.contract import extension
from loopmdm.ops.head_stats import SPAN, Draw, logit_stats
from loopmdm.ops.noise import GROUP, TOKEN, gumbel_rows

NOISE = "torch" if extension() is None else "cpp"
RUNS = 54


def sample(x: Tensor, n: int, temperature: float, seed: int) -> Tensor:
    """int64 [n], tokens of one row of logits fp32 [V] under n row seeds: `draw_token`, its levels computed once."""
    seeds = torch.arange(n) + seed * 2**40
    zero = torch.zeros_like(seeds)
    draw = Draw(temperature, seeds, zero, zero + 7, (), None, None, None, None)
    top = x.max()[None]
    level = module.levels(x[None], top, draw.scale)
    tokens = []
    for part in (slice(i, i + 16384) for i in range(0, n, 16384)):
        some = draw.rows(part)
        first = module.draw_group(level, some, NOISE) * SPAN
        inside = torch.nn.functional.pad(x, (0, -len(x) % SPAN), value=-math.inf).view(-1, SPAN)[first // SPAN]
        tokens.append(module._inside_token(inside, top, first, some, NOISE))
    return torch.cat(tokens)


def test_the_shortcut_draws_what_logit_stats_draws() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    n = torch.arange(300)
    whole = logit_stats(x.expand(300, -1), temperature=0.7, seeds=n + 5 * 2**40, positions=n * 0 + 7, impl="torch")
    assert torch.equal(sample(x, 300, 0.7, 5), whole.token)


def chi_square(x: Tensor, tokens: Tensor, temperature: float) -> float:
    """p-value; tokens by falling probability are pooled until a bin expects at least 10."""
    p = (x.double() / temperature).softmax(-1)
    p, order = p.sort(descending=True)
    observed = tokens.bincount(minlength=len(x))[order].double()
    bins, filled = [], 0.0
    index = 0
    for share in (p * len(tokens)).tolist():
        bins.append(index)
        filled += share
        if filled >= 10:
            index, filled = index + 1, 0.0
    bin_of = torch.tensor(bins).clamp(max=index - 1)  # what is left over joins the last bin
    pooled = [torch.zeros(index, dtype=torch.float64).index_add_(0, bin_of, v) for v in (observed, p * len(tokens))]
    assert float(pooled[1].min()) >= 10 and index > 10
    return float(stats.chisquare(pooled[0].numpy(), pooled[1].numpy() * (len(tokens) / float(pooled[1].sum()))).pvalue)


@pytest.mark.parametrize(
    "vocab, n, runs",
    [(50258, 8192, RUNS), pytest.param(126464, 60000, RUNS, marks=pytest.mark.slow)],
)
def test_p_values_are_uniform(vocab: int, n: int, runs: int) -> None:
    """Chi-square at T = 0.5, 1 and 1.5 by turns; Kolmogorov-Smirnov over the runs' p-values."""
    values = []
    for run in range(runs):
        temperature = (0.5, 1.0, 1.5)[run % 3]
        x = torch.randn(vocab, generator=torch.Generator().manual_seed(run)) * 3
        values.append(chi_square(x, sample(x, n, temperature, run), temperature))
    assert stats.kstest(values, "uniform").pvalue > 0.01, sorted(values)
    assert min(values) > 1e-5


def test_tokens_twenty_nats_below_come_as_often_as_they_should() -> None:
    """One token holds nearly all; the others, each 2e-9 as likely, together 1e-4: counted over 2^19 draws."""
    vocab, n = 50304, 1 << 19
    x = torch.full((vocab,), -20.0)
    x[300] = 0.0
    far = sample(x, n, 1.0, 3)
    far = far[far != 300]
    mass = (vocab - 1) * math.exp(-20)
    expected = n * mass / (1 + mass)
    assert stats.poisson.cdf(len(far), expected) > 5e-4 and stats.poisson.sf(len(far) - 1, expected) > 5e-4
    assert bool((x[far] == -20).all())
    # they are spread evenly, within groups and over them
    assert stats.kstest((far / vocab).numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(((far % SPAN + 0.5) / SPAN).numpy(), "uniform").pvalue > 1e-3


def test_noise_of_groups_and_tokens_are_independent() -> None:
    seeds = torch.arange(1 << 15)
    zero = torch.zeros_like(seeds)
    a, b = (gumbel_rows(seeds, zero, zero, zero, 4, stream, NOISE).flatten().double() for stream in (GROUP, TOKEN))
    r = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
    assert abs(r) < 4 / len(a) ** 0.5

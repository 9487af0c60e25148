"""nelbo_by_loops: the same masks for every S, the definition, and nothing that depends on the batch."""

import math

import pytest
import torch

from loopmdm import random
from loopmdm.diffusion import T_MIN, nelbo
from loopmdm.errors import InputError
from loopmdm.lab.evaluate import estimate, fill, nelbo_by_loops, solved

from .helpers import ids, live, tiny

VOCABULARY = 7
MASK = VOCABULARY - 1


class Fake:
    """A denoiser that records what it is shown and predicts token 0 with log-odds S everywhere."""

    mask_id = pad_id = MASK
    vocab_size, max_length, suppressed_ids, logit_shift, max_loops = VOCABULARY, None, (MASK,), 0, 4

    def __init__(self):
        self.seen = {}

    def hidden(self, input_ids, attention_mask=None, num_loops=None, sigma=None):
        self.seen.setdefault(num_loops, []).append((input_ids.clone(), sigma.clone()))
        out = torch.zeros(*input_ids.shape, 1)
        out[..., 0] = num_loops
        return out

    def head(self):
        return torch.eye(VOCABULARY, 1), None

    def forward_flops(self, length, num_loops):
        return 0.0


def ce(tokens, loops):
    """-log p of each token under Fake: token 0 has logit `loops`, the other five 0."""
    return math.log(math.exp(loops) + MASK - 1) - loops * (tokens == 0).double()


def test_every_s_sees_the_same_masks():
    model, tokens = Fake(), ids(10, 12, VOCABULARY, masks=0.0)
    nelbo_by_loops(model, tokens, [1, 3, 5], repeats=2, batch=4)
    assert set(model.seen) == {1, 3, 5}
    for shown in (model.seen[3], model.seen[5]):
        for (a, sigma_a), (b, sigma_b) in zip(model.seen[1], shown, strict=True):
            assert torch.equal(a, b) and torch.equal(sigma_a, sigma_b)
    first, second = (torch.cat([a for a, _ in model.seen[1][i : i + 3]]) for i in (0, 3))
    assert not torch.equal(first, second)  # rounds differ
    assert ((first == tokens) | (first == MASK)).all() and (first == MASK).any()


def test_against_the_definition():
    model, tokens = Fake(), ids(6, 12, VOCABULARY, masks=0.0)
    got = nelbo_by_loops(model, tokens, [1, 2], repeats=3, batch=4, seed=5)
    assert got.shape == (2, 6) and got.dtype == torch.float64
    u = random.scalar(5, random.TIME, 0)
    want = torch.zeros(2, 6, dtype=torch.float64)
    for round_ in range(3):
        place = torch.arange(6) + 6 * round_
        t = T_MIN + (1 - T_MIN) * ((u + place.double() / 18) % 1)
        mask = random.uniform(5, random.MASK, 0, place, 12) < ((1 - 1e-3) * t)[:, None].float()
        for i, S in enumerate((1, 2)):
            want[i] += (mask * ce(tokens, S)).sum(-1) / t / 12 / 3 / math.log(2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_times_cover_the_interval_evenly():
    model = Fake()
    nelbo_by_loops(model, ids(8, 4, VOCABULARY, masks=0.0), [1], repeats=4)
    alpha = torch.cat([sigma for _, sigma in model.seen[1]]).neg().exp()
    t = ((1 - alpha) / (1 - 1e-3) - T_MIN) / (1 - T_MIN)
    assert t.min() < 1 / 32 and t.max() > 31 / 32
    torch.testing.assert_close(t.sort().values.diff(), torch.full((31,), 1 / 32), rtol=0, atol=1e-4)


def test_batch_size_does_not_matter_and_maskable_is_respected():
    model = live(tiny())
    tokens = ids(9, 10, masks=0.0)
    maskable = torch.arange(10).expand(9, 10) >= 4
    whole = nelbo_by_loops(model, tokens, [1, 3], maskable=maskable)
    parts = nelbo_by_loops(model, tokens, [1, 3], maskable=maskable, batch=2)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    direct = nelbo(model, tokens, maskable=maskable, num_loops=3, seed=0)
    assert not direct.corruption.mask[:, :4].any()
    torch.testing.assert_close(whole[1], direct.per_sequence.double() / math.log(2), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole[0], whole[1], rtol=1e-3)


def test_dropout_is_off_meanwhile_and_the_mode_comes_back():
    model = live(tiny(dropout=0.5)).train()
    tokens = ids(4, 10, masks=0.0)
    a, b = (nelbo_by_loops(model, tokens, [2]) for _ in range(2))
    assert torch.equal(a, b) and model.training
    assert torch.equal(a, nelbo_by_loops(model.eval(), tokens, [2])) and not model.training
    with pytest.raises(InputError):
        nelbo_by_loops(model.train(), tokens, [0])
    assert model.training


def test_no_gradient_is_kept():
    model = live(tiny())
    assert not nelbo_by_loops(model, ids(2, 8, masks=0.0), [1]).requires_grad


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="no sequences"):
        nelbo_by_loops(Fake(), torch.zeros(0, 4, dtype=torch.int64), [1])


def test_estimate():
    got = estimate(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert got.mean == 3.0
    assert got.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert estimate(torch.tensor([2.0])).error == math.inf


def test_fill_takes_the_arg_max_and_solved_counts_whole_rows():
    puzzles = torch.tensor([[1, MASK, 2], [MASK, 3, MASK]])
    made = fill(Fake(), puzzles, loops=2)
    assert made.tokens.tolist() == [[1, 0, 2], [0, 3, 0]] and made.nfe == 1 and made.loops_per_step == [2]
    share = solved(made.tokens, torch.tensor([[1, 0, 2], [0, 3, 1]]))
    assert share.mean == 0.5 and share.error == pytest.approx(math.sqrt(0.25 / 2))

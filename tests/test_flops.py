"""Analytic FLOPs against torch's counter, and the paper's own numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from loopmdm.config import preset
from loopmdm.errors import InputError
from loopmdm.model.depth import Depth
from loopmdm.model.flops import (
    forward_flops,
    head_flops,
    inverse_flops_loops,
    layer_flops,
    matched_steps,
    mean_loops,
    token_flops,
    training_flops,
    uniform_loops,
)
from loopmdm.model.lm import LoopMDM

from .helpers import BACKBONES, tiny

# The paper counts a vocabulary of 50257, GPT-2's without the mask.
PAPER = preset("paper-170m", vocab_size=50257)
T = 1024


def test_the_paper_s_layer():
    d, C = 768, 128
    assert layer_flops(PAPER, T) == 24 * d * d + 4 * T * d + 2 * C * 6 * d / T
    base = token_flops(PAPER, T, 1, "head+embedding")
    assert base == 12 * layer_flops(PAPER, T) + 4 * 50257 * d
    assert round(base / layer_flops(PAPER, T), 3) == 20.923


@pytest.mark.parametrize(
    ("distribution", "convention", "steps"),
    [("uniform", "head+embedding", 655_420), ("inverse", "head+embedding", 688_915), ("uniform", "head", 599_438)],
)
def test_matched_steps(distribution, convention, steps):
    loops = uniform_loops(12) if distribution == "uniform" else inverse_flops_loops(PAPER, T, 12, convention)
    assert matched_steps(PAPER, T, 1_000_000, loops, convention) == steps
    # the same from the preset with its mask, when the vocabulary of the convention is named
    whole = preset("paper-170m")
    assert matched_steps(whole, T, 1_000_000, loops, convention, vocab_size=50257) == steps


def test_loop_distributions():
    assert mean_loops(uniform_loops(12)) == pytest.approx(6.5)
    inverse = inverse_flops_loops(PAPER, T, 12, "head+embedding")
    assert sum(inverse.values()) == pytest.approx(1) and set(inverse) == set(range(1, 13))
    assert round(mean_loops(inverse), 3) == 5.724
    cost = [p * token_flops(PAPER, T, s, "head+embedding") for s, p in inverse.items()]
    assert max(cost) == pytest.approx(min(cost))  # equal FLOPs at every depth
    with pytest.raises(InputError, match="max_loops is 0"):
        uniform_loops(0)


def test_equal_cost_baseline_has_23_layers():
    deeper = preset("paper-170m", num_hidden_layers=23, vocab_size=50257)
    assert token_flops(deeper, T) == pytest.approx(token_flops(PAPER, T, 6.5))


def test_conventions():
    V, d = PAPER.vocab_size, PAPER.hidden_size
    assert [head_flops(PAPER, c) for c in ("head", "head+embedding", "none")] == [2 * V * d, 4 * V * d, 0]
    assert head_flops(PAPER, vocab_size=10) == 20 * d
    with pytest.raises(InputError, match="unknown FLOPs convention 'heads'; did you mean 'head'"):
        head_flops(PAPER, "heads")
    with pytest.raises(InputError, match="at least once"):
        forward_flops(PAPER, T, 0)


def test_training_flops():
    """Three forward passes; with truncated backprop F(S) + 2 F(k)."""
    for S in (1, 4, 6.5):
        assert training_flops(PAPER, T, S) == pytest.approx(3 * T * token_flops(PAPER, T, S))
        assert training_flops(PAPER, T, S, grad_loops=99) == training_flops(PAPER, T, S)
    F = {s: T * token_flops(PAPER, T, s, "none") for s in (2, 8)}
    assert training_flops(PAPER, T, 8, "none", grad_loops=2) == pytest.approx(F[8] + 2 * F[2])


def test_forward_flops_defaults():
    config = preset("tiny-dit")
    assert forward_flops(config, 50) == forward_flops(config, 50, config.loop.max_loops)
    assert forward_flops(config, 50, 2) == 50 * token_flops(config, 50, 2, "head")
    model = LoopMDM(config)
    assert model.forward_flops(50, 2) == forward_flops(config, 50, 2)
    mean = (model.forward_flops(50, 1) + model.forward_flops(50, 1) + model.forward_flops(50, 5)) / 3
    assert model.forward_flops(50, 7 / 3) == pytest.approx(mean), "F is linear in S"
    for bad in (0.5, float("inf"), float("nan"), True, "2"):
        with pytest.raises(InputError, match=r"num_loops is .*at least once"):
            model.forward_flops(50, bad)


def sized(backbone):
    wide = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 256}
    return tiny(backbone, num_attention_heads=4, **wide)


def counted(run):
    # SDPA counts 0 on CPU unless it is made of matmuls.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_loops", [1, 2, 5])
@pytest.mark.parametrize("boundary", ["plain", "anchored"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_forward_against_the_counter(backbone, boundary, num_loops):
    """Within 0.1%. What is not counted: the sigma embedding and the final modulation, once a sequence."""
    config = sized(backbone).replace(boundary=boundary)
    assert config.num_key_value_heads == (2 if backbone == "llama" else 4)
    model, tokens = LoopMDM(config), torch.randint(0, 299, (1, 192))
    with torch.no_grad():
        got = counted(lambda: model(tokens, num_loops=num_loops).logits)
    want = forward_flops(config, 192, num_loops)
    assert got == pytest.approx(want, rel=1e-3)
    if backbone == "llama":
        assert got == want


@pytest.mark.parametrize("num_loops", [1, 2, 5])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_against_the_counter(backbone, num_loops):
    """Forward and backward, the head at every position.

    Exact for llama, since the gradient goes down to the embedding: no layer's input gradient is saved. With dit
    the sigma embedding's first layer has none, one of the things that are not counted anyway.
    """
    config = sized(backbone)
    model, tokens = LoopMDM(config), torch.randint(0, 299, (1, 192))

    def step():
        model(tokens, num_loops=num_loops).logits[..., :299].square().sum().backward()

    got, want = counted(step), training_flops(config, 192, num_loops)
    assert got == pytest.approx(want, rel=1e-3)
    if backbone == "llama":
        assert got == want


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("also", [(), ((3, 1), (5, 2))])
def test_several_blocks_recomputation_and_deep_supervision_against_the_counter(also, every):
    config = sized("llama").replace(num_hidden_layers=8, also=also)
    model, tokens, S, T = LoopMDM(config), torch.randint(0, 299, (1, 192)), 4, 192
    with torch.no_grad():
        assert counted(lambda: model(tokens, num_loops=S).logits) == forward_flops(config, T, S)

    def step(checkpoint):
        depth = Depth(S, checkpoint=checkpoint, every=every)
        hidden = model.hidden(tokens, None, depth)
        sum((model.lm_head(x) ** 2).sum() for x in depth.outputs or [hidden]).backward()

    assert counted(lambda: step(False)) == training_flops(config, T, S, every=every)
    # recomputation stops once it has what the backward pass reads, short of each visit's last matrix product
    coda_visits = sum(range(1, S + 1)) if every else S
    spared = (S + len(also) * coda_visits) * T * 2 * config.hidden_size * config.intermediate_size
    assert counted(lambda: step(True)) == training_flops(config, T, S, every=every, recompute=True) - spared


def test_truncated_backprop_against_the_counter():
    """Less than F(S) + 2 F(k) by what the plain boundary cuts off: the backward pass of the layers before."""
    config, S, k, T = sized("llama"), 5, 2, 192
    model, tokens = LoopMDM(config), torch.randint(0, 299, (1, 192))
    got = counted(lambda: model(tokens, num_loops=Depth(S, backprop_loops=k)).logits[..., :299].sum().backward())
    assert got == training_flops(config, T, S, grad_loops=k) - T * 2 * layer_flops(config, T)

"""generate end to end against a plain loop that projects every position at every step, as peers' samplers do.

Both arms run the same looped model; what differs is the sampler. Before anything is timed, greedy tokens must be equal
on a float64 copy of the model (in fp32 the two round differently, and random weights make near ties).
"""

from __future__ import annotations

import copy

import pytest
import torch

import loopmdm

PROMPT, LENGTH, STEPS, BATCH = 16, 64, 16, 2
ARMS = ("reference", "loopmdm")


def prompts(model: loopmdm.LoopMDM) -> torch.Tensor:
    """Random ids: from masks alone every position would tie with every other."""
    return torch.randint(0, model.mask_id, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))


def reference(model: loopmdm.LoopMDM, steps: int, loops: int) -> torch.Tensor:
    """LLaDA's low-confidence sampling at temperature 0, written plainly: logits everywhere, a Python loop over rows."""
    x = torch.cat((prompts(model), torch.full((BATCH, LENGTH), model.mask_id)), dim=1)
    for step in range(steps):
        masked = x == model.mask_id
        logits = model(x, num_loops=loops).logits
        x0 = logits.argmax(-1)
        probability = logits.softmax(-1).gather(-1, x0[..., None])[..., 0]
        confidence = torch.where(masked, probability, -torch.inf)
        count = LENGTH // steps + (step < LENGTH % steps)
        for row in range(BATCH):
            chosen = confidence[row].topk(count).indices
            x[row, chosen] = x0[row, chosen]
    return x


def ours(model: loopmdm.LoopMDM, loops: int) -> loopmdm.Generation:
    return loopmdm.generate(model, prompts(model), max_new_tokens=LENGTH, steps=STEPS, num_loops=loops)


@pytest.fixture(scope="module")
def model() -> loopmdm.LoopMDM:
    torch.manual_seed(0)
    made = loopmdm.LoopMDM.from_preset("tiny-llama", vocab_size=8193).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("loops", (1, 4))
@pytest.mark.parametrize("arm", ARMS)
def test_generate(benchmark, model, arm, loops):
    benchmark.group = f"generate, greedy, {BATCH} x {LENGTH} tokens, {STEPS} steps, V {model.vocab_size}, S = {loops}"

    def run(which: loopmdm.LoopMDM) -> torch.Tensor:
        if arm == "loopmdm":
            return ours(which, loops).tokens
        with torch.no_grad():
            return reference(which, STEPS, loops)

    counted = ours(model, loops)
    exact = copy.deepcopy(model).double()
    assert torch.equal(run(exact), ours(exact, loops).tokens)
    benchmark.pedantic(run, (model,), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        tokens_per_second=counted.generated / benchmark.stats.stats.median,
        nfe=counted.nfe,
        gflop=counted.flops / 1e9,
        head_rows=counted.head_rows if arm == "loopmdm" else BATCH * (PROMPT + LENGTH) * STEPS,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )

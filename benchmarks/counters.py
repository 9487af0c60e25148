"""What a pass costs in numbers that no busy machine can change: operations, bytes and FLOPs.

    python benchmarks/counters.py            print them
    python benchmarks/counters.py --write    and keep them in counters.json, which tests/test_counters.py holds code to

An operation is what torch dispatches and is no view: on a GPU about a kernel launch. Bytes are those of the tensors
that it reads and writes, as if nothing stayed in a cache; allocated are those of the tensors that it makes. Temporaries
inside an operation are not seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import loopmdm

PATH = Path(__file__).with_suffix(".json")


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name() and "detach" not in func.name():
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            inside = {t.untyped_storage().data_ptr() for t in read}
            self.operations += 1
            self.bytes += sum(t.nbytes for t in (*read, *made))
            self.allocated += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in inside)
        return out


def model(preset: str) -> loopmdm.LoopMDM:
    """Drawn, not fresh; one S a pass."""
    made, rng = loopmdm.LoopMDM.from_preset(preset).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1, generator=rng)
    return made


def cases() -> dict[str, Callable[[], Any]]:
    """Each is run once before it is counted: what is built on first use does not count."""
    found: dict[str, Callable[[], Any]] = {}
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
    prompt = torch.cat((ids[:, :8], torch.full((2, 24), 256)), 1)
    for name in ("tiny-llama", "tiny-dit"):
        made = model(name)
        plan = made.fused()
        for loops in (1, 4):
            found[f"{name}, hidden states, S = {loops}"] = lambda m=made, s=loops: m.hidden(ids, num_loops=s)
            found[f"{name}, fused plan, S = {loops}"] = lambda p=plan, s=loops: p.hidden(ids, num_loops=s)
        found[f"{name}, loss and gradients, S = 2"] = lambda m=made: step(m, ids)
        for policy in ("confidence", "ancestral"):
            found[f"{name}, generate, {policy}"] = lambda m=made, p=policy: loopmdm.generate(
                m, prompt, steps=6, num_loops=2, policy=p, temperature=1.0
            )
    return found


def step(made: loopmdm.LoopMDM, ids: torch.Tensor) -> None:
    with torch.enable_grad():
        loopmdm.nelbo(made, ids, num_loops=2, step=0).loss.backward()
    made.zero_grad()


@torch.no_grad()
def measure() -> dict[str, dict[str, int]]:
    results = {}
    for name, run in cases().items():
        run()
        with Counter() as counter:
            run()
        with FlopCounterMode(display=False) as flops:
            run()
        results[name] = {
            "operations": counter.operations,
            "bytes": counter.bytes,
            "allocated": counter.allocated,
            "flops": flops.get_total_flops(),
        }
    return results


if __name__ == "__main__":
    measured = measure()
    for name, numbers in measured.items():
        print(name, numbers)
    if "--write" in sys.argv[1:]:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in measured.items())
        PATH.write_text(f'{{"torch": "{torch.__version__.partition("+")[0]}", "cases": {{\n{lines}\n}}}}\n')

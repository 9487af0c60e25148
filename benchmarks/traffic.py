"""One pass of the looped block between the profiler's start and stop, for ncu to count bytes: traffic.py ARM S [SIZE].

    ncu --csv --metrics dram__bytes_read.sum,dram__bytes_write.sum --profile-from-start off --cache-control none \\
        python benchmarks/traffic.py fused 4

ARM is "reference" or "fused"; bf16, 4 x 1024 tokens. `loopmdm bench --gpu` calls it for S = 1, 4, 12: the slope over S
is what a visit reads and writes.
"""

from __future__ import annotations

import sys

import torch
from reference import Reference
from sizes import block_config, drawn


def main(arm: str, loops: int, size: str = "paper-170m") -> None:
    device = torch.device("cuda")
    model = drawn(block_config(size), device).to(torch.bfloat16)
    ids = torch.randint(0, 1023, (4, 1024), device=device)
    runs = {"reference": Reference(model).hidden, "fused": model.fused(impl="triton", attention_impl="auto").hidden}
    with torch.no_grad():
        for _ in range(3):
            runs[arm](ids, num_loops=loops)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        runs[arm](ids, num_loops=loops)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])

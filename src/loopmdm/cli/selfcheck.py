"""`loopmdm selfcheck`: every implementation of every op against torch on this machine."""

from __future__ import annotations

import argparse

from .common import FAILED, Parser, table


def options(parser: Parser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    import torch

    from ..ops.contract import all_ops

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    rows: list[tuple[str, ...]] = [("op", "impl", "device", "dtype", "deviation", "allowed", "verdict")]
    verdicts = []
    for name, op in sorted(all_ops().items()):
        for impl in op.impls:
            for device in devices if impl != "torch" else ():
                reason = op.unavailable(impl, device)
                if reason is not None:
                    verdicts.append("not run")
                    rows.append((name, impl, str(device), "", "", "", f"not run: {reason}"))
                    continue
                for dtype in op.dtypes:
                    if not op.taken(impl, device, dtype):
                        continue
                    allowed = op.tolerance.get(dtype, 0.0)
                    try:
                        gap = op.deviation(impl, device, dtype)
                    except Exception as error:  # whatever a kernel dies of is the finding
                        gap, verdict = float("nan"), f"failed: {type(error).__name__}: {error}".partition("\n")[0]
                    else:
                        verdict = "ok" if gap <= allowed else "failed"
                    verdicts.append(verdict.partition(":")[0])
                    kind = str(dtype).removeprefix("torch.")
                    rows.append((name, impl, str(device), kind, f"{gap:.1e}", f"{allowed:.0e}", verdict))
    print(table(rows))
    counts = {kind: verdicts.count(kind) for kind in ("ok", "failed", "not run")}
    print(f"\nagainst torch: {counts['ok']} ok, {counts['failed']} failed, {counts['not run']} not run")
    return FAILED if counts["failed"] else 0

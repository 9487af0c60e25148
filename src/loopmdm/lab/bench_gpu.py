"""`loopmdm bench --gpu`: what waits for a GPU, in parts of under nine minutes, each kept as soon as it is done.

The measurements come first, with implementations named; tuning, which is mostly Triton's compiling, last.
A part that succeeded on this device at this revision is not run again; one that was cut off is. State and results lie
in benchmarks/results, so a second call, on another day and machine of the kind, goes on where the first ended.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from . import bench, evidence

FAILED = 1


class Part(NamedTuple):
    """One command, and how long it should take.

    Attributes:
        command: after the interpreter: "-m", a module, its arguments.
        measures: whether it is pytest over benchmarks, whose rows are merged into the results.
        needs: a program without which the part is skipped.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    measures: bool = False
    needs: str | None = None


def _bench(name: str, files: str, minutes: float, select: str = "") -> Part:
    paths = tuple(f"benchmarks/bench_{file}.py" for file in files.split())
    chosen = ("-k", select) if select else ()
    return Part(name, ("-m", "pytest", "-q", *paths, "--benchmark-only", *chosen), minutes, measures=True)


NCU = ["ncu", "--csv", "--print-units", "base", "--profile-from-start", "off", "--cache-control", "none"]
NCU += ["--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]
"""Caches are not flushed between kernels, as ncu does by default: what stays in one is what is to be seen."""
TUNED = ["attention", "residual_norm", "norm_linear", "linear_residual", "loop_boundary", "head_stats"]
TUNED += ["linear_cross_entropy"]
PARTS = (
    Part("first contact", ("-m", "pytest", "tests/gpu/test_first_contact.py", "-x", "-q"), 3),
    _bench("head and unmasking", "head_stats compact select_scatter select_topk", 6),
    _bench("one denoising step", "step", 6),
    _bench("looped block, small", "block", 8, "(small or pair or single) and not compile"),
    _bench("looped block, medium and large", "block", 8, "(medium or large) and not compile"),
    _bench("looped block, compiled", "block", 8, "compile"),
    _bench("attention and the fused ops", "attention norm_linear linear_residual loop_boundary residual_norm", 6),
    _bench("depth", "depth", 3),
    _bench("loss", "linear_cross_entropy", 4),
    _bench("generate", "generate", 8),
    _bench("other people's models", "adapters", 4),
    Part("bytes from memory", ("benchmarks/traffic.py",), 5, needs="ncu"),
    *(
        Part(f"tune {op}", ("-m", "loopmdm.cli", "tune", "--table", "--quick", "--dtype", "bfloat16", "--op", op), 8)
        for op in TUNED
    ),
)


def run_parts(root: Path, minutes: float) -> int:
    """Run what is not done, in order, while it should end within `minutes`; 1 if a part failed."""
    if not torch.cuda.is_available():
        raise InputError(
            "--gpu needs a CUDA device and there is none here; `loopmdm bench` alone measures this machine"
        )
    revision = (evidence.revision(root) or "unknown").removesuffix("+")  # tuning changes the tables, as it should
    name = bench.slug(torch.cuda.get_device_name())
    state_path = root / "benchmarks" / "results" / f"gpu-{name}.json"
    state: dict[str, Any] = json.loads(state_path.read_text()) if state_path.exists() else {}
    started, failed = time.monotonic(), []
    for number, part in enumerate(PARTS, 1):
        label = f"part {number} of {len(PARTS)}, {part.name}"
        before = state.get(part.name, {})
        if before.get("ok") and before.get("revision") == revision:
            print(f"{label}: done before")
            continue
        if part.needs and shutil.which(part.needs) is None:
            print(f"{label}: skipped, {part.needs} is not installed")
            continue
        if (time.monotonic() - started) / 60 + part.minutes > minutes:
            print(f"{label}: not started, it takes about {part.minutes:g} minutes; run this again to go on")
            break
        print(f"{label}: about {part.minutes:g} minutes", flush=True)
        begin = time.monotonic()
        ok = _run(root, part, name)
        state[part.name] = {"ok": ok, "seconds": round(time.monotonic() - begin, 1), "revision": revision}
        state_path.parent.mkdir(parents=True, exist_ok=True)
        state_path.write_text(json.dumps(state, indent=1) + "\n")
        if not ok:
            failed.append(part.name)
            if number == 1:
                print("first contact failed: nothing that follows would mean anything")
                break
    else:
        print("all parts are done" if not failed else "all parts were run")
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed", f"state in {state_path}", sep="; ")
    return FAILED if failed else 0


def _run(root: Path, part: Part, name: str) -> bool:
    folder = root / "benchmarks" / "results"
    if part.measures:
        raw = folder / f".{name}.raw.json"
        done = subprocess.run([sys.executable, *part.command, f"--benchmark-json={raw}"], cwd=root).returncode == 0
        try:
            if raw.exists() and raw.stat().st_size:
                bench.save(bench.condense(json.loads(raw.read_text())), folder / f"bench-{name}.json", merge=True)
        except InputError as error:  # no row came through
            print(f"{part.name}: {error}")
            return False
        finally:
            raw.unlink(missing_ok=True)
        return done
    if part.needs == "ncu":
        return _traffic(root, part, folder / f"traffic-{name}.json")
    return subprocess.run([sys.executable, *part.command], cwd=root).returncode == 0


def _traffic(root: Path, part: Part, path: Path) -> bool:
    """Bytes from and to memory of the looped block, by arm and S."""
    measured = []
    for arm in ("reference", "fused"):
        for loops in (1, 4, 12):
            command = [*NCU, sys.executable, *part.command, arm, str(loops)]
            out = subprocess.run(command, cwd=root, capture_output=True, text=True)
            if out.returncode:
                print(f"ncu: {out.stdout[-300:]}{out.stderr[-300:]}")
                return False
            measured.append({"arm": arm, "loops": loops, "bytes": total_bytes(out.stdout.splitlines())})
    path.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": measured}, indent=1) + "\n")
    return True


UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def total_bytes(lines: Iterable[str]) -> float:
    """The sum of the metrics in ncu's CSV, which its own and the program's messages surround."""
    table: Sequence[str] = [line for line in lines if line.startswith('"')]
    rows = list(csv.DictReader(table))
    if not rows:
        raise InputError("ncu printed no table")
    return sum(float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]] for row in rows)

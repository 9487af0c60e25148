"""`loopmdm bench`: run the repository's benchmarks and show them; compare two runs; write the README's table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .common import FAILED, Parser


def options(parser: Parser) -> None:
    parser.add_argument("--select", metavar="EXPRESSION", help="those whose names match, as pytest -k has it")
    parser.add_argument("--full", action="store_true", help="the slow ones too: 64 steps of the larger model")
    parser.add_argument("--sweeps", type=int, help="go through all rows so many times (default 5 on a CPU, 3 on a GPU)")
    parser.add_argument("--rounds", type=int, help="timed rounds of a row in each (default by its length, 1 to 40)")
    parser.add_argument("--out", metavar="FILE", help="where to write (default benchmarks/results/bench-DEVICE.json)")
    parser.add_argument("--plot", metavar="PNG", help="draw the ratios too")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--show", metavar="FILE", help="run nothing; show this file")
    other.add_argument("--compare", nargs=2, metavar=("A", "B"), help="run nothing; do two files agree?")
    other.add_argument("--readme", action="store_true", help="run nothing; write the results into the README's table")
    other.add_argument("--check-readme", action="store_true", help="run nothing; fail if that table is stale")
    other.add_argument("--gpu", action="store_true", help="what waits for a GPU, part after part; run again to go on")
    parser.add_argument("--minutes", type=float, default=9.0, help="with --gpu: start no part that would end later")


def run(options: argparse.Namespace) -> int:
    from ..lab import bench

    if options.compare:
        cells, verdict = bench.compare(*map(bench.load, options.compare))
        _print(cells, verdict)
        return 0
    if options.readme or options.check_readme:
        return _readme(checkout(), options.check_readme)
    if options.gpu:
        from ..lab.bench_gpu import run_parts

        return run_parts(checkout(), options.minutes)
    if options.show:
        results, status = bench.load(options.show), 0
    else:
        results, status = _measure(checkout(), options)
    print(f"{bench.title(results)}\n")
    _print(bench.table(results), bench.LEGEND)
    if options.plot:
        from ..lab.plots import ratios

        ratios(Path(options.plot), results)
        print(f"\n{options.plot}")
    return status


def _print(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Columns to the right; a row with nothing but a name is a heading, and as long as it likes."""
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if any(row[1:])), strict=True)]
    for name, *cells in rows:
        if any(cells):
            line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            print(f"{name.ljust(widths[0])}  {line}".rstrip())
        else:
            print(f"\n{name}")
    print("", *notes, sep="\n")


def checkout() -> Path:
    """The repository that this package is installed from, editable."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "benchmarks" / "frame.py").exists():
        raise InputError(
            'the benchmarks are in the repository, not in the package: clone it, `pip install -e ".[test]"`, and run '
            "there; --show and --compare work anywhere"
        )
    return root


def _measure(root: Path, options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    from ..lab import bench

    environment = dict(os.environ)
    for name in ("rounds", "sweeps"):
        value = getattr(options, name)
        if value is None:
            continue
        if not 1 <= value <= 100:
            raise InputError(f"--{name} is {value}; it must be from 1 to 100")
        environment[f"LOOPMDM_{name.upper()}"] = str(value)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.json")
        command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-only", f"--benchmark-json={raw}"]
        command += ["--benchmark-columns=median,rounds", "--benchmark-sort=fullname", "-rs"]
        command += ["-k", options.select] if options.select else []
        command += ["-m", "slow or not slow"] if options.full else []
        status = subprocess.run(command, cwd=root, env=environment).returncode
        if not raw.exists() or not raw.stat().st_size:
            raise InputError("nothing was measured; see what pytest says above")
        results = bench.condense(json.loads(raw.read_text()))
    name = f"bench-{bench.slug(results.get('device', 'unknown'))}.json"
    path = bench.save(results, options.out or root / "benchmarks" / "results" / name)
    print(f"\n{path}\n")
    return results, FAILED if status else 0


def _readme(root: Path, check: bool) -> int:
    from ..lab import bench

    path = root / "README.md"
    text = path.read_text()
    fresh = bench.rewritten(text, bench.summary(root / "benchmarks" / "results", bench.HEADLINES))
    if fresh == text:
        print("README.md is up to date")
        return 0
    if check:
        print("README.md is stale: run `loopmdm bench --readme` and commit it", file=sys.stderr)
        return FAILED
    path.write_text(fresh)
    print("README.md written")
    return 0

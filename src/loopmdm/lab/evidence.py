"""Where `loopmdm tune` keeps what it found: rows that dispatch reads, and beside them all timings.

    ~/.config/loopmdm/tuned.json                     rows of every run on this machine, `kernels.tuned.override_file()`
                      tuned-20260102-030405.json     one run: machine, versions, revision, every arm of every size

A run replaces the rows of the ops and dtypes that it measured on this architecture, and no others.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..kernels import tuned
from .state import replace_file
from .tune import CONFIDENCE, MARGIN, Cell, Effort, collapsed

ROOT = tuned.TABLES.parent.parent
RESULTS = "benchmarks/results"


@dataclass
class Store:
    """Rows in one file of the user's, or, `path` None, in the tables of the checkout that runs.

    Raises:
        InputError: a file that holds something else; no checkout.
    """

    path: Path | None
    effort: Effort
    device: torch.device

    def __post_init__(self) -> None:
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        if self.path is None and not (ROOT / RESULTS).is_dir():
            raise InputError("--table writes the tables of a checkout, and this loopmdm runs from none; leave it out")
        self._read()
        self.cells: list[Cell] = []

    @property
    def results(self) -> Path:
        """The file of this run's timings."""
        if self.path is None:
            return ROOT / RESULTS / f"{tuned.arch(self.device)}-tune-{self.stamp}.json"
        return self.path.with_name(f"{self.path.stem}-{self.stamp}.json")

    def _read(self) -> list[tuned.Row]:
        if self.path is None:
            return []
        try:
            return list(tuned.read_override(self.path))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{self.path} does not hold rows of `loopmdm tune` ({error}); remove it, or name another --out"
            ) from None

    def measured(self, op: str, dtype: str) -> list[tuned.Row]:
        """The rows that measuring `op` in `dtype` here would replace."""
        rows = [row for row in self._read() if row.op == op] if self.path else list(tuned.table(op))
        key = (tuned.arch(self.device), dtype)
        return [row for row in rows if row.measured and (row.arch, row.dtype) == key]

    def better(self, op: str, dtype: str) -> str | None:
        """The file of what was measured before with more effort than this run's, or None."""
        if self.effort.name == "full":
            return None
        files = {row.evidence.partition(": ")[2] for row in self.measured(op, dtype)}
        return next((file for file in sorted(files) if _effort(file) != "quick"), None)

    def add(self, cells: Sequence[Cell]) -> int:
        """Keep an op's cells, all of them of one dtype: write rows and results. The number of rows replaced."""
        self.cells += cells
        op, dtype = cells[0].op, cells[0].dtype
        old = self.measured(op, dtype)
        file = self.results.relative_to(ROOT).as_posix() if self.path is None else str(self.results.absolute())
        found = collapsed([cell.row for cell in cells if cell.failed is None])
        new = [replace(row, evidence=f"measured: {file}") for row in found]
        self.results.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.results, self._report())
        if not new:
            return 0
        kept = [row for row in (self._read() if self.path else tuned.table(op)) if row not in old]
        if self.path is None:
            replace_file(tuned.TABLES / f"{op}.json", _lines([*new, *kept], named=False))
        else:
            replace_file(self.path, _lines([*new, *kept], named=True))
        tuned.forget()
        return len(old)

    def _report(self) -> str:
        head = {
            "unit": "microseconds a call, medians of interleaved rounds; ratio: torch's time over the arm's",
            "rule": f"a row is earned where low, of the ratio's {CONFIDENCE:.0%} interval, is {MARGIN} or more",
            "effort": self.effort._asdict() | {"name": self.effort.name},
            "date": time.strftime("%Y-%m-%d", time.strptime(self.stamp[:8], "%Y%m%d")),
            "machine": machine(self.device),
            "versions": versions(),
            "revision": revision(),
        }
        body = ",\n".join("  " + json.dumps(_rounded(cell.facts())) for cell in self.cells)
        return f'{json.dumps(head, indent=1)[:-2]},\n "timings": [\n{body}\n ]\n}}\n'


def _lines(rows: Iterable[tuned.Row], named: bool) -> str:
    """A table's text: one row a line."""
    entries = []
    for row in rows:
        entry: dict[str, Any] = {"op": row.op} if named else {}
        entry |= {"impl": row.impl, "arch": row.arch, "dtype": row.dtype, "upto": dict(row.upto)}
        entries.append(entry | {"config": dict(row.config), "evidence": row.evidence})
    return '{\n  "rows": [\n' + ",\n".join("    " + json.dumps(entry) for entry in entries) + "\n  ]\n}\n"


def _effort(file: str) -> str:
    """How much effort a results file says it took; "full" where it does not say."""
    try:
        return str(json.loads((ROOT / file).read_text(encoding="utf-8"))["effort"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return "full"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def machine(device: torch.device) -> dict[str, Any]:
    """What the timings depend on, without the machine's name."""
    facts: dict[str, Any] = {"cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["system"] = platform.system()
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"gpu": found.name, "arch": tuned.arch(device), "multiprocessors": found.multi_processor_count}
        facts |= {"memory_gib": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return facts


PACKAGES = ("loopmdm", "torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "flash-attn")


def versions() -> dict[str, str]:
    """Of Python, and of those packages that are installed which timings may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def revision(root: Path = ROOT) -> str | None:
    """The commit of a checkout, by default the one that runs, "+" behind it where files differ; None without one."""
    if not (root / ".git").exists():  # git would answer for a repository that an environment lies in
        return None
    try:
        asked = [
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    commit, changed = (done.stdout.strip() for done in asked)
    return commit + ("+" if changed else "")


def processor() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

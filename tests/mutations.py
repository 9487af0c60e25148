"""Break the code one line at a time and demand that the named tests turn red.

    python tests/mutations.py [--list] [-k SUBSTRING] [--part I/N] [--jobs N]

Reads tests/mutations/*.json: [{"file", "old", "new", "tests", "interpret", "rebuild", "timeout"}]. Every job works
on its own copy of the repository, which shadows an installed loopmdm through PYTHONPATH; the working tree is never
touched. A test that does not end is a failure here unless the entry says "timeout": true.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = shutil.ignore_patterns(
    ".git", "__pycache__", ".*_cache", ".venv*", "build", "dist", "runs", "*.egg-info", "results", ".hypothesis"
)
IMPORTED = "import loopmdm, loopmdm.ops, loopmdm.kernels; print(*loopmdm.ops.__path__, *loopmdm.kernels.__path__)"
RED = 1  # pytest's exit status for failed tests; 2 and above: they did not run
LIMIT = 300.0
TIMED_OUT = f"no test had failed after {LIMIT:.0f} s"


@dataclass(frozen=True)
class Mutation:
    """One breakage: `old` becomes `new` in `file`; one of `tests` must then fail, or with `timeout` not end."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpret: bool = False
    rebuild: bool = False
    timeout: bool = False


class Copy:
    """A copy of the repository in which one mutation at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        shutil.copytree(ROOT, self.root, ignore=SKIPPED, symlinks=True)
        (self.root / "benchmarks" / "results").mkdir(parents=True, exist_ok=True)
        # setuptools maps kernels/ to loopmdm.kernels; without an install a link does
        link = self.root / "src" / "loopmdm" / "kernels"
        if not link.exists():
            link.symlink_to(self.root / "kernels", target_is_directory=True)
        places = self.python("-c", IMPORTED).stdout.split()
        if not places or not all(Path(place).resolve().is_relative_to(self.root.resolve()) for place in places):
            sys.exit(f"The copy's code is not what gets imported: {places}")

    def python(self, *words: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
        # no bytecode: two versions of a file within one second and of one size would look the same to the cache
        env = {**os.environ, "PYTHONPATH": str(self.root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"LOOPMDM_CUDA": "0", "OMP_NUM_THREADS": "1"}
        env.pop("TRITON_INTERPRET", None)
        if interpret:
            env["TRITON_INTERPRET"] = "1"
        return subprocess.run(
            [sys.executable, *words], cwd=self.root, env=env, capture_output=True, text=True, timeout=LIMIT
        )

    def pytest(self, tests: Iterable[str], interpret: bool, *options: str) -> subprocess.CompletedProcess[str]:
        return self.python(
            "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *options, *tests,
            interpret=interpret,
        )  # fmt: skip

    def build(self) -> None:
        try:
            done = self.python("setup.py", "-q", "build_ext", "--inplace")
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the build had not ended after {LIMIT:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"the build failed: {done.stderr.strip().splitlines()[-1:]}")

    def try_out(self, mutation: Mutation) -> str:
        """Empty when a test turned red, else what happened instead."""
        path = self.root / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return f"its old text occurs {text.count(mutation.old)} times in {mutation.file}, not once"
        built = list((self.root / "src" / "loopmdm").glob("_C*")) if mutation.rebuild else []
        saved = {library: library.read_bytes() for library in built}
        path.write_text(text.replace(mutation.old, mutation.new))
        try:
            if mutation.rebuild:
                self.build()
            done = self.pytest(mutation.tests, mutation.interpret)
        except subprocess.TimeoutExpired:
            return "" if mutation.timeout else TIMED_OUT
        except RuntimeError as error:
            return str(error)
        finally:
            path.write_text(text)
            for library, content in saved.items():
                library.write_bytes(content)
        if done.returncode == 0:
            return "the tests stayed green"
        if done.returncode == -signal.SIGKILL:
            return "pytest was killed, perhaps for want of memory"
        # below zero otherwise: the broken code took the process down with it
        red = done.returncode == RED or done.returncode < 0
        return "" if red else f"pytest ended with status {done.returncode}: {_last(done)}"

    def green(self, tests: Iterable[str], interpret: bool) -> str:
        """Empty when the unmodified copy passes."""
        done = self.pytest(tests, interpret)
        return _last(done) if done.returncode else ""


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The line that says most: the first failed test, else the last line."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (named or lines[-1:] or ["no output"])[0]


def load(match: str = "") -> list[Mutation]:
    found = []
    for path in sorted((ROOT / "tests" / "mutations").glob("*.json")):
        for number, entry in enumerate(json.loads(path.read_text()), 1):
            name = f"{path.stem}-{number}"
            mutation = Mutation(name=name, **{**entry, "tests": tuple(entry["tests"])})
            if match in f"{name} {mutation.file} {mutation.old}":
                found.append(mutation)
    return found


@contextlib.contextmanager
def copies(jobs: int) -> Iterator[queue.SimpleQueue[Copy]]:
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for job in range(jobs):
            free.put(Copy(Path(folder, str(job))))
        yield free


def show(mutation: Mutation, problem: str, seconds: float) -> None:
    verdict = "ok    " if not problem else "FAILED"
    old, new = (" ".join(text.split()) or "(nothing)" for text in (mutation.old, mutation.new))
    print(f"{verdict} {mutation.name:<20} {seconds:5.1f} s  {old[:60]}  ->  {new[:60]}", flush=True)
    if problem:
        print(f"       {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("-k", default="", metavar="SUBSTRING", help="only those with this in name, file or old text")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th of them from number I modulo N on")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    number, parts = map(int, options.part.split("/"))
    mutations = load(options.k)[number % parts :: parts]
    if options.list:
        for m in mutations:
            print(f"{m.name:<20} {m.file}: {' '.join(m.old.split())[:70]}")
        return 0
    if not mutations:
        print(f"No mutation matches {options.k!r}.")
        return 2

    with copies(max(1, options.jobs)) as free, ThreadPoolExecutor(max(1, options.jobs)) as pool:

        def check(interpret: bool) -> str:
            copy = free.get()
            tests = dict.fromkeys(t for m in mutations if m.interpret == interpret for t in m.tests)
            try:
                return copy.green(tests, interpret) if tests else ""
            finally:
                free.put(copy)

        def attempt(mutation: Mutation) -> str:
            copy, start = free.get(), time.perf_counter()
            try:
                problem = copy.try_out(mutation)
            finally:
                free.put(copy)
            show(mutation, problem, time.perf_counter() - start)
            return problem

        for problem in pool.map(check, (False, True)):
            if problem:
                print(f"The unmodified copy is not green, so a red test would prove nothing: {problem}")
                return 1
        problems = list(pool.map(attempt, mutations))
    late = problems.count(TIMED_OUT)
    failed = len(problems) - problems.count("")
    print(f"{problems.count('')} passed, {failed} failed" + (f", {late} of them by time" if late else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`loopmdm tune`: time every implementation of every op against torch here, and keep what is faster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, nearest
from .common import Parser, table

if TYPE_CHECKING:
    import torch

    from ..lab.tune import Cell
    from ..ops.contract import Op


def options(parser: Parser) -> None:
    parser.add_argument("--op", nargs="+", action="extend", default=[], metavar="NAME", help="these ops alone")
    parser.add_argument("--dtype", nargs="+", action="extend", default=[], metavar="NAME", help="as bfloat16")
    parser.add_argument("--quick", action="store_true", help="fewer rounds; never replaces what a full run measured")
    parser.add_argument("--force", action="store_true", help="let --quick replace it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", metavar="FILE", help="another file for the rows than the user's own, which auto reads")
    where.add_argument("--table", action="store_true", help="write the tables of this checkout")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..kernels import tuned
    from ..lab.evidence import Store
    from ..lab.tune import EFFORTS, MARGIN, cells, why_not
    from ..ops.contract import all_ops

    ops, dtypes = _chosen(options.op, all_ops(), "op"), _dtypes(options.dtype, all_ops())
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    path = None if options.table else Path(options.out).expanduser() if options.out else tuned.override_file()
    if path is None and not options.table:
        raise InputError("LOOPMDM_TUNED is empty, which switches the user's rows off; give --out or --table")
    store = Store(path, EFFORTS["quick" if options.quick else "full"], device)

    skipped: dict[str, list[str]] = {}
    plan: list[tuple[str, list[Callable[[], Cell]]]] = []
    for name, op in ops.items():
        reason = why_not(op, device)
        mine = [dtype for dtype in op.dtypes if not dtypes or dtype in dtypes]
        if reason is not None or not mine:
            skipped.setdefault(reason or "not in the dtypes asked for", []).append(name)
            continue
        for dtype in mine:
            kind = str(dtype).removeprefix("torch.")
            better = None if options.force else store.better(name, kind)
            if better is not None:
                skipped.setdefault(f"a full run measured it, {better}; --force replaces that", []).append(
                    f"{name} {kind}"
                )
            else:
                plan.append((f"{name} {kind}", list(cells(op, device, [dtype], store.effort))))
    found: list[Cell] = []
    replaced: dict[str, int] = {}
    with _progress(sum(len(todo) for _, todo in plan)) as advance:
        for what, todo in plan:
            done = []
            for cell in todo:
                advance(what)
                done.append(cell())
            if done:
                replaced[what] = store.add(done)
            found += done
    if found:
        print(table(_rows(found)))
        graphs = "Timed as CUDA graphs where torch's own can be captured."
        how = f"Threads: {torch.get_num_threads()}." if device.type == "cpu" else graphs
        print(f"\nA row is earned at {MARGIN}x torch with 95% confidence; torch keeps the others. {how}")
        print(f"rows: {path or tuned.TABLES}\ntimings: {store.results}")
        gone = [f"{count} of {what}" for what, count in replaced.items() if count]
        if gone:
            print(f"replaced rows measured before: {', '.join(gone)}")
        if path is not None and path != tuned.override_file():
            print(f"in force where {tuned.OVERRIDE}={path} is set")
    if skipped:
        each = (f"{', '.join(names)} ({reason})" for reason, names in skipped.items())
        print(f"not timed on {device.type}: {'; '.join(each)}")
    return 0


def _chosen(names: Sequence[str], known: dict[str, Op], what: str) -> dict[str, Op]:
    for name in names:
        if name not in known:
            raise InputError(f"there is no {what} {name!r}{nearest(name, known)}")
    return {name: op for name, op in sorted(known.items()) if not names or name in names}


def _dtypes(names: Sequence[str], ops: dict[str, Op]) -> list[torch.dtype]:
    known = {str(dtype).removeprefix("torch."): dtype for op in ops.values() for dtype in op.dtypes}
    for name in names:
        if name not in known:
            raise InputError(f"no op has dtype {name!r}{nearest(name, known)}")
    return [known[name] for name in names]


def _rows(found: Sequence[Cell]) -> list[tuple[str, ...]]:
    from ..lab.tune import MARGIN

    rows: list[tuple[str, ...]] = [("op", "dtype", "size", "torch us", "best us", "times torch", "95%", "row")]
    for cell in found:
        size = " ".join(f"{name}<={bound}" for name, bound in cell.size.items()) or "larger"
        timed = [arm for arm in cell.arms if arm.outcome == "timed" and not cell.failed]
        best = cell.best or max(timed, key=lambda arm: (arm.rounds, arm.ratio), default=None)
        if best is None:
            said = cell.failed or next((arm.outcome for arm in cell.arms), "nothing to time")
            rows.append((cell.op, cell.dtype, size, "", "", "", "", f"{'none' if cell.failed else 'torch'}: {said}"))
            continue
        config = " ".join(f"{name}={value}" for name, value in best.config.items())
        numbers = (f"{best.torch:.1f}", f"{best.microseconds:.1f}", f"{best.ratio:.2f}")
        lost = "undecided" if best.high >= MARGIN else "not"
        won = f"{best.impl} {config}".strip() if cell.best else f"torch, {lost} {best.impl}"
        rows.append((cell.op, cell.dtype, size, *numbers, f"{best.low:.2f} to {best.high:.2f}", won))
    return rows


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal where rich is installed, else a line for each measurement on standard error."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        console = None
    else:
        console = Console(stderr=True)
    if console is not None and console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total, completed=-1)
            yield lambda what: bar.update(task, advance=1, description=what)
        return
    count = iter(range(1, total + 1))
    yield lambda what: print(f"{next(count)} of {total}: {what}", file=sys.stderr, flush=True)

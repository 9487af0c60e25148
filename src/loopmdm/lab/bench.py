"""What the benchmarks measured: one small file a run, tables, comparisons and the README's summary.

`pytest benchmarks --benchmark-json FILE` writes every round; `condense` keeps of each row the median, the number of
rounds, the ratio to its reference with the interval, and what the benchmark noted.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

FORMAT = 1
SHARED = ("device", "threads", "malloc", "versions", "revision")
"""Of the machine and the run: kept once."""

Row = dict[str, Any]

HEADLINES = (
    r"^generate, .*: (llama|paper).* \| loopmdm",
    r"^head and unmask: V 50258.* \| (dream|compile|fused|loopmdm)",
    r"^loss.*: 4096 positions.* \| (gather_then_head|chunked)",
    r"^looped block, forward: (paper-170m|llama-1024), S = (4|12).* \| (compile|loopmdm|fused|graph)",
    r"^looped block, forward and backward: .* \| loopmdm",
)
"""Groups and arms of the README's table."""


def condense(raw: Mapping[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's JSON -> {"format", "date", what SHARED names, "rows"}."""
    rows, shared = [], {}
    for entry in raw["benchmarks"]:
        extra = dict(entry["extra_info"])
        shared.update({key: extra.pop(key) for key in SHARED if key in extra})
        seconds = entry["stats"]["median"]
        row = {"group": entry["group"] or entry["fullname"], "arm": entry["name"], "seconds": seconds}
        rows.append(_summed(row | {"rounds": entry["stats"]["rounds"]} | extra))
    if not rows:
        raise InputError("nothing was measured: no benchmark matched, or all were skipped")
    return {"format": FORMAT, "date": raw["datetime"][:10], **shared, "rows": rows}


SPREAD, WEIGHT = 0.06, 8
"""Expected deviation of a row's log ratio from sweep to sweep, and as how many sweeps more it counts than were made."""

BETWEEN, FACTOR = 0.06, 2.6
"""Expected deviation from process to process, which no sweeps show; deviations that an interval reaches.

In four runs of 144 rows, and in each pair of them, 2.3 held them all.
"""


def repeated(ratios: Sequence[float]) -> tuple[float, float]:
    """Where another run should have its ratio, wide enough for all rows at once, from the ratios of a run's sweeps."""
    n, middle = len(ratios), statistics.geometric_mean(ratios)
    squares = WEIGHT * SPREAD**2 + sum(math.log(ratio / middle) ** 2 for ratio in ratios)
    reach = math.exp(FACTOR * math.sqrt(2 * (squares / (WEIGHT + n - 1) / n + BETWEEN**2)))
    return middle / reach, middle * reach


def _summed(row: Row) -> Row:
    """A row with its ratio, the geometric mean over sweeps, and its interval."""
    if "ratios" not in row:
        return row
    low, high = repeated(row["ratios"])
    return row | {"ratio": statistics.geometric_mean(row["ratios"]), "ratio_low": low, "ratio_high": high}


def load(path: str | Path) -> dict[str, Any]:
    """A results file; InputError if it is none."""
    path = Path(path)
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} is no JSON file") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or not results.get("rows"):
        raise InputError(f"{path} is no results file of `loopmdm bench`")
    return results | {"rows": [_summed(row) for row in results["rows"]]}


def save(results: Mapping[str, Any], path: str | Path, merge: bool = False) -> Path:
    """Write one row a line; a file with better evidence stays, and the results go beside it.

    Better evidence: rows that these results lack, more sweeps or more than twice the rounds for a row, another device.

    Args:
        merge: keep the rows of a file of the same device, versions and revision that these results do not replace.

    Returns:
        where the results are.
    """
    path = Path(path)
    if path.exists():
        try:
            before = load(path)
        except InputError:
            raise InputError(f"{path} exists and is no results file; name another") from None
        if merge and all(_shared(before, key) == _shared(results, key) for key in SHARED):
            results = {**results, "rows": _merged(before["rows"], results["rows"])}
        if _better(before, results):
            taken = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(2, 10_000))
            path = next(other for other in taken if not other.exists())
    head = json.dumps({key: value for key, value in results.items() if key != "rows"})[:-1]
    lines = ",\n".join("  " + json.dumps(_kept(row)) for row in results["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]}}\n')
    temporary.replace(path)
    return path


def _kept(row: Row) -> Row:
    """What is written of a row: not what its sweeps' ratios say."""
    derived = ("ratio", "ratio_low", "ratio_high") if "ratios" in row else ()
    short = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
    return {key: value for key, value in short.items() if key not in derived}


def _weaker(row: Row, than: Row) -> bool:
    """Whether a row rests on less; rounds of a sweep are as many as fit in a time, so they alone vary."""
    return row.get("sweeps", 1) < than.get("sweeps", 1) or 2 * row["rounds"] < than["rounds"]


def _shared(results: Mapping[str, Any], key: str) -> Any:
    return results.get(key, "default" if key == "malloc" else None)


def _better(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    rows = {(row["group"], row["arm"]): row for row in now["rows"]}
    if any(_shared(before, key) != _shared(now, key) for key in ("device", "threads", "malloc")):
        return True
    same = ((rows.get((row["group"], row["arm"])), row) for row in before["rows"])
    return any(mine is None or _weaker(mine, row) for mine, row in same)


def _merged(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    found = {(row["group"], row["arm"]): row for row in before}
    for row in now:
        place = row["group"], row["arm"]
        if place not in found or not _weaker(row, found[place]):
            found[place] = row
    return list(found.values())


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def groups(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order in which they were measured."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return found


def title(results: Mapping[str, Any]) -> str:
    """ "AMD EPYC, 2 threads, memory kept, torch 2.13.0, revision 0123456789, 2026-01-02"."""
    malloc = "" if _shared(results, "malloc") == "default" else f", {results['malloc']}"
    return (
        f"{results['device']}, {results['threads']} threads{malloc}, torch {results['versions']['torch']}, "
        f"revision {str(results['revision'])[:10]}, {results['date']}"
    )


LEGEND = (
    "the reference: its median over the same rounds, in each of which it and all arms run once",
    "times faster: the reference's time over the arm's; in brackets, where a repeated run has it, for all rows at once",
    "share of peak: achieved FLOP/s over those of this machine's own matrix product",
    "peak memory: the most that one round holds of torch's memory beyond what it was given",
)
"""What the columns of `table` mean."""


def table(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells, a heading first; a group's name stands in a row of its own."""
    out: list[tuple[str, ...]] = [
        ("", "median", "the reference", "times faster", "tokens/s", "share of peak", "peak memory")
    ]
    for name, rows in groups(results["rows"]).items():
        out.append((name, "", "", "", "", "", ""))
        for row in rows:
            share, memory = row.get("share_of_matmul"), row.get("peak_bytes")
            cells = (
                f"  {row['arm']}",
                seconds(row["seconds"]),
                seconds(row["reference_seconds"]) if "reference_seconds" in row else "",
                ratio(row),
                f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
                f"{100 * share:.0f}%" if share is not None else "",
                f"{memory / 2**20:,.1f} MiB" if memory is not None else "",
            )
            out.append(cells)
    return out


def seconds(value: float) -> str:
    """Three digits: 1.5e-5 -> "15.0 µs"."""
    factor, unit = (1e6, "µs") if value < 0.9995e-3 else (1e3, "ms") if value < 0.9995 else (1.0, "s")
    return f"{value * factor:#.3g} {unit}".replace(". ", " ")


def ratio(row: Row) -> str:
    """ "2.31 (2.20 to 2.40)"; nothing for a reference's own row."""
    if "ratio" not in row:
        return ""
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """(cells of a table, heading first; sentences): how far two runs agree.

    A row agrees when each run's ratio lies in the other's interval, as all should; what was measured at several sizes
    (the part of a group's name before ":"), when the geometric means of its ratios are within 10%. Rows without a ratio
    are compared by their times, which depend on the machine.
    """
    cells: list[tuple[str, ...]] = [("", "first", "second", "second / first", "")]
    theirs = {(row["group"], row["arm"]): row for row in b["rows"]}
    inside = 0
    shifts: dict[str, list[float]] = {}
    for name, rows in groups(a["rows"]).items():
        pairs = [(row, theirs[name, row["arm"]]) for row in rows if (name, row["arm"]) in theirs]
        if not pairs:
            continue
        cells.append((name, "", "", "", ""))
        for one, two in pairs:
            if "ratio" in one and "ratio" in two:
                agree = one["ratio_low"] <= two["ratio"] <= one["ratio_high"]
                agree = agree and two["ratio_low"] <= one["ratio"] <= two["ratio_high"]
                inside += agree
                change = two["ratio"] / one["ratio"]
                shifts.setdefault(name.partition(":")[0], []).append(math.log(change))
                cells.append((f"  {one['arm']}", ratio(one), ratio(two), f"{change:.2f}", "" if agree else "outside"))
            else:
                change = two["seconds"] / one["seconds"]
                cells.append((f"  {one['arm']}", seconds(one["seconds"]), seconds(two["seconds"]), f"{change:.2f}", ""))
    if len(cells) == 1:
        raise InputError("the two files have no row in common")
    changes = [change for part in shifts.values() for change in part]
    apart = [name for name, part in shifts.items() if abs(sum(part) / len(part)) > math.log(1.1)]
    verdict = [f"{inside} of {len(changes)} ratios lie inside the other run's interval."]
    if changes:
        typical = math.exp(math.sqrt(sum(change**2 for change in changes) / len(changes))) - 1
        verdict[0] += f" They differ by {100 * typical:.1f}% (root mean square)."
    verdict.append(
        f"Means over sizes differ by more than 10% in: {'; '.join(apart)}."
        if apart
        else "All means over sizes agree within 10%."
    )
    for key in SHARED:
        if _shared(a, key) != _shared(b, key):
            verdict.append(f"Not the same {key}: {a.get(key)} and {b.get(key)}.")
    return cells, verdict


START, END = "<!-- results: written by `loopmdm bench --readme` -->", "<!-- end of results -->"


def summary(folder: str | Path, wanted: Sequence[str] = ()) -> str:
    """The README's table from the results files in `folder`: ratios for CPUs, times for GPUs with the machine named.

    Args:
        wanted: patterns (regular expressions) of groups to show, in this order; none is all.
    """
    files = [load(path) for path in sorted(Path(folder).glob("bench-*.json"))]
    lines = []
    for results in files:
        gpu = "NVIDIA" in str(results["device"])
        chosen = _chosen(results["rows"], wanted)
        if not chosen:
            continue
        what = "median time, times faster" if gpu else "times faster (in a repeated run)"
        lines += [
            f"{title(results)}:",
            "",
            f"| measured | arm | {what} | tokens/s |",
            "|---|---|---|---|",
        ]
        for row in chosen:
            shown = f"{seconds(row['seconds'])}, {ratio(row)}" if gpu else ratio(row)
            rate = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else ""
            lines.append(f"| {row['group']} | {row['arm']} | {shown} | {rate} |")
        lines.append("")
    if not any("NVIDIA" in str(results["device"]) for results in files):
        lines.append("Not measured: anything on a GPU.")
    return "\n".join(lines).strip()


def _chosen(rows: Sequence[Row], wanted: Sequence[str]) -> list[Row]:
    rows = [row for row in rows if "ratio" in row]
    if not wanted:
        return rows
    return [row for pattern in wanted for row in rows if re.search(pattern, f"{row['group']} | {row['arm']}")]


def rewritten(text: str, table: str) -> str:
    """A text with what lies between the two marks replaced."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"the README has no {START} ... {END}")
    return f"{before}{START}\n\n{table}\n\n{END}{after}"

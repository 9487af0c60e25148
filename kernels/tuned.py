"""Which implementation of an op runs where: static evidence rows, one JSON file an op in `tables/`.

A row says "op `op` on architecture `arch` in `dtype`, for sizes up to `upto`, runs `impl` with
`config`", and carries its evidence: `measured: benchmarks/results/FILE` or `compiled` (it fits
and does not spill, nobody timed it). Automatic dispatch uses measured rows only. Nothing autotunes
at run time.

Rows that `loopmdm tune` measured on a machine of its own lie in one file of the user's, `override_file()`, and are
looked at before these tables. A file that is not what `loopmdm tune` writes is ignored with one warning.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
TABLES = Path(__file__).parent / "tables"
OVERRIDE = "LOOPMDM_TUNED"
_CACHES: list[Callable[[], None]] = []


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """Cache `function`, and let torch.compile call it while tracing instead of tracing into it.

    What torch.compiler.assume_constant_result does, which would import all of torch._dynamo here.
    """
    cached = functools.cache(function)

    def call(*args: Any) -> T:
        return cached(*args)

    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    _CACHES.append(cached.cache_clear)
    return call


def forgotten_dict() -> dict[Any, Any]:
    """A dict that `forget` empties."""
    made: dict[Any, Any] = {}
    _CACHES.append(made.clear)
    return made


def forget() -> None:
    """Read tables anew and repeat self-checks: after a table was written."""
    for clear in _CACHES:
        clear()


@dataclass(frozen=True)
class Row:
    """One line of evidence.

    Attributes:
        op: name of the op.
        impl: "triton", "cuda", "cpp" or "torch" (a measured "torch" row: nothing of ours was faster).
        arch: "sm_90" and so on, or "cpu".
        dtype: "bfloat16" and so on, or "*" for any.
        upto: inclusive upper bounds on the op's size numbers; a missing name is unbounded.
        config: tile sizes, num_warps, num_stages.
        evidence: "measured: FILE" or "compiled".
    """

    op: str
    impl: str
    arch: str
    dtype: str = "*"
    upto: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, int] = field(default_factory=dict)
    evidence: str = "compiled"

    @property
    def measured(self) -> bool:
        return self.evidence.startswith("measured")


class Compile(NamedTuple):
    """One compilation that the compile gate proves: no spills, and shared memory that fits.

    A kernel file lists its own: `gate(dtype, size, config) -> Iterable[Compile]`, called for every Triton row
    of its table (`size` is the row's `upto`) and for each of its `GATE_SIZES` with an empty config.

    Attributes:
        kernel: the `triton.jit` function.
        signature: Triton type of every argument that is not a constexpr ("*bf16", "i32", "fp32").
        constants: the constexpr arguments.
        num_warps, num_stages: launch options.
        contains: SASS mnemonics that must occur ("HGMMA").
        registers: most registers a thread.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    contains: tuple[str, ...] = ()
    registers: int = 255


def override_file() -> Path | None:
    """Where the user's own rows lie, whether or not there is such a file; None where they are switched off.

    LOOPMDM_TUNED in the environment names it (empty: none), else it is loopmdm/tuned.json in XDG_CONFIG_HOME or
    ~/.config. Its rows hold for an architecture, so do not share it between machines with different processors.
    """
    named = os.environ.get(OVERRIDE)
    if named is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        config = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    except RuntimeError:  # no home
        return None
    return config / "loopmdm" / "tuned.json"


def read_override(path: Path) -> tuple[Row, ...]:
    """The rows of a file that `loopmdm tune` wrote.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file; the message says what is wrong.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or not isinstance(held.get("rows"), list):
        raise ValueError('it is not {"rows": [...]}')
    return tuple(_row(entry) for entry in held["rows"])


def _row(entry: Any) -> Row:
    words = dict.fromkeys(("op", "impl", "arch", "dtype", "evidence"), str)
    kinds: dict[str, type] = {**words, "upto": dict, "config": dict}
    if not isinstance(entry, dict) or not {"op", "impl", "arch"} <= set(entry) <= set(kinds):
        raise ValueError(f"a row is {entry!r:.100}")
    for name, value in entry.items():
        counts = value.values() if kinds[name] is dict and isinstance(value, dict) else ()
        if not isinstance(value, kinds[name]) or any(type(count) is not int for count in counts):
            raise ValueError(f"a row's {name} is {value!r:.100}")
    return Row(**entry)


@constant_in_graphs
def override() -> tuple[Row, ...]:
    """The user's own rows; none, and one warning, where their file cannot be read."""
    path = override_file()
    try:
        return () if path is None else read_override(path)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path} is ignored, it does not hold the rows of `loopmdm tune`: {error}; tune again or remove it"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return ()


@constant_in_graphs
def rows(op: str) -> tuple[Row, ...]:
    """All rows of an op, the user's own first; the first that covers a problem wins."""
    return tuple(row for row in override() if row.op == op) + table(op)


def table(op: str) -> tuple[Row, ...]:
    """The rows of an op's own table, in the order of its file."""
    path = TABLES / f"{op}.json"
    if not path.exists():
        return ()
    return tuple(Row(op=op, **entry) for entry in json.loads(path.read_text())["rows"])


def best(
    op: str,
    arch: str,
    dtype: torch.dtype,
    size: Mapping[str, int],
    *,
    impl: str | None = None,
    measured_only: bool = False,
    but: tuple[str, ...] = (),
) -> Row | None:
    """The first row that covers the problem and is of none of the implementations in `but`, or None."""
    name = str(dtype).removeprefix("torch.")
    for chosen, kind, upto, config, evidence in _candidates(op, arch, impl, measured_only):
        if kind in ("*", name) and chosen not in but and all([size.get(what, 0) <= bound for what, bound in upto]):
            return Row(op, chosen, arch, kind, dict(upto), dict(config), evidence)
    return None


Pairs = tuple[tuple[str, int], ...]


@constant_in_graphs
def _candidates(
    op: str, arch: str, impl: str | None, measured_only: bool
) -> tuple[tuple[str, str, Pairs, Pairs, str], ...]:
    """The rows that a call looks through, as plain constants, which is what a traced graph can hold.

    None at all where nothing was measured, the usual case on a CPU.
    """
    return tuple(
        (row.impl, row.dtype, tuple(row.upto.items()), tuple(row.config.items()), row.evidence)
        for row in rows(op)
        if row.arch == arch and (row.measured or not measured_only) and impl in (None, row.impl)
    )


@constant_in_graphs
def arch(device: torch.device) -> str:
    """ "cpu", or "sm_XY" of a CUDA device."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

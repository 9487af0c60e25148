"""One op, one contract: how an op names its implementations and how one of them is chosen.

A file `ops/x.py` holds the public function `x(..., impl="auto")`, its torch reference (also the CPU
path), the torch.library registration, and one `OP = Op(...)`. Everything else finds ops through
`all_ops()`, so a new op is a new file and no registry is edited:

    kernels/x.py (or csrc)      the kernel
    kernels/tables/x.json       evidence rows: which implementation is used where, and why
    src/loopmdm/ops/x.py        the public function and its reference
    tests/test_x.py             against the float64 oracle
    benchmarks/bench_x.py       against the unfused reference

`impl` is one of "auto", "torch", "triton", "cuda", "cpp", or a library's kernel that the op names itself
(`Op.library`). "auto" uses an implementation only where a row of
the table says it was *measured* faster on this architecture; everything else gets torch. Before the
first automatic use on a device the implementation is compared with torch on a small random
problem; on a mismatch or a launch error it is switched off for the process, with one warning.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import InputError, nearest
from ..kernels import tuned

IMPLS = ("torch", "triton", "cuda", "cpp")
Example = Callable[[torch.device, torch.dtype, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """What an op will run: the implementation, its tile configuration, and the reason."""

    impl: str
    config: Mapping[str, int] = field(default_factory=dict)
    why: str = ""


@tuned.constant_in_graphs
def unavailable(impl: str, device: torch.device) -> str | None:
    """Return why `impl` cannot run on `device`, or None when it can."""
    if impl == "torch":
        return None
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda" or interpreting():
            return None
        return f"triton needs a CUDA device or TRITON_INTERPRET=1, the tensors are on {device.type}"
    built = extension()
    if built is None:
        return "loopmdm._C is not built"
    if impl == "cpp":
        return None if device.type == "cpu" else f"cpp runs on cpu, the tensors are on {device.type}"
    if not built.has_cuda:
        return "loopmdm._C was built without CUDA"
    return None if device.type == "cuda" else f"cuda runs on CUDA, the tensors are on {device.type}"


def interpreting() -> bool:
    """True when Triton kernels run in the interpreter (TRITON_INTERPRET=1, process-wide)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def extension() -> Any:
    """The compiled module `loopmdm._C`, or None where it was not built."""
    try:
        return importlib.import_module("loopmdm._C")
    except ImportError:
        return None


@dataclass
class Pin:
    """A choice that is forced upon an op, and the (dtype, size) of each decision it stood in for."""

    choice: Choice
    asked: list[tuple[torch.dtype, dict[str, int]]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Op:
    """An op's identity card.

    Attributes:
        name: the file's, the public function's and the table's name.
        call: the public function; takes `impl=`.
        examples: each `(device, dtype, generator) -> kwargs` of `call`, a small random problem with odd
            sizes; the self-check, the first-contact GPU test and `loopmdm selfcheck` run on all of them, so
            they must between them reach every branch of the kernels.
        impls: what there is, "torch" first.
        dtypes: dtypes of the example for which the op is defined.
        tolerance: largest allowed max|a-b| / max|b| between `impl` and torch, by dtype; 0 means equal.
        grads: names of the examples' tensors that get gradients (compared too).
        library: `(impl, device) -> why it cannot run there, or None`, for the impls that are none of `IMPLS`: kernels
            of other libraries.
        refuses: `(impl, **kwargs of call) -> why impl cannot take this problem, or None`; an op without it takes
            with every impl whatever its examples show.
        problems: what `loopmdm tune` times, `(device, dtype, generator, **size) -> kwargs` of `call`; a row holds for
            all of them, so the one that gains least decides.
        sizes: for "cpu" and "cuda" the sizes that it times, smallest first, each the bounds of a row; a name that is
            left out is unbounded, and `problems` take something large for it. None for a device: not timed there.
            "training" is no number of a problem: 0 is timed without gradients, 1 with them, a size without it both.
    """

    name: str
    call: Callable[..., Any]
    examples: tuple[Example, ...]
    impls: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    tolerance: Mapping[torch.dtype, float]
    grads: tuple[str, ...] = ()
    library: Callable[[str, torch.device], str | None] | None = None
    refuses: Callable[..., str | None] | None = None
    problems: tuple[Callable[..., dict[str, Any]], ...] = ()
    sizes: Mapping[str, tuple[Mapping[str, int], ...]] = field(default_factory=dict)
    _pins: list[Pin] = field(default_factory=list, init=False, repr=False)
    _decided: dict[Any, Choice] = field(default_factory=tuned.forgotten_dict, init=False, repr=False)

    def choose(
        self,
        impl: str,
        device: torch.device,
        dtype: torch.dtype,
        refuses: Callable[[str], str | None] | None = None,
        **size: int,
    ) -> Choice:
        """Decide what runs.

        Args:
            impl: "auto" or a name; device, dtype: the problem's.
            refuses: why an impl cannot take this very problem, or None; "auto" then goes on to the table's next row.
            size: the shape's numbers that the table's rows bound.

        Raises:
            InputError: an explicit `impl` that does not exist for this op, cannot run here or refuses the problem.
        """
        if impl == "torch":
            return Choice("torch", why="asked for")
        if self._pins:
            self._pins[-1].asked.append((dtype, size))
            return self._pins[-1].choice
        if impl != "auto":
            if impl not in self.impls:
                raise InputError(f"{self.name} has no impl {impl!r}{nearest(impl, ('auto', *self.impls))}")
            reason = self.unavailable(impl, device)
            if reason is not None:
                raise InputError(f"{self.name}: impl={impl!r} cannot run here: {reason}")
            reason = refuses(impl) if refuses is not None else None
            if reason is not None:
                raise InputError(f"{self.name}: impl={impl!r} cannot run: {reason}")
            row = tuned.best(self.name, tuned.arch(device), dtype, size, impl=impl)
            return Choice(impl, row.config if row else {}, "asked for")
        key = (device, dtype, tuple(size.items()))
        known = None if torch.compiler.is_compiling() else self._decided.get(key)
        if known is not None and (refuses is None or refuses(known.impl) is None):
            return known
        passed_over: tuple[str, ...] = ()
        why = None
        while True:
            row = tuned.best(self.name, tuned.arch(device), dtype, size, measured_only=True, but=passed_over)
            if row is None or row.impl == "torch":
                found = "no faster implementation was measured here" if row is None else row.evidence
                decided = Choice("torch", why=why or found)
                break
            reason = None if row.impl in self.impls else f"{self.name} has no impl {row.impl!r}"
            reason = reason or self.unavailable(row.impl, device)
            reason = reason or (refuses(row.impl) if refuses is not None else None)
            reason = reason or self.verify(row.impl, device, dtype, row.config)
            if reason is None:
                decided = Choice(row.impl, row.config, row.evidence)
                break
            passed_over, why = (*passed_over, row.impl), why or reason
        if not passed_over and not torch.compiler.is_compiling():
            if len(self._decided) > 10_000:
                self._decided.clear()
            self._decided[key] = decided
        return decided

    def unavailable(self, impl: str, device: torch.device) -> str | None:
        """Return why `impl` cannot run on `device`, or None when it can."""
        return unavailable(impl, device) if impl in IMPLS or self.library is None else self.library(impl, device)

    def verify(
        self, impl: str, device: torch.device, dtype: torch.dtype, config: Mapping[str, int] | None = None
    ) -> str | None:
        """First-use self-check, cached: None when `impl` with `config` agrees with torch, else the reason."""
        return _verify(self, impl, device.type, device.index, dtype, tuple((config or {}).items()))

    @contextmanager
    def pinned(self, choice: Choice) -> Iterator[Pin]:
        """Within it every call takes `choice`, whatever impl but "torch" it names; not for several threads."""
        pin = Pin(choice)
        self._pins.append(pin)
        try:
            yield pin
        finally:
            self._pins.pop()

    def taken(self, impl: str, device: torch.device, dtype: torch.dtype) -> tuple[Example, ...]:
        """The examples that `impl` takes; all of them for most."""
        if self.refuses is None or impl == "torch":
            return self.examples
        return tuple(e for e in self.examples if self.refuses(impl, **e(device, dtype, torch.Generator())) is None)

    def deviation(self, impl: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> float:
        """Largest max|a-b|/max|b| over outputs and gradients of `impl` against torch on the examples."""
        taken = self.taken(impl, device, dtype)
        got, want = (self._results(taken, which, device, dtype, seed) for which in (impl, "torch"))
        return max((relative(a, b) for a, b in zip(got, want, strict=True)), default=0.0)

    def results(self, impl: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        """Outputs and gradients of every example that `impl` takes."""
        return self._results(self.taken(impl, device, dtype), impl, device, dtype, seed)

    def _results(
        self,
        examples: tuple[Example, ...],
        impl: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> list[torch.Tensor]:
        return [t for example in examples for t in self.run(example, impl, device, dtype, seed)]

    def run(
        self, example: Example, impl: str, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> list[torch.Tensor]:
        """Outputs and gradients of one problem."""
        rng = torch.Generator(device="cpu").manual_seed(seed)
        kwargs = example(device, dtype, rng)
        leaves = []
        with torch.enable_grad():
            for name in self.grads:
                if kwargs.get(name) is None:
                    continue
                kwargs[name] = kwargs[name].detach().requires_grad_()
                leaves.append(kwargs[name])
            result = self.call(**kwargs, impl=impl)
            outputs = list(result) if isinstance(result, tuple) else [result]
            if leaves:
                weights = [torch.randn(o.shape, generator=rng).to(o) for o in outputs]
                total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
                outputs += torch.autograd.grad(total, leaves)
        return [o.detach() for o in outputs]


@contextmanager
def on_torch() -> Iterator[None]:
    """Within it every op is torch's own; not for several threads."""
    with ExitStack() as pins:
        for op in all_ops().values():
            pins.enter_context(op.pinned(Choice("torch")))
        yield


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b| over what is finite in b; inf where dtype, shape, NaN or infinities differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    if torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()):
        finite = b.isfinite()
        gap = (a - b)[finite].abs().max().item() if finite.any() else 0.0
        scale = b[finite].abs().max().item() if finite.any() else 1.0
        return gap / scale if scale else gap
    return float("inf")


@contextmanager
def _undisturbed(device_type: str) -> Iterator[None]:
    """By what surrounds a first call: inference mode, autocast, a checkpoint that counts the tensors saved."""

    def same(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    kept = torch.autograd.graph.saved_tensors_hooks(same, same)
    with torch.inference_mode(False), torch.autocast(device_type, enabled=False), kept:
        yield


@tuned.constant_in_graphs
def _verify(
    op: Op, impl: str, device_type: str, index: int | None, dtype: torch.dtype, config: tuple[tuple[str, int], ...]
) -> str | None:
    device = torch.device(device_type, index) if index is not None else torch.device(device_type)
    try:
        if not op.taken(impl, device, dtype):
            return f"{op.name}: {impl} takes no example in {dtype}, so nothing would check it"
        with _undisturbed(device_type), op.pinned(Choice(impl, dict(config))):
            gap = op.deviation(impl, device, dtype)
    except Exception as error:  # a launch error must cost speed, never the user's run
        reason = f"{op.name}: {impl} failed its self-check ({type(error).__name__}: {error})"
    else:
        allowed = op.tolerance.get(dtype, 0.0)
        if gap <= allowed:
            return None
        reason = f"{op.name}: {impl} differs from torch by {gap:.2e} (allowed {allowed:.0e}) on {dtype}"
    warnings.warn(f"{reason}; using torch instead", RuntimeWarning, stacklevel=3)
    return reason


@functools.cache
def all_ops() -> dict[str, Op]:
    """Every op in this folder by name: modules that define `OP`."""
    package = importlib.import_module("loopmdm.ops")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        op = getattr(importlib.import_module(f"loopmdm.ops.{info.name}"), "OP", None)
        if op is not None:
            found[op.name] = op
    return found

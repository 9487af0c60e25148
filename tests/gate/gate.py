"""Compile Triton kernels for GPUs that are not here, and read registers, spills and shared memory off the result.

A kernel takes part by declaring, in its own file, `GATE_SIZES` and `gate(dtype, size, config)`
(see `loopmdm.kernels.tuned.Compile`); nothing is registered here.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import loopmdm.kernels
from loopmdm.kernels import tuned

DEFAULT_ARCHS = ("sm_80", "sm_90")
DTYPES = ("bfloat16", "float32")
# shared memory that one block may use, bytes (CUDA programming guide, "compute capabilities")
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
SPILLS = re.compile(r"\b(STL|LDL)\b")


@dataclass(frozen=True)
class Case:
    """One test: what to compile, for which GPU, and the row (or the kernel's default) that asks for it."""

    label: str
    arch: str
    compile: tuned.Compile

    @property
    def key(self) -> tuple[Any, ...]:
        c = self.compile
        return (self.arch, c.kernel, *c.signature.items(), *c.constants.items(), c.num_warps, c.num_stages)


@dataclass(frozen=True)
class Binary:
    """What ptxas made: registers a thread, stack and shared memory in bytes, and the code.

    What spills has a stack to spill to. The instructions are asked for only where a test reads them: to disassemble
    them takes as long as to compile most kernels.
    """

    registers: int
    stack: int
    shared: int
    cubin: bytes
    ptx: str

    @functools.cached_property
    def sass(self) -> str:
        return _dump("-sass", self.cubin)

    @property
    def spills(self) -> int:
        return len(SPILLS.findall(self.sass))


def kernel_files() -> Iterator[ModuleType]:
    """Modules in kernels/ that have a gate."""
    for info in pkgutil.iter_modules(loopmdm.kernels.__path__):
        module = importlib.import_module(f"loopmdm.kernels.{info.name}")
        if hasattr(module, "gate"):
            yield module


def cases() -> list[Case]:
    """Every table row and every kernel's own default, without repetitions."""
    found: dict[tuple[Any, ...], Case] = {}
    for case in itertools.chain.from_iterable(_cases_of(module) for module in kernel_files()):
        found.setdefault(case.key, case)
    return list(found.values())


def _cases_of(module: ModuleType) -> Iterator[Case]:
    op = module.__name__.rpartition(".")[2]
    for arch, dtype, size in itertools.product(DEFAULT_ARCHS, DTYPES, module.GATE_SIZES):
        for item in module.gate(dtype, size, {}):
            yield _case(f"{op} default {size}", arch, dtype, item)
    for row in tuned.rows(op):
        if row.impl != "triton":
            continue
        for dtype in DTYPES if row.dtype == "*" else (row.dtype,):
            # a size that the row leaves open is as large as the kernel says it goes
            for item in module.gate(dtype, {**module.GATE_SIZES[-1], **row.upto}, row.config):
                yield _case(f"{op} row {dict(row.upto)}", row.arch, dtype, item)


def _case(what: str, arch: str, dtype: str, item: tuned.Compile) -> Case:
    flags = "+".join(name.lower() for name, value in item.constants.items() if value is True)
    return Case(f"{what} {item.kernel.__name__} {dtype} {flags}", arch, item)


def compile_for(arch: str, item: tuned.Compile) -> Binary:
    """Compile as a launch would: pointers aligned to 16 bytes, scalars unspecialised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = item.kernel
    signature = {name: item.signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, dict(item.constants), aligned)
    number = int(arch.removeprefix("sm_"))
    options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    usage = _dump("--dump-resource-usage", built.asm["cubin"])
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    return Binary(numbers["REG"], numbers["STACK"], built.metadata.shared, built.asm["cubin"], built.asm["ptx"])


def _dump(flag: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([_cuobjdump(), flag, str(path)], check=True, capture_output=True, text=True).stdout


@functools.cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def shared_limit(arch: str) -> int:
    return SHARED[arch.removeprefix("sm_")] * 1024

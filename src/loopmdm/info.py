"""What was built, what was found, and what each op will use here: the text of `loopmdm info`."""

from __future__ import annotations

import importlib.util
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .kernels import tuned
from .ops import contract

PACKAGES = ("torch", "triton", "numpy", "flash_attn", "transformers", "accelerate")


def collect() -> dict[str, Any]:
    """Gather everything as plain data (JSON-able); imports neither triton nor flash_attn."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
    return {
        "loopmdm": _version("loopmdm"),
        "build": _build(),
        "python": platform.python_version(),
        "packages": {name: _version(name) if importlib.util.find_spec(name) else None for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "devices": [_device(device) for device in devices],
        "tuned": _tuned(devices),
        "notes": _notes(devices),
        "ops": {name: _op(op, devices[0]) for name, op in sorted(contract.all_ops().items())},
    }


def render(found: dict[str, Any]) -> str:
    """The collected facts as plain text."""
    lines = [f"loopmdm {found['loopmdm']}, {found['build']}", f"python {found['python']}"]
    lines += [f"{name} {number or 'not installed'}" for name, number in found["packages"].items()]
    lines.append(f"torch was built for CUDA {found['torch_cuda']}" if found["torch_cuda"] else "torch has no CUDA")
    lines += [f"device {line}" for line in found["devices"]]
    if found["tuned"] is not None:
        lines.append(f"tuned rows of your own come first: {found['tuned']}")
    lines += [f"note: {line}" for line in found["notes"]]
    lines += ["", "What impl='auto' uses here, and why not something else:"]
    width = max((len(name) for name in found["ops"]), default=0)
    for name, choices in found["ops"].items():
        for dtype, choice in choices.items():
            lines.append(f"  {name:<{width}}  {dtype:<9} {choice['impl']:<7} {choice['why']}")
            lines += [f"  {'':<{width}}  {'':<9} not {other}: {why}" for other, why in choice["others"].items()]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(no metadata)"


def _build() -> str:
    built = contract.extension()
    if built is None:
        return "without loopmdm._C (torch and triton only)"
    if not built.has_cuda:
        return f"C++ only ({built.compiler})"
    return f"C++ and CUDA {built.cuda_version} for {built.cuda_archs} ({built.compiler})"


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    facts = torch.cuda.get_device_properties(device)
    return f"{device} {facts.name}, {tuned.arch(device)}, {facts.total_memory / 2**30:.0f} GiB"


def _tuned(devices: list[torch.device]) -> str | None:
    """What the user's own rows are about, or why their file is not used; None where there is none."""
    path = tuned.override_file()
    if path is None:
        return None
    try:
        rows = tuned.read_override(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return f"not {path}, which is ignored ({error}); run `loopmdm tune` again or remove it"
    here = [row for row in rows if row.arch in {tuned.arch(device) for device in devices}]
    about = ", ".join(sorted({f"{row.op} {row.dtype}" for row in here})) or "none for this machine"
    return f"{path} ({about})"


def _notes(devices: list[torch.device]) -> list[str]:
    notes = []
    built = contract.extension()
    if built is not None and built.has_cuda:
        notes += [note for note in (driver_note(built.cuda_driver_version(), built.cuda_version),) if note]
        for device in devices:
            if device.type == "cuda":
                note = arch_note(torch.cuda.get_device_capability(device), built.cuda_archs)
                notes += [f"{device}: {note}"] if note else []
    if torch.version.cuda is None and importlib.util.find_spec("triton"):
        notes.append("triton is installed but torch has no CUDA: triton kernels run only under TRITON_INTERPRET=1")
    return notes


def driver_note(driver: int, built: str) -> str | None:
    """Say what is wrong with the driver. `driver` is CUDA's number (12040 for 12.4, 0 for none)."""
    if driver == 0:
        return "no NVIDIA driver was found, so CUDA code cannot run"
    if driver // 1000 < int(built.split(".")[0]):
        has = f"{driver // 1000}.{driver % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old: it runs CUDA {has}, loopmdm._C was built with CUDA {built}; "
            "update the driver or rebuild with an older toolkit"
        )
    return None


def arch_note(capability: tuple[int, int], archs: str) -> str | None:
    """Say when the compiled code does not run on a device: a cubin runs within its major, PTX on anything newer."""
    device = capability[0] * 10 + capability[1]
    for name in archs.split():
        number = int(name.rpartition("_")[2])
        same_major = name.startswith("sm_") and number // 10 == capability[0]
        if number <= device and (same_major or name.startswith("compute_")):
            return None
    return f"loopmdm._C has no code for sm_{device}; rebuild with LOOPMDM_CUDA_ARCHS=sm_{device}"


def _op(op: contract.Op, device: torch.device) -> dict[str, dict[str, Any]]:
    return {str(dtype).removeprefix("torch."): _choice(op, device, dtype) for dtype in op.dtypes}


def _choice(op: contract.Op, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in the table
        chosen = op.choose("auto", device, dtype)
    others = {impl: _why_not(op, impl, device, dtype) for impl in op.impls if impl not in (chosen.impl, "torch")}
    return {"impl": chosen.impl, "why": chosen.why, "others": others}


def _why_not(op: contract.Op, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    reason = op.unavailable(impl, device)
    if reason is not None:
        return reason
    row = tuned.best(op.name, tuned.arch(device), dtype, {}, impl=impl)
    if row is None:
        return f"no row of its table covers {tuned.arch(device)}"
    return "another row comes first" if row.measured else "it compiles, but nobody has measured it here"

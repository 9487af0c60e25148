"""Builds loopmdm._C: C++ always, CUDA as well where nvcc is found. Torch is not needed to build.

LOOPMDM_CUDA        auto (default), 0 (C++ only) or 1 (fail when there is no nvcc)
LOOPMDM_CUDA_ARCHS  "sm_80 sm_90" by default, or "8.0 9.0"; the highest is also stored as PTX for newer GPUs
CXX                 the C++ compiler, perhaps behind another command as in "ccache g++" (nvcc uses its own default;
                    NVCC_CCBIN changes it). g++ 11 or later; clang++ builds the same without AVX

Both compilers run under ninja. With CUDA, nvcc also links: it knows where its own static runtime
lies, whatever wrapper script or folder it was found in, so the module needs no CUDA at import time.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

VERSION = "0.1.0"
HERE = Path(__file__).parent


def find_nvcc():
    """Path of nvcc, or None when this is to be a C++ build."""
    wanted = os.environ.get("LOOPMDM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"LOOPMDM_CUDA is {wanted!r}; it must be auto, 0 or 1.")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin")) for home in homes] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None and wanted == "1":
        sys.exit("LOOPMDM_CUDA=1 but nvcc was found neither in CUDA_HOME/bin nor on PATH; install the CUDA toolkit.")
    return nvcc


def cuda_release(nvcc):
    """Toolkit version, for example "13.0"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", text).group(1)


def cuda_archs():
    """Numbers as nvcc's, rising: 80 for "sm_80", "80" and "8.0"; "90a" is 90."""
    given = os.environ.get("LOOPMDM_CUDA_ARCHS", "80 90")
    found = [re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)[af]?", word) for word in re.split(r"[\s,;]+", given.strip(" ,;"))]
    if not all(found):
        sys.exit(f'LOOPMDM_CUDA_ARCHS is {given!r}; write for example LOOPMDM_CUDA_ARCHS="sm_80 sm_90" or "8.0 9.0".')
    return sorted({int(match[1] + match[2]) for match in found})


NVCC = find_nvcc()
CUDA = cuda_release(NVCC) if NVCC else ""
BUILD = f"{VERSION}+cu{CUDA.replace('.', '')}" if NVCC else f"{VERSION}+cpu"


def ninja_file(ext, output):
    """The text of build.ninja: one line per rule and object, paths absolute."""
    import pybind11

    archs = cuda_archs()
    names = " ".join(f"sm_{n}" for n in archs) + f" compute_{archs[-1]}"
    defines = [f'-DLOOPMDM_VERSION="{BUILD}"']
    if NVCC:
        defines += ["-DLOOPMDM_CUDA", f'-DLOOPMDM_CUDA_VERSION="{CUDA}"', f'-DLOOPMDM_CUDA_ARCHS="{names}"']
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    cxx = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "clang++"]
    # csrc/noise.h promises bits: no a * b + c in one rounding unless a function asks for it
    flags = ["-std=c++17", "-O3", "-Wall", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread"]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-pthread"]
    gencode = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in archs]
    gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    cuflags = ["-std=c++17", "-O3", *gencode, "-Xcompiler=-fPIC,-fvisibility=hidden"]
    # --exclude-libs hides the static runtime's symbols from the runtime that torch loads
    link = [NVCC, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"] if NVCC else [*cxx, *shared]
    lines = [
        "rule cxx",
        f"  command = {_shell([*cxx, *flags, *defines, *includes])} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {_shell([NVCC or 'nvcc', *cuflags])} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_shell(link)} $in -o $out",
    ]
    objects = []
    for source in ext.sources:
        if source.endswith(".cu") and not NVCC:
            continue
        objects.append(Path(source).name + ".o")
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {_escape(HERE.resolve() / source)}")
    lines.append(f"build {_escape(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _shell(words):
    return shlex.join(words).replace("$", "$$")


def _escape(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for needed in (folder, output.parent):
            needed.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(ext, output))
        if subprocess.run([_ninja(), "-C", str(folder)]).returncode:
            hint = "; LOOPMDM_CUDA=0 builds without CUDA" if NVCC else "; a C++17 compiler is needed (CXX names it)"
            sys.exit(f"Compiling loopmdm._C failed, see the compiler's message above{hint}.")


def _ninja():
    found = shutil.which("ninja")
    if found is None:
        import ninja

        found = str(Path(ninja.BIN_DIR, "ninja"))
    return found


sources = sorted(str(path.relative_to(HERE)) for path in HERE.glob("csrc/*.c*"))
setup(
    # The source archive carries no local version, nor does what is built from one (it holds PKG-INFO): pip refuses an
    # archive whose name says 0.1.0 and whose build says 0.1.0+cpu.
    version=VERSION if "sdist" in sys.argv or (HERE / "PKG-INFO").exists() else BUILD,
    package_dir={"loopmdm": "src/loopmdm", "loopmdm.kernels": "kernels"},
    packages=[*find_packages("src"), "loopmdm.kernels"],
    include_package_data=False,  # what package_data names, nothing else
    package_data={"loopmdm": ["py.typed"], "loopmdm.kernels": ["tables/*.json"]},
    # Without the module the ops run on their torch reference. Windows gets none, and training does not run there.
    ext_modules=[] if sys.platform == "win32" else [Extension("loopmdm._C", sources)],
    cmdclass={"build_ext": NinjaBuild},
)

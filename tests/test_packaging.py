"""What a user installs: names, import cost, the sdist and the wheels built from it."""

import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import loopmdm
from loopmdm.info import arch_note, driver_note

ROOT = Path(__file__).parents[1]
HEAVY = ("triton", "transformers", "accelerate", "matplotlib", "tokenizers", "rich", "tensorboard")


def python(code, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version_is_the_metadata_s():
    assert loopmdm.__version__ == importlib.metadata.version("loopmdm")
    assert loopmdm.__version__.partition("+")[0] == "0.1.0"


def test_extension_is_built_from_this_version():
    from loopmdm import _C

    assert _C.version.partition("+")[0] == loopmdm.__version__.partition("+")[0]
    assert _C.has_cuda == ("+cu" in _C.version)
    assert bool(_C.cuda_version) == bool(_C.cuda_archs) == _C.has_cuda


def test_import_is_cheap_and_light(tmp_path):
    code = (
        "import torch, sys, time; before = set(sys.modules); start = time.perf_counter(); import loopmdm; "
        "cost = time.perf_counter() - start; import json; "
        f"print(json.dumps([cost, [m for m in {HEAVY!r} if m in sys.modules and m not in before]]))"
    )
    runs = [json.loads(python(code, cwd=tmp_path)) for _ in range(3)]
    assert statistics.median(cost for cost, _ in runs) < 0.5
    assert runs[0][1] == []


def ours(name):
    """True when the top-level module `name` would come from this checkout."""
    spec = importlib.util.find_spec(name)
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
    return any(Path(place).is_relative_to(ROOT) for place in places if place)


def test_kernels_is_not_a_top_level_name():
    import loopmdm.kernels

    assert not ours("kernels")
    assert Path(loopmdm.kernels.__file__).name == "__init__.py"


@pytest.mark.parametrize("how", ["pytest", "python -m pytest"])
def test_kernels_is_not_top_level_however_pytest_starts(how):
    script = Path(sysconfig.get_path("scripts"), "pytest")
    command = [str(script)] if how == "pytest" else [sys.executable, "-m", "pytest"]
    target = "tests/test_packaging.py::test_kernels_is_not_a_top_level_name"
    done = subprocess.run([*command, "-q", "-p", "no:cacheprovider", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_console_script_does_not_see_the_checkout(tmp_path):
    """A script puts its own folder on sys.path, so `loopmdm` run in the checkout finds no `kernels`."""
    (tmp_path / "script").write_text("import importlib.util\nprint(importlib.util.find_spec('kernels'))\n")
    done = subprocess.run([sys.executable, tmp_path / "script"], cwd=ROOT, capture_output=True, text=True)
    assert str(ROOT) not in done.stdout


def test_kernels_is_harmless_where_python_puts_the_checkout_on_the_path():
    """`python -c` in the checkout finds ours as `kernels`: it must not import or claim anything there.

    transformers takes a `kernels` without a version for a folder that is in the way.
    """
    code = (
        "import sys; before = set(sys.modules); import kernels; print(sorted(set(sys.modules) - before), dir(kernels))"
    )
    out = python(code, cwd=ROOT)
    assert out.startswith("['kernels'] ") and "__version__" not in out


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_does_not_take_ours():
    code = "from transformers.utils import is_kernels_available as has; print(has())"
    assert python(code, cwd=ROOT) == python(code, cwd=ROOT.parent)


def setup_py(**env):
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_bad_build_settings_get_one_sentence():
    assert "LOOPMDM_CUDA is 'yes'; it must be auto, 0 or 1." in setup_py(LOOPMDM_CUDA="yes").stderr
    assert setup_py(LOOPMDM_CUDA="0").stdout.split()[-1] == "0.1.0+cpu"


def settings(monkeypatch, **env):
    """What setup.py defines where these variables are set."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name, value in {"LOOPMDM_CUDA": "0", **env}.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architectures(monkeypatch):
    for given, want in (("sm_90 sm_80", [80, 90]), ("8.0;9.0, 12.0", [80, 90, 120]), ("100", [100])):
        assert settings(monkeypatch, LOOPMDM_CUDA_ARCHS=given)["cuda_archs"]() == want
    for given in ("", "8", "native", "8.0+PTX"):
        with pytest.raises(SystemExit, match="write for example"):
            settings(monkeypatch, LOOPMDM_CUDA_ARCHS=given)["cuda_archs"]()


def test_a_compiler_behind_another_command(monkeypatch):
    pytest.importorskip("pybind11")
    text = settings(monkeypatch, CXX="ccache g++")["ninja_file"](setuptools.Extension("x", ["x.cpp"]), "x.so")
    assert text.count("command = ccache g++ ") == 2


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="nvcc lies in the default place and is found")
def test_demanding_cuda_without_nvcc_fails_loudly():
    done = setup_py(LOOPMDM_CUDA="1", PATH="/nowhere", CUDA_HOME="", CUDA_PATH="")
    assert done.returncode and "LOOPMDM_CUDA=1 but nvcc was found neither" in done.stderr
    assert setup_py(LOOPMDM_CUDA="auto", PATH="/nowhere", CUDA_HOME="", CUDA_PATH="").stdout.strip() == "0.1.0+cpu"


def test_driver_and_arch_notes():
    assert "runs CUDA 12.4, loopmdm._C was built with CUDA 13.0" in driver_note(12040, "13.0")
    assert "no NVIDIA driver" in driver_note(0, "13.0")
    assert driver_note(13000, "13.0") is None and driver_note(13010, "12.8") is None
    shipped = "sm_80 sm_90 compute_90"
    assert all(arch_note(capability, shipped) is None for capability in [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
    assert "no code for sm_75" in arch_note((7, 5), shipped)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    away = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "runs", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=away)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, folder / "tree"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "loopmdm-0.1.0.tar.gz"


@pytest.mark.slow
def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {p for top in ("src/loopmdm", "kernels", "csrc") for p in (ROOT / top).rglob("*") if p.is_file()}
    wanted = {str(p.relative_to(ROOT)) for p in wanted if p.suffix not in (".so", ".pyc")}
    assert wanted <= held
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= held


PROBE = """
import json, loopmdm, torch
from importlib.metadata import version
from loopmdm import _C, info
from loopmdm.ops.select_topk import OP
deviation = OP.deviation("cpp", torch.device("cpu"), torch.float32)
text = info.render(info.collect())
print(json.dumps([loopmdm.__file__, loopmdm.__version__, version("loopmdm"), _C.has_cuda, deviation, text]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cuda", [False, pytest.param(True, marks=pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="the CUDA wheel needs nvcc"))])  # fmt: skip
def test_wheel_from_sdist(sdist, tmp_path, cuda):
    env = {**os.environ, "LOOPMDM_CUDA": "1" if cuda else "0"}
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist]
    done = subprocess.run(build, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tables = {f"loopmdm/kernels/tables/{p.name}" for p in (ROOT / "kernels" / "tables").glob("*.json")}
    assert {"loopmdm/py.typed", "loopmdm/kernels/tuned.py", *tables} <= set(names)
    assert not [name for name in names if name.startswith("kernels") or name.endswith((".cu", ".cpp"))]

    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    interpreter = home / "bin" / "python"
    subprocess.run([*pip, "--python", interpreter, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # torch and the rest come from this environment, behind the new one's own packages
    (site,) = home.glob("lib/python*/site-packages")
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = subprocess.run([interpreter, "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, shown, recorded, has_cuda, deviation, text = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(home)
    assert shown == recorded == "0.1.0" and has_cuda == cuda
    assert deviation == 0.0
    assert ("C++ and CUDA" if cuda else "C++ only") in text and "select_topk" in text

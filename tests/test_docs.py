"""The pages of docs/ run as they stand: every shell block, then every python block, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text())


def execute(page, folder):
    """Run a page's blocks, the python ones as one program. Returns what all of them printed."""
    bin_ = folder / "bin"
    bin_.mkdir()
    (bin_ / "loopmdm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loopmdm.cli "$@"\n')
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for file in bin_.iterdir():
        file.chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    shell = [code for kind, code in blocks(page) if kind == "shell"]
    python = [code for kind, code in blocks(page) if kind == "python"]
    assert [kind for kind, _ in blocks(page)] == ["shell"] * len(shell) + ["python"] * len(python)
    printed = []
    for words in (*(["sh", "-ec", code] for code in shell), [sys.executable, "-c", "".join(python)]):
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return "\n".join(printed)


@pytest.mark.slow
def test_from_data_to_samples(tmp_path):
    printed = execute("from-data-to-samples.md", tmp_path)
    assert '"step": 60' in printed and "gain at S = 4" in printed and "Wrote runs/first/model/depth.json" in printed
    assert "S of each step:" in printed and (tmp_path / "eval.png").exists() and "\x1b" not in printed
    assert (tmp_path / "samples.json").read_text().startswith("{")


def test_options(tmp_path):
    printed = execute("options.md", tmp_path)
    assert "E[S] = 2." in printed and "of the FLOPs" in printed


def test_adapters(tmp_path):
    printed = execute("adapters.md", tmp_path)
    assert "equal within" in printed and "first differ at 'layer 0: attention'" in printed and "[4.0, 4.0," in printed


def test_every_option_states_its_cost():
    sections = re.split(r"^## ", (DOCS / "options.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) == 9
    for section in sections:
        assert "```python" in section and section.count("**Cost:**") == 1, section.splitlines()[0]


def test_names_and_links_of_the_pages_exist():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_options_of_commands_exist(capsys):
    """Every --option that a page names is one of the commands'."""
    from loopmdm import cli

    known = set()
    for command in ("train", "eval", "schedule", "sample", "flops", "convert"):
        cli.main([command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for page in ("from-data-to-samples.md", "options.md", "adapters.md"):
        text = re.sub(r"^ *python -m (?!loopmdm.cli).*$", "", (DOCS / page).read_text(), flags=re.MULTILINE)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
        assert named and named <= known, f"{page}: {sorted(named - known)}"

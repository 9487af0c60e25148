"""The README's examples run as written, and CI runs its commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "NELBO" in capsys.readouterr().out
    assert (tmp_path / "runs/readme/model.safetensors").exists()


def test_ci_runs_the_install_commands():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    installs = re.findall(r"^    pip install (-c constraints.txt -e .*?)(?: &&.*)?$", readme, re.MULTILINE)
    assert len(installs) == 2
    for arguments in installs:
        assert f"pip install -q {arguments}" in ci


def test_local_links_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target

"""Running commands in tests: their status and what they print, and a run small enough to train in a second."""

import json
import os
import subprocess
import sys

from loopmdm import cli

TEXT = "the [red]cat[/red] sat on the mat.\nthe dog sat on the log.\n" * 40
SMALL = (
    "hidden_size=32 intermediate_size=48 num_hidden_layers=3 num_attention_heads=4 length=1 max_loops=3 "
    "max_position_embeddings=40 initializer_range=0.3"
)
QUICK = f"--steps 4 --batch-size 4 --length 16 --warmup 0 --eval-every 2 --set {SMALL}".split()


def run(capsys, *words):
    """(exit status, stdout, stderr) of `loopmdm WORDS`."""
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words):
    """The one sentence that `loopmdm WORDS` ends with."""
    status, _, err = run(capsys, *words)
    assert status == 2 and err.startswith("loopmdm: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("loopmdm: ").rstrip()


def shell(*words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "loopmdm.cli", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

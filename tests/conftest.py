"""Every test starts from the same generator state, on one thread, and never reaches for the network."""

import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ["LOOPMDM_TUNED"] = ""  # rows that a developer tuned must not decide what is tested
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once

import torch
from hypothesis import settings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs ignore Ctrl-C, its tests must not
    signal.signal(signal.SIGINT, signal.default_int_handler)
# children that fork from here must not start an OpenMP team, as accelerate would: none survives a fork
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile("loopmdm", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("loopmdm")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file."""
    from .commands import TEXT

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """The folder of a run of a few steps on `text`; tests must not change it."""
    from loopmdm import cli

    from .commands import QUICK

    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "--data", str(text), "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a `model/` as a run leaves it: random weights that do something, and TEXT's characters."""
    from loopmdm.lab.data import TOKENIZER_FILE, build_tokenizer

    from .commands import TEXT
    from .helpers import live, tiny

    tokenizer = build_tokenizer("char", TEXT)
    size = tokenizer.get_vocab_size()
    folder = tmp_path_factory.mktemp("checkpoint")
    live(tiny(vocab_size=size + 1, mask_token_id=size, max_position_embeddings=40)).save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / TOKENIZER_FILE))
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of `checkpoint`'s model."""
    return Path(shutil.copytree(checkpoint / "model", tmp_path / "copy"))

"""Every test starts from the same generator state, on one thread, with the helper modules of this folder importable."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# importlib mode puts no folder on sys.path; `import helpers` and `import unlooped` need this one. Last, so that it hides nothing.
HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
settings.register_profile("loopmdm", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("loopmdm")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

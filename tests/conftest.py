"""Every test starts from the same generator state, on one thread, and never reaches for the network."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once

import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
settings.register_profile("loopmdm", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("loopmdm")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

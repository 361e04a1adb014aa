"""One thread, one seed, no network: what every test of the package runs under."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

torch.set_num_threads(1)  # widths of 16-64: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

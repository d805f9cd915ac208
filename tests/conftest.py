"""One thread, no network, quiet libraries, and every result that several tests look at, once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels and commands that tests start share two cores with the other worker: threads would wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from tests.support import tiny
from tests.support.pictures import save_blank
from toolkit.tables import drawing

# Files that start processes or kernels, train, or make many runs: `make quick` leaves them out.
SLOW = {
    "broken_input", "comparison", "cross_fit", "deficient_mlp", "diagnose", "diagnose_reach",
    "diagnose_recovery", "distilled", "distributions", "docs", "error_growth", "estimate",
    "every_kind", "families", "figures", "first_look", "free_memory", "grpo", "heap", "kernel",
    "killed", "known_answers", "main", "methods", "next_steps", "noise", "notebooks", "offload",
    "once", "output", "page", "placement", "plot", "processes", "quantised", "recommend",
    "shared_work", "shipped", "shipped_runs", "side_by_side", "site", "steer", "trainer",
    "tuners", "validity", "workspace",
}  # fmt: skip

# Files that look at pictures.
PICTURES = {"comparison", "estimate", "figures", "main", "plot"}

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)
settings.register_profile("same every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same every time")


def pytest_collection_modifyitems(items):
    """Mark the tests of `SLOW` files."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    return tiny.make_tokenizer(chat=True)


@pytest.fixture
def llama_pair(tokenizer):
    return tiny.make_pair("llama", torch.float64, tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _blank_pictures(request):
    """Runs of other files write blank pictures: their figures are made, and not rendered."""
    if request.path.stem.removeprefix("test_") in PICTURES:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawing, "save", save_blank)
        yield


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Tests that draw without a generator of their own draw the same in any order."""
    torch.manual_seed(0)
    np.random.seed(0)

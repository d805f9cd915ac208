"""Quiet libraries, and every result that several tests look at, once; loaded by the conftest."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from tests.support import tiny
from tests.support.pictures import save_blank
from toolkit.tables import drawing

# Files that look at pictures.
PICTURES = {"comparison", "estimate", "figures", "main", "plot"}

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)
settings.register_profile("same every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same every time")


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

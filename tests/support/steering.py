"""Random adapters, prompts and plain generation that the tests of adapters share."""

import torch

from tests.support import tiny
from toolkit.adapters.collection import Adapters
from toolkit.adapters.linear import Linear
from toolkit.adapters.vector import FixedVector
from toolkit.models.generation import make_prompts

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32, 33], [7, 7, 40]]


N_NEW = 7


def random_adapters(location, kind="linear", layers=range(tiny.N_LAYERS)):
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    d = tiny.D_MODEL
    made = {
        "vector": lambda: FixedVector(draw(d)),
        "linear": lambda: Linear(draw(d, 3), draw(3, d), draw(d)),
        "full": lambda: Linear(draw(d, d), None, draw(d)),
    }[kind]
    return Adapters(location, {layer: made() for layer in layers}, "free")


def generate(model):
    """Generate with transformers, batched, left-padded, with its cache."""
    prompts = make_prompts(PROMPTS, tiny.PAD)
    arguments = {"input_ids": prompts.ids, "attention_mask": prompts.mask.long()}
    said = model.generate(**arguments, max_new_tokens=N_NEW, min_new_tokens=None, do_sample=False)
    said = said[:, prompts.ids.shape[1] :]
    return torch.nn.functional.pad(said, (0, N_NEW - said.shape[1]), value=tiny.PAD)

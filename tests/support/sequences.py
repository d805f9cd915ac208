"""Every continuation of a prompt that a model of few tokens can make, with its probability."""

import itertools

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.support import textbook, tiny

END, N_TOKENS = tiny.EOS, 5


def small_model(seed):
    """A random Llama in float64 that knows five tokens."""
    torch.manual_seed(seed)
    config = tiny.FAMILIES["llama"]()
    config.vocab_size = N_TOKENS
    model = AutoModelForCausalLM.from_config(config).double()
    return model.eval().requires_grad_(False)


def every_sequence(n_new):
    """All token sequences that end with the first end, or have `n_new` tokens."""
    found = set()
    for tokens in itertools.product(range(N_TOKENS), repeat=n_new):
        end = tokens.index(END) + 1 if END in tokens else n_new
        found.add(tokens[:end])
    return sorted(found)


def log_probability(model, prompt, tokens):
    """Of the tokens after the prompt, by reading everything at once."""
    logits = textbook.run(model, [*prompt, *tokens]).logits[len(prompt) - 1 : -1]
    return float(textbook.log_softmax(logits)[np.arange(len(tokens)), list(tokens)].sum())

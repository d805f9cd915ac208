"""Batches of prompts and the logits of a steered model."""

from tests.support import tiny
from tests.support.steering import PROMPTS
from toolkit.adapters.attach import steer
from toolkit.models.generation import make_prompts


def batch_of(prompts=PROMPTS):
    padded = make_prompts(prompts, tiny.PAD)
    return {"input_ids": padded.ids, "attention_mask": padded.mask.long()}


def steered_logits(model, adapters):
    with steer(model, adapters):
        return model(**batch_of()).logits

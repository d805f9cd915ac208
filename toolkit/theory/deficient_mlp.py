"""A model of one block whose MLP cannot write everything: what steering after it can still learn.

``y(x) = x + Attn(x) + GLU(x + Attn(x))`` with ``GLU(h) = W_d m(h)`` and W_d of rank k. A post-MLP
steer is a function of ``W_d m``, the post-block steer one of the whole sum. So

- k = 0: whatever the adapter, a post-MLP steer is one constant vector;
- any k: two tokens whose m differ in the null space of W_d alone get the same post-MLP steer;
- a linear adapter's post-MLP steers lie in an affine subspace of at most k dimensions: the image of
  W_d's columns under its matrix. It may point anywhere. (The post, its "pre-MLP" there read as
  post-MLP, says that outside col(W_d) such a steer adds a fixed vector alone. What is limited is
  what it can depend on, not where it points.)

The task is one that needs the difference: after each token, say a fixed permutation of it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.adapters.attach import steer
from toolkit.adapters.collection import Adapters
from toolkit.errors import InputError
from toolkit.models.hooks import capture
from toolkit.models.locations import mlp_projections, resolve
from toolkit.training.examples import NOT_SUPERVISED, collate
from toolkit.training.methods import Method, adapted
from toolkit.training.trainer import TrainingOptions, response_loss, train

D_MODEL, D_FF, N_TOKENS, LENGTH = 48, 128, 32, 14
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Outcome:
    """On held-out sequences: mean cross entropy in nats, and the share of right answers."""

    loss: float
    accuracy: float


def one_block_model(
    rank: int, seed: int = 0, d_model: int = D_MODEL, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A random Llama of one block; W_d is the best rank-`rank` approximation of one W_d per seed.

    Rank 0 is W_d = 0. All else is the same at every rank.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=N_TOKENS,
                hidden_size=d_model,
                intermediate_size=D_FF,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                initializer_range=d_model**-0.5,  # states keep their scale from matrix to matrix
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model = model.to(dtype).eval().requires_grad_(False)
    limit_rank(model, rank)
    return model


@torch.no_grad()
def limit_rank(model: nn.Module, rank: int) -> None:
    """Put the best approximation of rank `rank` in place of every down projection of `model`."""
    for projections in mlp_projections(model):
        weight = projections["down"].weight
        assert isinstance(weight, Tensor)
        if not 0 <= rank <= min(weight.shape):
            raise InputError(
                f"rank is {rank}: expected a whole number from 0 to {min(weight.shape)}"
            )
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])


def permutation_rows(n: int, seed: int) -> list[Row]:
    """`n` random sequences; after each token its image under a permutation fixed for all seeds.

    Nothing is asked after the first token, which adapters leave alone.
    """
    image = torch.randperm(N_TOKENS, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1 + seed)
    ids = torch.randint(N_TOKENS, (n, LENGTH), generator=draw)
    skipped = [NOT_SUPERVISED] * 2  # a label stands one place after the token that says it
    return [
        {"input_ids": row.tolist(), "labels": [*skipped, *image[row[1:-1]].tolist()]} for row in ids
    ]


def train_adapter(
    model: nn.Module, method: Method, rows: Sequence[Row], options: TrainingOptions
) -> Adapters:
    """Return the method's adapters, trained on `rows` at `options`; `model` stays as it is."""
    with adapted(model, method, seed=options.seed) as found:
        assert found.trainee is not None
        assert found.adapters is not None
        train(found.trainee, rows, options)
    return copy.deepcopy(found.adapters)


@torch.no_grad()
def judge(model: nn.Module, adapters: Adapters, rows: Sequence[Row]) -> Outcome:
    """Return how the steered model does on `rows`, which training must not have seen."""
    batch = collate(rows, pad_id=0)
    with steer(model, adapters):
        loss = response_loss(model, rows, pad_id=0, batch_size=len(rows))
        said = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
    asked = batch["labels"][:, 1:]
    right = said[asked != NOT_SUPERVISED] == asked[asked != NOT_SUPERVISED]
    return Outcome(loss, float(right.double().mean()))


@dataclass(frozen=True)
class Spread:
    """How steers vary from token to token: in how many dimensions, and which share of their
    variance lies outside the columns of W_d (0 where they do not vary).
    """

    dimensions: int
    outside: float


@torch.no_grad()
def spread_of(model: nn.Module, changes: Tensor, tolerance: float = 1e-4) -> Spread:
    """Return the spread of `changes`, `[n, d]`, after the one block of `model`.

    Singular values below `tolerance` of the largest entry are rounding.
    """
    centred = (changes - changes[0]).double()
    centred -= centred.mean(0)
    floor = tolerance * float(changes.abs().max())
    singular = torch.linalg.svdvals(centred)
    if not (dimensions := int((singular > floor * len(changes) ** 0.5).sum())):
        return Spread(0, 0.0)
    down = mlp_projections(model)[0]["down"].weight
    assert isinstance(down, Tensor)
    columns = torch.from_numpy(scipy.linalg.orth(down.double().numpy(), rcond=1e-6))
    inside = float((centred @ columns).square().sum() / centred.square().sum())
    return Spread(dimensions, max(0.0, 1 - inside))


@torch.no_grad()
def steers(model: nn.Module, adapters: Adapters, rows: Sequence[Row]) -> Tensor:
    """Return what `adapters` add to the one block's steered tokens, `[n, d]`."""
    with capture({"state": resolve(model).at[adapters.location, 0]}) as seen:
        model(input_ids=collate(rows, pad_id=0)["input_ids"])
    return adapters.by_layer[0](seen["state"][:, 1:]).flatten(0, 1)

"""A block's modules are named by hand, family by family, and called by themselves."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.support.textbook.definitions import Array, to_numpy


def branch_modules(block: Any) -> dict[str, Any]:
    """The modules whose outputs are added to, and become, the residual stream."""
    kind = type(block).__name__
    if kind.startswith("Gemma"):
        pair = block.post_attention_layernorm, block.post_feedforward_layernorm
    elif kind.startswith("GPT2"):
        pair = block.attn, block.mlp
    elif kind.startswith("GPTNeoX"):
        pair = block.attention, block.mlp
    elif kind.startswith("OPT"):
        pair = block.self_attn, block.fc2
    elif kind.startswith("Olmo2"):
        pair = block.post_attention_layernorm, block.post_feedforward_layernorm
    else:
        pair = block.self_attn, block.mlp
    return {"pre_mlp": pair[0], "post_mlp": pair[1], "post_block": block}


def mlp_input_module(block: Any) -> Any:
    return block.fc1 if hasattr(block, "fc1") else block.mlp


def is_parallel(block: Any) -> bool:
    """Tell whether the MLP reads nothing of what attention adds."""
    return type(block).__name__.startswith(("GPTNeoX", "Falcon"))


WITH_A_TAIL = ("Llama", "Gemma", "Qwen3", "Olmo2", "Phi3", "GPT2")


def attention_projection(block: Any) -> Any:
    """The projection of the attention heads' outputs, in families whose MLP follows attention."""
    return block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj


def heads_matrix(block: Any, z: Array) -> tuple[Array, Array]:
    """The matrix from the heads to the stream, and each token's factor of what is to be supplied.

    With a root-mean-square norm behind the projection: its weights times the matrix, and the root
    mean square of what enters it.
    """
    projection = attention_projection(block)
    weight = to_numpy(projection.weight)
    post = branch_modules(block)["pre_mlp"]
    if "Norm" not in type(post).__name__:
        return weight, np.ones((len(z), 1))
    y = z @ weight.T
    factor = np.sqrt(np.mean(y**2, 1, keepdims=True) + 1e-6)
    return (1 + to_numpy(post.weight))[:, None] * weight, factor  # as Gemma has it


def heads_output(block: Any, z: torch.Tensor) -> torch.Tensor:
    """What the heads' outputs `z` `[n, d_z]` add to the stream, by the block's own modules."""
    attended = attention_projection(block)(z)
    post = branch_modules(block)["pre_mlp"]
    is_norm = "Norm" in type(post).__name__
    return post(attended) if is_norm else attended


def sublayer(block: Any, x: torch.Tensor) -> torch.Tensor:
    """The block behind the first skip, on tokens `[n, d]`, by its own modules."""
    kind = type(block).__name__
    if kind.startswith("Gemma"):
        inner = block.mlp(block.pre_feedforward_layernorm(x))
        return x + block.post_feedforward_layernorm(inner)
    if kind.startswith("Olmo2"):
        return x + block.post_feedforward_layernorm(block.mlp(x))
    if kind.startswith("GPT2"):
        return x + block.mlp(block.ln_2(x))
    return x + block.mlp(block.post_attention_layernorm(x))


def per_token_jacobian(function: Callable[[torch.Tensor], torch.Tensor], x: Array) -> Array:
    """``[n, d_out, d_in]`` of a map of tokens, one token at a time by reverse mode."""
    one = torch.func.jacrev(lambda token: function(token[None])[0])
    return np.stack([to_numpy(one(token)) for token in torch.from_numpy(x)])


def mlp_output(block: Any, h: Array) -> Array:
    """The MLP module itself on `h` `[n, d]`, in the precision of its weights."""
    parameter = next(block.parameters())
    x = torch.from_numpy(h).to(parameter.dtype)
    is_opt = hasattr(block, "fc1")
    return to_numpy(block.fc2(block.activation_fn(block.fc1(x))) if is_opt else block.mlp(x))

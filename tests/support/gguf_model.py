"""A tiny Llama as a GGUF file, without a tokenizer, as llama.cpp's converter would write it."""

import re

import numpy as np
from gguf import GGUFWriter

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model, path):
    """Write the float32 weights of a LlamaForCausalLM."""
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        values = np.ascontiguousarray(weight.float().numpy())
        name = name.removesuffix(".weight")
        if found := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
            short = NAMES[found[2]]
            if short in heads:  # llama.cpp rotates neighbours, transformers halves
                rows = values.reshape(heads[short], 2, -1, values.shape[1]).swapaxes(1, 2)
                values = np.ascontiguousarray(rows.reshape(values.shape))
            name = f"blk.{found[1]}.{short}"
        else:
            name = OTHERS[name]
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

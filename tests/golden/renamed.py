"""Checkpoints of families that bring their own code and have no class in transformers: saved by a
class that computes the same, rewritten under the names of that code.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

Tensors = dict[str, torch.Tensor]

QWEN_NAMES = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    ".input_layernorm.": ".ln_1.",
    ".self_attn.o_proj.": ".attn.c_proj.",
    ".post_attention_layernorm.": ".ln_2.",
    ".mlp.up_proj.": ".mlp.w1.",
    ".mlp.gate_proj.": ".mlp.w2.",
    ".mlp.down_proj.": ".mlp.c_proj.",
}
QWEN_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings",
)  # fmt: skip
INTERNLM2_NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.",
    ".input_layernorm.": ".attention_norm.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    "lm_head.": "output.",
}
PHI_NAMES = {
    "lm_head.": "lm_head.linear.",
    "model.embed_tokens.": "transformer.embd.wte.",
    "model.layers.": "transformer.h.",
    "model.final_layernorm.": "lm_head.ln.",
    ".input_layernorm.": ".ln.",
    ".self_attn.dense.": ".mixer.out_proj.",
}
LLAMA_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def as_first_qwen(path: pathlib.Path) -> None:
    """Qwen2 with as many KV heads as others."""
    tensors, config = read(path)
    fields = {name: config[name] for name in QWEN_FIELDS} | {
        "model_type": "qwen",
        "intermediate_size": 2 * config["intermediate_size"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "no_bias": True,
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": config["max_position_embeddings"],
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    write(path, join_qkv(tensors, "attn.c_attn"), QWEN_NAMES, fields)


def as_internlm2(path: pathlib.Path) -> None:
    """Llama with biases of attention."""
    tensors, config = read(path)
    n_kv_heads = config["num_key_value_heads"]
    fields = {name: config[name] for name in LLAMA_FIELDS} | {
        "model_type": "internlm2",
        "bias": config["attention_bias"],
        "max_position_embeddings": config["max_position_embeddings"],
        "num_key_value_heads": n_kv_heads,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},  # beyond these positions
        "rope_theta": config["rope_parameters"]["rope_theta"],
    }
    write(path, join_qkv(tensors, "attention.wqkv", n_kv_heads), INTERNLM2_NAMES, fields)


def as_first_phi(path: pathlib.Path) -> None:
    """Phi."""
    tensors, config = read(path)
    rope = config["rope_parameters"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    fields = {
        "model_type": "phi-msft",
        "vocab_size": config["vocab_size"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_head_kv": config["num_key_value_heads"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_positions": config["max_position_embeddings"],
        "rotary_dim": int(rope["partial_rotary_factor"] * head_dim),
        "activation_function": config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "tie_word_embeddings": False,
    }
    write(path, join_qkv(tensors, "mixer.Wqkv"), PHI_NAMES, fields)


def as_baichuan_7b(path: pathlib.Path) -> None:
    """Llama with as many KV heads as others, and a head of rows of length one."""
    tensors, config = read(path)
    fields = {name: config[name] for name in LLAMA_FIELDS} | {"model_type": "baichuan"}
    fields |= {"max_position_embeddings": config["max_position_embeddings"]}
    write(path, join_qkv(tensors, "self_attn.W_pack"), {}, fields)


def as_baichuan_13b(path: pathlib.Path) -> None:
    """The same with ALiBi."""
    tensors, config = read(path)
    fields = {name: config[name] for name in LLAMA_FIELDS} | {"model_type": "baichuan"}
    fields |= {"model_max_length": config["max_position_embeddings"]}
    write(path, join_qkv(tensors, "self_attn.W_pack"), {}, fields)


def with_unit_head(model: Any) -> Any:
    """Of Baichuan 2, whose code normalises the head's rows before it takes their products."""
    model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data)
    return model


def with_alibi(model: Any) -> Any:
    """Nothing turns; scores fall with distance."""
    model.model.rotary_emb.inv_freq.zero_()
    transformers.AttentionInterface.register("alibi", alibi_attention)
    model.config._attn_implementation = "alibi"
    return with_unit_head(model)


def alibi_attention(
    layer: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **_
):
    """Of queries for the last tokens of the keys'; the causal mask is made here."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    bias = build_alibi_tensor(torch.ones(1, n_keys), query.shape[1], query.dtype)
    is_later = torch.ones(n_queries, n_keys).triu(n_keys - n_queries + 1).bool()
    scores = query @ key.transpose(2, 3) * scaling + bias[None]
    weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


RENAMED: dict[str, Callable[[pathlib.Path], None]] = {  # golden -> what rewrites it
    "baichuan_13b": as_baichuan_13b,
    "baichuan_7b": as_baichuan_7b,
    "internlm2": as_internlm2,
    "phi_msft": as_first_phi,
    "qwen": as_first_qwen,
}
# Golden -> what makes the class that was saved compute as that code does, where it does not.
REFERENCES: dict[str, Callable[[Any], Any]] = {
    "baichuan_13b": with_alibi,
    "baichuan_7b": with_unit_head,
}


def read(path: pathlib.Path) -> tuple[Tensors, dict[str, Any]]:
    config = json.loads((path / "config.json").read_text())
    return safetensors.torch.load_file(path / "model.safetensors"), config


def join_qkv(tensors: Tensors, name: str, n_groups: int = 1) -> Tensors:
    """Queries, keys and values as one tensor of that name, group by group of heads."""
    joined = {}
    for old, tensor in tensors.items():
        if ".self_attn.q_proj." in old:
            parts = [tensors[old.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            groups = zip(*[part.chunk(n_groups) for part in parts], strict=True)
            new = old.replace("self_attn.q_proj", name)
            joined[new] = torch.cat([tensor for group in groups for tensor in group])
        elif ".k_proj." not in old and ".v_proj." not in old:
            joined[old] = tensor
    return joined


def write(
    path: pathlib.Path, tensors: Tensors, names: dict[str, str], config: dict[str, Any]
) -> None:
    """Replaces the checkpoint by these tensors, with parts of their names replaced in turn."""
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

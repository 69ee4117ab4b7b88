"""Configs and checkpoints in other forms than transformers 5 writes, as the hub has them; and
variants that are refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoints import loading, weights
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.engine import startup
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.models import families
from fastgen_jax.models.config import ModelConfig, QueryScale
from fastgen_jax.models.hf_config import alibi_slopes
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.rope import rope_frequencies
from fastgen_jax.models.sharding import make_mesh
from tests.tiny import one_program, random_requests, run, tokens

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT, LONG = [9.0] * 6, [1.0, 1.2, 1.5, 2.0, 3.0, 4.0]
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN_OF_GOLDENS = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3_OF_GOLDENS = YARN_OF_GOLDENS | {"type": "llama3", "low_freq_factor": 1.0}


def golden_config(name: str) -> dict[str, Any]:
    return read_json(GOLDEN / name / "config.json")


def read(hf: dict[str, Any]) -> ModelConfig:
    return families.model_config(hf)


def resolve(model: ModelConfig, **options) -> startup.ResolvedConfig:
    return startup.resolve(EngineConfig(**options), model, make_mesh(1))


@pytest.mark.parametrize(
    ("name", "dropped", "added"),
    [
        (
            "phi3_long",
            ["rope_parameters"],
            {"rope_scaling": {"type": "su", "short_factor": SHORT, "long_factor": LONG}},
        ),
        ("gemma", ["rope_parameters"], {"rope_theta": 10000.0, "hidden_act": "gelu"}),
        (
            "gemma",
            ["hidden_act", "tie_word_embeddings"],
            {"hidden_activation": "gelu_pytorch_tanh"},
        ),
        ("gemma2", ["layer_types", "rope_parameters", "tie_word_embeddings"], {}),
        (
            "gemma3_text",
            ["layer_types", "rope_parameters"],
            {"sliding_window_pattern": 2, "rope_scaling": LINEAR}
            | {"rope_theta": 1000.0, "rope_local_base_freq": 50.0},
        ),
        ("qwen2_windows", ["layer_types", "rope_parameters"], {"rope_theta": 10000.0}),
        ("cohere2", ["layer_types"], {"sliding_window_pattern": 2}),
        ("exaone4", ["layer_types"], {"sliding_window_pattern": 2}),
        ("exaone4_global", ["layer_types"], {"sliding_window_pattern": None}),
        (
            "olmo3",
            ["rope_parameters"],
            {"rope_theta": 10000.0} | {"rope_scaling": YARN_OF_GOLDENS | {"attention_factor": 1.2}},
        ),
        ("ernie4_5", ["rope_parameters"], {"rope_theta": 500000.0, "compression_ratio": 1.0}),
        ("glm", ["rope_parameters", "attention_bias"], {"rope_theta": 10000.0}),
        (
            "hunyuan_v1_dense",
            ["rope_parameters"],
            {"rope_theta": 100.0, "use_qk_norm": True, "use_cla": False}
            | {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}},
        ),
        (
            "apertus",
            ["rope_parameters"],
            {"rope_theta": 10000.0, "qk_norm": True, "post_norm": False}
            | {"rope_scaling": LLAMA3_OF_GOLDENS},
        ),
        ("nemotron", ["rope_parameters"], {"rope_theta": 10000.0}),
    ],
)
def test_older_form_of_a_config_reads_alike(name, dropped, added):
    hf = golden_config(name)
    old = {field: value for field, value in hf.items() if field not in dropped} | added
    assert old != hf
    assert read(old) == read(hf)


def test_windows_that_are_turned_off_are_not_used():
    hf = golden_config("qwen2_windows")
    assert read(hf).windows == (None, 40)
    del hf["layer_types"]
    assert read(hf | {"use_sliding_window": False}).windows == ()


def test_exaone_pattern_of_letters_repeats_and_ends_with_a_global_layer():
    hf = golden_config("exaone4") | {"num_hidden_layers": 6, "sliding_window_pattern": "LLG"}
    del hf["layer_types"]
    assert read(hf).windows == (40, 40, None, 40, 40, None)
    config = read(hf | {"num_hidden_layers": 5})
    assert config.windows == (40, 40, None, 40, None)
    assert config.unrotated_layers == (2, 4)


def test_queries_of_devstral_2_do_not_grow():
    hf = golden_config("ministral3")
    rope = hf["rope_parameters"]
    assert read(hf).query_scale == QueryScale(weight=0.4, length=32, layers=(0, 1))
    assert read(hf | {"rope_parameters": rope | {"llama_4_scaling_beta": 0}}).query_scale is None


def test_ministral_without_layer_types_has_windows_everywhere():
    hf = golden_config("ministral") | {"layer_types": None}
    assert read(hf).windows == (40, 40)
    assert read(hf | {"sliding_window": None}).windows == ()
    assert read({field: hf[field] for field in hf if field != "sliding_window"}).windows[0] == 4096


def test_first_config_of_phi_2_says_what_differs_from_its_shape():
    hf = {"model_type": "phi-msft", "vocab_size": 51200, "n_embd": 2560, "n_head": 32}
    hf |= {"n_head_kv": None, "n_inner": None, "n_layer": 32, "n_positions": 2048}
    config = read(hf | {"rotary_dim": 32, "tie_word_embeddings": False})
    assert (config.n_kv_heads, config.head_dim, config.ffn_size) == (32, 80, 10240)
    assert config.rope is not None and config.rope.size == 32


def test_baichuan_13b_is_known_by_its_longest_context_and_the_first_one_by_its_vocabulary():
    small, large = golden_config("baichuan_7b"), golden_config("baichuan_13b")
    config = read(small | {"model_max_length": 4096})  # Baichuan 2 of 7B says both
    assert config.rope is not None and config.alibi_slopes == ()
    assert (config.max_position, config.unit_head) == (256, True)
    config = read(large | {"vocab_size": 64000})
    assert config.rope is None and config.alibi_slopes == alibi_slopes(6)
    assert (config.max_position, config.unit_head) == (256, False)


def test_seed_oss_has_biases_of_queries_keys_and_values_unless_it_says_otherwise():
    hf = golden_config("seed_oss")
    biases = "attention_bias", "attention_out_bias", "mlp_bias"
    config = read({field: value for field, value in hf.items() if field not in biases})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)
    assert not read(hf | {"attention_bias": False}).qkv_bias


def test_smollm3_has_windows_only_where_nothing_turns():
    hf = golden_config("smollm3") | {"use_sliding_window": True, "sliding_window": 40}
    dropped = "layer_types", "no_rope_layers", "tie_word_embeddings"
    config = read({field: value for field, value in hf.items() if field not in dropped})
    assert config.unrotated_layers == (3,)
    assert config.windows == (None, None, None, 40)
    assert config.tie_embeddings


def test_gemma3_config_of_the_hub_says_only_what_differs_from_defaults():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = read({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text})
    assert (config.vocab_size, config.n_heads, config.n_kv_heads) == (262208, 8, 4)
    assert (config.head_dim, config.attention_scale) == (256, 1 / 16)
    assert config.windows[:7] == (1024,) * 5 + (None, 1024)
    assert config.rope is not None and config.local_rope is not None
    assert (config.rope.theta, config.rope.factor) == (1e6, 8.0)
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert config.tie_embeddings and config.eos_token_ids == (1, 106)
    assert resolve(config).max_model_len == 131072  # stretched already


def test_long_factors_are_chosen_once_for_all_contexts():
    config = read(golden_config("phi3_long"))
    is_long = {n: startup.fit_rope(config, n).rope.is_long for n in (64, 65, 256)}
    assert is_long == {64: False, 65: True, 256: True}
    assert resolve(config).max_model_len == 256


@pytest.mark.parametrize("start", ["model.language_model.", "language_model.model."])
def test_text_weights_are_found_under_every_name_that_checkpoints_give_them(tmp_path, start):
    folder, policy, mesh = GOLDEN / "gemma3_text", Policy(), make_mesh(1)
    stored = load_file(folder / "model.safetensors")
    assert all(name.startswith("model.") for name in stored)
    renamed = {start + n.removeprefix("model."): tensor for n, tensor in stored.items()}
    vision = {"vision_tower.vision_model.head.probe": np.zeros(3, np.float32)}
    save_file(renamed | vision, tmp_path / "model.safetensors")
    text = golden_config("gemma3_text")
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": 2, "bos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(outer))

    def parameters(directory):
        model = loading.load_model(directory, read_config(directory), policy, mesh)
        return {path: param[...] for path, param in loading.flat_params(model).items()}

    found, expected = parameters(tmp_path), parameters(folder)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


def test_mistral_has_a_window_unless_its_config_says_none():
    hf = golden_config("mistral")
    assert read(hf | {"sliding_window": None}).windows == ()
    del hf["sliding_window"]
    assert read(hf).windows == (4096, 4096)
    assert (
        read(
            hf | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
        ).windows
        == ()
    )


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("qwen3_next", "its layers keep a recurrent state beside the KV cache"),
        ("lfm2", "its layers keep the inputs of convolutions"),
        ("deepseek_v32", "its attention looks tokens up by an index"),
        ("gemma3n", "its layers share KV caches"),
        ("t5", "it is an encoder, or has one; only decoders are served"),
    ],
)
def test_known_types_that_are_not_served_are_refused_with_the_reason(model_type, message):
    with pytest.raises(ConfigError, match=f"'{model_type}' is not supported: {message}"):
        read({"model_type": model_type})


def test_unknown_type_is_refused_with_the_nearest_known_ones():
    with pytest.raises(ConfigError, match="'qwen33' is not supported; did you mean 'qwen3' or"):
        read({"model_type": "qwen33"})
    with pytest.raises(ConfigError, match=r"'xyz' is not supported; known: .*llama, "):
        read({"model_type": "xyz"})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("phi3", {"attention_bias": True}, "attention_bias=True in config.json is not supported"),
        ("phi3", {"rope_parameters": LINEAR}, "phi3 with a rope type other than longrope"),
        (
            "phi3_long",
            {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "longrope"}},
            r"longrope needs 8 short factors and as many long ones, got \(0, 0\)",
        ),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block=False.*only True"),
        ("qwen", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("exaone4", {"layer_types": ["chunked_attention"] * 3}, r"\['chunked_attention'\]"),
        ("gemma2", {"hidden_activation": "mish"}, "activation 'mish' is not supported"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "elementwise_affine=False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.0}, "rotary size must be .* got 0"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("mpt", {"no_bias": False}, "no_bias=False"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale=0.5"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type='rmsnorm' is not supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi=False"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln=True"),
        ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "multiquery_attention"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type='rms_norm'"),
        (
            "granitemoehybrid",
            {"layer_types": ["mamba", "attention"]},
            r"\['mamba'\]: .*a recurrent",
        ),
        ("granitemoehybrid", {"layer_types": None}, r"\['mamba'\]: its layers keep a recurrent"),
        ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts=4"),
        ("ministral3", {"is_causal": False}, "is_causal=False in config.json is not supported"),
        (
            "ministral3",
            {"rope_parameters": {"llama_4_scaling_beta": 1, "original_max_position_embeddings": 0}},
            "length at which queries grow must be a positive integer, got 0",
        ),
        ("ernie4_5", {"compression_ratio": 2.0}, "compression_ratio=2.0"),
        ("hunyuan_v1_dense", {"use_cla": True}, "use_cla=True"),
        ("apertus", {"post_norm": True}, "post_norm=True"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act=.silu."),
        ("phi_msft", {"num_local_experts": 4}, "num_local_experts=4"),
        ("baichuan_7b", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
)
def test_variant_that_is_not_supported_is_refused(name, changes, message):
    hf = golden_config(name)
    read(hf)
    with pytest.raises(ConfigError, match=message):
        read(hf | changes)


def test_first_qwen_serves_no_context_beyond_what_it_was_trained_on():
    config = read(golden_config("qwen") | {"max_position_embeddings": 512})
    with pytest.raises(ConfigError, match="max_model_len=257 exceeds the 256 positions"):
        resolve(config, max_model_len=257)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "phi3", "opt", "falcon_40b", "bloom"])
def test_two_devices_make_the_same_tokens(name):
    requests = random_requests(17, 4, longest=70, max_tokens=12)
    one, two = (
        one_program(
            EngineConfig(
                model=str(GOLDEN / name),
                max_model_len=96,
                num_kv_blocks=64,
                max_num_batched_tokens=16,
                tensor_parallel_size=n_devices,
            )
        )
        for n_devices in (1, 2)
    )
    expected = [tokens(outputs) for outputs in run(one, requests)]
    assert [tokens(outputs) for outputs in run(two, requests)] == expected


ROPE = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}}
GPT = {"n_embd": 64, "n_head": 8, "n_layer": 3, "n_positions": 99}
GPT_ALIASES = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "max_position_embeddings": 99,
}


@pytest.mark.parametrize(
    ("name", "fields", "aliases"),
    [
        ("gpt_neox", ROPE, {"rotary_pct": 0.75, "rotary_emb_base": 500}),
        ("phi", ROPE, {"partial_rotary_factor": 0.75, "rope_theta": 500.0}),
        ("stablelm", ROPE, {"partial_rotary_factor": 0.75, "rope_theta": 500.0}),
        ("falcon_7b", {"rope_parameters": {"rope_theta": 500.0}}, {"rope_theta": 500.0}),
        ("starcoder2", {"rope_parameters": {"rope_theta": 500.0}}, {"rope_theta": 500.0}),
        ("gpt2", GPT, GPT_ALIASES),
        ("gptj", GPT, GPT_ALIASES),
        ("bloom", {"hidden_size": 64, "n_head": 8}, {"n_embed": 64, "num_attention_heads": 8}),
        ("mpt", {"d_model": 64, "n_heads": 8}, {"hidden_size": 64, "num_attention_heads": 8}),
        ("falcon_40b", {"num_kv_heads": 4}, {"n_head_kv": 4}),
        ("gpt_bigcode", GPT, GPT_ALIASES),
    ],
)
def test_fields_under_other_names_read_alike(name, fields, aliases):
    hf = golden_config(name)
    config = read(hf | fields)
    assert config != read(hf)
    assert read({key: hf[key] for key in hf if key not in fields} | aliases) == config


def test_gptj_without_rotary_dim_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(golden_config("gptj") | {"rotary_dim": None}))
    with pytest.raises(ConfigError, match="lacks 'rotary_dim'"):
        read_config(tmp_path)


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(6) == (*(2.0 ** (-2 * i) for i in range(1, 5)), 2.0**-1, 2.0**-3)
    assert alibi_slopes(4, max_bias=16) == (2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16)


@pytest.mark.parametrize(
    ("name", "prefix", "buffers"),  # a prefix that names lack on the hub; tensors nothing needs
    [
        ("opt", "model.", ["decoder.version"]),
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("bloom", "transformer.", []),
        ("gptj", "", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("phi", "", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
        ("stablelm", "", ["model.layers.1.self_attn.rotary_emb.inv_freq"]),
        ("gpt_neox", "", ["gpt_neox.layers.0.attention.masked_bias"]),
        ("gpt_neox", "", ["gpt_neox.layers.1.attention.rotary_emb.inv_freq"]),
        ("gpt_neox", "", ["gpt_neox.layers.1.attention.bias"]),
    ],
)
def test_checkpoints_as_the_hub_has_them_load_alike(tmp_path, name, prefix, buffers):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    assert all(name.startswith(prefix) for name in tensors)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    mask = np.ones((1, 1, 4, 4), np.bool_)
    assert_loads_as(name, tensors | dict.fromkeys(buffers, mask), tmp_path)


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_head_has_two_names(tmp_path, head):
    tensors = load_file(GOLDEN / "gpt_neox" / "model.safetensors")
    (known,) = {"embed_out.weight", "lm_head.weight"} & set(tensors)
    assert_loads_as("gpt_neox", tensors | {head: tensors.pop(known)}, tmp_path)


def test_weight_that_the_config_has_no_place_for_is_not_dropped(tmp_path):
    tensors = load_file(GOLDEN / "stablelm_parallel" / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    hf = golden_config("stablelm_parallel") | {"qk_layernorm": False}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    message = "unused: .*q_layernorm.norms.0.weight .*the config says there is no such parameter"
    with pytest.raises(CheckpointError, match=message):
        loading.load_model(tmp_path, read(hf), Policy(), make_mesh(1))


def assert_loads_as(name: str, tensors: dict[str, np.ndarray], directory: Path) -> None:
    """The tensors, saved to the directory, give the same parameters as that golden's."""
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(golden_config(name)))
    config = read(golden_config(name))
    found, expected = (
        loading.flat_params(loading.load_model(path, config, Policy(), make_mesh(1)))
        for path in (directory, GOLDEN / name)
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path][...], expected[path][...]) for path in expected)


DEEPSEEK_ROPE = YARN_OF_GOLDENS | {"mscale": 0.7, "mscale_all_dim": 1.2}


@pytest.mark.parametrize(
    ("name", "dropped", "added"),
    [
        (
            "qwen2_moe",
            ["rope_parameters", "qkv_bias", "norm_topk_prob"],
            {"rope_theta": 10000.0, "norm_topk_prob": False},
        ),
        (
            "qwen3_moe",
            ["num_local_experts", "rope_parameters", "mlp_only_layers"],
            {"num_experts": 6, "rope_theta": 10000.0, "rope_scaling": None},
        ),
        ("olmoe", ["rope_parameters", "clip_qkv"], {"rope_theta": 10000.0}),
        (
            "gpt_oss",
            ["rope_parameters", "layer_types", "swiglu_alpha", "attention_bias"],
            {"rope_theta": 10000.0, "rope_scaling": YARN_OF_GOLDENS | {"truncate": False}},
        ),
        (
            "deepseek_v2_lite",
            ["rope_parameters", "head_dim", "qk_head_dim"],
            {"rope_theta": 10000.0, "rope_scaling": DEEPSEEK_ROPE, "moe_layer_freq": 1}
            | {"scoring_func": "softmax", "norm_topk_prob": False},
        ),
        (
            "deepseek_v3",
            ["rope_parameters", "head_dim", "qk_head_dim", "rope_interleave"],
            {"rope_theta": 10000.0, "rope_scaling": DEEPSEEK_ROPE, "moe_layer_freq": 1}
            | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
        (
            "kimi_k2",
            ["rope_parameters", "head_dim", "qk_head_dim", "rope_interleave"],
            {"rope_theta": 10000.0, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
            | {
                "rope_scaling": YARN_OF_GOLDENS
                | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0}
            }
            | {"moe_layer_freq": 1, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.001},
        ),
        (
            "glm4_moe_air",
            ["rope_parameters"],
            {"rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": 0.67},
        ),
        (
            "granitemoeshared",
            ["rope_parameters"],
            {"rope_theta": 10000.0, "rope_scaling": None},
        ),
        (
            "phimoe",
            ["rope_parameters"],
            {"rope_theta": 1000000.0, "rope_scaling": None},
        ),
        (
            "ernie4_5_moe",
            ["rope_parameters"],
            {"rope_theta": 500000.0, "rope_scaling": None, "moe_use_aux_free": True}
            | {"moe_gate_act": None, "num_nextn_predict_layers": 1},
        ),
        (
            "ernie4_5_moe_unshared",
            ["moe_num_shared_experts", "moe_layer_end_index", "moe_layer_interval"],
            {"moe_num_shared_experts": None, "moe_layer_end_index": -1},
        ),
        (
            "llama4_text",
            ["rope_parameters", "layer_types", "moe_layers", "no_rope_layers"],
            {"rope_theta": 500000.0, "rope_scaling": None, "no_rope_layers": []}
            | {"attn_temperature_tuning": 4, "attention_chunk_size": 256},
        ),
        (
            "hunyuan_v1_moe",
            ["rope_parameters", "moe_topk"],
            {"rope_theta": 10000.0, "rope_scaling": None, "moe_topk": [3, 3]}
            | {"moe_intermediate_size": [24, 24], "num_shared_expert": [1, 1]}
            | {"use_mixed_mlp_moe": True, "moe_layer_num_skipped": 0, "use_cla": False},
        ),
        (
            "glm4_moe_lite",
            ["rope_parameters", "head_dim", "qk_head_dim", "rope_interleave", "mlp_layer_types"],
            {"rope_theta": 10000.0, "rope_scaling": DEEPSEEK_ROPE, "first_k_dense_replace": 1}
            | {"topk_method": "noaux_tc", "partial_rotary_factor": 1.0},
        ),
        (
            "exaone_moe",
            ["rope_parameters", "mlp_layer_types", "layer_types", "first_k_dense_replace"],
            {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window_pattern": 2}
            | {"is_moe_layer": [False, True, False], "first_last_k_dense_replace": 1}
            | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
        (
            "dots1",
            ["rope_parameters", "layer_types", "n_group", "topk_group"],
            {"rope_theta": 10000.0, "rope_scaling": None, "n_group": None}
            | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        ),
        (
            "solar_open",
            ["rope_parameters"],
            {"rope_theta": 10000.0, "rope_scaling": YARN_OF_GOLDENS, "use_qk_norm": False}
            | {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0},
        ),
        (
            "flex_olmo",
            ["rope_parameters"],
            {"rope_theta": 500000.0, "rope_scaling": None},
        ),
        (
            "minimax_m2",
            ["rope_parameters", "attention_dropout"],
            {"rope_theta": 5000000, "scoring_func": "sigmoid", "use_routing_bias": True}
            | {"use_qk_norm": True, "qk_norm_type": "per_layer", "attn_type_list": [1, 1]}
            | {"shared_intermediate_size": 0, "use_mtp": True, "num_mtp_modules": 3},
        ),
    ],
)
def test_older_form_of_a_mixtures_config_reads_alike(name, dropped, added):
    hf = golden_config(name)
    old = {field: value for field, value in hf.items() if field not in dropped} | added
    assert old != hf
    assert read(old) == read(hf)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2_moe", {"layer_types": None}, "use_sliding_window without layer_types"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ("gpt_oss", {"rope_parameters": None}, "needs rope_scaling"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'.*only 'softmax'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2.*only 4"),
        ("deepseek_v2", {"v_head_dim": 24}, "values of 24 elements, larger than keys of 20"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "at least two experts"),
        ("kimi_k2", {"scoring_func": "softmax"}, "kimi_k2: scoring_func='softmax'"),
        ("glm4_moe", {"n_group": 3}, "8 experts do not divide into 3 groups"),
        ("minimax_m2", {"attn_type_list": [0, 1]}, r"attn_type_list=\[0, 1\]"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1.*only 2"),
        ("phimoe", {"rope_parameters": LINEAR}, "phimoe with a rope type other than longrope"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias=True"),
        ("ernie4_5_moe", {"moe_use_aux_free": False}, "moe_use_aux_free=False"),
        ("hunyuan_v1_moe", {"moe_topk": [3, 2]}, "layers with different moe_topk"),
        ("hunyuan_v1_moe", {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe=False"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True"),
        ("glm4_moe_lite", {"topk_method": "greedy"}, "glm4_moe_lite: topk_method='greedy'"),
        ("exaone_moe", {"scoring_func": "softmax"}, "exaone_moe: scoring_func='softmax'"),
        ("dots1", {"moe_layer_freq": 2}, "dots1: moe_layer_freq=2"),
        ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
        ("solar_open", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm=False"),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    ],
)
def test_mixtures_that_nothing_here_computes_are_refused(name, changes, message):
    hf = golden_config(name)
    read(hf)
    with pytest.raises(ConfigError, match=message):
        read(hf | changes)


def test_llama4_serves_contexts_that_are_one_chunk():
    hf = golden_config("llama4_text") | {"max_position_embeddings": 1024}
    assert read(hf).max_position == 256
    assert read(hf | {"layer_types": None}).max_position == 256
    assert read(hf | {"attention_chunk_size": None}).max_position == 1024
    assert read(hf | {"layer_types": ["full_attention"] * 2}).max_position == 1024


def test_phimoe_scales_rotations_as_its_config_says():
    config = read(golden_config("phimoe_longrope"))
    ropes = {n: startup.fit_rope(config, n).rope for n in (256, 257)}
    assert {n: rope_frequencies(8, rope)[1] for n, rope in ropes.items()} == {256: 1.3, 257: 1.7}


def test_experts_are_in_the_layers_that_the_config_says():
    hf = golden_config("qwen3_moe")
    assert read(hf).moe.layers == (1, 3)
    assert read(hf | {"mlp_only_layers": [3]}).moe.layers == (1,)
    assert read(hf | {"decoder_sparse_step": 1, "mlp_only_layers": [0]}).moe.layers == (1, 2, 3)
    assert read(golden_config("deepseek_v3")).moe.layers == (1,)
    ernie = golden_config("ernie4_5_moe")
    assert read(ernie).moe.layers == (1,)
    assert read(ernie | {"moe_layer_end_index": 3}).moe.layers == (1, 3)
    assert read(ernie | {"moe_layer_start_index": 2, "moe_layer_end_index": -1}).moe.layers == (3,)


def test_yarn_of_deepseek_v3_scales_attention_not_queries():
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    rope |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    sizes = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    hf = golden_config("deepseek_v3") | sizes | {"rope_parameters": None, "rope_scaling": rope}
    config = read(hf)
    assert config.head_dim == 192
    assert config.rope is not None and config.rope.size == 64
    assert config.attention_scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert rope_frequencies(64, config.rope)[1] == 1.0


@pytest.mark.parametrize(
    ("name", "extra", "is_known"),
    [
        ("deepseek_v3", "model.layers.2.eh_proj.weight", True),
        ("deepseek_v3", "model.layers.1.eh_proj.weight", False),
        ("glm4_moe", "model.layers.2.eh_proj.weight", True),
        ("ernie4_5_moe", "model.mtp_linear_proj.0.weight", True),
    ],
)
def test_layer_that_predicts_a_second_token_is_ignored(tmp_path, name, extra, is_known):
    for file in ("config.json", "model.safetensors"):
        copy = file.replace("model", "first")  # no index: all files are read
        (tmp_path / copy).write_bytes((GOLDEN / name / file).read_bytes())
    save_file({extra: np.zeros((32, 64), np.float32)}, tmp_path / "second.safetensors")
    config = read_config(tmp_path)
    params = loading.flat_params(loading.abstract_model(config, Policy()))
    if is_known:
        assert set(loading.find_parts(tmp_path, config, params)) == set(params)
    else:
        with pytest.raises(CheckpointError, match=f"unused: {re.escape(extra)}"):
            loading.find_parts(tmp_path, config, params)


@pytest.mark.parametrize("part", ["experts", "experts_gate_up"])
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 8)])
def test_experts_in_one_tensor_are_written_as_they_were_read(part, shape):
    source = weights.Source("experts", "layers.0.mlp.down", part)
    config = read(golden_config("gpt_oss"))
    on_disk = weights.tensor_shape(source, shape, config)
    assert on_disk == (shape[0], *shape[:0:-1])
    tensor = np.arange(np.prod(on_disk)).reshape(on_disk)
    parameter = np.empty(shape, tensor.dtype)
    weights.fill(source, parameter, tensor, config)
    np.testing.assert_array_equal(weights.extract(source, parameter, config), tensor)
    if part == "experts_gate_up":
        gate, up = np.split(parameter, 2, axis=1)
        np.testing.assert_array_equal(gate[1].T, tensor[1, ..., ::2])
        np.testing.assert_array_equal(up[1].T, tensor[1, ..., 1::2])

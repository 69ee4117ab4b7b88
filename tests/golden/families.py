"""Tiny configurations of every model family, as `transformers.AutoConfig.for_model` takes them.

At least one for each variant of a family that its code knows. Weights are large (initializer_range)
so that attention is sharp.
"""

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 6, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
YARN |= {"original_max_position_embeddings": 32}
GPT_OSS = MOE | {"head_dim": 16, "sliding_window": 40, "swiglu_limit": 1.5}
GPT_OSS |= {"rope_parameters": YARN | {"truncate": False}}
DEEPSEEK = {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
DEEPSEEK |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
DEEPSEEK |= {"first_k_dense_replace": 1, "num_key_value_heads": 4, "n_shared_experts": 2}
DEEPSEEK |= {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}
DEEPSEEK |= {"rms_norm_eps": 0.01}  # not the latents' norms'
ERNIE_MOE = {"model_type": "ernie4_5_moe", "moe_num_experts": 6, "moe_k": 3}
ERNIE_MOE |= {"moe_intermediate_size": 24}
LLAMA4 = {"model_type": "llama4_text", "intermediate_size_mlp": 40, "intermediate_size": 24}
LLAMA4 |= {"num_local_experts": 6, "no_rope_layer_interval": 2, "attention_chunk_size": 256}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0}
GRANITE |= {"residual_multiplier": 0.6, "attention_multiplier": 0.2}
GRANITE_4 = GRANITE | {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}
GRANITE_4 |= {"num_local_experts": 0, "shared_intermediate_size": 40, "mamba_n_heads": 8}
GRANITE_4 |= {"position_embedding_type": "rope"}
GLM_MOE = {"model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 3}
GLM_MOE |= {"moe_intermediate_size": 24, "head_dim": 12}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
OLDER = {  # families that know neither KV heads nor a feed-forward size
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}
OPT = OLDER | {"model_type": "opt", "ffn_dim": 48, "init_std": 0.25, "max_position_embeddings": 256}
GPT2 = OLDER | {"model_type": "gpt2", "max_position_embeddings": 256}
NEOX = OLDER | {"model_type": "gpt_neox", "intermediate_size": 48, "max_position_embeddings": 256}
MPT = OLDER | {"model_type": "mpt", "max_seq_len": 256}
FALCON = OLDER | {"model_type": "falcon", "max_position_embeddings": 256}
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6}  # for ALiBi, no power of two
TIED = {"tie_word_embeddings": True}
PHI3 = {"model_type": "phi3", "pad_token_id": 0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0}
GEMMA3 = (
    SHAPE
    | TIED
    | {"num_hidden_layers": 3, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 40}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        }
    }
)
SEES: dict[str, Any] = {  # the part that sees, of most models that do
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    },
    "image_token_index": 70,
    "tie_word_embeddings": False,
}
QWEN_SEES = SEES | {
    "vision_config": {
        "depth": 1,
        "embed_dim": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_heads": 1,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
        "fullatt_block_indexes": [0],
    },
}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
LLAMA, QWEN2 = SHAPE | {"model_type": "llama"}, SHAPE | {"model_type": "qwen2"}
QWEN2_VL = SHAPE | {"rope_parameters": MROPE}
QWEN3_VL = SHAPE | {"head_dim": 12, "rope_parameters": MROPE | {"mrope_section": [3, 2, 1]}}
GLM_SEES = SEES | {"vision_config": QWEN_SEES["vision_config"] | {"image_size": 8}}
GLM4V = SHAPE | {"model_type": "glm4v_text"}
GLM4V |= {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}
HEARS = {"audio_config": {"encoder_layers": 1, "encoder_attention_heads": 1, "d_model": 8}}
HEARS["audio_config"] |= {"encoder_ffn_dim": 8, "num_mel_bins": 8, "max_source_positions": 8}
HEARS["audio_config"] |= {"intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": SHAPE | {"model_type": "qwen2"},
    "mixtral": SHAPE | MOE | {"model_type": "mixtral", "sliding_window": None},
    "mistral": SHAPE | {"model_type": "mistral", "sliding_window": 50},
    "mistral_nemo": SHAPE | {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "ministral3": SHAPE
    | {"model_type": "ministral3", "sliding_window": None, "head_dim": 12}
    | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.4, "mscale": 1.0}
       | {"mscale_all_dim": 1.0}},
    "qwen": SHAPE | {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2_windows": SHAPE
    | {"model_type": "qwen2", "tie_word_embeddings": True}
    | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "qwen3": SHAPE | {"model_type": "qwen3", "head_dim": 12},
    "phi3": SHAPE | PHI3 | {"sliding_window": 50},
    "phi3_short": SHAPE
    | PHI3
    | {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    | {"rope_parameters": LONGROPE | {"short_factor": [1.0, 1.1, 1.2, 1.5]}
       | {"long_factor": [9.0] * 4}},
    "phi3_long": SHAPE
    | PHI3
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    | {"original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    | {"rope_parameters": LONGROPE | {"short_factor": [9.0] * 6}
       | {"long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0]}},
    "gemma": SHAPE | TIED | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 12},
    "gemma2": SHAPE
    | TIED
    | {"model_type": "gemma2", "head_dim": 12, "query_pre_attn_scalar": 20}
    | {"sliding_window": 40, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": GEMMA3 | {"model_type": "gemma3_text"},
    "olmo2": SHAPE | {"model_type": "olmo2"},
    "granite": SHAPE | GRANITE | {"model_type": "granite"},
    "cohere": SHAPE | TIED | {"model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.5},
    "cohere_biases": SHAPE | {"model_type": "cohere", "attention_bias": True, "logit_scale": 0.3},
    "cohere2": SHAPE
    | TIED
    | {"model_type": "cohere2", "num_hidden_layers": 3, "sliding_window": 40, "logit_scale": 0.5}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4": SHAPE
    | {"model_type": "exaone4", "num_hidden_layers": 3, "sliding_window": 40}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "exaone4_global": SHAPE
    | TIED
    | {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "opt": OPT,
    "opt_350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt_bare": OPT
    | {"enable_bias": False, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2_unscaled": GPT2
    | {"scale_attn_weights": False, "n_inner": 48, "tie_word_embeddings": False}
    | {"activation_function": "relu", "initializer_range": 0.15},
    "gptj": OLDER | {"model_type": "gptj", "max_position_embeddings": 256, "rotary_dim": 4},
    "gpt_neox": NEOX | {"rotary_pct": 0.5},
    "gpt_neox_sequential": NEOX
    | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
    | {"rotary_pct": 1.0, "rotary_emb_base": 1000.0, "hidden_act": "gelu_fast"},
    "bloom": OLDER | {"model_type": "bloom"},
    "bloom_six_heads": OLDER | SIX_HEADS | {"model_type": "bloom", "tie_word_embeddings": False},
    "mpt": MPT,
    "mpt_six_heads": MPT
    | SIX_HEADS
    | {"attn_config": {"clip_qkv": 2.0, "softmax_scale": 0.5}},
    "falcon_7b": FALCON,
    "falcon_40b": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_11b": FALCON
    | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
    | {"ffn_hidden_size": 48, "rope_theta": 500.0, "tie_word_embeddings": False},
    "falcon_rw": FALCON
    | SIX_HEADS
    | {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
    "phi": SHAPE | {"model_type": "phi"},
    "stablelm": SHAPE | {"model_type": "stablelm", "use_qkv_bias": True},
    "stablelm_parallel": SHAPE
    | {"model_type": "stablelm", "use_parallel_residual": True, "qk_layernorm": True}
    | {"partial_rotary_factor": 0.5},
    "starcoder2": SHAPE | {"model_type": "starcoder2", "sliding_window": 50},
    "starcoder2_bare": SHAPE
    | {"model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": True},
    "smollm3": SHAPE | {"model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0},
    "olmo3": SHAPE
    | {"model_type": "olmo3", "num_hidden_layers": 3, "sliding_window": 40, "pad_token_id": 0}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    | {
        "rope_parameters": {
            "full_attention": YARN | {"attention_factor": 1.2},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "seed_oss": SHAPE
    | {"model_type": "seed_oss", "head_dim": 12, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": SHAPE | {"model_type": "ernie4_5", "head_dim": 12, "use_bias": True},
    "ministral": SHAPE
    | {"model_type": "ministral", "head_dim": 12, "sliding_window": 40}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "glm": SHAPE | {"model_type": "glm", "head_dim": 12, "pad_token_id": 0},
    "glm4": SHAPE
    | {"model_type": "glm4", "head_dim": 16, "attention_bias": False, "pad_token_id": 0},
    "hunyuan_v1_dense": SHAPE
    | {"model_type": "hunyuan_v1_dense", "head_dim": 12, "attention_bias": True}
    | {"rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}
       | {"rope_theta": 100.0}},
    "apertus": SHAPE
    | {"model_type": "apertus", "attention_bias": True, "pad_token_id": 0}
    | {"rope_parameters": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0}
       | {"high_freq_factor": 4.0}},
    "internlm2": SHAPE | {"model_type": "llama", "attention_bias": True},
    "gpt_bigcode": GPT2 | {"model_type": "gpt_bigcode"},
    "gpt_bigcode_heads": GPT2
    | {"model_type": "gpt_bigcode", "multi_query": False, "scale_attn_weights": False}
    | {"initializer_range": 0.15, "tie_word_embeddings": False, "activation_function": "gelu"},
    "phi_msft": SHAPE | {"model_type": "phi"},
    "baichuan_7b": SHAPE | {"model_type": "llama", "num_key_value_heads": 4},
    "baichuan_13b": SHAPE
    | SIX_HEADS
    | {"model_type": "llama", "num_key_value_heads": 6, "intermediate_size": 32},
    "arcee": SHAPE | {"model_type": "arcee", "head_dim": 12, "mlp_bias": True},
    "nemotron": SHAPE | {"model_type": "nemotron"},
    "helium": SHAPE | {"model_type": "helium", "head_dim": 8, "attention_bias": True},
    "qwen2_moe": SHAPE | QWEN_MOE | {
        "model_type": "qwen2_moe", "shared_expert_intermediate_size": 20, "mlp_only_layers": [0],
        "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe": SHAPE | QWEN_MOE | {
        "model_type": "qwen3_moe", "head_dim": 12, "norm_topk_prob": True, "decoder_sparse_step": 2,
        "num_hidden_layers": 4, "attention_bias": True,
    },
    "olmoe": SHAPE | {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": SHAPE | GPT_OSS | {"model_type": "gpt_oss"},
    "gpt_oss_mxfp4": SHAPE | GPT_OSS | {"model_type": "gpt_oss", "intermediate_size": 64},
    "deepseek_v2_lite": SHAPE | DEEPSEEK | {
        "model_type": "deepseek_v2", "q_lora_rank": None, "attention_bias": True,
    },
    "deepseek_v2": SHAPE | DEEPSEEK | GROUPS | {
        "model_type": "deepseek_v2", "q_lora_rank": 20, "topk_method": "group_limited_greedy",
    },
    "deepseek_v3": SHAPE | DEEPSEEK | GROUPS | {
        "model_type": "deepseek_v3", "q_lora_rank": 20, "attention_bias": True,
    },
    "kimi_k2": SHAPE | DEEPSEEK | {
        "model_type": "kimi_k2", "q_lora_rank": 20, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.827, "n_shared_experts": 1,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0},
    },
    "glm4_moe": SHAPE | GLM_MOE | GROUPS | {"use_qk_norm": True},
    "glm4_moe_air": SHAPE | GLM_MOE | {
        "attention_bias": True, "n_shared_experts": 2, "partial_rotary_factor": 0.67,
    },
    "ernie4_5_moe": SHAPE | ERNIE_MOE | {
        "num_hidden_layers": 4, "head_dim": 12, "moe_layer_start_index": 1,
        "moe_layer_end_index": 2, "moe_layer_interval": 2, "moe_num_shared_experts": 1,
    },
    "ernie4_5_moe_unshared": SHAPE | ERNIE_MOE | TIED | {
        "moe_layer_start_index": 0, "moe_num_shared_experts": 0,
    },
    "granitemoe": SHAPE | MOE | GRANITE | {
        "model_type": "granitemoe", "intermediate_size": 24, "attention_bias": True,
        "logits_scaling": 0.5,
    },
    "granitemoehybrid": SHAPE | GRANITE_4,
    "granitemoehybrid_nope": SHAPE | GRANITE_4 | {
        "position_embedding_type": "nope", "attention_bias": True,
    },
    "granitemoeshared": SHAPE | MOE | GRANITE | {
        "model_type": "granitemoeshared", "intermediate_size": 24, "shared_intermediate_size": 20,
        "logits_scaling": 0.5,
    },
    "phimoe": SHAPE | MOE | {
        "model_type": "phimoe", "intermediate_size": 24, "attention_bias": True,
        "lm_head_bias": True, "router_jitter_noise": 0.3, "sliding_window": 50,
    },
    "phimoe_longrope": SHAPE | MOE | {
        "model_type": "phimoe", "intermediate_size": 24, "max_position_embeddings": 1024,
        "rope_parameters": LONGROPE | {
            "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [9.0] * 4, "short_mscale": 1.3,
            "long_mscale": 1.7, "original_max_position_embeddings": 256,
        },
    },
    "glm4_moe_lite": SHAPE | DEEPSEEK | GROUPS | {
        "model_type": "glm4_moe_lite", "q_lora_rank": 20, "v_head_dim": 20,
    },
    "exaone_moe": SHAPE | QWEN_MOE | {
        "model_type": "exaone_moe", "num_hidden_layers": 3, "sliding_window": 40, "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "dense"], "n_group": 3, "topk_group": 2,
    },
    "dots1": SHAPE | {
        "model_type": "dots1", "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "head_dim": 12,
        "sliding_window": 40, "max_window_layers": 1,
    },
    "solar_open": SHAPE | GROUPS | {
        "model_type": "solar_open", "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "head_dim": 12, "attention_bias": True,
        "rope_parameters": YARN,
    },
    "flex_olmo": SHAPE | MOE | {
        "model_type": "flex_olmo", "num_experts": 6, "intermediate_size": 24, "pad_token_id": 0,
    },
    "hunyuan_v1_moe": SHAPE | TIED | {
        "model_type": "hunyuan_v1_moe", "num_experts": 6, "moe_topk": 3, "intermediate_size": 24,
        "head_dim": 12,
    },
    "llama4_text": SHAPE | LLAMA4 | {
        "head_dim": 12, "interleave_moe_layer_step": 2, "floor_scale": 20, "attn_scale": 0.5,
    },
    "llama4_text_unscaled": SHAPE | LLAMA4 | {
        "head_dim": 8, "num_experts_per_tok": 2, "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "rope_parameters": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0},
    },
    "minimax_m2": SHAPE | MOE | {
        "model_type": "minimax_m2", "head_dim": 12, "rotary_dim": 8, "intermediate_size": 24,
    },
    "gemma3": SEES | TIED | {
        "model_type": "gemma3", "text_config": GEMMA3, "mm_tokens_per_image": 4,
    },
    "llama4": {
        "model_type": "llama4", "text_config": SHAPE | LLAMA4 | {"head_dim": 8},
        "vision_config": SEES["vision_config"] | {
            "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8,
        },
    },
    "llava": SEES | {"model_type": "llava", "text_config": LLAMA},
    "llava_next": SEES | {
        "model_type": "llava_next", "image_grid_pinpoints": [[8, 8]],
        "text_config": SHAPE | {"model_type": "mistral", "sliding_window": 50},
    },
    "llava_onevision": SEES | {
        "model_type": "llava_onevision", "image_grid_pinpoints": [[8, 8]], "text_config": QWEN2,
    },
    "exaone4_5": QWEN_SEES | {
        "model_type": "exaone4_5",
        "text_config": SHAPE | {
            "model_type": "exaone4", "num_hidden_layers": 3, "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
    "glm4v": GLM_SEES | {"model_type": "glm4v", "text_config": GLM4V},
    "glm46v": GLM_SEES | {"model_type": "glm46v", "text_config": GLM4V},
    "glm4v_moe": GLM_SEES | {
        "model_type": "glm4v_moe",
        "text_config": SHAPE | GLM_MOE | GROUPS | {
            "model_type": "glm4v_moe_text", "n_shared_experts": 2,
            "rope_parameters": MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]},
        },
    },
    "internvl": SEES | {"model_type": "internvl", "text_config": QWEN2},
    "mistral3": SEES | {
        "model_type": "mistral3", "text_config": SHAPE | {"model_type": "mistral", "head_dim": 12},
    },
    "aya_vision": SEES | TIED | {
        "model_type": "aya_vision",
        "text_config": SHAPE
        | TIED
        # transformers leaves out the scale of an Aya's logits.
        | {"model_type": "cohere2", "sliding_window": 40, "logit_scale": 1.0},
    },
    "idefics3": SEES | {"model_type": "idefics3", "text_config": LLAMA},
    "smolvlm": SEES | {"model_type": "smolvlm", "text_config": LLAMA},
    "qwen2_vl": QWEN_SEES | {"model_type": "qwen2_vl", "text_config": QWEN2_VL},
    "qwen2_5_vl": QWEN_SEES | TIED | {"model_type": "qwen2_5_vl", "text_config": QWEN2_VL | TIED},
    "qwen3_vl": QWEN_SEES | {"model_type": "qwen3_vl", "text_config": QWEN3_VL},
    "qwen3_vl_moe": QWEN_SEES | {
        "model_type": "qwen3_vl_moe", "text_config": QWEN3_VL | QWEN_MOE,
    },
    "qwen2_audio": HEARS | {"model_type": "qwen2_audio", "text_config": QWEN2},
    "voxtral": HEARS | {"model_type": "voxtral", "text_config": LLAMA | {"head_dim": 8}},
}  # fmt: skip

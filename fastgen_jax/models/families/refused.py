"""Model types that are known and not served, and why."""

RECURRENT = "its layers keep a recurrent state beside the KV cache"
CONVOLUTIONS = "its layers keep the inputs of convolutions beside the KV cache"
INDEXED = "its attention looks tokens up by an index that is kept beside the KV cache"
SHARED = "its layers share KV caches, and each reads embeddings of its own"
CROSS = "its layers attend to what an encoder has made of an image"
PREFIX = "its prompts are attended to in both directions"
ENCODER = "it is an encoder, or has one; only decoders are served"

REFUSED = {
    **dict.fromkeys(
        (
            "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "jamba",
            "kimi_linear", "mamba", "mamba2", "minimax", "minimax_m1", "minimax_text_01",
            "nemotron_h", "nemotron_h_omni", "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_5_moe",
            "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "rwkv7",
            "xlstm", "zamba", "zamba2",
        ),
        RECURRENT,
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm2_vl"), CONVOLUTIONS),
    **dict.fromkeys(
        ("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "minimax_m3_vl", "minimax_m3_vl_text"),
        INDEXED,
    ),
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"), SHARED),
    **dict.fromkeys(("mllama", "mllama_text_model"), CROSS),
    "paligemma": PREFIX,
    **dict.fromkeys(
        (
            "albert", "bart", "bert", "camembert", "clip", "convbert", "data2vec-text", "deberta",
            "deberta-v2", "distilbert", "electra", "encoder-decoder", "ernie", "esm", "eurobert",
            "funnel", "longformer", "longt5", "m2m_100", "marian", "mbart", "modernbert", "mpnet",
            "mt5", "nllb-moe", "nomic_bert", "pegasus", "roberta", "seamless_m4t", "siglip",
            "squeezebert", "switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5", "vit",
            "whisper", "xlm-roberta", "xlm-roberta-xl",
        ),
        ENCODER,
    ),
}  # fmt: skip

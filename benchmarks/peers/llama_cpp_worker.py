"""llama.cpp by its C API: prompts in batches of 512 tokens, then all sequences decode together.

The checkpoint is written anew as GGUF, in the dtype asked for, which is its KV cache's too. Every
sequence has a part of the cache for itself (not `kv_unified`: each would look at all cells of all).
"""

import ctypes
import json
import os
import tempfile
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp as ll  # pyright: ignore[reportMissingImports]
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from benchmarks.peers.protocol import Generate, serve

BATCH = 512
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
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


def load(path: str, dtype: str) -> tuple[str, Generate]:
    ll.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(Path(path), file, dtype)
        options = ll.llama_model_default_params()
        model = ll.llama_model_load_from_file(str(file).encode(), options)
        assert model, "llama.cpp did not load the GGUF"
    contexts = {}

    def generate(prompts, n_new, _):
        longest = max(len(p) + n for p, n in zip(prompts, n_new, strict=True))
        key = len(prompts), -(-longest // 256) * 256
        if key not in contexts:
            contexts.clear()
            contexts[key] = Batches(model, *key, dtype)
        return contexts[key].generate(prompts, n_new)

    return f"llama-cpp-python {ll.__version__}", generate


def write_gguf(path: Path, file: Path, dtype: str) -> None:
    config = json.loads((path / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weight in load_file(path / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = interleaved(weight, kv_heads)
        if dtype == "float32" or weight.ndim == 1:
            writer.add_tensor(gguf_name(name), weight.astype(np.float32))
        else:
            raw = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16)).view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, layer, part = name.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[name]}.weight"


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbours, Hugging Face's the two halves of a head."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


class Batches:
    """A context for so many sequences, and the one batch that it is asked with."""

    def __init__(self, model, n_seqs: int, longest: int, dtype: str):
        options = ll.llama_context_default_params()
        options.n_ctx = n_seqs * longest
        options.n_batch = options.n_ubatch = BATCH
        options.n_seq_max = n_seqs
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        options.kv_unified = False
        kinds = gguf.GGMLQuantizationType
        kind = kinds.F32 if dtype == "float32" else kinds.BF16
        options.type_k = options.type_v = kind
        self.context = ll.llama_init_from_model(model, options)
        assert self.context, "llama.cpp made no context"
        self.batch = ll.llama_batch_init(BATCH, 0, 1)
        self.n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def generate(self, prompts, n_new):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        tokens = [[] for _ in prompts]
        for seq, prompt in enumerate(prompts):
            for start in range(0, len(prompt), BATCH):
                for position in range(start, min(start + BATCH, len(prompt))):
                    self._add(seq, position, prompt[position], position == len(prompt) - 1)
                self._decode(tokens)
        while running := [s for s, n in enumerate(n_new) if len(tokens[s]) < n]:
            for seq in running:
                self._add(seq, len(prompts[seq]) + len(tokens[seq]) - 1, tokens[seq][-1], True)
            self._decode(tokens)
        return tokens

    def _add(self, seq, position, token, has_logits):
        i, batch = self.batch.n_tokens, self.batch
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, has_logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        batch.n_tokens = i + 1

    def _decode(self, tokens):
        code = ll.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        for i in range(self.batch.n_tokens):
            if self.batch.logits[i]:
                logits = ll.llama_get_logits_ith(self.context, i)
                values = np.ctypeslib.as_array(
                    ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.n_vocab,)
                )
                tokens[self.batch.seq_id[i][0]].append(int(values.argmax()))
        self.batch.n_tokens = 0


if __name__ == "__main__":
    serve(load)

"""Writes the tiny random checkpoints beside this file, and what Hugging Face makes of them.

    python -m tests.golden.make_golden [NAME ...]  (needs torch and transformers; default: all)

Each folder is a checkpoint as transformers saves it, plus `golden.npz`: prompt_ids, the greedy_ids
that follow, and logits "T V" at every token of both but the last (float32 arithmetic on the stored
weights). `config.old.json` says the same rope in the form of transformers 4: top-level rope_theta,
rope_scaling.

Weights are large, so that attention is sharp and a wrong rotation shows. Dynamic NTK is computed
token by token: each key keeps the base of its own time, as in decoding with a cache.
"""

import json
import pathlib
import shutil
import sys
import zlib
from typing import Any

import numpy as np
import torch
import transformers

from fastgen_jax.models.families.wrappers import WRAPPERS
from tests.golden.families import FAMILIES
from tests.golden.pack_mxfp4 import pack_experts
from tests.golden.renamed import REFERENCES, RENAMED

# Threads that wait for each other's parts of tiny products take forty times their time.
torch.set_num_threads(1)

HERE = pathlib.Path(__file__).parent
N_PROMPT, N_NEW, ORIGINAL, LONGEST = 150, 32, 64, 256

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": rope("default", rope_theta=1000.0),
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 24},
    "sharded": {},
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0) | {"max_position_embeddings": ORIGINAL},
    "yarn": rope("yarn", **YARN),
    "yarn_betas": rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=16, beta_slow=2),
    "yarn_exact": rope("yarn", **YARN, attention_factor=1.25, truncate=False),
    "llama3": rope("llama3", **LLAMA3),
    **FAMILIES,
}  # fmt: skip
KNOWN_AS = {"kimi_k2": "deepseek_v3"}  # model types that transformers knows by another name only
OLD_FORM = ("gqa", "linear", "dynamic", "yarn", "llama3")


def auto_class(model_type: str) -> Any:
    """What makes and loads models of that type, the text's head included."""
    if model_type in WRAPPERS:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def random_model(seed: int, *, model_type: str = "llama", **fields: Any) -> Any:
    """A model whose every parameter, biases and norms included, is random, rounded to bfloat16."""
    torch.manual_seed(seed)
    shape = SHAPE if model_type == "llama" else {}
    fields = shape | {"bos_token_id": 1, "eos_token_id": 2} | fields
    known_type = KNOWN_AS.get(model_type, model_type)
    config = transformers.AutoConfig.for_model(known_type, **fields)
    model = auto_class(model_type).from_config(config)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if not parameter.is_floating_point():  # a mask
            continue
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
        elif "norm" in name or ".ln_" in name:
            parameter.data += torch.empty_like(parameter).uniform_(-0.3, 0.3)  # around 1 or 0
        elif name.endswith(("alpha_p", "alpha_n", "beta")):  # of an activation
            parameter.data += torch.empty_like(parameter).uniform_(0, 0.3)
    return model.to(torch.bfloat16).eval()


def load(path: pathlib.Path) -> Any:
    # Eager Falcon of transformers 5 adds ALiBi to the scores and again to the mask.
    config = json.loads((path / "config.json").read_text())
    model_type = config.pop("model_type")
    options = {"attn_implementation": "sdpa" if model_type == "falcon" else "eager"}
    if "quantization_config" in config:
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    if model_type in KNOWN_AS:
        options["config"] = transformers.AutoConfig.for_model(KNOWN_AS[model_type], **config)
    options |= {"dtype": torch.float32, "experts_implementation": "eager"}
    return auto_class(model_type).from_pretrained(path, **options).eval()


@torch.inference_mode()
def run(model: Any, prompt: list[int], n_new: int) -> tuple[np.ndarray, list[int]]:
    """Logits "T V" at the prompt and all but the last of n_new greedy tokens; and those tokens."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    one_by_one = rope.get("rope_type") == "dynamic"
    pieces = [[token] for token in prompt] if one_by_one else [prompt]
    cache = transformers.DynamicCache(config=model.config)
    logits, greedy = [], []
    while len(greedy) < n_new:
        for piece in pieces:
            out = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
            logits.append(out.logits[0].float().numpy())
        greedy.append(int(logits[-1][-1].argmax()))
        pieces = [greedy[-1:]]
    return np.concatenate(logits), greedy


def margin(logits: np.ndarray, n_new: int) -> float:
    """By how much the best token leads the second, at least, where tokens were chosen."""
    best = np.sort(logits[-n_new:])
    return float((best[:, -1] - best[:, -2]).min())


def clear_prompt(model: Any, n_prompt: int, n_new: int, seed: int) -> tuple[list[int], Any, Any]:
    """A random prompt whose greedy continuation no rounding can change."""
    rng = np.random.default_rng(seed)
    while True:
        vocab_size = model.config.get_text_config().vocab_size
        prompt = rng.integers(3, vocab_size, n_prompt).tolist()
        logits, greedy = run(model, prompt, n_new)
        if margin(logits, n_new) > 0.01:
            return prompt, logits, greedy


def set_model_type(path: pathlib.Path, model_type: str) -> None:
    config = json.loads((path / "config.json").read_text()) | {"model_type": model_type}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_old_config(path: pathlib.Path) -> None:
    config = json.loads((path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] in ("linear", "dynamic"):
        scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    (path / "config.old.json").write_text(json.dumps(config, indent=2) + "\n")


def check_old_config(path: pathlib.Path, prompt: list[int], logits: np.ndarray) -> None:
    """Hugging Face reads both forms alike."""
    old = path.parent / f"{path.name}.old"
    shutil.copytree(path, old)
    shutil.move(old / "config.old.json", old / "config.json")
    again, _ = run(load(old), prompt, 1)
    shutil.rmtree(old)
    assert np.array_equal(again, logits[: len(prompt)]), path.name


def make(name: str, seed: int) -> None:
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    model = random_model(seed, **CHECKPOINTS[name])
    model.save_pretrained(path, max_shard_size="80KB" if name == "sharded" else "1GB")
    (path / "generation_config.json").unlink()
    if name == "gpt_oss_mxfp4":
        pack_experts(path)
    if CHECKPOINTS[name].get("model_type") in KNOWN_AS:
        set_model_type(path, CHECKPOINTS[name]["model_type"])
    model = REFERENCES.get(name, lambda model: model)(load(path))
    prompt, logits, greedy = clear_prompt(model, N_PROMPT, N_NEW, seed)
    if name in OLD_FORM:
        write_old_config(path)
        check_old_config(path, prompt, logits)
    np.savez_compressed(
        path / "golden.npz",
        prompt_ids=np.array(prompt, np.int32),
        logits=logits,
        greedy_ids=np.array(greedy, np.int32),
    )
    if name in RENAMED:
        RENAMED[name](path)
    size = sum(file.stat().st_size for file in path.iterdir())
    rounding = np.abs(run(model.double(), prompt, 1)[0] - logits[:N_PROMPT]).max()
    print(
        f"{name:12} {size:7} bytes, logits {logits.std():.2f} rms, float64 differs by "
        f"{rounding:.1e}; {len(set(greedy)):2} distinct tokens, margin {margin(logits, N_NEW):.3f}"
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    chosen = sys.argv[1:] or list(CHECKPOINTS)
    for place, name in enumerate(CHECKPOINTS):
        if name in chosen:
            make(name, zlib.crc32(name.encode()) if name in FAMILIES else place)

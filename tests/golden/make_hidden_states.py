"""Writes `hidden_states.npz`: Hugging Face's output_hidden_states of the tiny checkpoints.

    python -m tests.golden.make_hidden_states  (needs torch and transformers)

Of each checkpoint f32[layers, positions, D], for token ids 3, 8, 13 ...
"""

import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
NAMES = ("gqa", "gpt2", "gemma2", "opt", "bloom", "olmo2", "mixtral", "cohere", "gptj")
TOKEN_IDS = [3 + 5 * i for i in range(12)]


def hidden_states(name: str) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / name, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([TOKEN_IDS]), output_hidden_states=True).hidden_states
    return np.stack([layer[0].numpy() for layer in found])


if __name__ == "__main__":
    np.savez_compressed(HERE / "hidden_states.npz", **{name: hidden_states(name) for name in NAMES})

"""Packs the experts of a GPT-OSS checkpoint as OpenAI's are: in MXFP4, rounded to nearest."""

import json
import pathlib

import safetensors.torch
import torch

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BLOCK_SIZE = 32
LARGEST_EXPONENT = 2  # of 6.0


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks "E O I/32 16" and scales "E O I/32" of a weight "E I O"."""
    numbers = weight.float().transpose(1, 2).unflatten(2, (-1, BLOCK_SIZE))
    exponents = numbers.abs().amax(3).log2().floor() - LARGEST_EXPONENT
    scaled = numbers / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(4)
    codes = nearest + 8 * (scaled < 0)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponents + 127).to(torch.uint8)


def pack_experts(path: pathlib.Path) -> None:
    """Rewrites model.safetensors and config.json of that directory."""
    file = path / "model.safetensors"
    packed = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantise(tensor)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            packed[name] = tensor
    safetensors.torch.save_file(packed, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")

"""What a checkpoint is quantised with, by its config, which each tool writes in its own form, and
by the names of its tensors, none of which is read.
"""

from collections.abc import Iterable
from typing import Any

from fastgen_jax.errors import CheckpointError

BESIDE = "hf_quant_config.json"  # modelopt's file beside a config.json that says nothing
KEYS = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
# Methods whose NAME.weight has a NAME.weight_scale beside it, and what varies of them.
SCALED = ("compressed-tensors", "fp8", "fbgemm_fp8", "modelopt")
FORMATS = ("dense", "float-quantized", "int-quantized", "naive-quantized")  # of compressed-tensors
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", None)  # of modelopt; None: only the KV cache
OF_MODELOPT = {"quant_algo", "kv_cache_quant_algo"}  # which not always says its name
# Ends of names that only one way of packing has. A scale's own scale is NVFP4's.
PACKED = {
    ".weight_scale_2": "NVFP4",
    ".weight_packed": "compressed-tensors, packed",
    ".qweight": "gptq or awq",
    ".trellis": "exl3",
    ".q_weight": "exl2",
    ".W_q": "hqq",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
}


def settings(hf: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of quantisation, {} if nothing.

    Raises:
        CheckpointError: it is no JSON object.
    """
    for config in (hf, hf.get("text_config") or {}):
        for key in KEYS:
            if found := config.get(key):
                if not isinstance(found, dict):
                    raise CheckpointError(
                        f"config.json: {key} must be a JSON object, got {found!r}"
                    )
                inner = found.get("quantization")  # modelopt's own form says who made it, too
                return inner if isinstance(inner, dict) else found
    return {}


def without_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """A config.json for the same weights, not quantised."""
    kept = {name: value for name, value in hf.items() if name not in KEYS}
    if isinstance(hf.get("text_config"), dict):
        kept["text_config"] = without_settings(hf["text_config"])
    return kept


def method_of(given: dict[str, Any], names: Iterable[str]) -> str | None:
    """What a checkpoint is quantised with, None if it is not; where it is only certain kinds of a
    method that are read, others bring the name of their kind.
    """
    method = _named(given)
    if method not in (None, *SCALED):
        return method
    packed = [PACKED[end] for name in names for end in PACKED if name.endswith(end)]
    if packed:
        return packed[0]
    return "MLX" if method is None and {"bits", "group_size"} <= given.keys() else method


def _named(given: dict[str, Any]) -> str | None:
    method, algorithm = given.get("quant_method"), given.get("quant_algo")
    if given.keys() & OF_MODELOPT or str(method).startswith("modelopt"):
        return "modelopt" if algorithm in ALGORITHMS else f"modelopt ({algorithm})"
    if method != "compressed-tensors":
        return None if method is None else str(method)
    groups = (given.get("config_groups") or {}).values()
    parts = [given, given.get("sparsity_config") or {}, *groups]
    formats = {str(part.get("format") or "dense") for part in parts} - {*FORMATS}
    return f"{method} ({', '.join(sorted(formats))})" if formats else method

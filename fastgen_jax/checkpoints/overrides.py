"""What a user changes of a config.json before anything reads it (`hf_overrides`)."""

from collections.abc import Mapping
from typing import Any

from fastgen_jax.checkpoints.quantisation import KEYS
from fastgen_jax.errors import ConfigError

Overrides = Mapping[str, Any] | None
Object = dict[str, Any]

# What counts outside of a text_config, even if that has it, too.
OUTSIDE = ("model_type", "bos_token_id", "eos_token_id", "tie_word_embeddings")
SCALING, PARAMETERS, LOCAL_THETA = "rope_scaling", "rope_parameters", "rope_local_base_freq"
FULL, LOCAL = "full_attention", "sliding_attention"  # keys of rope_parameters by type of layer
# What transformers 4 has beside rope_scaling -> in rope_parameters. Scaling leaves it as it is.
BESIDE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}


def overridden(hf: Object, overrides: Overrides) -> Object:
    """A config.json with other values. A config within it (text_config) is changed key by key; any
    other value is replaced, but base and share of a head that turns stay when rope_scaling or
    rope_parameters change. Of these two either may be given, whichever the file has.

    Raises:
        ConfigError: a change that nothing would read.
    """
    overrides = dict(overrides or {})
    _check(hf, overrides)
    changed = dict(hf)
    if hf.get(PARAMETERS):
        changed[PARAMETERS] = _rope_parameters(hf[PARAMETERS], overrides)
        overrides.pop(PARAMETERS, None)
    elif PARAMETERS in overrides:
        changed.pop(SCALING, None)
    for name, value in overrides.items():
        changed[name] = overridden(hf[name], value) if _is_config(name, value) else value
    return changed


def _is_config(name: str, value: Any) -> bool:
    return name.endswith("_config") and name not in KEYS and isinstance(value, dict)


def _check(hf: Object, overrides: Object) -> None:
    text = hf.get("text_config")
    for name, value in overrides.items():
        if _is_config(name, value):
            if not isinstance(hf.get(name), dict):
                raise ConfigError(f"hf_overrides: config.json has no {name}; leave it out")
            continue
        is_inside = isinstance(text, dict) and (name in text or name not in {*hf, *KEYS})
        if is_inside and name not in OUTSIDE:
            raise ConfigError(
                f"hf_overrides: {name} belongs into the text_config of this config.json; write "
                f'{{"text_config": {{"{name}": ...}}}}'
            )
        if name in (SCALING, PARAMETERS) and not isinstance(value, dict | None):
            raise ConfigError(f"hf_overrides: {name} must be a JSON object or null, got {value!r}")
    if SCALING in overrides and PARAMETERS in overrides:
        raise ConfigError(f"hf_overrides has {SCALING} and {PARAMETERS}; give one of them")


def _rope_parameters(rope: Object, overrides: Object) -> Object:
    """A file's rope_parameters with what overrides say, in their words or those of transformers 4.

    Where they differ by type of layer, only layers that see everything are scaled.
    """
    given = overrides.get(PARAMETERS) or overrides.get(SCALING) or {}
    if FULL in given or LOCAL in given:
        return rope | {
            kind: _rope_parameters(rope.get(kind) or {}, {PARAMETERS: value})
            for kind, value in given.items()
        }
    if FULL in rope:
        local = dict(rope.get(LOCAL) or {})
        if LOCAL_THETA in overrides:
            local["rope_theta"] = overrides[LOCAL_THETA]
        return rope | {FULL: _rope_parameters(rope[FULL] or {}, overrides), LOCAL: local}
    if PARAMETERS in overrides or SCALING in overrides:
        rope = {name: rope[name] for name in BESIDE.values() if name in rope} | given
    return rope | {ours: overrides[name] for name, ours in BESIDE.items() if name in overrides}

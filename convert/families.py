"""The model families, and what of a config.json each reads."""

import inspect
import re
from types import ModuleType

import fastgen_jax.models.families as families
import fastgen_jax.models.hf_config as hf_config
from fastgen_jax.models.families.wrappers import WRAPPERS


def table() -> str:
    """A paragraph per model_type: its name, what it is, the keys of config.json that it reads; then
    the types that also see or hear.
    """
    paragraphs = []
    for model_type in sorted(families.FAMILIES):
        module = families.family(model_type)
        title = (module.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        keys = ", ".join(sorted(config_keys(module)))
        paragraphs.append(f"{model_type}: {title}\n    reads {keys}")
    wrappers = ", ".join(sorted(WRAPPERS))
    return "\n".join([*paragraphs, f"their texts, which are one of the above: {wrappers}"])


def config_keys(module: ModuleType) -> set[str]:
    """Keys of config.json named in a family's module and in those that it builds on."""
    found = set(re.findall(r'\bhf(?:\.get\(|\[)"(\w+)"', inspect.getsource(module)))
    for value in vars(module).values():
        if inspect.ismodule(value) and value.__name__.startswith(families.__name__):
            found |= config_keys(value)
        elif inspect.isfunction(value) and value.__module__ == hf_config.__name__:
            found |= set(re.findall(r'\bhf(?:\.get\(|\[)"(\w+)"', inspect.getsource(value)))
    return found

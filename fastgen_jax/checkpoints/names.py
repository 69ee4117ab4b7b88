"""Names of tensors as files have them -> names as a family's WEIGHTS has them.

What a name begins with tells who saved it: a model with its head or without, a trainer that wrapped
it, a model that also sees. None of this counts: a tensor is known by the first word behind.
"""

import re
from collections.abc import Iterable

ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch's wrappers
AROUND = {"module", "base_model", "model", "language_model", "text_model", "transformer"}
AROUND |= {"gpt_neox"}
# Made from the config, at whatever level of the model.
BUFFER = re.compile(r"(.*\.)?rotary_(pos_)?emb\w*\.\w*(inv_freq|cached|cache)")
ADAPTERS = ("lora_", "modules_to_save")  # starts of words in names of what peft did not merge


def split(name: str) -> tuple[list[str], list[str]]:
    """Words of a dotted name that only wrap, and those behind."""
    words = [word for word in name.split(".") if word not in ANYWHERE]
    n = next((i for i, word in enumerate(words) if word not in AROUND), len(words))
    return words[:n], words[n:]


def canonical(
    names: Iterable[str], known: Iterable[str], other_parts: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """{name in WEIGHTS: name in the files}, and what is wrong. A name that no family has stays.

    Args:
        known: names in WEIGHTS and IGNORED.
        other_parts: first words of what is not the language model's, and left out.
    """
    prefixes = {rest[0]: prefix for prefix, rest in map(split, known)}
    others = {*other_parts}
    found: dict[str, str] = {}
    problems = []
    for name in names:
        _, rest = split(name)
        first = rest[0] if rest else ""
        if BUFFER.fullmatch(name) or first in others:
            continue
        ours = ".".join([*prefixes[first], *rest]) if first in prefixes else name
        if ours in found:
            problems.append(f"twice: {found[ours]} and {name} are both {ours}")
        found.setdefault(ours, name)
    return found, problems


def adapter(names: Iterable[str]) -> str | None:
    """A name that belongs to an adapter which is not merged into its model."""
    return next(
        (name for name in names if any(word.startswith(ADAPTERS) for word in name.split("."))), None
    )

"""The token budget of steps, chosen from how long they take: measured once, and kept in a file.

The file is a number of floats below the directory of compiled programs, named by all that shapes
programs on this machine. One that cannot be read or written is as none.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen_jax.config import is_integer, is_real
from fastgen_jax.engine.pace import SMALLEST_CHUNK
from fastgen_jax.engine.surface import Surface, Work

log = logging.getLogger("fastgen_jax.engine")

N_COEFFICIENTS = 5  # of a surface
MULTIPLE = 16  # of tokens, where there are more


def choose(surface: Surface, target: float | None) -> int:
    """The most tokens of a step that takes `target` seconds; None: as many as it takes for nearly
    the most tokens per second.
    """
    if target is None:
        n = surface.knee()
        log.info("max_num_batched_tokens=%d: more tokens a step are hardly more a second", n)
        return n
    n = surface.tokens_within(target)
    if n < SMALLEST_CHUNK:
        log.warning(
            "no step takes less than %.1f ms: target_itl_ms=%.1f will be missed",
            1e3 * (surface.e + surface.a), 1e3 * target,
        )  # fmt: skip
        return SMALLEST_CHUNK
    n = n // MULTIPLE * MULTIPLE
    log.info(
        "max_num_batched_tokens=%d: with nothing cached such a step takes %.1f ms, and "
        "target_itl_ms=%.1f; it takes fewer as contexts grow",
        n, 1e3 * surface._replace(sizes=())(Work(n, 0, 0.0)), 1e3 * target,
    )  # fmt: skip
    return n


def kept(directory: str | None, key: Mapping[str, Any]) -> Surface | None:
    """What was measured before; None: nothing was."""
    if not directory:
        return None
    try:
        told = json.loads(_path(directory, key).read_text())
        coefficients, sizes = told["coefficients"], told["sizes"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    is_good = len(coefficients) == N_COEFFICIENTS and all(
        is_real(x) and x >= 0 for x in coefficients
    )
    if (
        not is_good
        or not any(coefficients[:3])
        or not sizes
        or not all(is_integer(n) and n > 0 for n in sizes)
    ):
        return None
    e, a, b, c, d = map(float, coefficients)
    return Surface(e, a, b, c, d, tuple(sizes))


def keep(directory: str | None, key: Mapping[str, Any], surface: Surface) -> None:
    """For the next start."""
    if not directory or not all(map(math.isfinite, surface[:N_COEFFICIENTS])):
        return
    path = _path(directory, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(
            json.dumps({"coefficients": surface[:N_COEFFICIENTS], "sizes": surface.sizes})
        )
        new.replace(path)
    except OSError as error:
        log.warning("how long steps take is not kept: %s", error)


def _path(directory: str, key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps([key, os.cpu_count()], sort_keys=True).encode()).hexdigest()
    return Path(directory).expanduser() / "surfaces" / f"{name[:32]}.json"

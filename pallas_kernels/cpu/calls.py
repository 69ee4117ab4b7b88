"""The library's functions as XLA custom calls."""

import ctypes
import functools

import jax

from pallas_kernels.cpu.build import KINDS, library

TARGETS = {  # XLA's name -> the library's
    "fastgen_ragged_paged_attention": "ragged_paged_attention",
    "fastgen_product": "product",
}


@functools.cache
def check_installed() -> str:
    """Makes the library known to XLA. Which of build.KINDS this CPU is of.

    Raises:
        ImportError: it is not built, or does not load.
    """
    path = library()
    if not path.exists():
        raise ImportError(
            "the CPU's library is not built; `python -m pallas_kernels.cpu.build` does it "
            "where there is a C++ compiler"
        )
    try:
        loaded = ctypes.CDLL(str(path))
        functions = {target: getattr(loaded, name) for target, name in TARGETS.items()}
        kind = list(KINDS)[loaded.best_kind()]
    except (OSError, AttributeError) as error:
        raise ImportError(f"the CPU's library does not load: {error}") from None
    for target, function in functions.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return kind

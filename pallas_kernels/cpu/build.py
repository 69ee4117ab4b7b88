"""The library of pallas_kernels.cpu: where it lies, whether it is there, and how it is built.

    python -m pallas_kernels.cpu.build [--compiler g++]

It lies beside its sources and bears their hash, so one of older sources is never used. Tiles are
compiled once per kind of CPU and the library chooses when it is called: it runs on any CPU of the
architecture, wherever it was built.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CALLS = "attention.cc", "product.cc"
TILES = "attention_tile.cc", "product_tile.cc"
HEADERS = "attention_tile.h", "product_tile.h", "vectors.h", "matrix_unit.h", "kinds.h"
HEADERS += ("threads.h",)
SOURCES = CALLS + TILES + HEADERS
COMPILERS = "c++", "g++", "clang++"
LOSS = "attention on CPU will be slower, and so will products with 16-bit weights"
# No -ffast-math: NaN must stay NaN.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=fast")
FLAGS += ("-fno-math-errno", "-fno-trapping-math")
KINDS: dict[str, tuple[str, ...]] = {
    "any": ("-DLANES=4",)
}  # of CPU -> how tiles are compiled for it
if platform.machine() == "x86_64":
    KINDS["avx2"] = ("-DLANES=8", "-mavx2", "-mfma")
    KINDS["avx512"] = ("-DLANES=16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
    KINDS["avx512bf16"] = (*KINDS["avx512"], "-mavx512bf16")
    KINDS["amx"] = (*KINDS["avx512bf16"], "-mamx-tile", "-mamx-bf16")


def library() -> Path:
    """Where the library of these sources is, if it was built."""
    known = hashlib.sha256(repr((FLAGS, KINDS, platform.machine())).encode())
    for name in SOURCES:
        known.update((HERE / name).read_bytes())
    return HERE / f"library-{known.hexdigest()[:16]}.so"


def build(compiler: str, headers: str) -> Path:
    """Compiles the library, and removes those of other sources.

    headers: XLA's, `jax.ffi.include_dir()`.

    Raises:
        subprocess.CalledProcessError: the compiler failed; it has said why.
    """
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        jobs = [(name, "-isystem", headers) for name in CALLS]
        jobs += [(name, f"-DKIND={k}", *flags) for name in TILES for k, flags in KINDS.items()]
        objects = [f"{folder}/{i}.o" for i in range(len(jobs))]

        def compile_one(job: tuple[str, ...], target: str) -> None:
            run(compiler, *FLAGS, *job, "-c", "-o", target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs, objects))
        built = f"{folder}/library.so"
        # What it needs of the C++ library comes along.
        run(compiler, "-shared", "-static-libstdc++", "-static-libgcc", *objects, "-o", built)
        os.chmod(built, 0o644)
        for old in HERE.glob("*.so"):
            old.unlink(missing_ok=True)
        os.replace(built, library())
    return library()


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=HERE)


def main() -> None:
    """Never fails a set-up: without a compiler the engine has its other backend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found = next(filter(shutil.which, COMPILERS), None)
    parser.add_argument("--compiler", default=found, help="default: %(default)s")
    compiler = parser.parse_args().compiler
    if library().exists():
        return
    if compiler is None:
        print(f"no C++ compiler ({', '.join(COMPILERS)}): {LOSS}")
        return
    import jax.ffi

    print(f"building the CPU's library with {compiler}", flush=True)
    try:
        build(compiler, jax.ffi.include_dir())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{error}: {LOSS}")


if __name__ == "__main__":
    main()

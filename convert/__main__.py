"""The command line: python -m convert SRC DST."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.chips import ENVIRONMENT, Chips
from convert.destination import new_directory
from fastgen_jax.config import json_object
from fastgen_jax.engine.config import KV_CACHE_DTYPES
from fastgen_jax.errors import FastGenError

DTYPES = ("float32", "bfloat16", "float16")
SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_blocks")
EXAMPLES = """\
examples:
  python -m convert meta-llama/Llama-3.2-1B ./llama     a directory that serve and LLM take
  python -m convert --to-hf ./llama ./llama-hf          and back, bit for bit
  python -m convert --check ./llama                     verify files, shapes and checksums
  python -m convert SRC ./llama --compile tpu-v6e-8,h100 --max-model-len 8192
  python -m convert --list                              model families and the config keys they read
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Converts or checks; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (FastGenError, OSError, ValueError) as error:  # Orbax says ValueError of a full disk
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Convert Hugging Face checkpoints to Orbax checkpoints and back.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", metavar="SRC", help="directory or hub id")
    parser.add_argument("destination", nargs="?", metavar="DST", type=Path, help="new directory")
    parser.add_argument("--revision", help="branch, tag or commit of SRC if it is a hub id")
    parser.add_argument(
        "--hf-overrides", type=json_object, default=None, metavar="JSON",
        help="keys of SRC's config.json to change, which DST then has",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as they are)")
    parser.add_argument(
        "--shards", type=_shards, default=None, metavar="N",
        help="weight files, about as many; auto: 1 GiB each, with --to-hf as many as there were",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the model that DST is")
    programs = parser.add_argument_group("programs, compiled for chips that need not be here")
    programs.add_argument(
        "--compile", type=_chips, default=[], metavar="CHIPS",
        help="store an engine's programs in DST, or in SRC if it is converted and there is no DST: "
        "as tpu-v6e-8,h100,cpu",
    )  # fmt: skip
    for name in SIZES:
        programs.add_argument(
            "--" + name.replace("_", "-"), type=int, metavar="N",
            help="as the engine will be started with it (default: what it chooses)",
        )  # fmt: skip
    programs.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, help="as the engine will be started with it"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--to-hf", action="store_true", help="SRC is converted; DST is to be safetensors"
    )
    modes.add_argument("--check", action="store_true", help="verify SRC, converted or not")
    modes.add_argument("--list", action="store_true", help="print the model families")
    return parser


def _chips(text: str) -> list[Chips]:
    try:
        return [Chips.of(name) for name in text.split(",")]
    except FastGenError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _shards(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"want auto or a number from 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for.

    Raises:
        FastGenError: what is wrong with source or destination.
    """
    if args.list:
        from convert import families

        print(families.table())
        return
    if args.compile:
        os.environ |= ENVIRONMENT  # before jax loads the compilers
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    destination: Path = args.destination  # None where SRC is all that is wanted
    only_compiles = bool(args.compile) and not args.destination
    n_paths = 1 if args.check or only_compiles else 2
    if sum(path is not None for path in (args.source, args.destination)) != n_paths:
        raise FastGenError("give SRC and DST, or --check SRC; --help shows examples")
    from fastgen_jax.checkpoints.directory import locate

    source = locate(args.source, revision=args.revision)
    if args.check:
        from convert import verification

        print(verification.check(source, args.hf_overrides))
        return
    if only_compiles:
        compile_programs(args, source)
        return
    with new_directory(destination, overwrite=args.overwrite) as directory:
        convert(args, source, directory)
    compile_programs(args, destination)
    print(f"{args.destination} is complete")


def compile_programs(args: argparse.Namespace, directory: Path) -> None:
    """Stores programs for each of the chips in a converted checkpoint."""
    if not args.compile:
        return
    from fastgen_jax.checkpoints.converted import is_converted

    if not is_converted(directory):
        raise FastGenError(
            f"programs are stored in converted checkpoints, and {str(directory)!r} is none; give "
            "a DST to convert it to"
        )
    from tqdm import tqdm

    from convert import programs

    names = [name for name in (*SIZES, "kv_cache_dtype") if getattr(args, name) is not None]
    sizes = {name: getattr(args, name) for name in names}
    for chips in args.compile:
        with tqdm(unit="program", disable=None) as bar:

            def on_progress(done: int, total: int, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            print(programs.compile_for(chips, directory, sizes, on_progress))


def convert(args: argparse.Namespace, source: Path, directory: Path) -> None:
    """Fills an empty directory."""
    from fastgen_jax.checkpoints.converted import is_converted

    if is_converted(source) != args.to_hf:
        is_now = "converted already" if is_converted(source) else "no converted checkpoint"
        raise FastGenError(
            f"{args.source!r} is {is_now}; --to-hf takes converted ones, and only it"
        )
    if args.to_hf:
        from convert import to_hf

        to_hf.write(
            source, directory, dtype=args.dtype, n_files=args.shards, overrides=args.hf_overrides
        )
        return
    from tqdm import tqdm

    from convert import to_orbax

    with tqdm(unit="parameter", disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        to_orbax.write(
            source, directory, name=args.source, dtype=args.dtype, n_files=args.shards,
            overrides=args.hf_overrides, on_progress=on_progress,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""Whether a checkpoint is whole, converted or not."""

from pathlib import Path

from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.converted import damages, is_converted, misfits, read_manifest
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.overrides import Overrides
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.layers import Policy


def check(directory: Path, overrides: Overrides = None) -> str:
    """One line that says what was verified.

    Args:
        overrides: keys of config.json to change before it is read.

    Raises:
        FastGenError: lists all that is wrong.
    """
    config = read_config(directory, overrides)
    params = loading.flat_params(loading.abstract_model(config, Policy()))
    if not is_converted(directory):
        loading.find_parts(directory, config, params, overrides)
        return f"{len(params)} parameters: all there, none damaged that headers would tell"
    manifest = read_manifest(directory)
    problems = [*damages(directory, manifest["files"], checksums=True)]
    problems += misfits(manifest["params"], params)
    if problems:
        raise CheckpointError(f"{len(problems)} problems:\n  " + "\n  ".join(problems))
    return f"{len(params)} parameters, {len(manifest['files'])} files: all as they were written"

"""The server as a Ray Serve application: replicas, on one machine or many.

Ray starts, places, checks, scales, replaces and updates replicas. Here is what it runs, where a
request goes, and when there should be more of them. Ray is imported by `application` and `running`
only, when they are.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application  # pyright: ignore[reportMissingImports]


def build(args: Mapping[str, Any]) -> "Application":
    """The application, for `serve run fastgen_jax.cluster:build model=...` and Ray's config files.

    Args:
        args: the command line's flags by name, underscored; text is read as the flags read it.

    Raises:
        ConfigError: an unknown name, naming the nearest, or a value that cannot work.
    """
    from fastgen_jax.cluster.application import application
    from fastgen_jax.cluster.arguments import read

    return application(*read(args))

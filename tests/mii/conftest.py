"""What the tests of MII's names share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[Path]:
    """A runtime directory of the tests' own."""
    path = tmp_path_factory.mktemp("session")
    path.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path / "fastgen_jax"

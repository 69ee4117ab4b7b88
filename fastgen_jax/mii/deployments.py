"""What this user has deployed on this machine: a directory of its own, with one file for each.

INVARIANT: only this user can write there, and whoever holds the lock sees no entry whose process
has ended. A file that this version cannot read is reported, never removed: its server may run.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgen_jax.errors import ConfigError, FastGenError
from fastgen_jax.mii.process import Process
from fastgen_jax.mii.wire import Wire

SUFFIX = "-mii-deployment"
MAX_FILE_NAME = 240  # bytes, of the 255 that file systems take
TAIL_BYTES, TAIL_LINES = 8192, 20
END_SECONDS = 30.0  # beyond its drain timeout, for a server, or Ray with its replicas, to unload


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A server that `serve` has started.

    tls_cert: the file with the certificate that it shows, of which no other is taken.
    max_prompts, max_body_bytes: the most that it takes in one request.
    drain_timeout: seconds that its running requests may take to finish when it is stopped.
    """

    name: str
    url: str
    api_key: str | None
    tls_cert: str | None
    process: Process
    max_prompts: int
    max_body_bytes: int
    drain_timeout: float

    def wire(self) -> Wire:
        return Wire(self.url, self.api_key, tls_cert=self.tls_cert)

    def stop(self) -> None:
        self.process.stop(self.drain_timeout + END_SECONDS)


class Directory:
    """The deployments of one user. Every method that changes it wants the lock held."""

    def __init__(self, path: Path):
        """Raises ConfigError if the directory is another's, or open to others."""
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if found.st_uid != os.getuid() or not is_private:
            raise ConfigError(
                f"{path} must be a directory of this user that is closed to others (mode 0700), "
                "for it tells where prompts go; remove it or set XDG_RUNTIME_DIR"
            )
        self.path = path

    @classmethod
    def of_user(cls) -> "Directory":
        """In the runtime directory that the session has, else beside other temporary files."""
        session = os.environ.get("XDG_RUNTIME_DIR")
        if session and _is_own(Path(session)):
            return cls(Path(session) / "fastgen_jax")
        return cls(Path(tempfile.gettempdir()) / f"fastgen_jax-{os.getuid()}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with open(self.path / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for path in self.path.glob("*.json"):
                with contextlib.suppress(FastGenError):
                    if not _read(path).process.is_running:
                        path.unlink()
            yield

    def names(self) -> list[str]:
        stems = [path.stem for path in self.path.glob("*.json")]
        return sorted(urllib.parse.unquote(stem, errors="surrogateescape") for stem in stems)

    def find(self, name: str) -> Deployment | None:
        """Raises FastGenError if there is an entry that cannot be read."""
        path = self.entry(name)
        return _read(path) if path.exists() else None

    def add(self, deployment: Deployment) -> None:
        """Writes the entry, whole or not at all."""
        path = self.entry(deployment.name)
        unfinished = path.with_suffix(".part")
        with open(unfinished, "w", opener=private) as file:
            json.dump(dataclasses.asdict(deployment), file)
        unfinished.replace(path)

    def remove(self, deployment: Deployment) -> None:
        """Removes the entry and the log, unless another deployment has the name by now."""
        if self.find(deployment.name) in (deployment, None):
            self.entry(deployment.name).unlink(missing_ok=True)
            self.log(deployment.name).unlink(missing_ok=True)

    def entry(self, name: str) -> Path:
        return self._file(name, ".json")

    def log(self, name: str) -> Path:
        """What the server says; kept if it ends by itself, until the next one of that name."""
        return self._file(name, ".log")

    def _file(self, name: str, suffix: str) -> Path:
        """A name may be a path or a hub id: no character of it means anything to the file system.

        Raises:
            ConfigError: it is none that a file can have.
        """
        file_name = urllib.parse.quote(name, safe="", errors="surrogateescape") + suffix
        if not name or len(file_name) > MAX_FILE_NAME:
            raise ConfigError(
                f"{name!r:.80} is no name of a deployment; give a shorter deployment_name"
                if name
                else "a deployment needs a name; leave deployment_name out for the model's"
            )
        return self.path / file_name


def last_lines(log: Path) -> str:
    """The end of a server's log, where the cause of its end is."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "(nothing)"
    return "\n".join(lines[-TAIL_LINES:]) or "(nothing)"


def _read(path: Path) -> Deployment:
    try:
        fields = json.loads(path.read_bytes())
        fields["process"] = Process(**fields["process"])
        return Deployment(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FastGenError(
            f"{path} is not what this version writes ({error!r:.100}); end its server with the "
            "version that started it, or remove the file"
        ) from None


def private(path: str, flags: int) -> int:
    """An opener of files that nobody else may read."""
    return os.open(path, flags, 0o600)


def _is_own(path: Path) -> bool:
    """Whether nobody else can put something there."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022

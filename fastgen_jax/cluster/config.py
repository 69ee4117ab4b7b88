"""ClusterConfig: how many replicas, where, and when there are more of them."""

from dataclasses import dataclass

from fastgen_jax.config import option
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig

OF_ONE_SERVER = ("fd", "uds", "tls_cert", "grpc_port", "admin_key", "weights_root")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Options of the Ray Serve application; each replica is an EngineConfig and a ServerConfig."""

    replicas: int = option(
        1,
        "engines behind one address, run by Ray Serve (extra `ray`); with max_replicas the fewest, "
        "which may be 0",
        "replicas",
    )
    max_replicas: int | None = option(
        None,
        "most replicas: between the two, as many as waiting prompts need (default: as replicas)",
        "replicas",
    )
    waiting_tokens: int = option(
        4096, "prompt tokens that may wait per replica before another one starts", "replicas"
    )
    scale_down_delay: float = option(
        300.0, "seconds that a replica must have been too many before it stops", "replicas"
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to run on, as host:port or auto (default: this machine, for as long as the "
        "command runs, if there are replicas)",
        "replicas",
    )
    version: str | None = option(
        None,
        "name of what runs; another one in Ray's configuration file replaces the replicas one by "
        "one, as the command line always does",
        "replicas",
    )
    replica_cpus: float = option(
        1.0, "CPUs that Ray sets aside for a replica; accelerators as tensor_parallel_size says",
        "replicas",
    )  # fmt: skip

    def __post_init__(self):
        if self.replicas < 0 or (self.replicas == 0 and self.max_replicas is None):
            raise ConfigError(
                f"replicas must be at least 1, or 0 with max_replicas, got {self.replicas}"
            )
        if self.max_replicas is not None and self.max_replicas < max(self.replicas, 1):
            raise ConfigError(
                f"max_replicas={self.max_replicas} is less than replicas={self.replicas}"
            )
        if self.waiting_tokens < 1:
            raise ConfigError(f"waiting_tokens must be at least 1, got {self.waiting_tokens}")
        for name in ("scale_down_delay", "replica_cpus"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def is_asked_for(self) -> bool:
        """Whether this needs Ray; else one server in one process does."""
        return self.replicas != 1 or self.max_replicas is not None or self.ray_address is not None


def check_shared(config: ServerConfig):
    """Raises ConfigError for what a replica cannot have of its own: clients meet Ray's proxy."""
    for name in OF_ONE_SERVER:
        if getattr(config, name) != getattr(ServerConfig, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a single server: replicas answer through Ray's "
                "proxy, on host and port; leave it out"
            )

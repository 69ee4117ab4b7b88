"""ServerConfig: everything that shapes the HTTP server, validated on construction."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from fastgen_jax.config import option
from fastgen_jax.dialects import DIALECTS, THINKING
from fastgen_jax.errors import ConfigError
from fastgen_jax.sampling_params import POOLINGS
from fastgen_jax.server.attainment import PROMPT_RATE, SLA, TOKEN_RATES, WINDOW

HOST, PORT = "127.0.0.1", 8000
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::[0-9]{1,5})?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
SENDABLE = re.compile(r"[!-~]+")
METRICS_PREFIXES = {"both": ("fastgen", "vllm"), "fastgen": ("fastgen",), "vllm": ("vllm",)}
LOG_FORMATS = ("text", "json")
MAX_LIMIT = 10**12
KEY_VARIABLE = "FASTGEN_API_KEY"  # of the environment: a key that no list of processes shows
ADMIN_VARIABLE = "FASTGEN_ADMIN_KEY"  # likewise
LOG_LEVELS = ("debug", "info", "warning", "error")


def is_text(value: str) -> bool:
    """Whether an argument is Unicode: other bytes come as surrogates, which JSON cannot hold."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def is_origin(value: str) -> bool:
    """Whether browsers may send it: scheme, host and port, but not the scheme's own port."""
    has_own_port = value.endswith(DEFAULT_PORTS.get(value.partition(":")[0], "/"))
    return ORIGIN.fullmatch(value) is not None and not has_own_port


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of the HTTP server; those of the engine are EngineConfig's."""

    host: str = option(HOST, "address to listen on; 0.0.0.0 for every interface", "server")
    port: int = option(PORT, "port to listen on; 0 takes a free one", "server")
    fd: int | None = option(
        None,
        "file descriptor of a listening socket that whoever starts the server has bound (default: "
        "host and port are bound)",
        "server",
    )
    uds: str | None = option(
        None, "Unix socket to listen on instead of host and port; only this user may use it",
        "server",
    )  # fmt: skip
    tls_cert: str | None = option(
        None, "PEM file with the certificate of HTTPS and its chain, read again when it changes",
        "server",
    )  # fmt: skip
    tls_key: str | None = option(None, "PEM file with the key of --tls-cert", "server")
    grpc_port: int = option(
        0, "port of the gRPC service on the same host (0: none); needs the extra grpc", "server"
    )
    served_model_name: tuple[str, ...] = option(
        (), "model id that clients see; may be repeated (default: the model's name)", "server"
    )
    chat_template: str | None = option(
        None, "file with a Jinja chat template (default: the tokenizer's)", "server"
    )
    api_key: tuple[str, ...] = option(
        (),
        "key that clients must send (Authorization: Bearer KEY); may be repeated; FASTGEN_API_KEY "
        "is one more, which no list of processes shows",
        "server",
    )
    admin_key: str | None = option(
        None,
        "key of the routes that change what is served (/update_weights, /sleep, /wake_up, "
        "/is_sleeping, /reset_prefix_cache), which there are only with it; or FASTGEN_ADMIN_KEY",
        "server",
    )
    weights_root: str | None = option(
        None, "directory below which /update_weights finds checkpoints (default: it takes none)",
        "server",
    )  # fmt: skip
    allowed_host: tuple[str, ...] = option(
        (),
        "further Host header accepted while listening on loopback; may be repeated",
        "server",
    )
    allowed_origin: tuple[str, ...] = option(
        (),
        "origin of web pages that may use the server, as https://chat.example, or * for all; may "
        "be repeated",
        "server",
    )
    embedding_pooling: str = option(
        "last", "hidden states that make embeddings: last (of a text) or mean (of all)", "server"
    )
    metrics_prefix: str = option(
        "both",
        "what names of metrics begin with: fastgen, vllm (as vLLM's dashboards ask) or both",
        "server",
    )
    sla_token_rate: tuple[float, ...] = option(
        TOKEN_RATES,
        "tokens/s that an answer must come at to meet the service level of sla_attainment_ratio in "
        "/metrics: the moving average (span 16) of the times between tokens stays below 1 / rate; "
        "may be repeated",
        "server",
    )
    sla_prompt_rate: float = option(
        PROMPT_RATE, "prompt tokens/s: its first token must come within prompt tokens / this",
        "server",
    )  # fmt: skip
    sla_ttft_ms: float | None = option(
        None, "milliseconds for the first token of any prompt, in place of --sla-prompt-rate",
        "server",
    )  # fmt: skip
    sla_window: int = option(WINDOW, "seconds that sla_attainment_ratio looks back", "server")
    tool_call_parser: str | None = option(
        None, "how the model writes calls of tools (default: as its chat template tells)", "server"
    )
    reasoning_parser: str | None = option(
        None, "how the model writes its thoughts (default: as its chat template tells)", "server"
    )
    enable_auto_tool_choice: bool = option(
        True, "let the model call tools unforced (tool_choice auto)", "server"
    )
    web: bool = option(
        True,
        "serve the page for people, /, and what it shows of the engine, /debug/steps",
        "server",
    )
    profile: str | None = option(
        None,
        "directory for traces of the server at work, for XProf and Perfetto, which POST "
        "/start_profile begins and /stop_profile ends (default: there are no such routes)",
        "server",
    )
    log_level: str = option("info", "debug, info, warning or error", "server")
    log_format: str = option(
        "text", "text, or json: one object a line, and a line for each request", "server"
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "URL that takes OpenTelemetry's traces, as http://localhost:4318/v1/traces (default: as "
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT say, else no traces)",
        "server",
    )
    max_body_bytes: int = option(2_000_000, "largest request body (HTTP 413 above)", "limits")
    max_upload_bytes: int = option(
        64_000_000,
        "request bodies held at once, received or being tokenized (HTTP 429 above)",
        "limits",
    )
    max_prompts: int = option(256, "most prompts in one request body", "limits")
    max_requests_per_key: int | None = option(
        None,
        "requests of one API key, running and waiting at once (HTTP 429 above; 0 or none: any "
        "number); clients without a key are one client together",
        "limits",
    )
    max_tokens_per_minute: int | None = option(
        None,
        "tokens, of prompts and generated, that one API key may use a minute: while they are used "
        "up its requests are refused (HTTP 429; 0 or none: any number)",
        "limits",
    )
    queue_timeout: float = option(
        600.0, "seconds that a request may wait for its first token (HTTP 504 after)", "limits"
    )
    request_timeout: float | None = option(
        None, "seconds that a request may take in all (default: no limit)", "limits"
    )
    stream_timeout: float = option(
        60.0, "seconds that a client may leave its answer unread before it is cut", "limits"
    )
    step_timeout: float = option(
        120.0, "seconds that a step may take before /health reports the engine stalled", "limits"
    )
    drain_timeout: float = option(
        30.0, "seconds that running requests may take to finish after SIGTERM", "limits"
    )
    on_engine_failure: str = option(
        "exit",
        "what to do when the engine has given up: exit with status 1, for a supervisor to start "
        "the server again, or stay and answer 503",
        "limits",
    )
    share_prefix_cache: bool = option(
        False,
        "let requests of different API keys share cached prompts: faster, but usage and timing "
        "then tell one client what another has asked",
        "server",
    )

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        if not 0 <= self.grpc_port < 65536:
            raise ConfigError(f"grpc_port must be in [0, 65535], got {self.grpc_port}")
        if self.grpc_port and self.grpc_port == self.port:
            raise ConfigError(f"grpc_port and port are both {self.port}; give gRPC its own")
        if self.uds is not None and (self.host, self.port) != (HOST, PORT):
            raise ConfigError("uds takes the place of host and port; give the one or the others")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together; give both or neither")
        if self.fd is not None and self.fd < 0:
            raise ConfigError(f"fd must be the number of an open file, got {self.fd}")
        if self.fd is not None and self.uds is not None:
            raise ConfigError("fd and uds are two sockets to listen on; give one")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}"
            )
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(
                f"log_format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format!r}"
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not re.match("https?://[^/]", endpoint):
            raise ConfigError(f"otlp_traces_endpoint must be a URL of HTTP, got {endpoint!r:.100}")
        if self.metrics_prefix not in METRICS_PREFIXES:
            raise ConfigError(
                f"metrics_prefix must be one of {', '.join(METRICS_PREFIXES)}, got "
                f"{self.metrics_prefix!r}"
            )
        if self.embedding_pooling not in POOLINGS:
            raise ConfigError(
                f"embedding_pooling must be one of {', '.join(POOLINGS)}, got "
                f"{self.embedding_pooling!r}"
            )
        for name, known in (("tool_call_parser", DIALECTS), ("reasoning_parser", THINKING)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.on_engine_failure not in ("exit", "stay"):
            raise ConfigError(
                f"on_engine_failure must be exit or stay, got {self.on_engine_failure!r}"
            )
        for name in ("max_body_bytes", "max_upload_bytes", "max_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a positive integer, got {getattr(self, name)}")
        for name in ("max_requests_per_key", "max_tokens_per_minute"):
            if not 0 <= (getattr(self, name) or 0) <= MAX_LIMIT:
                raise ConfigError(
                    f"{name} must be from 0 to {MAX_LIMIT}, got {getattr(self, name)}"
                )
        if self.max_upload_bytes < self.max_body_bytes:
            raise ConfigError(
                f"max_upload_bytes={self.max_upload_bytes} is less than one body may have; give at "
                f"least max_body_bytes={self.max_body_bytes}"
            )
        for name in ("queue_timeout", "request_timeout", "stream_timeout", "step_timeout",
                     "drain_timeout"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} must be a number of seconds, got {value}")
            if value == 0 and name != "drain_timeout":
                raise ConfigError(f"{name} must be more than 0 seconds: no request could be served")
        self._check_sla()
        for origin in self.allowed_origin:
            if origin != "*" and not is_origin(origin):
                raise ConfigError(
                    "allowed_origin must be * or scheme://host:port as browsers send it, in lower "
                    f"case, with no path and without the scheme's own port; got {origin!r:.100}"
                )
        if any(not name or not is_text(name) for name in self.served_model_name):
            raise ConfigError("served_model_name must be text that JSON can hold; choose another")
        if self.admin_key is not None and self.admin_key in self.api_key:
            raise ConfigError("admin_key is an api_key too; choose one that no client has")
        if self.weights_root is not None and self.admin_key is None:
            raise ConfigError("weights_root needs admin_key: who has it may change the weights")
        if self.profile is not None:
            try:
                Path(self.profile).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"profile {self.profile!r} is no directory and cannot be made: {error}"
                ) from None
        if self.weights_root is not None and not Path(self.weights_root).is_dir():
            raise ConfigError(f"weights_root {self.weights_root!r} is no directory; make it first")
        admin_keys = () if self.admin_key is None else (self.admin_key,)
        for name, keys in (("api_key", self.api_key), ("admin_key", admin_keys)):
            if not all(keys):
                raise ConfigError(f"{name} must not be empty; leave the flag out to have none")
            if not all(map(SENDABLE.fullmatch, keys)):
                raise ConfigError(
                    f"{name} may hold only visible ASCII characters, since nothing else can be "
                    "sent in a header as it is; choose another key"
                )

    @property
    def sla(self) -> SLA:
        """The service level that /metrics tells the attainment of."""
        first_token = None if self.sla_ttft_ms is None else self.sla_ttft_ms / 1000
        return SLA(self.sla_token_rate, self.sla_prompt_rate, first_token)

    def _check_sla(self):
        rates, ttft = self.sla_token_rate, self.sla_ttft_ms
        numbers = [*rates, self.sla_prompt_rate, *([] if ttft is None else [ttft])]
        if not all(0 < number < math.inf for number in numbers):
            raise ConfigError(f"rates and times of --sla-... must be more than 0, got {numbers}")
        if len({f"{rate:g}" for rate in rates}) < len(rates):
            raise ConfigError(f"sla_token_rate must name each rate once, got {list(rates)}")
        if not 1 <= self.sla_window <= 3600:
            raise ConfigError(f"sla_window must be from 1 to 3600 seconds, got {self.sla_window}")

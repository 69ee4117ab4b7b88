"""Arguments of the application builder, without Ray."""

import sys
from pathlib import Path

import pytest
import yaml

from fastgen_jax import serve
from fastgen_jax.cluster.arguments import read
from fastgen_jax.cluster.running import run_cluster
from fastgen_jax.errors import ConfigError


def test_values_are_read_as_flags_from_text_and_from_yaml():
    as_text = {"model": "org/name", "max_model_len": "4K", "enable_prefix_caching": "false",
               "replicas": "2", "api_key": "k"}  # fmt: skip
    as_yaml = {"model": "org/name", "max_model_len": 4096, "enable_prefix_caching": False,
               "replicas": 2, "api_key": ["k"], "seed": None}  # fmt: skip
    assert read(as_text) == read(as_yaml)
    engine, server, cluster = read(as_text)
    assert (engine.max_model_len, engine.enable_prefix_caching) == (4096, False)
    assert (server.api_key, cluster.replicas) == (("k",), 2)


def test_a_mapping_reaches_the_config_that_takes_one():
    overrides = {"rope_scaling": {"factor": 4.0}}
    assert read({"hf_overrides": overrides})[0].hf_overrides == overrides


@pytest.mark.parametrize(("args", "message"), [
    ({"replica": 2}, "unknown option 'replica'; did you mean 'replicas'"),
    ({"replicas": "many"}, "expected a whole number"),
    ({"replicas": 0}, "at least 1, or 0 with max_replicas"),
    ({"replicas": 3, "max_replicas": 2}, "max_replicas=2 is less than replicas=3"),
    ({"waiting_tokens": 0}, "waiting_tokens must be at least 1"),
    ({"scale_down_delay": -1}, "scale_down_delay must be 0 or more"),
    ({"tls_cert": "a", "tls_key": "b"}, "--tls-cert is for a single server: replicas answer"),
    ({"admin_key": "a"}, "--admin-key is for a single server: replicas answer"),
    ({"port": object()}, "port must be text, a number, a list or a mapping"),
])  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(args, message):
    with pytest.raises(ConfigError, match=message):
        read(args)


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_the_files_of_the_package_ask_for_what_there_is(file):
    config = yaml.safe_load((Path(serve.__file__).parent / "cluster" / file).read_text())
    config = yaml.safe_load(config["spec"]["serveConfigV2"]) if "spec" in config else config
    (application,) = config["applications"]
    _, server, cluster = read(application["args"])
    assert server.host == config["http_options"]["host"]
    assert cluster.max_replicas > cluster.replicas


def test_replicas_without_ray_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastgen-jax\[ray\]'"):
        run_cluster(*read({"replicas": 4}))

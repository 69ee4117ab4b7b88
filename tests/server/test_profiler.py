"""A trace of a server at work: there by a flag alone, one at a time, and ended if forgotten."""

import gzip
import json
import re
from pathlib import Path

import httpx
import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.server import profiler
from fastgen_jax.server.config import ServerConfig
from tests.server.running import TEXT, Running, serving, wait_until


@pytest.fixture
def up(tokenizer, tmp_path):
    with serving(tokenizer, profile=str(tmp_path / "traces")) as running:
        yield running


def ask(up: Running, path: str) -> httpx.Response:
    return up.http.post(up.url + path)


def traces(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "traces").rglob("*.trace.json.gz")]


def test_trace_shows_what_the_server_does_and_no_text(up, tmp_path):
    assert ask(up, "/start_profile").json() == {"seconds_at_most": 60.0}
    up.http.post(up.url + "/v1/completions", json={"prompt": TEXT, "max_tokens": 4})
    assert ask(up, "/stop_profile").json() == {"directory": str(tmp_path / "traces")}
    (trace,) = traces(tmp_path)
    told = gzip.decompress(trace.read_bytes()).decode()
    assert "text" in {event.get("name") for event in json.loads(told)["traceEvents"]}
    assert TEXT not in told


def test_second_profile_and_an_end_without_one_are_refused(up):
    refused = ask(up, "/stop_profile")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == (
        "no profile is being recorded; POST /start_profile begins one"
    )
    ask(up, "/start_profile")
    refused = ask(up, "/start_profile")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"].startswith("a profile is being recorded")
    assert ask(up, "/stop_profile").status_code == 200


def test_forgotten_profile_ends_by_itself(up, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "LONGEST", 0.1)
    ask(up, "/start_profile")
    wait_until(lambda: traces(tmp_path))
    assert ask(up, "/stop_profile").status_code == 409


def test_profile_that_is_recorded_when_the_server_ends_is_written(tokenizer, tmp_path):
    with serving(tokenizer, profile=str(tmp_path / "traces")) as up:
        ask(up, "/start_profile")
    assert traces(tmp_path)


def test_without_the_flag_there_is_no_route(tokenizer):
    with serving(tokenizer) as up:
        assert ask(up, "/start_profile").status_code == 404


def test_profile_asks_for_the_key(tokenizer, tmp_path):
    with serving(tokenizer, profile=str(tmp_path), api_key=("secret",)) as up:
        assert ask(up, "/start_profile").status_code == 401


def test_profile_below_a_file_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    message = f"profile '{tmp_path}/file/x' is no directory and cannot be made"
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerConfig(profile=f"{tmp_path}/file/x")

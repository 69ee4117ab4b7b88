"""Routes that change what is served: theirs is a key of their own, and one thing at a time."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.admin import PATHS
from fastgen_jax.server.config import ServerConfig
from tests.server.running import TEXT, Running, serving, wait_until

ADMIN = {"authorization": "Bearer admin-key"}
CLIENT = {"authorization": "Bearer client-key"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Checkpoints `good` and `pickled`, and ways out."""
    root = tmp_path_factory.mktemp("root") / "weights"
    outside = root.parent / "outside"
    for folder, name in ((root / "good", "model.safetensors"), (outside, "model.safetensors"),
                         (root / "pickled", "pytorch_model.bin")):  # fmt: skip
        folder.mkdir(parents=True)
        (folder / name).write_bytes(b"")
    (root / "link").symlink_to(outside)
    (root / "linked").mkdir()
    (root / "linked" / "model.safetensors").symlink_to(outside / "model.safetensors")
    (root / "circle").symlink_to(root / "circle")
    return root


@pytest.fixture(scope="module")
def shared(tokenizer, root) -> Iterator[Running]:
    keys = {"api_key": ("client-key",), "admin_key": "admin-key"}
    with serving(tokenizer, weights_root=str(root), **keys) as running:
        yield running


@pytest.fixture
def up(up) -> Iterator[Running]:
    up.engine.changes.clear()
    yield up
    up.engine.misfit = ""
    up.engine.may_change.set()


def ask(up: Running, path: str, body=None, headers=ADMIN) -> httpx.Response:
    return up.http.post(up.url + path, json=body, headers=headers)


def update(up: Running, path: str = "good", **fields) -> httpx.Response:
    return ask(up, "/update_weights", {"path": path} | fields)


def generate(up: Running) -> httpx.Response:
    return ask(up, "/v1/completions", {"prompt": TEXT, "max_tokens": 1}, CLIENT)


def phase(up: Running) -> tuple[int, str]:
    reply = up.get("/health")
    return reply.status_code, reply.json()["phase"]


def samples(up: Running, name: str) -> dict[str, float]:
    """A metric's values by their last label."""
    lines = up.http.get(up.url + "/metrics", headers=CLIENT).text.splitlines()
    found = [line for line in lines if line.startswith(f"fastgen:{name}{{")]
    return {line.split('"')[-2]: float(line.split()[-1]) for line in found}


class TestKey:
    def test_without_the_flag_there_are_no_such_routes(self, tokenizer):
        with serving(tokenizer) as up:
            for path in PATHS:
                assert up.get(path).status_code == up.post(path, {}).status_code == 404
            assert not PATHS & up.get("/openapi.json").json()["paths"].keys()

    @pytest.mark.parametrize("headers", [{}, CLIENT, {"authorization": "Bearer admin-ke"}])
    def test_they_want_the_admin_key_and_no_other(self, up, headers):
        for path in PATHS:
            for method in ("GET", "POST", "HEAD", "PUT"):
                reply = up.http.request(method, up.url + path, headers=headers)
                assert reply.status_code == 401
        assert "admin key" in ask(up, "/sleep", headers=headers).json()["error"]["message"]
        assert not up.engine.changes

    def test_it_opens_nothing_else(self, up):
        body = {"prompt": TEXT}
        assert ask(up, "/v1/completions", body).status_code == 401
        for path in ("/sleep/", "/SLEEP", "//sleep"):
            assert ask(up, path).status_code == 401
            assert ask(up, path, headers=CLIENT).status_code == 404
        assert ask(up, "/sl%65ep", headers=CLIENT).status_code == 401
        assert not up.engine.changes


class TestUpdate:
    def test_the_engine_is_given_the_directory(self, up, root):
        before = samples(up, "weight_updates_total")["done"]
        reply = update(up, in_flight="drain")
        assert (reply.status_code, reply.json()) == (200, {"weight_version": before + 1})
        assert update(up, str(root / "good")).status_code == 200
        directory = str((root / "good").resolve())
        assert up.engine.changes == [
            ("update_weights", directory, "drain"), ("update_weights", directory, "recompute")
        ]  # fmt: skip
        assert samples(up, "weight_updates_total")["done"] == before + 2

    @pytest.mark.parametrize("path", [
        "", "none", "..", "../outside", "/etc", "good/../..", "link", "linked", "circle", "pickled",
        "good/model.safetensors", "a\0b", "x" * 5000, "~", "$HOME",
    ])  # fmt: skip
    def test_what_is_no_checkpoint_below_the_root_is_refused(self, up, root, path):
        reply = update(up, path)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "path")
        assert str(root.parent) not in reply.text
        assert not up.engine.changes

    def test_what_the_engine_finds_wrong_is_told_without_the_machines_paths(self, up, root):
        up.engine.misfit = f"{(root / 'good').resolve()}: 2 tensors of other shapes: a, b"
        before = samples(up, "weight_updates_total")
        error = update(up).json()["error"]
        assert error["message"] == "good: 2 tensors of other shapes: a, b"
        after = samples(up, "weight_updates_total")
        assert after == before | {"refused": before["refused"] + 1}
        assert phase(up) == (200, "ready")

    @pytest.mark.parametrize("body", [
        {}, {"path": 5}, {"path": "good", "in_flight": "stop"}, {"path": "good", "url": "x"}, [],
    ])  # fmt: skip
    def test_bad_bodies_are_400(self, up, body):
        assert ask(up, "/update_weights", body).status_code == 400
        assert not up.engine.changes

    def test_without_a_root_there_are_no_updates(self, tokenizer):
        with serving(tokenizer, admin_key="admin-key") as up:
            error = update(up).json()["error"]
            assert error["code"] == "no_weights_root"
            assert "--weights-root" in error["message"]
            assert ask(up, "/sleep").status_code == 200

    def test_the_log_tells_who_did_what(self, up, caplog):
        with caplog.at_level("INFO", "fastgen_jax.server"):
            reply = update(up)
            update(up, "../outside")
        done, refused = (r for r in caplog.records if r.getMessage().startswith("admin "))
        assert "update_weights 'good' recompute: 'done' in" in done.getMessage()
        assert done.__dict__["fields"]["request_id"] == reply.headers["x-request-id"]
        assert (refused.levelname, "refused: path must" in refused.getMessage()) == (
            "WARNING", True
        )  # fmt: skip


class TestOneAtATime:
    def test_a_second_change_is_a_409_and_health_tells_of_the_first(self, up):
        up.engine.may_change.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(update, up)
            wait_until(lambda: phase(up) == (200, "updating"))
            for path in ("/sleep", "/wake_up", "/reset_prefix_cache"):
                reply = ask(up, path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (409, "busy")
            assert update(up).status_code == 409
            assert generate(up).status_code == 200  # it waits in the engine, if at all
            up.engine.may_change.set()
            assert first.result().status_code == 200
        assert phase(up) == (200, "ready")
        assert len(up.engine.changes) == 1

    def test_a_change_goes_on_when_its_client_leaves(self, up):
        up.engine.may_change.clear()
        with pytest.raises(httpx.ReadTimeout):
            up.http.post(up.url + "/reset_prefix_cache", headers=ADMIN, timeout=0.2)
        assert ask(up, "/sleep").status_code == 409
        up.engine.may_change.set()
        wait_until(lambda: up.engine.changes == [("reset_prefix_cache",)])
        wait_until(lambda: ask(up, "/reset_prefix_cache").status_code == 200)

    def test_a_fault_is_a_500_and_frees_the_way(self, up, monkeypatch):
        def fail(level):
            raise RuntimeError("secret")

        monkeypatch.setattr(up.engine, "sleep", fail)
        reply = ask(up, "/sleep")
        assert (reply.status_code, "secret" in reply.text) == (500, False)
        assert ask(up, "/wake_up").status_code == 200
        assert samples(up, "engine_sleep_state")["awake"] == 1


class TestSleep:
    def test_health_and_metrics_tell_of_sleep(self, up):
        names = ("awake", "weights_offloaded", "discard_all")
        for level, name in enumerate(names):
            path = f"/sleep?level={level}" if level else "/wake_up"
            assert ask(up, path).json() == {"is_sleeping": level > 0}
            assert samples(up, "engine_sleep_state") == {n: n == name for n in names}
            assert phase(up) == ((503, "sleeping") if level else (200, "ready"))
            told = up.http.get(up.url + "/is_sleeping", headers=ADMIN).json()
            assert told == {"is_sleeping": level > 0}
        assert ask(up, "/wake_up").json() == {"is_sleeping": False}
        assert [change[0] for change in up.engine.changes] == [
            "wake_up",
            "sleep",
            "sleep",
            "wake_up",
        ]

    @pytest.mark.parametrize("level", ["0", "3", "-1", "x", "1.0", ""])
    def test_other_levels_are_refused(self, up, level):
        reply = ask(up, f"/sleep?level={level}")
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "level")
        assert not up.engine.changes


def test_while_it_loads_nothing_changes(tokenizer):
    may_load = threading.Event()

    def load(on_phase):
        may_load.wait(20)
        raise SystemExit

    with serving(tokenizer, load=load, wait=False, admin_key="admin-key") as up:
        assert ask(up, "/sleep").status_code == 503
        may_load.set()


@pytest.mark.parametrize(("options", "message"), [
    ({"admin_key": "a b"}, "admin_key may hold only visible ASCII"),
    ({"admin_key": ""}, "admin_key must not be empty"),
    ({"admin_key": "a", "api_key": ("b", "a")}, "choose one that no client has"),
    ({"weights_root": "/"}, "weights_root needs admin_key"),
    ({"weights_root": "/none", "admin_key": "a"}, "is no directory"),
])  # fmt: skip
def test_keys_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**options)

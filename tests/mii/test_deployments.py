"""Where deployments are told, and that no process is taken for another."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgen_jax import mii
from fastgen_jax.errors import ConfigError, FastGenError
from fastgen_jax.mii.deployments import Deployment, Directory, last_lines
from fastgen_jax.mii.process import Process
from fastgen_jax.mii.start import Launch
from fastgen_jax.serve import parse
from fastgen_jax.server.flags import arguments
from fastgen_jax.server.listen import bind

STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); input()"


def spawned(code: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)


def ended(child: subprocess.Popen):
    child.kill()
    child.communicate()


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    child = spawned("input()")
    yield child
    ended(child)


@pytest.fixture
def directory(tmp_path) -> Directory:
    return Directory(tmp_path / "fastgen_jax")


def deployment(process: Process, name: str = "a/b", **changes) -> Deployment:
    fields = {"url": "http://127.0.0.1:1", "api_key": "k", "tls_cert": None, "max_prompts": 2}
    fields |= {"max_body_bytes": 1000, "drain_timeout": 1.0}
    return Deployment(name=name, process=process, **fields | changes)


class TestProcess:
    def test_a_process_of_the_same_id_that_started_later_is_another(self, child):
        process = Process.started(child.pid)
        assert process.is_running
        assert not Process(child.pid, process.start_time - 1).is_running

    def test_a_later_process_of_the_same_id_is_not_stopped(self, child):
        Process(child.pid, Process.started(child.pid).start_time - 1).stop(0.0)
        assert child.poll() is None

    def test_a_name_that_looks_like_a_state_hides_nothing(self):
        child = spawned(
            "open('/proc/self/comm', 'w').write('a) Z 1 (b'); print(1, flush=True); input()"
        )
        assert child.stdout
        child.stdout.readline()
        assert Process.started(child.pid).is_running
        ended(child)

    def test_one_that_has_ended_is_not_running_though_nobody_waited_for_it(self):
        child = spawned("pass")
        process = Process.started(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_running
        child.communicate()

    def test_one_that_ignores_sigterm_is_killed(self):
        child = spawned(STUBBORN)
        assert child.stdout
        child.stdout.readline()
        process = Process.started(child.pid)
        process.stop(0.05)
        assert not process.is_running
        process.stop(0.05)
        child.communicate()


class TestDirectory:
    def test_what_is_added_is_found_as_it_is_until_it_is_removed(self, directory, child):
        mine = deployment(Process.started(child.pid))
        directory.log(mine.name).write_text("said")
        with directory.locked():
            directory.add(mine)
        assert directory.find("a/b") == mine
        assert directory.names() == ["a/b"]
        with directory.locked():
            directory.remove(mine)
        assert [path.name for path in directory.path.iterdir()] == ["lock"]

    def test_an_entry_whose_process_has_ended_is_gone_and_its_log_is_not(self, directory):
        directory.log("a/b").write_text("why")
        with directory.locked():
            directory.add(deployment(Process(os.getpid(), 1)))
        with directory.locked():
            assert directory.find("a/b") is None
        assert not directory.entry("a/b").exists()
        assert directory.log("a/b").exists()

    def test_another_deployment_of_the_name_is_not_removed(self, directory, child):
        process = Process.started(child.pid)
        with directory.locked():
            directory.add(deployment(process))
            directory.remove(deployment(process, api_key="older"))
            assert directory.find("a/b") == deployment(process)

    def test_only_this_user_may_read_what_is_written(self, directory, child):
        with directory.locked():
            directory.add(deployment(Process.started(child.pid)))
        mode = directory.entry("a/b").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700

    @pytest.mark.parametrize(
        "name", ["../../x", "/etc/passwd", "..", ".", "a\0b", "a\nb", "ü\udcff"]
    )
    def test_no_name_leaves_the_directory(self, directory, name, child):
        mine = deployment(Process.started(child.pid), name)
        with directory.locked():
            directory.add(mine)
        assert directory.entry(name).parent == directory.path
        assert directory.entry(name).resolve().parent == directory.path.resolve()
        assert directory.find(name) == mine
        assert directory.names() == [name]

    def test_a_name_that_no_file_can_have_is_refused(self, directory):
        with pytest.raises(ConfigError, match="give a shorter deployment_name"):
            directory.entry("x" * 300)
        with pytest.raises(ConfigError, match="a deployment needs a name"):
            directory.entry("")

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"process": {"pid": 1}}', "\0"])
    def test_an_entry_that_cannot_be_read_is_reported_and_stays(self, directory, content):
        directory.entry("a").write_text(content)
        with directory.locked(), pytest.raises(FastGenError, match=r"a\.json is not what this"):
            directory.find("a")
        assert directory.entry("a").exists()

    def test_the_end_of_a_long_log_is_told(self, tmp_path):
        log = tmp_path / "log"
        assert last_lines(log) == "(nothing)"
        log.write_bytes(b"\xff\n" * 9000 + b"the cause\n")
        assert last_lines(log).endswith("\nthe cause")
        assert len(last_lines(log).splitlines()) == 20


class TestHostile:
    """A directory that somebody else may have made tells nothing that is believed."""

    def test_a_directory_that_is_open_to_others_is_refused(self, tmp_path):
        (tmp_path / "fastgen_jax").mkdir(mode=0o700)
        (tmp_path / "fastgen_jax").chmod(0o750)
        with pytest.raises(ConfigError, match="closed to others"):
            Directory(tmp_path / "fastgen_jax")

    def test_a_link_to_a_directory_is_refused(self, tmp_path):
        (tmp_path / "theirs").mkdir(mode=0o700)
        (tmp_path / "fastgen_jax").symlink_to(tmp_path / "theirs")
        with pytest.raises(ConfigError, match="must be a directory of this user"):
            Directory(tmp_path / "fastgen_jax")

    def test_another_users_directory_is_refused(self, tmp_path, monkeypatch):
        Directory(tmp_path / "fastgen_jax")
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ConfigError, match="must be a directory of this user"):
            Directory(tmp_path / "fastgen_jax")

    def test_a_session_directory_that_others_may_write_to_is_not_used(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        expected = tmp_path / f"fastgen_jax-{os.getuid()}"
        assert Directory.of_user().path == expected
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "open"))
        assert Directory.of_user().path == expected


class TestLaunch:
    def test_options_become_the_flags_that_mean_them(self):
        options = {"max_model_len": 64, "enable_prefix_caching": False, "dtype": "float32",
                   "hf_overrides": {"rope_theta": 1.0}, "served_model_name": ["-a", "b"],
                   "memory_fraction": 0.5, "num_kv_blocks": None, "model": "--x"}  # fmt: skip
        engine, server, _ = parse(arguments(options))
        assert (engine.max_model_len, engine.enable_prefix_caching) == (64, False)
        assert (engine.hf_overrides, engine.memory_fraction) == ({"rope_theta": 1.0}, 0.5)
        assert (engine.num_kv_blocks, engine.model) == (None, "--x")
        assert server.served_model_name == ("-a", "b")

    @pytest.mark.parametrize(("options", "message"), [
        ({"max_modl_len": 5}, "unknown option 'max_modl_len'; did you mean 'max_model_len'"),
        ({"fd": 3}, "unknown option 'fd'"),
        ({"uds": "/x"}, "uds='/x' is not supported"),
        ({"device_map": {"h": 1}}, "device_map=.* is not supported; it may be 'auto'"),
        ({"port": "http"}, "expected a whole number"),
        ({"port": True}, "port"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"tensor_parallel": 0}, "tensor_parallel_size must be a positive integer"),
        ({"replica_num": 0}, "replicas must be at least 1"),
        ({"replica_num": "two"}, "expected a whole number"),
        ({"api_key": "two words"}, "visible ASCII"),
        ({"deployment_name": "x" * 300}, "give a shorter deployment_name"),
    ])  # fmt: skip
    def test_what_cannot_work_is_refused_before_anything_starts(self, session, options, message):
        with pytest.raises(ConfigError, match=message):
            mii.serve(**options)
        assert not session.exists() or not list(session.glob("*.json"))

    def test_a_taken_port_is_named_at_once(self, session):
        with bind("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
                mii.serve(port=port)
        assert not list(session.glob("*.json"))

    def test_of_two_launches_of_one_name_one_wins(self, directory, monkeypatch):
        children = []

        def spawn(*_) -> Process:
            children.append(spawned("input()"))
            return Process.started(children[-1].pid)

        monkeypatch.setattr(Launch, "_spawn", spawn)
        results = []

        def launch():
            one = Launch(name="n", arguments=["--port=0"], api_key="k")
            try:
                results.append(one.start(directory))
            except FastGenError as error:
                results.append(error)

        threads = [threading.Thread(target=launch) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [result for result in results if isinstance(result, FastGenError)]
        assert (len(results), len(refused), len(children)) == (8, 7, 1)
        assert all("'n' is deployed already, at http://127.0.0.1:" in str(e) for e in refused)
        ended(children[0])

    def test_a_server_that_cannot_be_told_of_is_ended(self, directory, monkeypatch):
        child = spawned("input()")
        process = Process.started(child.pid)
        monkeypatch.setattr(Launch, "_spawn", lambda *_: process)
        monkeypatch.setattr(Directory, "add", lambda *_: json.loads("x"))
        launch = Launch(name="n", arguments=["--port=0"], api_key="")
        with pytest.raises(ValueError, match="Expecting value"):
            launch.start(directory)
        assert not process.is_running
        child.communicate()

    def test_a_server_that_ends_while_it_starts_is_told_with_its_last_lines(self, session):
        with pytest.raises(FastGenError) as caught:
            mii.serve("/no/such/model", port=0)
        assert "'/no/such/model-mii-deployment' ended while it started" in str(caught.value)
        assert "error: there is no directory '/no/such/model'" in str(caught.value)
        assert [path.name for path in session.iterdir()] == ["lock"]

    def test_a_server_that_does_not_get_ready_in_time_is_ended(self, session):
        started = time.monotonic()
        with pytest.raises(FastGenError, match=r"was not ready within start_timeout=0 s"):
            mii.serve(start_timeout=0.0)
        assert [path.name for path in session.iterdir()] == ["lock"]
        assert time.monotonic() - started < 60

    def test_replicas_are_asked_of_the_command_line(self, session, monkeypatch):
        def spawn(launch, port, fd, log):
            assert "--replicas=2" in launch.arguments
            assert (fd, port > 0) == (None, True)
            raise KeyboardInterrupt

        monkeypatch.setattr(Launch, "_spawn", spawn)
        with pytest.raises(KeyboardInterrupt):
            mii.serve(replica_num=2)

    def test_an_interrupt_ends_what_it_started(self, session, monkeypatch):
        seen = []

        def interrupt(client, deployment, *_):
            seen.append(deployment.process)
            raise KeyboardInterrupt

        monkeypatch.setattr("fastgen_jax.mii.start._wait_until_ready", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mii.serve()
        assert not seen[0].is_running
        assert [path.name for path in session.iterdir()] == ["lock"]

    def test_the_key_is_in_no_list_of_processes(self, session, monkeypatch):
        shown = []

        def look(client, deployment, *_):
            file = Path(f"/proc/{deployment.process.pid}/cmdline")
            while not (line := file.read_text()):  # exec is at it
                assert deployment.process.is_running
            shown.append(line)
            raise KeyboardInterrupt

        monkeypatch.setattr("fastgen_jax.mii.start._wait_until_ready", look)
        with pytest.raises(KeyboardInterrupt):
            mii.serve(api_key="secret")
        assert "--fd" in shown[0]
        assert "secret" not in shown[0]

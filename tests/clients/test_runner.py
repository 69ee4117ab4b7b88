"""The runner's own promises; the tools themselves run in a stage of .ci/run."""

import re
import subprocess
import sys

import pytest

from tests.clients.__main__ import HERE, all_tools, read
from tests.clients.environments import LIST, environments, settings_of_a_tool

HELPERS = {"__init__", "__main__", "environments", "scenario", "server", "test_runner"}


def test_every_script_is_a_tool_of_the_list_and_every_tool_has_one():
    scripts = {path.stem for path in [*HERE.glob("*.py"), *HERE.glob("*.mjs")]} - HELPERS
    assert scripts == {name.replace("-", "_") for name in LIST["tools"]}


def test_every_tool_has_a_pinned_version():
    tools = [tool for tool in all_tools(environments()) if tool.environment]
    assert len(tools) > 15
    assert [tool.name for tool in tools if not re.fullmatch(r"[\d.]+", tool.version)] == []


def test_every_scenario_of_a_script_runs():
    for script in HERE.glob("*.py"):
        text = script.read_text()
        defined = re.findall(r"^def (\w+)\(url: str\) -> None", text, re.MULTILINE)
        run = set(re.findall(r"\w+", text.rpartition("__main__")[2]))
        assert {*defined} <= run, script.name


def test_lines_of_a_script_become_its_verdict():
    verdict = read(["ok chats", "noise", "FAILED streams: why", "NOT RUN there is none"])
    assert verdict[:3] == (["chats"], ["streams: why"], ["there is none"])


@pytest.mark.parametrize("host", ["198.51.100.7", "example.org"])
def test_a_tool_that_turns_to_another_machine_is_refused_and_noted(tmp_path, host):
    calls = tmp_path / "calls"
    code = f"import socket; socket.create_connection(({host!r}, 443), timeout=1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=settings_of_a_tool(calls, tmp_path),
        capture_output=True,
        text=True,
    )
    assert f"no tool may turn to {host}" in done.stderr
    assert calls.read_text() == f"{host}\n"

"""Points the tools that people use at a real server, and prints a table of what they could do.

    python -m tests.clients                  # all but the heavy ones; exit code 1 if any failed
    python -m tests.clients open-webui       # by name
    python -m tests.clients --fetch          # only installs, below build/clients/

tools.toml lists them; a tool's scenarios are in the file of its name. One that cannot be had here
is NOT RUN, with the reason; `--all` makes that a failure.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.clients.environments import (
    BUILD,
    HOME,
    LIST,
    ROOT,
    SCRATCH,
    Environment,
    Missing,
    environments,
    settings_of_a_tool,
)
from tests.clients.server import serving

HERE = Path(__file__).parent
LOGS = BUILD / "logs"
N_AT_ONCE = 2


class Tool(NamedTuple):
    """A script, and where its tool is installed: in an environment, or on the system."""

    name: str
    environment: Environment | None
    package: str
    seconds: float
    is_heavy: bool

    @property
    def version(self) -> str:
        return self.environment.version(self.package) if self.environment else ""

    def is_wanted(self, names: list[str]) -> bool:
        return self.name in names if names else not self.is_heavy

    def command(self, url: str) -> list[str]:
        """Modules of node are found from where a script lies, so it is copied beside them."""
        stem = self.name.replace("-", "_")
        if self.environment and self.environment.modules:
            script = shutil.copy(HERE / f"{stem}.mjs", self.environment.folder)
            shutil.copy(HERE / "scenario.mjs", self.environment.folder)
            return ["node", str(script), url]
        python = self.environment.python if self.environment else sys.executable
        return [str(python), "-m", f"tests.clients.{stem}", url]


class Verdict(NamedTuple):
    """What a tool could do, what it could not, and why it was not run."""

    ok: list[str]
    failed: list[str]
    not_run: list[str]
    seconds: float = 0.0


def main() -> int:
    options = parse()
    places = environments()
    tools = [tool for tool in all_tools(places) if tool.is_wanted(options.names)]
    missing = make({tool.environment for tool in tools if tool.environment})
    if options.fetch:
        for name, why in missing.items():
            print(f"not fetched: {name}: {why}")
        return 0
    shutil.rmtree(SCRATCH, ignore_errors=True)
    for folder in (SCRATCH, HOME, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with serving(LOGS / "server.log") as url, ThreadPoolExecutor(N_AT_ONCE) as pool:
        verdicts = list(pool.map(lambda tool: judge(tool, url, missing), tools))
    show(tools, verdicts, time.monotonic() - started)
    return int(any(v.failed or (options.all and v.not_run) for v in verdicts))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="tests.clients")
    parser.add_argument("names", nargs="*", metavar="TOOL")
    parser.add_argument("--fetch", action="store_true", help="only install")
    parser.add_argument("--all", action="store_true", help="fail when a tool was not run")
    options = parser.parse_args()
    if unknown := {*options.names} - LIST["tools"].keys():
        parser.error(f"there is no tool {', '.join(unknown)}; there are {', '.join(LIST['tools'])}")
    return options


def all_tools(places: dict[str, Environment]) -> list[Tool]:
    return [
        Tool(
            name,
            places.get(table.get("environment", "")),
            table.get("package", name),
            table.get("seconds", 120),
            table.get("heavy", False),
        )
        for name, table in LIST["tools"].items()
    ]


def make(wanted: set[Environment]) -> dict[str, str]:
    """Makes environments, side by side; those that cannot be made, with the reason."""

    def reason_against(environment: Environment) -> str:
        try:
            environment.make()
        except Missing as reason:
            return str(reason)
        return ""

    with ThreadPoolExecutor() as pool:
        reasons = dict(zip(wanted, pool.map(reason_against, wanted), strict=True))
    return {environment.name: why for environment, why in reasons.items() if why}


def judge(tool: Tool, url: str, missing: dict[str, str]) -> Verdict:
    """Runs a tool's script; a tool that turns to other machines has failed."""
    if tool.environment and tool.environment.name in missing:
        return Verdict([], [], [missing[tool.environment.name]])
    started = time.monotonic()
    calls_out = LOGS / f"{tool.name}.calls"
    calls_out.write_text("")
    status, said = run(tool, url, calls_out)
    verdict = read(said.splitlines())
    verdict.failed.extend(f"turned to {host}" for host in {*calls_out.read_text().split()})
    if status and not verdict.failed:
        verdict.failed.append(f"{status}, see {(LOGS / tool.name).relative_to(ROOT)}.log")
    return verdict._replace(seconds=time.monotonic() - started)


def run(tool: Tool, url: str, calls_out: Path) -> tuple[str, str]:
    """How it ended, "" if well, and what it printed. It ends in time, with all that it started."""
    log, scratch = LOGS / f"{tool.name}.log", SCRATCH / tool.name
    scratch.mkdir()  # of its own: two that unpack a browser in one place find it busy
    with log.open("w") as file:
        process = subprocess.Popen(
            tool.command(url), cwd=scratch, env=settings_of_a_tool(calls_out, scratch),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        status = process.wait(tool.seconds)
        ending = f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        ending = f"took more than {tool.seconds} s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ending, log.read_text(errors="replace")


def read(lines: list[str]) -> Verdict:
    def after(word: str) -> list[str]:
        return [line.removeprefix(word).strip() for line in lines if line.startswith(word)]

    return Verdict(after("ok "), after("FAILED "), after("NOT RUN "))


def show(tools: list[Tool], verdicts: list[Verdict], seconds: float) -> None:
    print(f"\n{'tool':20}{'version':14}{'ok':>4}{'failed':>8}{'seconds':>9}")
    for tool, verdict in zip(tools, verdicts, strict=True):
        counts = f"{len(verdict.ok):4}{len(verdict.failed):8}{verdict.seconds:9.0f}"
        note = "  NOT RUN" if verdict.not_run else ""
        print(f"{tool.name:20}{tool.version:14}{counts}{note}")
    for tool, verdict in zip(tools, verdicts, strict=True):
        for what in verdict.failed:
            print(f"FAILED {tool.name}: {what}")
        for why in verdict.not_run:
            print(f"NOT RUN: {tool.name}: {why}")
    n_ok, n_failed = (sum(len(getattr(v, kind)) for v in verdicts) for kind in ("ok", "failed"))
    print(f"=== {n_ok} passed, {n_failed} failed in {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())

"""What the package brings for operators says what the server does: names, flags, times, extras."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastgen_jax import serve
from fastgen_jax.server import capacity, lifecycle
from fastgen_jax.server.service import ENGINE_EXIT_TIMEOUT
from tests.server.running import PATHS, wait_until

ROOT = Path(serve.__file__).parents[1]
DEPLOY = Path(serve.__file__).parent / "deploy"
METRIC = re.compile(r"\b(?:fastgen:|http_|process_)\w+")


def instructions(name: str) -> list[str]:
    """Of the Dockerfile."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    return [line.removeprefix(name + " ") for line in text.splitlines() if line.startswith(name)]


@pytest.fixture(scope="module")
def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters="=")
    parser.optionxform = str
    text = (DEPLOY / "fastgen.service").read_text()
    parser.read_string(re.sub(r"\\\n\s*", "", text))
    return parser["Service"]


class TestGrafana:
    def test_every_metric_that_it_queries_is_there(self, up):
        up.post("/v1/completions", PATHS["completions"])
        wait_until(lambda: not up.service.n_inflight)
        families = text_string_to_metric_families(up.get("/metrics").text)
        there = {sample.name for family in families for sample in family.samples}
        panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
        queries = [target["expr"] for panel in panels for target in panel["targets"]]
        asked = {name for query in queries for name in METRIC.findall(query)}
        assert len(asked) > 20
        assert asked - there == set()

    def test_panels_do_not_overlap_and_have_numbers_of_their_own(self):
        panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels) == len({panel["id"] for panel in panels})


class TestUnit:
    def test_its_flags_are_ours(self, unit):
        _, module, name, *flags = shlex.split(unit["ExecStart"])
        assert [module, name] == ["-m", "fastgen_jax.serve"]
        config = serve.parse(flags)[1]
        assert config.log_format == "json"
        assert config.host == "127.0.0.1"

    def test_it_waits_for_what_runs_and_starts_again_what_failed(self, unit):
        config = serve.parse(shlex.split(unit["ExecStart"])[3:])[1]
        end = config.drain_timeout + 2 * lifecycle.LAST_WRITES + ENGINE_EXIT_TIMEOUT
        assert int(unit["TimeoutStopSec"]) > end
        assert unit["Restart"] == "on-failure"
        assert int(unit["LimitNOFILE"]) >= capacity.N_WANTED + capacity.RESERVE

    @pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
    def test_systemd_finds_no_fault_in_it(self, tmp_path):
        text = (DEPLOY / "fastgen.service").read_text()
        unit = tmp_path / "fastgen.service"
        unit.write_text(text.replace("/opt/fastgen/bin/python", sys.executable))
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "fastgen.service" not in found.stderr
        assert found.returncode == 0


class TestDockerfile:
    def test_its_flags_are_ours(self):
        [entry] = instructions("ENTRYPOINT")
        _, module, name, *flags = json.loads(entry)
        assert [module, name] == ["-m", "fastgen_jax.serve"]
        assert serve.parse(flags)[1].host == "0.0.0.0"

    def test_every_accelerator_is_an_extra_and_other_names_are_refused(self):
        [case] = re.findall(r"case .* esac", instructions("RUN")[0])
        script = f'ACCELERATOR=$1; {case}; echo "$extras"'
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        for name in ("cpu", "cuda12", "cuda13", "tpu"):
            command = ["sh", "-c", script, "sh", name]
            chosen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert set(chosen.strip().split(",")) <= set(extras)
            assert name in chosen or name == "cpu"
        wrong = subprocess.run(["sh", "-c", script, "sh", "gpu"], capture_output=True, text=True)
        assert wrong.returncode == 1
        assert "not gpu" in wrong.stderr

    def test_it_copies_what_the_package_is_made_of(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
        sources = [s for line in instructions("COPY") for s in line.split()[:-1]]
        sources = [source for source in sources if not source.startswith(("--from", "/"))]
        assert {f"{source}*" for source in sources if (ROOT / source).is_dir()} == set(packages)
        assert all((ROOT / source).exists() for source in sources)
        assert "deploy/*" in project["tool"]["setuptools"]["package-data"]["fastgen_jax"]

    def test_it_runs_as_nobody_special_and_its_health_is_ours(self, up):
        assert int(instructions("USER")[-1]) > 0
        [check] = instructions("HEALTHCHECK")
        command = json.loads(check.partition("CMD ")[2])
        code = command[2].replace("127.0.0.1:8000", f"127.0.0.1:{up.address[1]}")
        assert httpx.get(up.url + "/health", trust_env=False).status_code == 200
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env={})
        up.service.drain()
        try:
            failed = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, timeout=30, env={}
            )
            assert failed.returncode != 0
        finally:
            up.service.phase = up.service.phase._replace(name="ready")

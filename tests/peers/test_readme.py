"""README's table of speeds is that of the run that is kept."""

import json
from pathlib import Path

from benchmarks import kept

ROOT = Path(__file__).parents[2]


def test_readme_shows_what_was_measured_and_by_which_command():
    told = json.loads((ROOT / "benchmarks/results/peers.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert kept.markdown(told["rows"]) in readme
    assert told["made"]["date"] in readme and told["made"]["machine"] in readme


def beside_openvino(name: str, dtype: str) -> str:
    """Our throughput over OpenVINO's, of both workloads; the first row is of the warm-up."""
    told = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    kind = dtype, "openvino"
    _, *ratios = [r["ours / it"] for r in told["rows"] if (r["dtype"], r["engine"]) == kind]
    return " and ".join(ratio.split()[0] for ratio in ratios)


def test_what_it_says_of_bfloat16_and_of_matrix_units_was_measured():
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"at {beside_openvino('peers_bfloat16', 'bfloat16')} of OpenVINO" in readme
    assert f"at {beside_openvino('peers_amx', 'float32')} of OpenVINO in float32" in readme
    assert f"and at {beside_openvino('peers_amx', 'bfloat16')} in bfloat16" in readme

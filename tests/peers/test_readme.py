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


def test_what_it_says_of_bfloat16_was_measured():
    told = json.loads((ROOT / "benchmarks/results/peers_bfloat16.json").read_text())
    _, *ratios = [row["ours / it"] for row in told["rows"] if row["engine"] == "openvino"]
    readme = (ROOT / "README.md").read_text()  # the first one is of the warm-up
    assert " and ".join(ratio.split()[0] for ratio in ratios) + " of OpenVINO" in readme

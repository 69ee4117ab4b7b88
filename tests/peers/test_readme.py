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

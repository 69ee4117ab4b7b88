"""aider, in a repository with one file."""

import json
import tempfile
from pathlib import Path

from tests.clients.scenario import KEY, TALE, beside_python, main, run_command

QUIET = ["--no-git", "--no-show-model-warnings", "--no-pretty", "--yes-always", "--no-gitignore"]
QUIET += ["--map-tokens", "0", "--no-check-update", "--analytics-disable", "--no-detect-urls"]


# What aider else reads from the net: what models hold and cost.
PRICES = {"openai/fastgen-demo": {"max_input_tokens": 2048, "max_output_tokens": 512}}


def ask(url: str, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prices = place / ".aider/caches/model_prices_and_context_window.json"
        prices.parent.mkdir(parents=True)
        prices.write_text(json.dumps(PRICES))
        (place / "hello.py").write_text("print('hello')\n")
        account = {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": KEY, "HOME": folder}
        return run_command(
            *[beside_python("aider"), "--model", "openai/fastgen-demo", *QUIET, *flags],
            *["--chat-history-file", place / "chat", "--input-history-file", place / "input"],
            *["--message", TALE, place / "hello.py"],
            **account,
        )


def answers(url: str) -> None:
    for flag in ("--stream", "--no-stream"):
        said = ask(url, "--chat-mode", "ask", flag)
        assert "Tokens: " in said, said
        assert "rror" not in said, said


if __name__ == "__main__":
    main(answers)

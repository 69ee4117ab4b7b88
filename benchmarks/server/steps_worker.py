"""The real server, whose record of steps can be switched off: steps.py's child.

Commands come in on stdin, a line each: "on" or "off", which "report" repeats as a line of JSON on
stdout. The end of stdin ends the process.
"""

import json
import os
import sys
import threading
from typing import Any, TextIO

import fastgen_jax.serve as command_line
from fastgen_jax.engine.history import History

BEGIN, END = History.begin, History.end


def switch(word: str) -> None:
    def nothing(self: History, *args: Any, **kwargs: Any) -> None:
        """As if there were no record."""

    setattr(History, "begin", BEGIN if word == "on" else nothing)  # noqa: B010
    setattr(History, "end", END if word == "on" else nothing)  # noqa: B010


def obey(answers: TextIO) -> None:
    """Runs until stdin ends."""
    newest = "on"
    for line in sys.stdin:
        if line.strip() == "report":
            print(json.dumps({"record": newest}), file=answers, flush=True)
        else:
            newest = line.strip()
            switch(newest)
    os._exit(1)


def main() -> int:
    answers, sys.stdout = sys.stdout, sys.stderr
    threading.Thread(target=obey, args=(answers,), daemon=True).start()
    return command_line.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

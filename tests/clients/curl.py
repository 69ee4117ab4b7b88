"""curl, as in the README."""

import json
import re
import shutil
import sys

from tests.clients.scenario import HISTORY, main, run_command

JSON = ["-H", "Content-Type: application/json"]
STORY = json.dumps({"messages": HISTORY, "max_tokens": 40, "stream": True})


def chats(url: str) -> None:
    asked = json.dumps({"messages": HISTORY, "max_tokens": 8})
    answer = json.loads(
        run_command("curl", "-sS", f"{url}/v1/chat/completions", *JSON, "-d", asked)
    )
    assert answer["choices"][0]["message"]["content"]


def sees_each_event_as_it_comes(url: str) -> None:
    said = run_command("curl", "-sSNi", f"{url}/v1/chat/completions", *JSON, "-d", STORY)
    head, _, body = said.partition("\n\n")
    assert re.search("(?i)^content-type: text/event-stream", head, re.MULTILINE)
    assert body.count("data: ") > 20
    assert body.rstrip().endswith("data: [DONE]")


def is_told_what_was_wrong(url: str) -> None:
    status = ["-o", "/dev/stderr", "-w", "%{http_code}"]
    said = run_command("curl", "-sS", *status, f"{url}/v1/chat/completions", *JSON, "-d", "{")
    assert said.endswith("400")
    assert '"error"' in said
    assert "405" in run_command("curl", "-sS", *status, f"{url}/v1/chat/completions")


if __name__ == "__main__":
    if shutil.which("curl") is None:
        print("NOT RUN there is no curl on the PATH")
        sys.exit()
    main(chats, sees_each_event_as_it_comes, is_told_what_was_wrong)

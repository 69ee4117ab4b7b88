"""KV blocks of sequences: who holds what, and which full blocks later prompts may share."""

from collections.abc import Iterable

import numpy as np

from fastgen_jax.engine.blocks import EMPTY_PREFIX, BlockPool
from fastgen_jax.engine.types import Sequence


class SequenceBlocks:
    """The only writer of `block_ids`, `n_published`, `n_dropped` and `prefix` of a sequence besides
    HostTables.extend.

    Sharing is by whole blocks of known tokens; the last token of a sequence is always computed.

    Args:
        window: no layer sees a token that is so many positions back; None: some layer sees all.
    """

    def __init__(
        self, n_blocks: int, block_size: int, *, is_sharing: bool, window: int | None = None
    ):
        self.pool = BlockPool(n_blocks)
        self.block_size = block_size
        self.is_sharing = is_sharing
        self.window = window

    def may_share(self, sequence: Sequence) -> bool:
        """Penalties and logits processors need every token of the prompt on the device, and a mean
        every hidden state: such requests compute it all.
        """
        p, pooled = sequence.params, sequence.pooled
        has_penalty = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        has_penalty = has_penalty or p.extra_args
        needs_all = has_penalty or (pooled is not None and pooled.needs_all)
        return self.is_sharing and not needs_all

    def has_prefix(self, sequence: Sequence) -> bool:
        """Whether others can share what it caches of its prompt."""
        return self.may_share(sequence) and sequence.n_prompt > self.block_size

    def attach(self, sequence: Sequence) -> None:
        """Lets a sequence without blocks hold the cached prefix of its known tokens."""
        assert not sequence.block_ids
        n_cacheable = _n_known(sequence) - 1
        if sequence.scoring is not None:
            n_cacheable = min(n_cacheable, sequence.scoring.n_cacheable)
        if sequence.states is not None:
            n_cacheable = min(n_cacheable, sequence.states.first)
        n_full = int(n_cacheable) // self.block_size
        sequence.block_ids, sequence.prefix = self.pool.match(self._split(sequence, 0, n_full))
        sequence.n_published = len(sequence.block_ids)
        sequence.n_cached = sequence.n_published * self.block_size

    def publish(self, sequence: Sequence) -> None:
        """Offers the blocks full of cells that led to finite logits, if the sequence lives."""
        n_full = min(_n_known(sequence) - 1, sequence.n_cached) // self.block_size
        if n_full <= sequence.n_published or not self.is_sharing:
            return
        contents = self._split(sequence, sequence.n_published, n_full)
        blocks = sequence.block_ids[sequence.n_published : n_full]
        for block, content in zip(blocks, contents, strict=True):
            sequence.prefix = self.pool.publish(block, sequence.prefix, content)
        sequence.n_published = n_full

    def drop(self, sequence: Sequence) -> bool:
        """Gives back the blocks that no further token of the sequence sees; those that are still to
        be published wait for that.

        Returns whether there were any.
        """
        assert self.window is not None
        n_unseen = max(sequence.n_cached - self.window + 1, 0) // self.block_size
        end = min(n_unseen, sequence.n_published) if self.is_sharing else n_unseen
        start = sequence.n_dropped
        if end <= start:
            return False
        self.pool.release(sequence.block_ids[start:end])
        sequence.block_ids[start:end] = [0] * (end - start)
        sequence.n_dropped = end
        return True

    def forget(self, sequence: Sequence) -> None:
        """Gives back all blocks; the sequence owes everything again."""
        self.pool.release(sequence.block_ids[sequence.n_dropped :])
        self.lose(sequence)

    def lose(self, sequence: Sequence) -> None:
        """Its blocks are gone already, with the pool that they were of."""
        sequence.block_ids = []
        sequence.n_cached = sequence.n_published = sequence.n_dropped = 0
        sequence.prefix = EMPTY_PREFIX

    def flush(self, holders: Iterable[Sequence]) -> None:
        """Lets no sequence share what has been cached so far: other weights made it. Nor what these
        ones cache from now on, behind it.
        """
        nowhere = self.pool.flush()
        for sequence in holders:
            sequence.prefix = nowhere

    def n_exclusive(self, sequence: Sequence) -> int:
        """Blocks that become free if this sequence is preempted."""
        return self.pool.n_exclusive(sequence.block_ids[sequence.n_dropped :])

    def _split(self, sequence: Sequence, start: int, end: int) -> list[bytes]:
        """Bytes of the known tokens of blocks start..end."""
        size, n_prompt = self.block_size, sequence.n_prompt
        outputs = sequence.output_ids[
            max(start * size - n_prompt, 0) : max(end * size - n_prompt, 0)
        ]
        prompt = sequence.prompt_ids[start * size : end * size]
        tokens = np.concatenate([prompt, np.array(outputs, np.int32)])
        contents = [tokens[i : i + size].tobytes() for i in range(0, len(tokens), size)]
        if start == 0 and contents:
            contents[0] = sequence.cache_salt + contents[0]  # no other salt finds what follows it
        return contents


def _n_known(sequence: Sequence) -> int:
    return sequence.n_prompt + len(sequence.output_ids)

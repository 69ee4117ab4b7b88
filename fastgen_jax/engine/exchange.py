"""Exchange: the weights of an engine that runs, what may replace them, and where they sleep.

Programs take the weights as arguments: others of the same shapes need no compilation.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from fastgen_jax.checkpoints import held
from fastgen_jax.checkpoints.fillings import Filling, Target, fillings
from fastgen_jax.checkpoints.held import on_host
from fastgen_jax.checkpoints.loading import abstract_model, flat_params
from fastgen_jax.engine.programs import return_freed_memory
from fastgen_jax.engine.runner import Runner
from fastgen_jax.engine.source import Load
from fastgen_jax.engine.startup import ResolvedConfig
from fastgen_jax.errors import ConfigError, WeightsError
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import placed

LEVELS = (1, 2)
GIVEN_AWAY = (
    "weights of the engine were given away (donated) to another program; call update_weights"
)
NOTHING_TO_READ = (
    "sleep(2) has dropped the weights, and there is no checkpoint to read them from again; call "
    "update_weights with all of them, then wake_up"
)


class Exchange:
    """The one writer of its runner's leaves once the runner is made.

    INVARIANT: the leaves are all there or none is. Awake (level 0) they are on the mesh; at level 1
    on the host, or where `put` has put them; at level 2 nowhere, until `put` brings them.

    Args:
        reload: makes the model again; None: nobody can.
    """

    def __init__(
        self,
        runner: Runner,
        config: ResolvedConfig,
        model_config: ModelConfig,
        reload: Load | None,
    ):
        self.level = 0
        self._runner, self._model_config, self._reload = runner, model_config, reload
        self._dtype, self._overrides = config.dtype, config.hf_overrides

    @property
    def _policy(self) -> Policy:
        return Policy.here(self._dtype, self._runner.mesh)

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        """By path, in the order of the leaves: their shapes on one device."""
        return flat_params(abstract_model(self._model_config, self._policy))

    def read(self, source: Any) -> dict[str, Filling]:
        """What `put` takes, all of it checked. Any thread may call it.

        Raises:
            WeightsError, CheckpointError, ConfigError: lists everything that does not fit.
        """
        target = Target(self._model_config, self._params, self._runner.mesh, self._overrides)
        return fillings(source, target)

    def put(self, found: dict[str, Filling]) -> None:
        """Replaces weights, one after the other: beside them there is never more than one.

        Raises:
            WeightsError: nothing was changed; or, where the message says so, a weight could not be
                made, and the engine sleeps without any.
        """
        self._check_others(found)
        leaves, self._runner.leaves = [*self._runner.leaves], ()
        leaves = leaves or [None] * len(self._params)
        n_done, n_all = 0, len(found)
        try:
            for i, path in enumerate(self._params):
                if path in found:
                    leaves[i] = found.pop(path)(leaves[i])
                    n_done += 1
        except Exception as error:
            self.sleep(2)
            raise WeightsError(
                f"weight {n_done + 1} of {n_all} could not be made ({type(error).__name__}: "
                f"{error}); those before were replaced, so the engine sleeps without weights: call "
                "update_weights with all of them, then wake_up"
            ) from error
        self._runner.leaves = tuple(leaves)

    def _check_others(self, found: dict[str, Filling]) -> None:
        """Raises WeightsError unless the weights that are not replaced are there."""
        own = dict(zip(self._params, self._runner.leaves, strict=False))
        others = [path for path in self._params if path not in found]
        held.check(
            [f"missing: {path} (the engine has none)" for path in others if path not in own]
            + [
                f"missing: {path} (the engine's was given away to a program that has run)"
                for path in others
                if path in own and _is_deleted(own[path])
            ]
        )

    def sleep(self, level: int) -> None:
        """Frees the cache and, on the device, the weights. The engine has lost what was cached."""
        if self.level == 0:
            self._runner.free()
        if level == 2:
            self._runner.leaves = ()
        elif self.level == 0:
            leaves, self._runner.leaves = [*self._runner.leaves], ()
            for i, leaf in enumerate(leaves):
                leaves[i] = on_host(leaf)
            self._runner.leaves = tuple(leaves)
        self.level = max(level, self.level)
        return_freed_memory()

    def wake_up(self) -> None:
        """Raises WeightsError, CheckpointError: there are no weights; it sleeps on."""
        if self.level == 0:
            return
        mesh = self._runner.mesh
        if not self._runner.leaves:
            if self._reload is None:
                raise WeightsError(NOTHING_TO_READ)
            model = self._reload(self._model_config, self._policy, mesh, lambda done, total: None)
            self._runner.leaves = tuple(jax.tree.leaves(model))
        leaves, self._runner.leaves = [*self._runner.leaves], ()
        for i, (path, param) in enumerate(self._params.items()):
            if isinstance(leaves[i], np.ndarray):
                sharding = placed(path, param, self._model_config, mesh).sharding
                leaves[i] = jax.device_put(leaves[i], sharding)
        self._runner.leaves = tuple(leaves)
        self._runner.reset()
        self.level = 0


def check_level(level: Any) -> int:
    """Raises ConfigError unless there is such a level of sleep."""
    if type(level) is not int or level not in LEVELS:
        raise ConfigError(
            f"level must be 1 (weights move to the host) or 2 (they are dropped), got {level!r:.40}"
        )
    return level


def is_lost(leaves: Iterable[Any]) -> bool:
    """Whether a program that shares the weights has deleted some."""
    return any(_is_deleted(leaf) for leaf in leaves)


def _is_deleted(leaf: jax.Array | np.ndarray) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()

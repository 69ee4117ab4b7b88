"""Our engine as the rollout engine of Tunix's learners, and our models as models of theirs (extra
`tunix`).

    actor = TunixModel(fastgen_jax.models.load(path))
    ClusterConfig(rollout_engine=FastGenRollout, ...)   # functools.partial adds engine options
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from tunix.rl import common  # pyright: ignore[reportMissingImports]
from tunix.rl.rollout.base_rollout import (  # pyright: ignore[reportMissingImports]
    BaseRollout,
    RolloutConfig,
    RolloutOutput,
)

from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.models.config import ModelConfig
from fastgen_jax.models.decoder import Model
from fastgen_jax.rl.rollouts import grouped, left_padded, params_of, sampled_logprobs


class TunixModel(nnx.Module):
    """A model of ours, called as Tunix calls models: padding and packing come as a mask, and
    logits go with a cache that trainers leave None.
    """

    def __init__(self, model: Model):
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def __call__(
        self,
        input_tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: None = None,
        attention_mask: Bool[Array, "B T T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], None]:
        """Args:
        attention_mask: causal, and 0 in the columns of padding.
        segment_ids: if given, they say all that the mask says.
        """
        if cache is not None:
            raise InvalidRequest("TunixModel has no KV cache; generate with FastGenRollout")
        if segment_ids is None and attention_mask is not None:
            segment_ids = attention_mask[:, -1].astype(jnp.int32)  # the last token sees all others
        return self.model(input_tokens, segment_ids, positions), None


class FastGenRollout(BaseRollout):
    """Generates with the actor's own arrays, as they were when `update_params` last brought them:
    the engine copies none that are on its devices already.

    Equal prompts that are neighbours, as in GRPO, are samples of one: its blocks are computed once.

    Args:
        rollout_actor: a TunixModel.
        tokenizer: Tunix's adapter of one.
        mesh: the engine takes as many devices as it has.
        options: of EngineConfig.
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        rollout_config: RolloutConfig,
        **options: Any,
    ):
        if not isinstance(rollout_actor, TunixModel):
            raise ConfigError(
                f"the actor is a {type(rollout_actor).__name__}; FastGenRollout generates with "
                "models of fastgen_jax: wrap one in TunixModel"
            )
        options = {
            "max_model_len": rollout_config.max_prompt_length
            + rollout_config.max_tokens_to_generate,
            "tensor_parallel_size": max(mesh.size, 1),
        } | options
        self._tokenizer, self._temperature = tokenizer, rollout_config.temperature
        self._graph, self._state = nnx.split(rollout_actor)
        self._llm = LLM.from_module(rollout_actor.model, **options)

    def generate(
        self, prompts: list[str], rollout_config: RolloutConfig, **changes: Any
    ) -> RolloutOutput:
        """Completes the prompts.

        Args:
            changes: fields of SamplingParams that the config does not have.
        """
        groups = grouped(prompts)
        params = [
            params_of(rollout_config, self.eos_id(), group.n, place, **changes)
            for place, group in enumerate(groups)
        ]
        ids = [self._encode(group.prompt) for group in groups]
        rows = [row for row, group in zip(ids, groups, strict=True) for _ in range(group.n)]
        padded = left_padded(rows, rollout_config.max_prompt_length, self.pad_id())
        outputs = self._llm.generate(ids, params, use_tqdm=False)
        samples = [sample for output in outputs for sample in output.outputs]
        return RolloutOutput(
            text=[self._tokenizer.decode(sample.token_ids) for sample in samples],
            logits=None,
            tokens=[np.array(sample.token_ids, np.int32) for sample in samples],
            left_padded_prompt_tokens=padded,
            logprobs=[*map(sampled_logprobs, samples)] if rollout_config.return_logprobs else None,
        )

    def _encode(self, prompt: str) -> list[int]:
        """Its ids; the first is BOS, once, as Tunix's own sampler has it."""
        bos = self._tokenizer.bos_id()
        ids = list(self._tokenizer.encode(str(prompt)))  # numpy has strings of its own
        return ids if bos is None else self._tokenizer.dedup_bos_ids([bos, *ids])

    def get_per_token_logps(
        self, prompt_tokens: Int[Array, "B P"], completion_tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """The policy's, with the engine's weights and the rollouts' temperature: Tunix's own
        computation, by the dense forward.
        """
        return common.compute_per_token_logps(
            self._graph,
            self._state,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            pad_id=self.pad_id(),
            eos_id=self.eos_id(),
            temperature=self._temperature,
        )

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Gives the engine the trainer's weights, in place.

        Args:
            params: the nnx.State of a TunixModel.
            filter_types: what the state was filtered by: parameters are all that a model has.
        """
        self._llm.update_weights(params["model"])
        self._state = params

    def pad_id(self) -> int:
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._tokenizer.eos_id()

    def model(self) -> TunixModel:
        """The engine's weights. Tunix brings a rollout no updates where these are the trainer's
        very objects; so they are others, of the same memory.
        """
        return nnx.merge(self._graph, jax.tree.map(view, self._state))


def view(array: jax.Array) -> jax.Array:
    """Another array of the same buffers."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)

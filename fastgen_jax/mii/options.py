"""MII's options and its response, one reader for both forms; knows neither engine nor server."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen_jax.config import Idle, check_known
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.results import RequestOutput
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.vllm_options import acting

OUR_NAMES = {
    "tensor_parallel": "tensor_parallel_size",
    "max_length": "max_model_len",
    "port_number": "port",
    "replica_num": "replicas",
}
LOADING: dict[str, Idle] = {
    "task": ("text-generation",),
    "device_map": ("auto",),
    "quantization_mode": (None,),
    "all_rank_output": bool,  # there is one rank
    "sync_debug": bool,
    "profile_model_time": (False,),
    "torch_dist_port": int,
    "zmq_port_number": int,
}
SERVING: dict[str, Idle] = {
    **LOADING,
    "enable_restful_api": bool,  # HTTP is what the server speaks
    "restful_processes": int,
    "hostfile": str | None,
    "version": int,
    "uds": (None,),
}


def loading_options(options: dict[str, Any], idle: dict[str, Idle], known: Sequence[str]) -> Any:
    """What a model is loaded with, under our names.

    Raises:
        ConfigError: an unknown option, with the nearest known one, or one that cannot be met.
    """
    known = [*known, *(name for name, ours in OUR_NAMES.items() if ours in known)]
    return {OUR_NAMES.get(k, k): v for k, v in acting(options, idle, known).items()}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """MII's generation parameters and defaults: sampling with top_p 0.9 to the end of the context.

    Unlike in MII, stop strings may span tokens and leave EOS in force, min_new_tokens counts
    generated tokens only, and max_length defaults to what the engine can hold.
    """

    max_length: int | None = None  # prompt and output together
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = True
    top_p: float = 0.9
    top_k: int | None = None
    temperature: float | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    return_full_text: bool = False

    @classmethod
    def read(cls, options: dict[str, Any]) -> "PipelineOptions":
        """Raises ConfigError for an unknown option, with the nearest one that there is."""
        check_known(options, cls)
        return cls(**options)

    def sampling_params(self, prompt_length: int) -> SamplingParams:
        """Raises InvalidRequest if max_length leaves no room or a value is out of range."""
        max_tokens = self.max_new_tokens
        if max_tokens is None and self.max_length is not None:
            max_tokens = self.max_length - prompt_length
            if max_tokens < 1:
                raise InvalidRequest(
                    f"max_length={self.max_length} must exceed the prompt's {prompt_length} tokens",
                    param="max_length",
                )
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_new_tokens,
            temperature=temperature if self.do_sample else 0.0,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            ignore_eos=self.ignore_eos,
        )

    def shown(self, response: "Response") -> "Response":
        """The response, which begins with its prompt if that was asked for."""
        if not self.return_full_text:
            return response
        prompt = response.prompt or ""
        outputs = [dataclasses.replace(out, text=prompt + out.text) for out in response.outputs]
        return dataclasses.replace(response, outputs=outputs)


@dataclass(frozen=True, repr=False)
class Response(RequestOutput):
    """A RequestOutput that shows itself as its text, also in a list, as MII's does."""

    def __repr__(self) -> str:
        return self.generated_text

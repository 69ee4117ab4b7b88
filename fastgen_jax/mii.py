"""MII's front, for those who come from it: pipeline(model)(prompts, max_new_tokens=64).

A thin layer on LLM: other names, other defaults, the same outputs.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgen_jax.config import check_known
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.prompts import at_prompt
from fastgen_jax.results import RequestOutput
from fastgen_jax.sampling_params import SamplingParams

MII_NAMES = {"tensor_parallel": "tensor_parallel_size", "max_length": "max_model_len"}


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


class Pipeline:
    """MII's non-persistent form: `pipe(prompts, max_new_tokens=64)`, one response per prompt."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def __call__(self, prompts: str | list[str], **options: Any) -> list[RequestOutput]:
        """Completes prompts with the same options of PipelineOptions; shows no progress."""
        check_known(options, PipelineOptions)
        o = PipelineOptions(**options)
        encoded = self.llm.encode_prompts(prompts)
        params = [at_prompt(i, o.sampling_params, len(ids)) for i, (_, ids) in enumerate(encoded)]
        responses = self.llm.run(encoded, params, use_tqdm=False)
        return [_with_prompt(r) for r in responses] if o.return_full_text else responses

    def destroy(self) -> None:
        """Closes the engine, which frees its memory; further calls raise EngineStopped."""
        self.llm.close()


def _with_prompt(response: RequestOutput) -> RequestOutput:
    outputs = [
        dataclasses.replace(out, text=(response.prompt or "") + out.text)
        for out in response.outputs
    ]
    return dataclasses.replace(response, outputs=outputs)


def pipeline(model_name_or_path: str, **options: Any) -> Pipeline:
    """Loads a model; options are EngineConfig's, or MII's tensor_parallel and max_length."""
    return Pipeline(LLM(model_name_or_path, **{MII_NAMES.get(k, k): v for k, v in options.items()}))

"""MII's non-persistent form, a thin layer on LLM: other names, other defaults."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.llm import LLM
from fastgen_jax.mii.options import LOADING, PipelineOptions, Response, loading_options
from fastgen_jax.prompts import Prompt, at_prompt


class Pipeline:
    """MII's non-persistent form: `pipe(prompts, max_new_tokens=64)`, one response per prompt."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def __call__(self, prompts: Prompt | Iterable[Prompt], **options: Any) -> list[Response]:
        """Completes prompts with the same options of PipelineOptions; shows no progress."""
        o = PipelineOptions.read(options)
        encoded = self.llm.encode_prompts(prompts)
        params = [at_prompt(i, o.sampling_params, len(ids)) for i, (_, ids) in enumerate(encoded)]
        outputs = self.llm.run(encoded, params, use_tqdm=False)
        return [o.shown(Response(**vars(output))) for output in outputs]

    def destroy(self) -> None:
        """Closes the engine, which frees its memory; further calls raise EngineStopped."""
        self.llm.close()


def pipeline(model_name_or_path: str = "", **options: Any) -> Pipeline:
    """Loads a model, the built-in demo if none is named; options are EngineConfig's, or MII's
    tensor_parallel and max_length.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    options = loading_options(options, LOADING, known)
    return Pipeline(LLM(model_name_or_path or str(DEMO), **options))

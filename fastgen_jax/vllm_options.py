"""Options that callers of vLLM bring, each with the values that ask for nothing more than is done.

Those are taken; any other value is refused, for what does not act is not dropped in silence.
"""

from collections.abc import Iterable
from types import NoneType
from typing import Any

from fastgen_jax.config import Idle, check_names, idle_problem
from fastgen_jax.errors import ConfigError
from fastgen_jax.sampling_params import MAX_LOGPROBS

NOTHING = (None, {}, [])

LOADING: dict[str, Idle] = {
    # what is loaded
    "task": ("auto", "generate"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "model_impl": ("auto",),
    "generation_config": ("auto",),
    "tokenizer_mode": ("auto",),
    "skip_tokenizer_init": (False,),
    "trust_remote_code": (False,),
    "tokenizer_revision": (None,),
    "code_revision": (None,),
    "hf_token": (None,),
    "download_dir": (None,),
    "quantization": (None,),
    "override_generation_config": NOTHING,
    "model_loader_extra_config": NOTHING,
    "use_tqdm_on_load": bool,
    # what the model is not
    "enable_lora": (False,),
    "enable_prompt_embeds": (False,),
    "mm_processor_kwargs": NOTHING,
    "limit_mm_per_prompt": NOTHING,
    "allowed_local_media_path": ("",),
    "allowed_media_domains": NOTHING,
    "pooler_config": (None,),
    "speculative_config": (None,),
    # memory
    "gpu_memory_utilization": (0.9,),
    "kv_cache_memory_bytes": (None,),
    "cpu_offload_gb": (0,),
    "swap_space": int | float,  # what is preempted is computed again
    "enable_sleep_mode": (False,),
    # how steps are made and run
    "enforce_eager": bool,  # all is compiled, before the first request
    "compilation_config": NOTHING,
    "max_seq_len_to_capture": int,
    "enable_chunked_prefill": (None, True),
    "scheduling_policy": ("fcfs", "priority"),  # turns go by priority, then by arrival
    "async_scheduling": bool | NoneType,
    "disable_async_output_proc": bool,
    "disable_cascade_attn": bool,
    "disable_log_stats": bool,
    "max_logprobs": (MAX_LOGPROBS,),
    "structured_outputs_config": NOTHING,
    # over how many devices
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "enable_expert_parallel": (False,),
    "distributed_executor_backend": (None, "uni", "mp"),
    "disable_custom_all_reduce": bool,
}
GENERATING: dict[str, Idle] = {
    "lora_request": NOTHING,
    "prompt_adapter_request": (None,),
    "guided_options_request": (None,),
    "tokenization_kwargs": NOTHING,
    "mm_processor_kwargs": NOTHING,
}
CHATTING: dict[str, Idle] = {**GENERATING, "chat_template_content_format": ("auto", "string")}
EMBEDDING: dict[str, Idle] = {
    "lora_request": NOTHING,
    "pooling_params": (None,),
    "priority": list | NoneType,  # all is done when the call returns
    "tokenization_kwargs": NOTHING,
    "truncate_prompt_tokens": (None,),
}
BEAM_SEARCHING: dict[str, Idle] = {
    "lora_request": NOTHING,
    "use_tqdm": (False,),
    "concurrency_limit": int | NoneType,  # the engine takes what it has room for
}
INSTEAD = {
    "chat_template_content_format": "templates get the content as one string",
    "data_parallel_size": "tensor_parallel_size is what there is",
    "enable_chunked_prefill": "prompts are always cut, at max_num_batched_tokens",
    "gpu_memory_utilization": "memory_fraction is the share of what loading leaves",
    "kv_cache_memory_bytes": "num_kv_blocks is the size of the KV cache",
    "pooling_params": "pooling and normalize are what there is",
    "pipeline_parallel_size": "tensor_parallel_size is what there is",
    "quantization": "config.json says how a checkpoint is quantised",
    "skip_tokenizer_init": "SamplingParams(detokenize=False) leaves the text out",
    "tokenizer_revision": "give the directory of that revision as tokenizer",
    "truncate_prompt_tokens": "give as many token ids as you want embedded",
    "trust_remote_code": "code of a repository is never run",
}


def acting(
    options: dict[str, Any], idle: dict[str, Idle], known: Iterable[str] = ()
) -> dict[str, Any]:
    """The options that are `known`, without the idle ones.

    Raises:
        ConfigError: a value that an idle option may not have, or an unknown option, with the
            nearest one that there is.
    """
    check_names(options, [*known, *idle])
    for name in options.keys() & idle.keys():
        if problem := idle_problem(name, options[name], idle[name]):
            raise ConfigError("; ".join([problem, INSTEAD.get(name, "leave it out")]))
    return {name: value for name, value in options.items() if name not in idle}

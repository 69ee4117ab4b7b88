"""OpenVINO GenAI's continuous batching with dynamic split fuse, on a model that optimum exports."""

import os
import tempfile

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai  # pyright: ignore[reportMissingImports]
from optimum.intel import OVModelForCausalLM  # pyright: ignore[reportMissingImports]

from benchmarks.peers.protocol import Generate, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def load(path: str, dtype: str) -> tuple[str, Generate]:
    with tempfile.TemporaryDirectory() as folder:
        exported = OVModelForCausalLM.from_pretrained(path, export=True, load_in_8bit=False)
        exported.save_pretrained(folder)
        precision = PRECISIONS[dtype]
        if precision.upper() not in openvino.Core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            precision = "f32"  # as OpenVINO computes then; a cache of bfloat16 is refused
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "INFERENCE_NUM_THREADS": os.cpu_count() or 1,
        }
        pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler(), "CPU", options)
    versions = f"openvino {openvino.__version__}, genai {openvino_genai.__version__}"
    if precision != PRECISIONS[dtype]:
        versions += f", in {precision}: this CPU has no {dtype}"
    return versions, lambda prompts, n_new, _: generate(pipeline, prompts, n_new)


def scheduler():
    config = openvino_genai.SchedulerConfig()
    config.max_num_batched_tokens = 512
    config.max_num_seqs = 64
    config.cache_size = 2  # GB
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = False
    return config


def generate(pipeline, prompts, n_new):
    inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
    configs = []
    for n in n_new:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = n
        config.ignore_eos = True
        config.do_sample = False
        configs.append(config)
    results = pipeline.generate(inputs, configs)
    return [list(map(int, result.m_generation_ids[0])) for result in results]


if __name__ == "__main__":
    serve(load)

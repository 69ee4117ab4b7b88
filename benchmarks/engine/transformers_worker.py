"""The transformers side of throughput.py, as a process of its own: it may have its own environment.

Reads one JSON job per line from stdin, answers each with a line on stdout: `{"seconds": ...}` or
`{"error": ...}`. A job names a strategy, prompts (token ids) and how many tokens to generate for
each; the answer is the time until all of them are there. Greedy, no end of sequence, all threads.
"""

import argparse
import json
import os
import sys
import time

import torch  # pyright: ignore[reportMissingImports]
import transformers


@torch.inference_mode()
def generate_static(model, prompts, n_new, batch_size):
    """generate() in left-padded batches; requests that end together go together."""
    order = sorted(range(len(prompts)), key=lambda i: (-n_new[i], len(prompts[i])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, i in enumerate(batch):
            ids[line, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[line, width - len(prompts[i]) :] = 1
        n = max(n_new[i] for i in batch)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        assert out.shape == (len(batch), width + n)


def generate_continuous(model, prompts, n_new, batch_size):
    """Continuous batching over a paged cache, each request with its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(n_new)
    )
    longest = max(len(p) + n for p, n in zip(prompts, n_new, strict=True))
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=len(prompts) * (longest // 32 + 2),
        max_batch_tokens=512,
        max_requests_per_batch=batch_size,
        allow_block_sharing=False,
    )
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        for i, (prompt, n) in enumerate(zip(prompts, n_new, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=n)
        n_done = 0
        while n_done < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself")
            if result is not None and result.is_finished():
                if len(result.generated_tokens) != n_new[int(result.request_id)]:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                n_done += 1


STRATEGIES = {"static": generate_static, "continuous": generate_continuous}


def run(model, job):
    start = time.perf_counter()
    STRATEGIES[job["strategy"]](model, job["prompts"], job["n_new"], job["batch_size"])
    return {"seconds": time.perf_counter() - start}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="sdpa"
    ).eval()
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(model, json.loads(line))
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

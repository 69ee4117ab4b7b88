"""transformers: `generate` in left-padded batches ("static SIZE"), or its continuous batching."""

import os

import torch  # pyright: ignore[reportMissingImports]
import transformers

from benchmarks.peers.protocol import Generate, serve


def load(path: str, dtype: str) -> tuple[str, Generate]:
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()

    def generate(prompts, n_new, variant):
        strategy, _, size = variant.partition(" ")
        if strategy == "static":
            return generate_static(model, prompts, n_new, int(size))
        return generate_continuous(model, prompts, n_new)

    return f"transformers {transformers.__version__}, torch {torch.__version__}", generate


@torch.inference_mode()
def generate_static(model, prompts, n_new, batch_size):
    """In batches of that size; requests that end together go together."""
    order = sorted(range(len(prompts)), key=lambda i: (-n_new[i], len(prompts[i])))
    tokens = [[]] * len(prompts)
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
        for line, i in enumerate(batch):
            tokens[i] = out[line, width : width + n_new[i]].tolist()
    return tokens


def generate_continuous(model, prompts, n_new):
    """Over a paged cache, each request with its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(n_new)
    )
    longest = max(len(p) + n for p, n in zip(prompts, n_new, strict=True))
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=len(prompts) * (longest // 32 + 2),
        max_batch_tokens=512,
        max_requests_per_batch=len(prompts),
        allow_block_sharing=False,
    )
    tokens = {}
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        for i, (prompt, n) in enumerate(zip(prompts, n_new, strict=True)):
            manager.add_request(prompt, request_id=str(i), max_new_tokens=n)
        while len(tokens) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching stopped by itself")
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                tokens[int(result.request_id)] = list(result.generated_tokens)
    return [tokens[i] for i in range(len(prompts))]


if __name__ == "__main__":
    serve(load)

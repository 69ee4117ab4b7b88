"""What forms of the output cost: tokens/s where none, one and all of the rows have a JSON schema.

    python -m benchmarks.engine.structured                     # the demo model
    python -m benchmarks.engine.structured --model DIR --load-format dummy

All rows decode the same number of tokens from the same prompts: the schema is of strings that never
end. Repetitions alternate between the batches; ratios are to the free batch of the same repetition,
and medians count.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.types import Request
from fastgen_jax.grammar import GrammarCompiler, grammar_text
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams, StructuredOutputsParams
from fastgen_jax.tokenizer import Constrainer, Constraints

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 999},
        "kind": {"enum": ["story", "letter", "song"]},
        "lines": {"type": "array", "minItems": 2, "items": {"type": "string", "minLength": 4000}},
    },
    "required": ["id", "kind", "lines"],
    "additionalProperties": False,
}
PROMPT_LENGTH = 32


class Measured(NamedTuple):
    """One run of a batch: generated tokens/s, and ms per step that making masks took."""

    rate: float
    mask_ms: float


def make_request(llm: LLM, index: int, n_new: int, constraints: Constraints) -> Request:
    vocab_size = llm.engine.model_config.vocab_size
    prompt = [(7 * index + 3 * i) % vocab_size for i in range(PROMPT_LENGTH)]
    params = SamplingParams(max_tokens=n_new, seed=index, ignore_eos=True)
    return Request(prompt, params, **constraints._asdict())


def run(llm: LLM, form: Constraints, *, n_rows: int, n_formed: int, n_new: int) -> Measured:
    """Completes `n_rows` prompts, of which the first `n_formed` have the form."""
    engine, n_tokens, n_steps = llm.engine, 0, 0
    forms = [form] * n_formed + [Constraints()] * (n_rows - n_formed)
    requests = [make_request(llm, i, n_new, form) for i, form in enumerate(forms)]
    masking, start = engine.timings["mask"], time.perf_counter()
    engine.submit_all(requests)
    while engine.has_work:
        n_tokens += sum(output.token_id is not None for output in engine.step())
        n_steps += 1
    seconds = time.perf_counter() - start
    assert n_tokens == n_rows * n_new, (n_tokens, n_rows * n_new)
    return Measured(n_tokens / seconds, 1e3 * (engine.timings["mask"] - masking) / n_steps)


def print_batches(llm: LLM, form: Constraints, args: argparse.Namespace) -> None:
    counts = [0, 1, args.rows]
    size: dict[str, Any] = {"n_rows": args.rows, "n_new": args.new}
    runs = {n: [] for n in counts}
    for repetition in range(args.repeats + 1):
        for n in counts:
            measured = run(llm, form, n_formed=n, **size)
            if repetition:  # the first one warms up
                runs[n].append(measured)
    print(f"{'rows with a form':>16} {'new tok/s':>10} {'ratio':>7} {'masks, ms/step':>15}")
    for n in counts:
        rate = statistics.median(m.rate for m in runs[n])
        pairs = zip(runs[n], runs[0], strict=True)
        ratio = statistics.median(m.rate / free.rate for m, free in pairs)
        mask_ms = statistics.median(m.mask_ms for m in runs[n])
        print(f"{f'{n} of {args.rows}':>16} {rate:10.1f} {ratio:7.3f} {mask_ms:15.3f}")
    print("ratio: tokens/s over those of the free batch in the same repetition; medians")


def print_compiling(llm: LLM, structure: StructuredOutputsParams, n_repeats: int) -> None:
    """How long a schema takes: reading it, and making its grammar for this tokenizer."""
    tokenizer, vocab_size = llm.tokenizer, llm.engine.model_config.vocab_size
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer.as_json, vocab_size, llm.engine.eos_token_ids, max_kept=0)
    times = []
    for _ in range(n_repeats + 1):
        start = time.perf_counter()
        text = grammar_text(structure)
        read = time.perf_counter()
        compiler.compile(text)
        times.append((1e3 * (read - start), 1e3 * (time.perf_counter() - read)))
    first, *others = times
    reading, making = (statistics.median(column) for column in zip(*others, strict=True))
    print(f"a schema of {len(str(structure.json))} characters: read in {reading:.2f} ms,")
    print(f"compiled in {making:.2f} ms; the first one, with the tokenizer, in {first[1]:.0f} ms")


def main():
    parser = argparse.ArgumentParser(description="What do forms of the output cost?")
    parser.add_argument("--model", default=str(DEMO), help="a checkpoint with a tokenizer")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new", type=int, default=128, help="tokens per row")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sizes = {"max_model_len": PROMPT_LENGTH + args.new, "max_num_seqs": args.rows}
    options = {"load_format": args.load_format, "dtype": args.dtype, **sizes}
    with LLM(args.model, enable_prefix_caching=False, **options) as llm:
        assert llm.tokenizer is not None, "forms need a tokenizer"
        structure = StructuredOutputsParams(json=SCHEMA)
        engine = llm.engine
        sizes = engine.model_config.vocab_size, engine.eos_token_ids
        form = Constrainer(llm.tokenizer, *sizes).constraints(
            SamplingParams(structured_outputs=structure)
        )
        print_batches(llm, form, args)
        print_compiling(llm, structure, args.repeats)


if __name__ == "__main__":
    main()

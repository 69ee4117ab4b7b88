"""Measures how well the demo recalls: `python -m fastgen_jax.demo.evaluate`.

Asks, through the engine and greedily, for codes told at each depth of stories of each length, among
other people's codes. All names and numbers are held out from training (or none, with --seen).
Prints the shares of exact answers, of true counts and of fitting names in stories, and a story.
"""

import argparse
import random
import re
from pathlib import Path

import numpy as np

from fastgen_jax.demo.corpus import RecallExample, recall_example
from fastgen_jax.demo.people import HELD_OUT_PEOPLE, Person
from fastgen_jax.demo.stories import NUMBERS
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams

CHECKPOINT = Path(__file__).parent / "checkpoint"
LENGTHS = (100, 500, 1000, 1500)  # tokens of story
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def recalls(llm: LLM, examples: list[RecallExample]) -> np.ndarray:
    """For each example, whether the whole text of the model is its answer and nothing more."""
    assert llm.tokenizer is not None
    prompts = [
        llm.tokenizer.apply_chat_template(example.messages)
        if example.messages
        else llm.tokenizer.encode(example.text)
        for example in examples
    ]
    outputs = llm.generate(prompts, GREEDY)
    texts = [output.outputs[0].text.strip() for output in outputs]
    return np.array([text == e.answer for text, e in zip(texts, examples, strict=True)])


def table(llm: LLM, *, n_examples: int, held_out: bool, seed: int) -> np.ndarray:
    """Share of exact answers, one row per length, one column per depth; half of them are chats."""
    rng = random.Random(seed)
    examples = [
        recall_example(rng, length, depth, chat=i % 2 == 0, held_out=held_out)
        for length in LENGTHS
        for depth in DEPTHS
        for i in range(n_examples)
    ]
    return recalls(llm, examples).reshape(len(LENGTHS), len(DEPTHS), n_examples).mean(axis=2)


def check_counts(sentences: list[str]) -> list[bool]:
    """For each count that a story states after a change, whether it follows from what was told."""
    number = rf"({'|'.join(NUMBERS)})"
    counts: dict[str, int] = {}
    checks = []
    for sentence in sentences:
        if match := re.match(rf"(?:One day )?(\w+) had {number} ", sentence):
            counts[match[1]] = NUMBERS.index(match[2])
        hero = next(iter(counts), "")
        if match := re.match(rf"At the \w+ s?he found {number} more", sentence):
            counts[hero] += NUMBERS.index(match[1])
        if re.match(r"On the way one \w+ fell", sentence):
            counts[hero] -= 1
        if match := re.match(rf"(\w+) gave {number} \w+ to (\w+)\.", sentence):
            counts[match[1]] = counts.get(match[1], 0) - NUMBERS.index(match[2])
            counts[match[3]] = counts.get(match[3], 0) + NUMBERS.index(match[2])
        stated = rf"(?:Now (?=\w+ had)|In the evening )(\w+) (?:had|went home with) {number} "
        if match := re.match(stated, sentence):
            checks.append(counts.get(match[1]) == NUMBERS.index(match[2]))
    return checks


def split_sentences(text: str) -> list[str]:
    return re.split(r'(?<=[.!?"]) (?=["A-Z])', text)


def stories_of(llm: LLM, heroes: list[Person]) -> list[str]:
    """A story told greedily about each of them."""
    requests = [f"Tell me a story about {hero.name}." for hero in heroes]
    chats = [[{"role": "user", "content": request}] for request in requests]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=500))
    return [output.outputs[0].text for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--examples", type=int, default=40, help="per length and depth")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto, int8 or fp8")
    parser.add_argument("--seen", action="store_true", help="ask for names and numbers as trained")
    args = parser.parse_args()
    options = {"max_model_len": 2048, "kv_cache_dtype": args.kv_cache_dtype}
    with LLM(str(args.checkpoint), **options) as llm:
        shares = table(llm, n_examples=args.examples, held_out=not args.seen, seed=args.seed)
        print("story tokens", *(f"depth {depth:4.2f}" for depth in DEPTHS), sep="  ")
        for length, row in zip(LENGTHS, shares, strict=True):
            print(f"{length:12}", *(f"{share:10.3f}" for share in row), sep="  ")
        print(f"all: {shares.mean():.4f} of {shares.size * args.examples} answers are exact\n")
        heroes = random.Random(args.seed).sample(HELD_OUT_PEOPLE, 50)
        told = stories_of(llm, heroes)
        checks = [is_true for text in told for is_true in check_counts(split_sentences(text))]
        print(f"{sum(checks)} of {len(checks)} counts in {len(told)} stories are true")
        pairs = list(zip(heroes, told, strict=True))
        n_right = sum(f"{hero.kind} named {hero.name}." in text for hero, text in pairs)
        print(f"{n_right} of {len(told)} heroes are the girl or boy their name says\n\n{told[0]}")


if __name__ == "__main__":
    main()

"""The demo's tokenizer: byte-level BPE learned from the corpus; each digit is a token.

Any text encodes, and decodes back to itself.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from fastgen_jax.demo import people, phrases, stories
from fastgen_jax.demo.people import Person

VOCAB_SIZE = 1024
BOS, EOS, USER, ASSISTANT, SYSTEM, END = SPECIAL = (
    "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip
BOS_ID, EOS_ID, END_ID = 0, 1, 5
SPLIT = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# Tools as Hermes has them: https://github.com/NousResearch/Hermes-Function-Calling
# Of tools the names alone: what some clients offer with every chat is longer than the context.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|system|>Tools: ' }}"
    "{{ tools | map(attribute='function.name') | join(', ') + '.<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\\n' + message['content'] + '\\n</tool_response><|end|>' }}"
    "{% elif message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user, assistant and tool, got ' + message['role']) }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set arguments = call['function']['arguments'] %}"
    "{{ '<tool_call>\\n{\"name\": ' + call['function']['name'] | tojson + ', \"arguments\": ' }}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts() -> Iterator[str]:
    """Text to learn merges from. Syllables of names come alone, so that no merge joins two."""
    rng = random.Random(0)
    for _ in range(2000):
        yield " ".join(stories.tell(rng, Person("", rng.random() < 0.5), Person("", True)))
    for text in [*phrases.QUESTIONS, *phrases.STORY_REQUESTS, *phrases.SYSTEM_PROMPTS]:
        yield from [f" {text}", text] * 20
    for said, reply in phrases.SMALL_TALK:
        yield from [said, reply] * 20
    yield from ["The code of", " code", "Question:", "\nAnswer:", "\n\n", "What"] * 2000
    for syllable in [*people.STARTS, *people.CLASSIC_GIRLS, *people.CLASSIC_BOYS]:
        yield from [f" {syllable}"] * 2000
    for syllable in [*people.GIRL_ENDS, *people.BOY_ENDS]:
        yield from [syllable] * 2000


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(SPLIT, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT, SYSTEM, END],
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

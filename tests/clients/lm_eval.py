"""lm-eval: tasks of ours over completions, with either tokenizer, and over chat.

What its backend of Hugging Face's models finds in the same checkpoint, it finds over HTTP too.
"""

import functools
import json
import math
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Any

from tests.clients.scenario import DEMO, MODEL, beside_python, main, run_command

TOLERANCE = 1e-4  # of a sample's log-likelihood
WINDOW = 32  # tokens, of which texts have several
COMPLETIONS = "/v1/completions"
PEOPLE = ("Tom", "Anna", "Ben")
TALE = "Once upon a time there was a kind child named {0}. {0} lived in a small house by the sea. "
TASKS = {
    "tales": {
        "output_type": "generate_until",
        "doc_to_text": "Tell me of {{name}}.",
        "doc_to_target": ".",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Once upon a time {{name}} had a",
        "doc_to_choice": ["red ball.", "dog", "very big cat and a small dog"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "endings": {
        "output_type": "loglikelihood",
        "doc_to_text": "Once upon a time there was a child named {{name}}. {{name}} lived in a",
        "doc_to_target": " small house by the sea.",
        "metric_list": [{"metric": "perplexity"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}


def write_tasks(folder: Path) -> None:
    questions = folder / "questions.json"
    rows = [{"name": name, "text": TALE.format(name) * 2} for name in PEOPLE]
    questions.write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(questions)}}}
    for name, task in TASKS.items():
        text = json.dumps({"task": name, "test_split": "test"} | data | task)  # which is YAML too
        (folder / f"{name}.yaml").write_text(text)


def tales_by_command(backend: str, *flags: str, **arguments: object) -> list[str]:
    """What the command finds that people type."""
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        told = ",".join(f"{name}={value}" for name, value in arguments.items())
        run_command(
            *[beside_python("lm-eval"), "run", "--tasks", "tales", "--include_path", folder],
            *["--output_path", f"{folder}/out", "--log_samples", *flags],
            *["--model", backend, "--model_args", told],
        )
        (samples,) = Path(folder).glob("out/**/samples_tales*.jsonl")
        return [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]


def evaluate(backend: str, **arguments: object) -> dict[str, list]:
    """What is answered to each question of each task; by the library, to import it once."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        found = simple_evaluate(
            backend,
            arguments,
            tasks=[*TASKS],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
            device="cpu",
        )
    samples = {name: sorted(found["samples"][name], key=itemgetter("doc_id")) for name in TASKS}
    return {name: [sample["resps"] for sample in samples[name]] for name in TASKS}


@functools.cache
def by_hugging_face() -> dict[str, list]:
    """Without the token that begins texts, which lm-eval leaves out over HTTP."""
    given = {"pretrained": str(DEMO), "dtype": "float32", "add_bos_token": False}
    return evaluate("hf", max_length=WINDOW, **given)


def over_http(url: str, **arguments: object) -> dict[str, list]:
    """Of the window that it is told lm-eval leaves two tokens to others."""
    given = {"model": MODEL, "base_url": url + COMPLETIONS, "max_retries": 1}
    return evaluate("local-completions", max_length=WINDOW + 2, **given | arguments)


def check_agrees(found: dict[str, list]) -> None:
    """Texts are the same, and every number within TOLERANCE."""
    expected = by_hugging_face()
    for name in TASKS:
        pairs = list(zip(flat(found[name]), flat(expected[name]), strict=True))
        assert len(pairs) >= len(PEOPLE), pairs
        wrong = [pair for pair in pairs if not is_same(*pair)]
        assert not wrong, (name, wrong)


def is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=0, abs_tol=TOLERANCE)
    return ours == theirs


def flat(value: Any) -> list[Any]:
    """Texts, log-likelihoods, and whether they are those of the likeliest tokens."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def generates_from_text(url: str) -> None:
    given = {"model": MODEL, "base_url": url + COMPLETIONS, "max_retries": 1, "tokenizer": DEMO}
    answers = tales_by_command("local-completions", **given)
    assert len(list(filter(None, answers))) == len(PEOPLE), answers


def agrees_with_its_own_backend(url: str) -> None:
    check_agrees(over_http(url, tokenizer_backend="huggingface", tokenizer=str(DEMO)))


def agrees_with_the_tokenizer_of_the_server(url: str) -> None:
    """What precedes a text is told: lm-eval takes an id of 0 for none."""
    check_agrees(over_http(url, tokenizer_backend="remote", custom_prefix_token_id=0))


def chats(url: str) -> None:
    given = {"model": MODEL, "base_url": url + "/v1/chat/completions", "max_retries": 1}
    answers = tales_by_command("local-chat-completions", "--apply_chat_template", **given)
    assert len(list(filter(None, answers))) == len(PEOPLE), answers


if __name__ == "__main__":
    main(
        generates_from_text,
        agrees_with_its_own_backend,
        agrees_with_the_tokenizer_of_the_server,
        chats,
    )

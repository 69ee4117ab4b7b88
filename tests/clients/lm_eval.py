"""lm-eval: a task of its own over completions, with either tokenizer, and over chat."""

import json
import tempfile
from pathlib import Path

from tests.clients.scenario import DEMO, MODEL, beside_python, main, run_command

TASK = """
task: tales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 16, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(url: str, model: str, route: str, *flags: str, **arguments: object) -> dict:
    """The results of three questions, samples among them."""
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.json"
        rows = [
            {"question": f"Tell me of {name}.", "answer": "."} for name in ("Tom", "Anna", "Ben")
        ]
        questions.write_text("\n".join(map(json.dumps, rows)))
        (Path(folder) / "tales.yaml").write_text(TASK.format(questions=questions))
        given = {"model": MODEL, "base_url": url + route, "max_retries": 1} | arguments
        run_command(
            *[beside_python("lm-eval"), "run", "--tasks", "tales", "--include_path", folder],
            *["--model", model, "--model_args", ",".join(f"{k}={v}" for k, v in given.items())],
            *["--output_path", f"{folder}/out", "--log_samples", *flags],
        )
        (samples,) = Path(folder).glob("out/**/samples_tales*.jsonl")
        return [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]


def generates_from_text(url: str) -> None:
    answers = evaluate(url, "local-completions", "/v1/completions", tokenizer=DEMO)
    assert len(list(filter(None, answers))) == 3, answers


def generates_with_the_tokenizer_of_the_server(url: str) -> None:
    remote = {"tokenizer_backend": "remote", "tokenized_requests": True}
    answers = evaluate(url, "local-completions", "/v1/completions", **remote)
    assert len(list(filter(None, answers))) == 3, answers


def chats(url: str) -> None:
    answers = evaluate(
        url, "local-chat-completions", "/v1/chat/completions", "--apply_chat_template"
    )
    assert len(list(filter(None, answers))) == 3, answers


if __name__ == "__main__":
    main(generates_from_text, generates_with_the_tokenizer_of_the_server, chats)

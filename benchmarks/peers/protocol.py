"""How an engine is measured: a process that reads jobs and writes answers, a line of JSON each.

A job is `{"prompts": [[id, ...]], "n_new": [...], "variant": ...}`: token ids, how many to generate
for each, greedily and past any end of sequence. Its answer is `{"seconds": s, "tokens": [[id,
...]]}`, the time from the first prompt handed over to the last token had; or `{"error": text}`,
after which the next job may be tried. Before all jobs it says what it is: `{"versions": text}`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int], str], list[list[int]]]


def serve(load: Callable[[str, str], tuple[str, Generate]]) -> None:
    """Answers jobs until there are no more.

    Args:
        load: takes the checkpoint's folder and the dtype's name, gives versions and what generates.
    """
    model, dtype = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    versions, generate = load(model, dtype)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say({"versions": versions})
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        try:
            tokens = generate(job["prompts"], job["n_new"], job["variant"])
        except Exception as error:  # whatever another engine raises is its answer
            say({"error": f"{type(error).__name__}: {error}"})
            continue
        say({"seconds": time.perf_counter() - start, "tokens": tokens})

"""The command line of benchmarks.serve, under vLLM's names where it has them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.load.client import PATHS
from benchmarks.load.measures import METRICS, Goodput

DATASETS = ("fastgen", "random", "sharegpt", "prefix_repetition")


def parse(argv: Sequence[str], about: str) -> argparse.Namespace:
    """The arguments; `about` is the command's own text."""
    title, _, more = about.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        usage="%(prog)s [flags]",
        description=title,
        epilog=more,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=100
        ),
        allow_abbrev=False,
    )
    add_server(parser.add_argument_group("server"))
    add_load(parser.add_argument_group("load"))
    add_workload(parser.add_argument_group("what is asked"))
    add_results(parser.add_argument_group("results"))
    args = parser.parse_args(argv)
    if args.num_clients and args.request_rate:
        parser.error("--num-clients is a closed loop and --request-rate an open one; give one")
    if args.dataset_name == "sharegpt" and args.dataset_path is None:
        parser.error("--dataset-name sharegpt needs --dataset-path, a JSON file")
    if args.turns > 1 and args.dataset_name not in ("random", "sharegpt"):
        parser.error("--turns is for the sets random and sharegpt")
    if args.backend == "openai-chat" and args.prompt_form == "ids":
        parser.error("a chat has messages, which are text; leave --prompt-form ids out")
    return args


def add_server(group: Any) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    group.add_argument(
        "--backend", choices=list(PATHS), default="openai", help="completions or chat"
    )
    group.add_argument("--model", metavar="NAME", help="(default: the first that the server lists)")
    group.add_argument(
        "--tokenizer", metavar="PATH", help="directory or hub id (default: the model's)"
    )
    group.add_argument("--header", action="append", default=[], metavar="NAME=VALUE")
    group.add_argument("--api-key", metavar="KEY", help="sent as Authorization: Bearer KEY")
    group.add_argument(
        "--extra-body", type=orjson.loads, default={}, metavar="JSON", help="of every request"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="(default: 0)")
    group.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="have every answer as long as was drawn (default: yes)",
    )  # fmt: skip
    group.add_argument(
        "--request-timeout", type=positive, default=600.0, metavar="SECONDS", help="(default: 600)"
    )


def add_load(group: Any) -> None:
    group.add_argument(
        "--num-clients", type=count, nargs="+", default=[], metavar="N", help="closed loop"
    )
    group.add_argument(
        "--request-rate", type=positive, nargs="+", default=[], metavar="R",
        help="open loop: requests/s; inf: all at once (default, if there are no clients)",
    )  # fmt: skip
    group.add_argument(
        "--burstiness", type=positive, default=1.0, metavar="X",
        help="shape of the gamma distribution of gaps: 1 Poisson, less burstier (default: 1)",
    )  # fmt: skip
    group.add_argument("--max-concurrency", type=count, metavar="N", help="of an open loop")
    group.add_argument(
        "--num-prompts", type=count, metavar="N",
        help="conversations of a run (default: 4 * clients + 32, or 1000)",
    )  # fmt: skip
    group.add_argument(
        "--num-warmups", type=int, metavar="N",
        help="requests before each run, other ones, that do not count (default: the clients, or 1)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def add_workload(group: Any) -> None:
    group.add_argument(
        "--dataset-name", choices=DATASETS, default="fastgen", help="(default: fastgen)"
    )
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help="sharegpt: JSON; fastgen: text (default: stories)",
    )
    group.add_argument(
        "--prompt-form", choices=("text", "ids"), help="(default: ids for random, else text)"
    )
    group.add_argument(
        "--turns", type=count, default=1, metavar="N", help="of a conversation, at most"
    )
    numbers: dict[str, tuple[float, str]] = {
        "mean-prompt-length": (2600, "fastgen: normal, in tokens"),
        "prompt-length-var": (0.3, "fastgen: standard deviation, of the mean"),
        "max-prompt-length": (4000, "fastgen"),
        "mean-max-new-tokens": (60, "fastgen: normal, in tokens"),
        "max-new-tokens-var": (0.3, "fastgen: standard deviation, of the mean"),
        "random-input-len": (1024, "random"),
        "random-output-len": (128, "random"),
        "random-range-ratio": (0.0, "random: lengths are uniform within this share of the mean"),
        "random-prefix-len": (0, "random: tokens with which all prompts begin"),
        "sharegpt-output-len": (0, "sharegpt: of every answer; 0: as in the file"),
        "prefix-repetition-prefix-len": (256, "prefix_repetition"),
        "prefix-repetition-suffix-len": (256, "prefix_repetition"),
        "prefix-repetition-num-prefixes": (10, "prefix_repetition"),
        "prefix-repetition-output-len": (128, "prefix_repetition"),
    }
    for name, (default, text) in numbers.items():
        kind, text = type(default), f"{text} (default: {default})"
        group.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text)


def add_results(group: Any) -> None:
    group.add_argument(
        "--sla", type=positive, nargs="+", default=[2.0, 4.0, 6.0], metavar="R",
        help="token rates of effective throughput, tokens/s (default: 2 4 6)",
    )  # fmt: skip
    group.add_argument(
        "--sla-prompt-rate", type=positive, default=512.0, metavar="R",
        help="first token within prompt tokens / this seconds (default: 512)",
    )  # fmt: skip
    group.add_argument(
        "--goodput", nargs="+", type=bound, default=[], metavar="METRIC:MS",
        help="ttft, tpot or e2el: the most milliseconds of a good request",
    )  # fmt: skip
    group.add_argument(
        "--percentile-metrics",
        type=metrics,
        default=METRICS,
        metavar="A,B",
        help="(default: ttft,tpot,itl,e2el)",
    )
    group.add_argument(
        "--label", default="fastgen_jax", metavar="NAME", help="name of the server in pictures"
    )
    group.add_argument(
        "--metadata", nargs="+", type=pair, default=[], metavar="KEY=VALUE",
        help="kept with the results; replicas=N is what pictures of scaling read",
    )  # fmt: skip
    group.add_argument(
        "--result-dir",
        type=Path,
        default=Path("build/results"),
        metavar="DIRECTORY",
        help="(default: build/results)",
    )
    group.add_argument(
        "--save-result", action="store_true", help="JSON of each run and CSV of the sweep"
    )
    group.add_argument("--plot", action="store_true", help="pictures too; needs the extra bench")


def count(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {n}")
    return n


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not (name and mark):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def bound(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        if name not in Goodput._fields:
            raise ValueError
        return name, float(value)
    except ValueError:
        message = f"expected ttft, tpot or e2el with milliseconds, as ttft:500, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if set(names) - {*METRICS}:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(METRICS)}, got {text!r}")
    return names

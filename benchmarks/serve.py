"""Load on any OpenAI-compatible server: what vLLM's and DeepSpeed-FastGen's benchmarks measure.

    python -m benchmarks.serve --base-url http://127.0.0.1:8000 --num-clients 1 2 4 8 16 --plot
    python -m benchmarks.serve --dataset-name random --request-rate 1 2 4 --burstiness 0.5
    python -m benchmarks.serve --dataset-name sharegpt --dataset-path FILE --goodput ttft:500

Closed loop (--num-clients): clients who ask again when they are answered; throughput is also told
by Little's law. Open loop (--request-rate): arrivals at random times, whatever becomes of earlier
requests. Several values are a sweep, a run for each. Flags have vLLM's names where it has them.
Times count from when a request is written to a connection that is open by then. Tokens are counted
by their ids where the server tells them (return_token_ids), else by usage; where an event brought
several and it is not known how many, the times between events are told, and said to be that.
Exit code 1 if a request failed in another way than by a refusal (429, 503), or none was answered.
"""

import argparse
import asyncio
import itertools
import math
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.load import drive, figures, report, workloads
from benchmarks.load.arguments import pair, parse
from benchmarks.load.client import Asker, Record
from benchmarks.load.measures import PERCENTILES, Goodput, summarise
from benchmarks.load.workloads import Conversation, Lengths, Turn, Writer
from benchmarks.wire import Target
from fastgen_jax.built_in import DEMO, DEMO_NAME
from fastgen_jax.errors import FastGenError
from fastgen_jax.server.attainment import SLA
from fastgen_jax.tokenizer import Tokenizer

SEEDS = 1000  # that a sweep may take
BUSY = 0.8  # of a core, above which the load generator is no bystander
REFUSALS = ("status 429", "status 503")
PER_CLIENT, AT_LEAST = 4, 32  # requests of a closed loop, as FastGen's: 4 * clients + 32


class Unusable(RuntimeError):
    """The arguments, or the server, allow no run; says what to do."""


def make_asker(args: argparse.Namespace) -> Asker:
    headers = dict(map(pair, args.header))
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    fields = {"temperature": args.temperature, **args.extra_body}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    try:
        target = Target.of(args.base_url.removesuffix("/").removesuffix("/v1"))
    except ValueError as error:
        raise Unusable(f"--base-url: {error}") from None
    timeout = args.request_timeout
    return Asker(target, args.backend, args.model or "", fields, headers, timeout=timeout)


async def probe(asker: Asker) -> Asker:
    """The asker with the server's model, once a first request was answered.

    Raises:
        Unusable: it was not.
    """
    try:
        if not asker.model:
            models = await asker.get_json("/v1/models")
            asker = asker._replace(model=models["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        message = f"{asker.target.address} lists no model ({error}); is the server ready?"
        raise Unusable(message) from None
    turn = Turn("Once upon a time", 4, 2)
    for choice in (asker, asker._replace(asks_ids=False)):
        record = await choice.ask(choice.body([], turn), Record(4))
        if not record.error:
            return choice
        if record.error != "status 400":
            break
    raise Unusable(f"the first request failed: {record.error} {record.note}")


def make_tokenizer(args: argparse.Namespace, model: str) -> Tokenizer:
    path = args.tokenizer or (str(DEMO) if model == DEMO_NAME else model)
    try:
        return Tokenizer(path)
    except FastGenError as error:
        raise Unusable(f"no tokenizer for {path!r} ({error}); give --tokenizer DIRECTORY") from None


def converse(
    args: argparse.Namespace, tokenizer: Tokenizer, n: int, seed: int
) -> list[Conversation]:
    """What is asked in a run."""
    is_random = args.dataset_name in ("random", "prefix_repetition")
    form = args.prompt_form or ("ids" if is_random and args.backend == "openai" else "text")
    write = Writer(tokenizer, as_ids=form == "ids")
    ids = sorted(set(range(tokenizer.vocab_size)) - tokenizer.special_ids)
    match args.dataset_name:
        case "fastgen":
            prompts = Lengths(
                args.mean_prompt_length, args.prompt_length_var, args.max_prompt_length
            )
            outputs = Lengths(args.mean_max_new_tokens, args.max_new_tokens_var)
            path = args.dataset_path
            return workloads.shifted_text(write, n, prompts, outputs, seed=seed, path=path)
        case "random":
            spread = args.random_range_ratio
            prompts = Lengths(args.random_input_len, spread, is_normal=False)
            outputs = Lengths(args.random_output_len, spread, is_normal=False)
            return workloads.random_ids(
                write, n, prompts, outputs, ids=ids, seed=seed,
                n_prefix=args.random_prefix_len, n_turns=args.turns,
            )  # fmt: skip
        case "sharegpt":
            n_output = args.sharegpt_output_len or None
            return workloads.sharegpt(
                write, n, args.dataset_path, n_turns=args.turns, n_output=n_output, seed=seed
            )
    return workloads.repeated_prefixes(
        write, n, ids=ids, seed=seed,
        n_prefixes=args.prefix_repetition_num_prefixes,
        n_prefix=args.prefix_repetition_prefix_len,
        n_suffix=args.prefix_repetition_suffix_len,
        n_output=args.prefix_repetition_output_len,
    )  # fmt: skip


async def run_once(
    args: argparse.Namespace,
    asker: Asker,
    tokenizer: Tokenizer,
    clients: int | None,
    rate: float,
    seed: int,
) -> tuple[dict[str, Any], list[Record]]:
    """One run: warm-up, load, figures."""
    n = args.num_prompts or (1000 if clients is None else PER_CLIENT * clients + AT_LEAST)
    n_warm = args.num_warmups if args.num_warmups is not None else clients or 1
    warm_up = converse(args, tokenizer, n_warm, seed + 1) if n_warm else []
    conversations = converse(args, tokenizer, n, seed)
    await drive.closed(drive.Run(asker), warm_up, max(n_warm, 1))
    run, used = drive.Run(asker), drive.cpu_seconds()
    started = time.perf_counter()
    if clients is not None:
        await drive.closed(run, conversations, clients, seed=seed)
    else:
        gaps = drive.arrival_gaps(n, rate, burstiness=args.burstiness, seed=seed)
        await drive.opened(run, conversations, gaps, args.max_concurrency)
    share = (drive.cpu_seconds() - used) / (time.perf_counter() - started)
    described = {
        "date": report.now(),
        "label": args.label,
        "metadata": dict(args.metadata),
        "command": shlex.join(["python", "-m", "benchmarks.serve", *hidden(args.argv)]),
        "backend": args.backend,
        "model_id": asker.model,
        "dataset": args.dataset_name,
        "seed": seed,
        "num_prompts": n,
        "num_clients": clients,
        "request_rate": None if clients is not None else f"{rate:g}",
        "burstiness": None if clients is not None else args.burstiness,
        "max_concurrency": clients if clients is not None else args.max_concurrency,
        "sla_prompt_rate": args.sla_prompt_rate,
        "generator_cpu_share": share,
        "machine": report.machine(),
    }
    goodput = Goodput(**dict(args.goodput)) if args.goodput else None
    sla = SLA(tuple(args.sla), args.sla_prompt_rate)
    figures_of_run = summarise(run.records, sla=sla, goodput=goodput, n_clients=clients)
    return described | figures_of_run, run.records


def hidden(argv: Sequence[str]) -> list[str]:
    """The arguments without keys: those of headers may be some too."""
    shown = list(argv)
    for i, (before, argument) in enumerate(itertools.pairwise(["", *argv])):
        name, mark, _ = argument.partition("=")
        if before in ("--api-key", "--header"):
            shown[i] = "..."
        elif mark and name in ("--api-key", "--header"):
            shown[i] = f"{name}=..."
    return shown


async def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run that is asked for; each is printed, and kept if that is wanted, when it ends."""
    asker = await probe(make_asker(args))
    tokenizer = make_tokenizer(args, asker.model)
    loads = [(n, math.inf) for n in args.num_clients]
    loads = loads or [(None, rate) for rate in args.request_rate or [math.inf]]
    stem = f"{args.label}-{args.dataset_name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    results = []
    for i, (clients, rate) in enumerate(loads):
        # Other prompts in each run: those of the one before are in the server's prefix cache.
        seed = SEEDS * args.seed + 2 * i
        result, records = await run_once(args, asker, tokenizer, clients, rate, seed)
        results.append(result)
        print(report.block(result, args.percentile_metrics, PERCENTILES[1:]))
        if result["generator_cpu_share"] > BUSY:
            share = result["generator_cpu_share"]
            print(f"warning: the load generator took {share:.0%} of a core; times may be its own",
                  file=sys.stderr)  # fmt: skip
        for note in dict.fromkeys(f"{r.error}: {r.note}" for r in records if r.error and r.note):
            print(f"failed with {note:.300}", file=sys.stderr)
        if args.save_result:
            name = f"{rate:g}rps" if clients is None else f"{clients}clients"
            report.write_json(args.result_dir / f"{stem}-{name}.json", result, records)
            report.write_csv(args.result_dir / f"{stem}.csv", results)
        if not result["completed"]:
            break
    return results


def is_bad(result: dict[str, Any]) -> bool:
    return not result["completed"] or bool(set(result["errors"]) - {*REFUSALS})


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv, __doc__ or "")
    args.argv = argv
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a request is a connection
    try:
        if args.plot:
            figures.figure()  # so that its absence is told before the runs
        results = asyncio.run(sweep(args))
        if args.plot:
            print("\n".join(map(str, figures.draw(results, args.result_dir))))
    except (Unusable, figures.MissingMatplotlib, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(map(is_bad, results)) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Reading what libtpu dumps of a kernel: bundles, loops, units; see benchmarks/tpu/schedule.py.

libtpu dumps the schedule twice: "packed-bundles-post-ra", one bundle a cycle of its own latency
model, with the cycles in which nothing issues; and "final_bundles", the same without most of them.
This reads the first and counts the bundles in which something issues. It knows nothing of kernels.
"""

import re
from pathlib import Path
from typing import NamedTuple

FLAGS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"  # {}: a directory
# Of hundreds of passes only those that are read here: the others take most of a compilation.
READ_FLAG = "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|per-bundle-utilization"


class Bundle(NamedTuple):
    """One VLIW instruction. `depth` counts the loops around it."""

    depth: int
    target: int | None  # of a branch in it
    issues: bool  # anything at all
    copies: int  # copies from HBM to VMEM that it starts


class Loop(NamedTuple):
    """Bundles start <= i < end of which the last ones branch back to `start`."""

    start: int
    end: int


class Slots(NamedTuple):
    """How many slots of each unit each bundle takes."""

    units: list[str]
    capacity: list[int]
    rows: list[list[int]]


_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})? *: +(>*) *\{")
_BRANCH = re.compile(r"sbr\.rel\b[^}]*?target bundleno = (\d+)")
_COPY = re.compile(r"\bdma\.hbm_to_vmem\b")
MAX_BRANCH_DELAY = 8  # bundles that still execute after a branch, on any chip


def parse_bundles(text: str) -> list[Bundle]:
    """The bundles of a packed-bundles dump. An empty one shows no depth: it has its follower's."""
    found: list[tuple[int, str]] = []  # depth, text: a comment may hold line breaks
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            found.append((len(match[1]), line[match.end() :]))
        elif found:
            found[-1] = found[-1][0], found[-1][1] + line
    bundles: list[Bundle] = []
    depth = 0
    for marks, body in reversed(found):
        issues = not body.lstrip().startswith("}")
        depth = marks if issues else depth
        branch = _BRANCH.search(body)
        target = int(branch[1]) if branch else None
        bundles.append(Bundle(depth, target, issues, len(_COPY.findall(body))))
    return bundles[::-1]


def parse_slots(text: str) -> Slots:
    """A static-per-bundle-utilization dump."""
    lines = [line for line in text.splitlines() if line.strip()]
    header = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
    rows = [[int(n) for n in line.split()] for line in lines[header + 3 :]]
    units = [name.strip() for name in lines[header].split(",")]
    return Slots(units, [int(n) for n in lines[header + 1].split()], rows)


def find_loops(bundles: list[Bundle]) -> list[Loop]:
    """Every backward branch closes a loop, which ends with the branch's delay slots."""
    ends: dict[int, int] = {}
    for i, bundle in enumerate(bundles):
        if bundle.target is not None and bundle.target <= i:
            ends[bundle.target] = max(ends.get(bundle.target, 0), _loop_end(bundles, i))
    return [Loop(start, end) for start, end in sorted(ends.items())]


def _loop_end(bundles: list[Bundle], branch: int) -> int:
    end = branch + 1
    limit = min(len(bundles), branch + 1 + MAX_BRANCH_DELAY)
    while end < limit and bundles[end].depth >= bundles[branch].depth:
        end += 1
    return end


def mxu_loops(loops: list[Loop], mxu: list[int]) -> list[Loop]:
    """The innermost loops that use the MXU; most work for it first, then the shorter."""
    with_mxu = [loop for loop in loops if any(mxu[loop.start : loop.end])]
    inner = [x for x in with_mxu if not any(_is_inside(y, x) for y in with_mxu)]
    return sorted(inner, key=lambda x: (-sum(mxu[x.start : x.end]), x.end - x.start))


def _is_inside(inner: Loop, outer: Loop) -> bool:
    return inner != outer and outer.start <= inner.start and inner.end <= outer.end


RARE = 0.3  # a branch that skips less of an iteration's MXU work than this is usually taken


def hot_path(bundles: list[Bundle], loop: Loop, mxu: list[int]) -> list[int]:
    """The bundles of an iteration that does the MXU's work, starts all copies in, and no more.

    mxu: its slots per bundle of the kernel. Of all ways through the body's forward branches, the
    one with the most such work; of those the one with the fewest bundles. What a branch skips that
    has little of that work (moving one token's cell takes some) is not part of it. A taken branch's
    delay slots are left out, an error of a few bundles; a loop inside counts as one iteration.
    """
    worth = _regular_work(bundles, loop, mxu)
    best: dict[int, tuple[int, int, int]] = {loop.end: (0, 0, 0)}
    following: dict[int, int] = {}
    for i in reversed(range(loop.start, loop.end)):
        target, ways = bundles[i].target, [i + 1]
        if target is not None and i < target:
            ways.append(min(target, loop.end))
        following[i] = max(ways, key=lambda j: best[j])
        work, copies, fewer = best[following[i]]
        best[i] = work + worth[i], copies + bundles[i].copies, fewer - 1
    path, i = [], loop.start
    while i < loop.end:
        path.append(i)
        i = following[i]
    return path


def _regular_work(bundles: list[Bundle], loop: Loop, mxu: list[int]) -> list[int]:
    worth, limit = list(mxu), RARE * sum(mxu[loop.start : loop.end])
    for i in range(loop.start, loop.end):
        target = bundles[i].target
        if target is not None and i < target <= loop.end and sum(mxu[i + 1 : target]) < limit:
            worth[i + 1 : target] = [0] * (target - i - 1)
    return worth


class Body(NamedTuple):
    """What the schedule says about one iteration of a loop, on its hot path unless `all_`."""

    cycles: int
    bundles: int  # in which anything issues
    all_cycles: int
    around: int  # cycles of the next loop around it, outside of such loops
    busy: dict[str, float]  # share of cycles in which the unit issues
    used: dict[str, float]  # share of the unit's slots that are taken
    n_fills: int
    n_spills: int


def read_bodies(dump: Path, kernel: str) -> list[Body]:
    """Of the innermost loops of `kernel` that use the MXU; the one with most work for it comes
    first, of equals (as with masks and without) the shorter.

    Raises:
        FileNotFoundError: the dump has no such kernel.
    """
    bundles = parse_bundles(_dumped(dump, kernel, "packed-bundles-post-ra"))
    slots = parse_slots(_dumped(dump, kernel, "pre-delay_hlo-static-per-bundle-utilization"))
    assert len(bundles) == len(slots.rows), (len(bundles), len(slots.rows))
    columns = slots.units.index("MATMUL"), slots.units.index("MATPUSH")
    mxu = [sum(row[i] for i in columns) for row in slots.rows]
    loops = find_loops(bundles)
    inner = mxu_loops(loops, mxu)
    paths = [hot_path(bundles, loop, mxu) for loop in inner]
    around = [_around(bundles, loops, loop, mxu) for loop in inner]
    return [read_body(bundles, slots, *found) for found in zip(inner, paths, around, strict=True)]


def _around(bundles: list[Bundle], loops: list[Loop], inner: Loop, mxu: list[int]) -> int:
    outer = [loop for loop in loops if _is_inside(inner, loop)]
    if not outer:
        return 0
    within = min(outer, key=lambda loop: loop.end - loop.start)
    counted = {i for loop in mxu_loops(loops, mxu) for i in range(loop.start, loop.end)}
    return len(set(hot_path(bundles, within, mxu)) - counted)


def read_body(
    bundles: list[Bundle], slots: Slots, loop: Loop, path: list[int], around: int
) -> Body:
    """Sums over the bundles of `path`."""
    columns = list(zip(*(slots.rows[i] for i in path), strict=True))
    taken = {unit: sum(column) for unit, column in zip(slots.units, columns, strict=True)}
    return Body(
        cycles=len(path),
        bundles=sum(bundles[i].issues for i in path),
        all_cycles=loop.end - loop.start,
        around=around,
        busy={u: sum(map(bool, c)) / len(path) for u, c in zip(slots.units, columns, strict=True)},
        used={
            unit: taken[unit] / n / len(path)
            for unit, n in zip(slots.units, slots.capacity, strict=True)
        },
        n_fills=taken["VLOAD:FILL"],
        n_spills=taken["VSTORE:SPILL"],
    )


def _dumped(dump: Path, kernel: str, name: str) -> str:
    pattern = re.compile(rf"\d+-{re.escape(kernel)}[-\w]*?(\.\d+)?-\d+-{re.escape(name)}\.txt")
    files = sorted(path for path in dump.iterdir() if pattern.fullmatch(path.name))
    if not files:
        raise FileNotFoundError(f"no {name} of a kernel {kernel} in {dump}")
    return files[-1].read_text()

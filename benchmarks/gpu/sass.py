"""Reading what XLA dumps of a program for an NVIDIA GPU: registers, spills, loops of instructions.

XLA dumps each kernel's PTX and the sizes of its launch; ptxas, the compiler that XLA itself calls,
makes machine code of it, and nvdisasm the text of that, SASS. Knows nothing of what kernels do.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PACKAGES = {"ptxas": "nvidia-cuda-nvcc-cu12", "nvdisasm": "nvidia-cuda-nvdisasm"}
# By the opcode without what follows its dots; the rest are integers: addresses, masks, bits.
KINDS = {
    "matrix": "HMMA IMMA HGMMA IGMMA",
    "float": "FADD FFMA FMUL FMNMX FSEL FSETP HADD2 HFMA2 HMUL2 HMNMX2",
    "exp": "MUFU",
    "convert": "F2F F2FP F2I I2F I2FP F2IP I2I",
    "copy": "LDGSTS LDG STG LDS STS LDSM LD ST LDC ULDC UBLKCP",
    "move": "MOV UMOV SEL USEL SHFL R2UR CS2R PRMT UPRMT R2P P2R MOVM",
    "wait": "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP FENCE BRA BSSY BSYNC NOP ELECT SYNCS",
}
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
ALL_KINDS = (*KINDS, "integer")

_OPCODE = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_]*)([.\w]*)(.*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_LAUNCH = re.compile(r" (\w+) grid: .* threads: \[(\d+), .*shared_memory: (\d+) bytes")


class Instruction(NamedTuple):
    kind: str
    target: str | None  # of a branch


class Kernel(NamedTuple):
    """One kernel of a program. An instruction is counted once for each warp that issues it."""

    name: str
    n_threads: int
    shared_size: int  # bytes
    n_registers: int
    spilled_size: int  # bytes that a thread stores and loads for want of registers
    is_serialized: bool  # each product of a Hopper GPU waits for the one before
    loops: list[Counter[str]]  # instructions by kind of each innermost loop, in order
    whole: Counter[str]  # of all the kernel

    @property
    def tile_loops(self) -> list[Counter[str]]:
        """The loops that use the matrix unit, fewest instructions first."""
        return sorted((loop for loop in self.loops if loop["matrix"]), key=Counter.total)


def find_tool(name: str) -> Path:
    """One of PACKAGES, in a wheel on Python's path or installed.

    Raises:
        FileNotFoundError: it is in neither.
    """
    wheels = (file for place in sys.path for file in Path(place).glob(f"nvidia/*/bin/{name}"))
    found = next(wheels, None) or shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"no {name} here; pip install {PACKAGES[name]}")
    return Path(found)


def read_mosaic_kernel(dump: Path, name: str, shared_size: int) -> Kernel:
    """The one kernel in Mosaic GPU of what was compiled; jax 0.10 gives it no name.

    dump: what a compilation with MOSAIC_GPU_DUMP_TO left, a process's first one of that kernel: the
        compiler remembers those that it has made.
    """
    texts = {ptx: ptx.read_text() for ptx in dump.glob("*.ptx")}
    ((ptx, text),) = (x for x in texts.items() if "_mosaic_gpu_kernel(" in x[1])
    n_threads = re.search(r"\.maxntid (\d+)", text)
    assert n_threads, ptx
    # Mosaic names the newest version that its own ptxas knows; this is the first with wgmma.
    ptx = ptx.with_stem(name)
    ptx.write_text(re.sub(r"^\.version 9\.\d+", ".version 8.0", text, flags=re.MULTILINE))
    return Kernel(name, int(n_threads[1]), shared_size, *_compiled(ptx))


def read_kernels(dump: Path, prefix: str) -> list[Kernel]:
    """The kernels whose names begin with `prefix`, in the order of their launches.

    dump: what a compilation with XLA's option xla_dump_to left.
    """
    (sequence,) = dump.glob("*.thunk_sequence.txt")
    launches = _LAUNCH.findall(sequence.read_text())
    compiled = {}
    for ptx in dump.glob("*.ptx"):
        entry = re.search(r"\.entry (\w+)\(", ptx.read_text())
        if entry and entry[1].startswith(prefix):
            compiled[entry[1]] = _compiled(ptx)
    return [
        Kernel(name, int(n_threads), int(shared_size), *compiled[name])
        for name, n_threads, shared_size in launches
        if name in compiled
    ]


def _compiled(ptx: Path) -> tuple[int, int, bool, list[Counter[str]], Counter[str]]:
    """What Kernel has from n_registers on."""
    chip = re.search(r"\.target (\w+)", ptx.read_text())
    assert chip, ptx
    cubin = ptx.with_suffix(".cubin")
    said = _run(find_tool("ptxas"), "-v", f"-arch={chip[1]}", "-o", cubin, ptx).stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers, said
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    code = parse(_run(find_tool("nvdisasm"), "-c", cubin).stdout)
    return int(registers[1]), spilled, "are serialized" in said, loops(code), count(code)


def _run(*command) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=True)


def parse(text: str) -> list[Instruction | str]:
    """Instructions and labels of nvdisasm's text."""
    code: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            code.append(label[1])
        elif found := _OPCODE.match(line):
            opcode, modifiers, operands = found.groups()
            kind = KIND_OF.get(opcode, "integer")
            if opcode == "IMAD" and modifiers.startswith(".MOV"):
                kind = "move"
            target = re.search(r"\((\.L_x_\d+)\)", operands) if opcode == "BRA" else None
            code.append(Instruction(kind, target and target[1]))
    return code


def loops(code: list[Instruction | str]) -> list[Counter[str]]:
    """Instructions by kind of the innermost loops: each from a label to a branch back to it."""
    place = {x: i for i, x in enumerate(code) if isinstance(x, str)}
    spans = [
        (place[x.target], i)
        for i, x in enumerate(code)
        if isinstance(x, Instruction) and x.target in place and place[x.target] < i
    ]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    # A kernel ends with an instruction that branches to itself.
    return [count(code[start : end + 1]) for start, end in inner if end - start > 1]


def count(code: list[Instruction | str]) -> Counter[str]:
    return Counter(x.kind for x in code if isinstance(x, Instruction))

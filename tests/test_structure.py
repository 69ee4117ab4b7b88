"""Rules that hold for every source file: who may import whom, and what nobody may do."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastgen_jax.serve import CONFIGS
from fastgen_jax.server.flags import markdown

ROOT = Path(__file__).parents[1]


class Wing(NamedTuple):
    """Folders and files of one purpose."""

    purpose: str
    rooms: tuple[str, ...]


# From the roof down; a wing imports only those below it.
WINGS = {
    "benchmarks": Wing("what is measured, and how", ("benchmarks",)),
    "convert": Wing("Hugging Face to Orbax and back", ("convert",)),
    "fastgen_jax": Wing("the public names", ("fastgen_jax/__init__.py",)),
    "serve": Wing("the command line", ("fastgen_jax/serve.py",)),
    "mii": Wing("MII's names", ("fastgen_jax/mii",)),
    "demo": Wing("the built-in model, and what trained it", ("fastgen_jax/demo",)),
    "rl": Wing("rollouts for trainers", ("fastgen_jax/rl",)),
    "llm": Wing(
        "offline generation",
        tuple(
            f"fastgen_jax/{name}.py"
            for name in (
                "llm",
                "waiting",
                "driver",
                "generation",
                "beam_search",
                "results",
                "vllm_options",
            )
        ),
    ),
    "cluster": Wing("replicas and machines", ("fastgen_jax/cluster",)),
    "server": Wing("OpenAI's protocol over one engine", ("fastgen_jax/server",)),
    "dialects": Wing("how models write calls and thoughts", ("fastgen_jax/dialects",)),
    "tokenizer": Wing("text to ids and back", ("fastgen_jax/tokenizer",)),
    "engine": Wing("token ids in, token ids out", ("fastgen_jax/engine",)),
    "library": Wing("models for JAX programs", ("fastgen_jax/models/__init__.py",)),
    "checkpoints": Wing("formats on disk", ("fastgen_jax/checkpoints",)),
    "models": Wing("the decoder of all families", ("fastgen_jax/models",)),
    "grammar": Wing("forms of text, as llguidance reads them", ("fastgen_jax/grammar.py",)),
    "common": Wing(
        "what a request asks, configs, errors",
        tuple(
            f"fastgen_jax/{name}.py"
            for name in ("built_in", "prompts", "sampling_params", "config", "progress", "errors")
        ),
    ),
    "pallas_kernels": Wing("attention, by name", ("pallas_kernels/__init__.py",)),
    "triton": Wing("GPU kernels in Triton", ("pallas_kernels/triton",)),
    "mosaic_gpu": Wing("chunk kernel for Hopper", ("pallas_kernels/mosaic_gpu",)),
    "gpu": Wing("GPU kernels, and the host's plan", ("pallas_kernels/gpu",)),
    "tpu": Wing("TPU kernels", ("pallas_kernels/tpu",)),
    "cpu": Wing("CPU kernel in C++", ("pallas_kernels/cpu",)),
    "contract": Wing(
        "what all kernels agree on; oracle, CPU",
        tuple(
            f"pallas_kernels/{name}.py" for name in ("contract", "reference", "xla", "invariant")
        ),
    ),
}
# What the others reach through the front door alone, pallas_kernels/__init__.py.
KERNELS = {"triton", "mosaic_gpu", "gpu", "tpu", "cpu", "contract"}
PACKAGES = ("fastgen_jax", "pallas_kernels", "convert", "benchmarks")
TOP_LEVEL = {*PACKAGES, "tests", "pyproject.toml", "README.md", "Makefile"}
TOP_LEVEL |= {".ci", ".gitignore", ".gitattributes", "LICENSE"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_MODULES |= {"jax._src"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS |= {"os.system", "os.popen", "yaml.load", "torch.load", "pandas.read_pickle"}
UNSAFE_CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
# Files whose checks refuse what comes from outside: no check there is an assert, which -O removes.
BORDER = ("server/json_body", "server/protocol", "server/reader", "server/framing", "server/gate")
BORDER += ("server/door", "server/intake", "server/rpc/requests", "server/rpc/calls")
BORDER += ("server/rpc/health", "server/rpc/reflection", "server/rpc/server")
BORDER += ("server/tools", "server/structure", "server/speech", "server/protocol_responses")
BORDER += ("server/stream", "server/uploads", "server/connection", "server/config")
BORDER += ("cluster/arguments", "cluster/config", "cluster/ticket", "cluster/ingress")
BORDER += ("server/cors", "server/embeddings", "tokenizer/history", "tokenizer/loading")
BORDER += ("server/admin",)
BORDER += ("sampling_params", "prompts", "engine/admission", "engine/config", "models/config")
BORDER += ("mii/options", "mii/deployments", "mii/wire", "mii/remote", "mii/start")
BORDER += ("models/hf_config", "checkpoints/directory", "checkpoints/tensor_files")
# What a server has no use for: other processes, but for one that tries clients' grammars, and
# ways to speak to other servers. MII's form starts a server, and is a client of it.
PROCESSES = {"subprocess", "multiprocessing", "pty"}
NEEDED = {
    "fastgen_jax/server/trial.py": {"subprocess"},
    "fastgen_jax/mii/start.py": {"subprocess"},
    "pallas_kernels/cpu/build.py": {"subprocess"},  # a compiler, at set-up
    "fastgen_jax/mii/wire.py": {"httpx2"},
    "fastgen_jax/mii/remote.py": {"httpx2"},
    "fastgen_jax/mii/deployments.py": {"urllib"},  # to spell names
}
MESSAGES = {"zmq", "grpc", "rpyc", "xmlrpc", "requests", "httpx", "httpx2", "aiohttp", "urllib"}
RPC = "fastgen_jax/server/rpc/"  # which answers by gRPC, and asks nobody
ENVIRONMENT = ("os.environ", "os.getenv")


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> set[str]:
    """Modules that a file names in imports, `a.b` and, for `from a import b`, `a.b` too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def wing(path: Path) -> str:
    """The wing that a file lies in: the one that names it, else the one that names its folder."""
    name = short(path)
    by_name = [w for w in WINGS if name in WINGS[w].rooms]
    by_folder = [w for w in WINGS for r in WINGS[w].rooms if name.startswith(f"{r}/")]
    found = by_name or by_folder
    assert len(found) == 1, f"{name} lies in the wings {found}; WINGS gives each file one"
    return found[0]


@functools.cache
def modules() -> dict[str, Path]:
    """Files by the names under which they are imported."""
    names = [short(path).removesuffix(".py").removesuffix("/__init__") for path in FILES]
    return {name.replace("/", "."): path for name, path in zip(names, FILES, strict=True)}


def needed(path: Path) -> set[Path]:
    """Our files that a file imports, in functions and for types too."""
    return {modules()[name] for name in imported(parse(path)) & modules().keys()} - {path}


def arrows() -> dict[str, list[str]]:
    """Which wings each wing imports, from the roof down."""
    found = {name: set() for name in WINGS}
    for path in FILES:
        found[wing(path)] |= {wing(other) for other in needed(path)} - {wing(path)}
    return {name: [w for w in WINGS if w in there] for name, there in found.items()}


def picture() -> str:
    """The wings and what each imports, as the README shows it."""
    lines = []
    for name, there in arrows().items():
        arrow = " ".join(["->", *there]) if there else ""
        lines.append(f"{name:16}{WINGS[name].purpose:40}{arrow}".rstrip())
    return "\n".join(lines)


def unsafe(tree: ast.Module) -> Iterator[str]:
    for name in imported(tree):
        if any(f"{name}.".startswith(f"{module}.") for module in UNSAFE_MODULES):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in UNSAFE_CALLS:
                yield f"line {node.lineno} calls {ast.unparse(node.func)}"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_KEYWORDS and not is_false:
                    yield f"line {node.lineno} sets {keyword.arg}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jax._src"):
            yield f"line {node.lineno} reaches into jax._src"


def above(path: Path) -> Iterator[str]:
    """Imports of a wing that is not below the file's own."""
    order = list(WINGS)
    for other in needed(path):
        if order.index(wing(other)) < order.index(wing(path)):
            yield f"{wing(path)} imports {short(other)}, of {wing(other)} above it"


def past_the_door(path: Path) -> Iterator[str]:
    is_outside = path.relative_to(ROOT).parts[0] in ("fastgen_jax", "convert")
    for other in needed(path):
        if is_outside and wing(other) in KERNELS:
            yield f"imports {short(other)}; pallas_kernels itself offers what others need"


def reads_environment(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(ENVIRONMENT):
            yield f"line {node.lineno} reads the environment"


def problems(rule: Callable[[Path], Iterable[str]], *folders: str) -> list[str]:
    """What a rule finds wrong, in all files of these folders."""
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] in (folders or PACKAGES)]
    assert files
    return [f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in rule(path)]


def test_a_wing_imports_only_wings_below_it():
    assert problems(above) == []


def test_a_file_imports_only_files_below_it():
    """There is such an order of files when no file needs itself through others."""
    try:
        graphlib.TopologicalSorter({path: needed(path) for path in FILES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(map(short, error.args[1])))


def test_kernels_are_reached_through_their_front_door():
    assert problems(past_the_door) == []


def test_readme_shows_the_wings():
    print(picture())
    assert picture() in (ROOT / "README.md").read_text()


def test_no_file_does_what_could_run_foreign_code():
    assert problems(lambda path: unsafe(parse(path))) == []


def test_no_check_of_what_comes_from_outside_is_an_assert():
    asserts = {
        name: [node for node in ast.walk(parse(ROOT / f"fastgen_jax/{name}.py")) if is_assert(node)]
        for name in BORDER
    }
    assert [name for name, found in asserts.items() if found] == []


def is_assert(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert)


def test_no_user_text_is_a_regular_expression():
    """In the path of a request a pattern is a constant of the source."""

    def variable_patterns(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            is_call = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
            if is_call and not (node.args and isinstance(node.args[0], ast.Constant)):
                yield f"line {node.lineno} makes a pattern of {ast.unparse(node.args[0])}"

    found = problems(variable_patterns, "fastgen_jax")
    in_request = ("fastgen_jax/server/", "fastgen_jax/dialects/", "fastgen_jax/engine/",
                  "fastgen_jax/tokenizer/", "fastgen_jax/sampling_params.py",
                  "fastgen_jax/llm.py", "fastgen_jax/generation.py",
                  "fastgen_jax/prompts.py")  # fmt: skip
    assert [text for text in found if text.startswith(in_request)] == []


def test_a_server_starts_no_process_but_one_and_speaks_to_no_other():
    def reaches_out(path: Path) -> set[str]:
        found = (PROCESSES | MESSAGES) & packages(imported(parse(path)))
        found -= NEEDED.get(short(path), set())
        return found - ({"grpc"} if short(path).startswith(RPC) else set())

    assert problems(reaches_out, "fastgen_jax", "pallas_kernels") == []


NAMED = re.compile(r"`(tests/[\w/]+\.py)((?:::\w+)*)`")


def test_every_test_that_the_table_of_promises_names_exists():
    rows = [r for r in (ROOT / "tests/README.md").read_text().splitlines() if r.startswith("| ")]
    assert len(rows) > 30
    for row in rows[1:]:
        promise, vulnerability, test = row.strip("| ").split(" | ")
        assert promise
        assert vulnerability
        assert NAMED.search(test) or test.startswith("does not apply: "), row
        for file, names in NAMED.findall(test):
            assert has_definition(parse(ROOT / file), names.split("::")[1:]), f"{file}{names}"


def has_definition(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Whether a class or function of the first name is there, and in it one of the next."""
    if not names:
        return True
    found = [node for node in tree.body if getattr(node, "name", None) == names[0]]
    return any(has_definition(node, names[1:]) for node in found)


def test_only_the_command_line_and_what_starts_it_read_the_environment():
    found = problems(reads_environment, "fastgen_jax", "pallas_kernels", "convert")
    outermost = (
        "convert/__main__.py",
        "fastgen_jax/serve.py",
        "fastgen_jax/mii/start.py",
        "fastgen_jax/mii/deployments",
        "fastgen_jax/engine/stored.py",  # what compilers read there, and never tell
    )
    assert [text for text in found if not text.startswith(outermost)] == []


def test_engine_and_converter_never_import_torch():
    def torch(path: Path) -> set[str]:
        return {"torch"} & packages(imported(parse(path)))

    assert problems(torch, "fastgen_jax", "pallas_kernels", "convert") == []


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [("scheduler", {"numpy", "jax", "flax"}), ("blocks", {"jax", "flax"}), ("types", {"jax"})],
)
def test_host_side_files_do_without_arrays_of_the_device(file, forbidden):
    assert not packages(imported(parse(ROOT / "fastgen_jax/engine" / f"{file}.py"))) & forbidden


def test_kernels_know_nothing_of_the_engine():
    known = {"pallas_kernels", "jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    # One backend needs packages that few have; it imports them when it is used.
    own = {"triton": {"jax_triton", "triton"}}

    def foreign(path: Path) -> set[str]:
        return packages(imported(parse(path))) - known - own.get(wing(path), set())

    assert problems(foreign, "pallas_kernels") == []


def test_importing_the_package_loads_neither_jax_nor_transformers():
    code = (
        "import sys, fastgen_jax, fastgen_jax.engine.scheduler\n"
        "print({'jax', 'transformers'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_top_level_holds_what_the_design_fixes():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL


def test_every_benchmark_has_one_command_that_it_and_the_readme_name():
    readme, n_found = (ROOT / "README.md").read_text(), 0
    for path in FILES:
        is_run = wing(path) == "benchmarks" and '__name__ == "__main__"' in path.read_text()
        if is_run and not path.stem.endswith("_worker"):  # which a benchmark starts
            module = short(path).removesuffix(".py").removesuffix("/__main__").replace("/", ".")
            command = f"python -m {module}"
            assert command in (ast.get_docstring(parse(path)) or "")
            assert f"`{command}" in readme
            n_found += 1
    assert n_found == len(re.findall(r"^\| `python -m benchmarks\.", readme, re.MULTILINE))


def test_readme_lists_every_flag_as_the_code_has_it():
    assert markdown(CONFIGS, positional="model") in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "from jax._src import core",
        "eval('1')",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=True)",
        "np.load(f, allow_pickle=flag)",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=flag)",
        "yaml.load(text)",
        "exec(code)",
        "os.system(name)",
        "jax._src.core.f()",
    ],
)
def test_the_search_for_unsafe_code_finds_it(code):
    assert list(unsafe(ast.parse(code)))


def test_tests_that_need_a_compiler_are_where_continuous_integration_has_one():
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    marked = {path for path in files if "mark.compile" in path.read_text()}
    assert {path for path in marked if path.parent.name != "triton"} == {
        path for path in files if path.name == "test_targets.py"
    }

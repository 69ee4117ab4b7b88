"""Rules that hold for every source file: who may import whom, and what nobody may do."""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from fastgen_jax.serve import CONFIGS
from fastgen_jax.server.flags import markdown

ROOT = Path(__file__).parents[1]
# A file imports only those before it.
ORDER = [
    *("errors", "config", "types", "blocks", "prefix", "scheduler", "admission", "batch"),
    *(
        "sampling",
        "rope",
        "layers",
        "moe",
        "mla",
        "models",
        "sharding",
        "weights",
        "mxfp4",
        "tensor_files",
        "quantised",
        "converted",
        "checkpoint",
        "runner",
        "startup",
        "engine",
    ),
    *("tokenizer", "progress", "llm", "mii", "server", "serve", "demo"),
]
PACKAGES = ("fastgen_jax", "pallas_kernels", "convert", "benchmarks")
TOP_LEVEL = {*PACKAGES, "tests", "pyproject.toml", "README.md", "Makefile"}
TOP_LEVEL |= {".ci", ".gitignore", ".gitattributes", "LICENSE"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_MODULES |= {"jax._src"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS |= {"os.system", "os.popen", "yaml.load", "torch.load"}
UNSAFE_KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}
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


def room(path: Path) -> str:
    """The file or folder of fastgen_jax that a path is or lies in."""
    return path.relative_to(ROOT / "fastgen_jax").parts[0].removesuffix(".py")


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


def out_of_order(path: Path) -> Iterator[str]:
    if path.parts[-2:] == ("fastgen_jax", "__init__.py"):
        return  # it names what users import, lazily
    here = room(path)
    for name in imported(parse(path)):
        there = name.split(".")[1] if name.startswith("fastgen_jax.") else here
        if there in ORDER and ORDER.index(there) > ORDER.index(here):
            yield f"{here} imports {there}"


def reads_environment(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(ENVIRONMENT):
            yield f"line {node.lineno} reads the environment"


def problems(rule: Callable[[Path], Iterable[str]], *folders: str) -> list[str]:
    """What a rule finds wrong, in all files of these folders."""
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] in (folders or PACKAGES)]
    assert files
    return [f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in rule(path)]


def test_every_file_has_a_place_in_the_order_of_imports():
    folder = ROOT / "fastgen_jax"
    assert {room(path) for path in folder.rglob("*.py")} - {"__init__"} <= {*ORDER}


def test_files_import_only_those_before_them():
    assert problems(out_of_order, "fastgen_jax") == []


def test_no_file_does_what_could_run_foreign_code():
    assert problems(lambda path: unsafe(parse(path))) == []


def test_only_the_command_line_reads_the_environment():
    found = problems(reads_environment, "fastgen_jax", "pallas_kernels", "convert")
    assert [text for text in found if not text.startswith("fastgen_jax/serve.py")] == []


def test_engine_and_converter_never_import_torch():
    def torch(path: Path) -> set[str]:
        return {"torch"} & packages(imported(parse(path)))

    assert problems(torch, "fastgen_jax", "pallas_kernels", "convert") == []


@pytest.mark.parametrize(
    ("file", "forbidden"),
    [("scheduler", {"numpy", "jax", "flax"}), ("blocks", {"jax", "flax"}), ("types", {"jax"})],
)
def test_host_side_files_do_without_arrays_of_the_device(file, forbidden):
    assert not packages(imported(parse(ROOT / "fastgen_jax" / f"{file}.py"))) & forbidden


def test_kernels_know_nothing_of_the_engine():
    known = {"pallas_kernels", "jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
    # One backend needs packages that few have; it imports them when it is used.
    own = {"jax_triton.py": {"jax_triton"}, "triton_kernels.py": {"triton"}}

    def foreign(path: Path) -> set[str]:
        return packages(imported(parse(path))) - known - own.get(path.name, set())

    assert problems(foreign, "pallas_kernels") == []


def test_importing_the_package_loads_neither_jax_nor_transformers():
    code = (
        "import sys, fastgen_jax, fastgen_jax.scheduler\n"
        "print({'jax', 'transformers'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_top_level_holds_what_the_design_fixes():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL


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
        "jax._src.core.f()",
    ],
)
def test_the_search_for_unsafe_code_finds_it(code):
    assert list(unsafe(ast.parse(code)))


def test_tests_that_need_a_compiler_are_where_continuous_integration_has_one():
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    marked = {path.name for path in files if "mark.compile" in path.read_text()}
    assert marked - {"test_jax_triton.py"} == {
        path.name for path in files if path.name.startswith("test_targets")
    }

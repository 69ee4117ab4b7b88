"""What of a hub's repository is downloaded, from a hub on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from fastgen_jax.checkpoints.directory import locate, locate_tokenizer
from fastgen_jax.checkpoints.hub import wanted
from fastgen_jax.checkpoints.tensor_files import INDEX
from fastgen_jax.errors import CheckpointError, ConfigError
from tests.tiny import CONFIG as TINY

MISTRAL = [
    ".gitattributes", "README.md", "config.json", "consolidated.safetensors",
    "generation_config.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", INDEX, "params.json", "special_tokens_map.json",
    "tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3",
    "tokenizer_config.json",
]  # fmt: skip
CONFIG = json.dumps(TINY).encode()
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", *SHARDS], ["model.safetensors"]),
        (["consolidated.safetensors", *SHARDS], SHARDS),
        (["consolidated-00001-of-00002.safetensors", *SHARDS], SHARDS),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["original/model.safetensors", "onnx/model.onnx", *SHARDS], SHARDS),
        (["pytorch_model.bin", "model.gguf", "model.safetensors"], ["model.safetensors"]),
    ],
)
def test_weights_are_wanted_once(weights, read):
    assert wanted(["config.json", *weights], "org/model") == ["config.json", *read]


def test_all_that_describes_a_model_is_wanted_and_nothing_else():
    texts = ["config.json", INDEX, "hf_quant_config.json", "tekken.json", "vocab.json"]
    texts += ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja"]
    texts += ["merges.txt", "vocab.txt", "qwen.tiktoken", "tiktoken.model", "tokenizer.model.v3"]
    others = ["README.md", "LICENSE.txt", "modeling_qwen.py", "original/params.json", "a/b.jinja"]
    others += ["training_args.bin", "onnx/model.onnx", "additional_chat_templates/README.md"]
    files = [*texts, *others, "model.safetensors"]
    assert sorted(wanted(files, "org/model")) == sorted([*texts, "model.safetensors"])
    assert sorted(wanted(files, "org/model", with_weights=False)) == sorted(texts)


def test_an_adapter_brings_no_weights_but_what_says_whose_it_is():
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    assert wanted(files, "org/lora") == ["adapter_config.json"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin is a pickle, which can run code"),
        (["llama.Q4_K_M.gguf"], "Q4_K_M.gguf is a GGUF file"),
        (["config.json", "tf_model.h5"], "tf_model.h5 is another framework's"),
        (["config.json", "original/model.safetensors"], "no .safetensors file in 'org/model'"),
        (["params.json", "consolidated.safetensors"], "config.json is missing in 'org/model'"),
    ],
)
def test_a_repository_that_cannot_be_read_is_refused_by_the_names_of_its_files(files, reason):
    with pytest.raises(CheckpointError, match=reason):
        wanted(files, "org/model")


class Hub(NamedTuple):
    """Repositories by name, their revisions by name, and what was taken from them."""

    repositories: dict[str, dict[str, list[str]]]
    taken: list[str]

    def answer(self, path: str) -> tuple[str, bytes]:
        """The commit and the body; KeyError for what there is not."""
        path = path.split("?")[0].strip("/")
        if path.startswith("api/models/"):
            owner, name, *what = path.removeprefix("api/models/").split("/")
            commit, files = self._revision(f"{owner}/{name}", what[1] if what else "main")
            entries = [{"type": "file", "path": f, "size": len(f), "oid": f} for f in files]
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return commit, json.dumps(entries if "tree" in what else about).encode()
        owner, name, _, revision, file = path.split("/", 4)
        body = CONFIG if file == "config.json" else file.encode()
        return self._revision(f"{owner}/{name}", revision)[0], body

    def _revision(self, repository: str, revision: str) -> tuple[str, list[str]]:
        for name, files in self.repositories[repository].items():
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit, files
        raise KeyError(revision)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if body := self._answer():
            if "/resolve/" in self.path:
                self.hub.taken.append(self.path.split("/resolve/")[1].partition("/")[2])
            self.wfile.write(body)

    def _answer(self) -> bytes:
        try:
            commit, body = self.hub.answer(self.path)
        except KeyError:
            is_known = any(f"/{name}/" in f"{self.path}/" for name in self.hub.repositories)
            if "/org/gated" in self.path:
                return self._refuse(403, "GatedRepo")
            return self._refuse(404, "RevisionNotFound" if is_known else "RepoNotFound")
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def _refuse(self, status: int, code: str) -> bytes:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return b""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, whose files hold their names, or a config."""
    hub = Hub({}, [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    url = f"http://127.0.0.1:{server.server_port}"
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def names(directory) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*.*")}


def test_a_download_takes_what_is_read(hub):
    hub.repositories["org/model"] = {"main": [*MISTRAL, "original/model.safetensors"]}
    directory = locate("org/model")
    unread = {".gitattributes", "README.md", "consolidated.safetensors"}
    assert names(directory) == {*MISTRAL} - unread
    assert sorted(hub.taken) == sorted({*MISTRAL} - unread)


def test_nothing_is_downloaded_of_a_repository_of_pickles(hub):
    hub.repositories["org/old"] = {"main": ["config.json", "pytorch_model.bin", "tokenizer.json"]}
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        locate("org/old")
    assert hub.taken == []


def test_a_tokenizer_brings_no_weights(hub):
    hub.repositories["org/model"] = {"main": ["tokenizer.json", "model.safetensors"]}
    assert names(locate("org/model", with_weights=False)) == {"tokenizer.json"}


def test_a_revision_is_the_one_that_is_downloaded(hub, tmp_path):
    files = ["config.json", "model.safetensors"]
    hub.repositories["org/model"] = {"main": files, "v2": [*files, "chat_template.jinja"]}
    assert "chat_template.jinja" in names(locate("org/model", revision="v2"))
    assert "chat_template.jinja" not in names(locate("org/model"))
    with pytest.raises(
        ConfigError, match=r"could not be downloaded .*check the name, the revision"
    ):
        locate("org/model", revision="v3")
    with pytest.raises(ConfigError, match=r"revision='v2' is for hub ids, and .* is a directory"):
        locate(str(tmp_path), revision="v2")


def test_a_tokenizer_is_of_the_models_revision_unless_it_has_a_repository_of_its_own(hub):
    hub.repositories["org/model"] = {"main": [], "v2": ["config.json", "model.safetensors"]}
    hub.repositories["org/other"] = {"main": ["tokenizer.json", "model.safetensors"]}
    directory = locate_tokenizer("org/model", revision="v2")
    assert hub.taken == ["config.json"]
    assert directory == locate("org/model", revision="v2")
    other = locate_tokenizer("org/model", "org/other", revision="v2")
    assert names(other) == {"tokenizer.json"}


def test_nothing_large_is_downloaded_of_a_model_that_is_not_supported(hub):
    hub.repositories["org/model"] = {"main": ["config.json", "model.safetensors"]}
    with pytest.raises(ConfigError, match="model type 'mamba' is not supported"):
        locate_tokenizer("org/model", overrides={"model_type": "mamba"})
    assert hub.taken == ["config.json"]


def test_a_repository_that_is_not_there_or_gated_is_named(hub):
    with pytest.raises(ConfigError, match="'org/none' is no directory here and could not be"):
        locate("org/none")
    with pytest.raises(ConfigError, match="'org/gated' is gated on the hub; ask for access"):
        locate("org/gated")


@pytest.mark.parametrize(
    ("name", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:1")]
)
def test_without_the_hub_the_cache_is_used_and_without_both_the_error_says_so(
    hub, monkeypatch, name, value
):
    hub.repositories["org/model"] = {"main": ["config.json", "model.safetensors"]}
    directory = locate("org/model")
    monkeypatch.setattr(constants, name, value)
    assert locate("org/model") == directory
    with pytest.raises(ConfigError, match="'org/other' is no directory here and could not be"):
        locate("org/other")

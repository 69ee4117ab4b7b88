"""The page for people: what is served, under which headers, and that it names nothing else."""

import re

import pytest

from fastgen_jax.server.web import FOLDER, PAGES
from tests.server.running import serving
from tests.server.test_wire import exchange


def test_every_file_of_the_page_is_served_and_no_other():
    assert {path.name for path in FOLDER.iterdir()} == set(PAGES.values())


@pytest.mark.parametrize("path", PAGES)
def test_files_come_with_a_strict_policy_and_their_type(up, path):
    answer = up.get(path)
    assert answer.status_code == 200
    assert answer.content == (FOLDER / PAGES[path]).read_bytes()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg"}
    assert answer.headers["content-type"].startswith(kinds[PAGES[path].rpartition(".")[2]])
    assert up.http.head(up.url + path).headers["content-length"] == str(len(answer.content))


def test_no_file_names_another_host_or_makes_code_or_markup_of_text():
    """Untrusted text becomes textContent; there is no way from a string to markup or code."""
    forbidden = r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|outerHTML|insertAdjacent|eval\("
    forbidden += r"|new Function|document\.write|\bstyle=|\son\w+=|<script>|setTimeout\(['\"]"
    for name in PAGES.values():
        assert re.findall(forbidden, (FOLDER / name).read_text()) == [], name


def test_every_file_that_the_page_asks_for_is_served():
    asked = re.findall(r'(?:href|src)="([^"]+)"', (FOLDER / "index.html").read_text())
    for name in PAGES.values():
        modules = re.findall(r'from "\./([\w.]+)"', (FOLDER / name).read_text())
        asked += [f"web/{module}" for module in modules]
    assert len(asked) > 10
    assert {f"/{path}" for path in asked} == PAGES.keys() - {"/"}


def test_the_page_needs_no_key_but_all_that_it_asks_for_does(tokenizer):
    with serving(tokenizer, api_key=("key",)) as up:
        assert all(up.get(path).status_code == 200 for path in PAGES)
        for path in ("/debug/steps", "/v1/models", "/tokenizer_info", "/web/", "/web/other.js"):
            assert up.get(path).status_code == 401, path


def test_no_web_serves_neither_the_page_nor_a_way_past_the_key(tokenizer):
    with serving(tokenizer, web=False) as up:
        assert all(up.get(path).status_code == 404 for path in PAGES)
    with serving(tokenizer, web=False, api_key=("key",)) as up:
        assert all(up.get(path).status_code == 401 for path in PAGES)


@pytest.mark.parametrize(
    "target",
    ["/web/../web.py", "/web/%2e%2e/web.py", "/web/index.html", "/web//style.css",
     "/web/style.css/", "/web/style.css%00", "/web/..%2f..%2fconfig.py", "/page/style.css",
     "/WEB/style.css"],
)  # fmt: skip
def test_nothing_of_a_request_names_a_file(up, target):
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert exchange(up.address, request.encode())[9:12] == b"404"


def test_the_page_is_guarded_by_its_host_like_all_else(up):
    assert up.get("/", headers={"host": "rebound.example"}).status_code == 403

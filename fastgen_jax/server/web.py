"""The page for people: a fixed list of files, read when the server starts.

Nothing of a request names a file. The page holds nothing secret and needs no key; what it asks the
server does. It may load nothing from elsewhere and run nothing that is not in these files.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGES = {
    "/": "index.html",
    "/web/style.css": "style.css",
    "/web/icon.svg": "icon.svg",
    "/web/main.js": "main.js",
    "/web/api.js": "api.js",
    "/web/chat.js": "chat.js",
    "/web/conversations.js": "conversations.js",
    "/web/tokens.js": "tokens.js",
    "/web/engine.js": "engine.js",
    "/web/bars.js": "bars.js",
    "/web/blocks.js": "blocks.js",
    "/web/load.js": "load.js",
    "/web/palette.js": "palette.js",
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Web:
    """Answers the paths of PAGES."""

    def __init__(self):
        self._files = {path: _answer(FOLDER / name) for path, name in PAGES.items()}

    async def page(self, request: Request) -> Response:
        body, content_type = self._files[request.scope["path"]]
        return Response(body, headers=HEADERS | {"content-type": content_type})


def _answer(file: Path) -> tuple[bytes, str]:
    return file.read_bytes(), TYPES[file.suffix]

"""The web page at `/`: a chat over the server's own endpoint, in plain HTML, CSS and JavaScript.

The files are served from the package. They ask nobody else for anything, and the policy they come with
forbids it: scripts and styles come from this server alone, and none stand inside the HTML.
"""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

__all__ = ["PAGE_PATHS", "page_router"]

FOLDER = Path(__file__).parent
TYPES = {
    "style.css": "text/css",
    "app.js": "text/javascript",
    "conversation.js": "text/javascript",
    "events.js": "text/javascript",
    "settings.js": "text/javascript",
    "strip.js": "text/javascript",
    "view.js": "text/javascript",
    "examples.json": "application/json",
    "icon.svg": "image/svg+xml",
}
"""What is served under /page/, and nothing else is."""

PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in TYPES)})
"""Every path of the page. They hold nothing that needs an API key, and the page asks for the key itself."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """GET / and the files it loads."""
    router = APIRouter(include_in_schema=False)

    @router.get("/", response_model=None)
    async def index() -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html", headers=HEADERS)

    @router.get("/page/{name}", response_model=None)
    async def file(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404, "the page has no such file")
        return FileResponse(FOLDER / name, media_type=TYPES[name], headers=HEADERS)

    return router

"""The web server of the playground: one page, its requests, images and report pages; Starlette on uvicorn.

Starlette and uvicorn, and not gradio: two small packages with no telemetry, no sharing link and no fonts or scripts
from elsewhere to switch off, and beside which the kit's tested versions stay as they are (gradio 6 wants an older
Pillow than the one that they have).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sana_kit.errors import UserError
from sana_kit.playground.runs import describe_run, find_runs, served_file
from sana_kit.playground.studio import Studio

HOST = "127.0.0.1"
_NAMES = [HOST, "localhost"]  # another name in a request is a page elsewhere that was pointed at this machine
_MOST_BYTES = 100_000
# Report pages hold their styles and scripts; nothing may be fetched from anywhere else, or frame the page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Page:
    """The handlers; `studio` draws, `places` are searched for trainings at each request."""

    def __init__(self, studio: Studio, places: Sequence[str]):
        self.studio, self.places = studio, places
        self.folders: dict[str, Path] = {}  # number in addresses -> folder; a folder keeps its number

    async def index(self, request: Request) -> Response:
        """The page itself."""
        template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
            Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        )
        return HTMLResponse(template.render(**self.studio.defaults()), headers=_HEADERS)

    async def draw(self, request: Request) -> Response:
        """Problems as JSON (422), or the drawing's events, a JSON line each, as they come."""
        # A page elsewhere can send a form here, but no JSON without being asked for leave first.
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "application/json")
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            raise HTTPException(413)
        try:
            asked = json.loads(await request.body())
            drawing = await run_in_threadpool(self.studio.check, asked if isinstance(asked, dict) else {})
        except UserError as error:
            return JSONResponse({"problems": [str(problem) for problem in error.problems]}, 422, _HEADERS)
        except ValueError as error:
            return JSONResponse({"problems": [f"not JSON: {error}"]}, 422, _HEADERS)

        def lines() -> Iterator[str]:
            yield json.dumps({"kind": "plan", "images": drawing.images, "notes": drawing.notes}) + "\n"
            for event in self.studio.draw(drawing):
                yield json.dumps(event) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=_HEADERS)

    async def image(self, request: Request) -> Response:
        """An image that was drawn."""
        path = self.studio.folder.path / request.path_params["name"]
        if path.suffix != ".png" or path.name.startswith(".") or not path.is_file():
            raise HTTPException(404)
        return FileResponse(path, headers=_HEADERS)

    async def runs(self, request: Request) -> Response:
        """The trainings as JSON, the latest first."""
        return JSONResponse(await run_in_threadpool(self._list_runs), headers=_HEADERS)

    def _list_runs(self) -> list[dict[str, Any]]:
        listed = []
        for folder in find_runs(self.places):
            known = [number for number, path in self.folders.items() if path == folder]
            number = known[0] if known else str(len(self.folders))
            self.folders[number] = folder
            listed.append({"number": number, "folder": str(folder), **describe_run(folder)})
        return listed

    async def run_file(self, request: Request) -> Response:
        """A file of a training that the list has named."""
        folder = self.folders.get(request.path_params["number"])
        path = folder and served_file(folder, request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, headers=_HEADERS)


def make_app(studio: Studio, places: Sequence[str]) -> Starlette:
    """The application: answers to loopback names only."""
    page = Page(studio, places)
    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/api/draw", page.draw, methods=["POST"]),
            Route("/api/runs", page.runs),
            Route("/images/{name}", page.image),
            Route("/runs/{number}/{name:path}", page.run_file),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_NAMES)],
    )

"""The playground on vLLM: the page, and the dial that it reads. The replies are those of vLLM's own routes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from ..errors import SteerError
from ..run_card import CARD_FILE, RunCard
from ..serving.described import described
from ..serving.page import page
from .settings import VECTORS, served_vectors

if TYPE_CHECKING:
    from fastapi import FastAPI


def add_playground(app: FastAPI) -> None:
    """`/play` and `/dial`. The page turns strengths by names of models alone, so it shows no KL."""

    @app.get("/play", include_in_schema=False)
    def playground() -> Response:
        text, headers = page()
        return HTMLResponse(text, headers=headers)

    @app.get("/dial", include_in_schema=False)
    def dial(request: Request) -> Response:
        try:
            return JSONResponse(_dial(request.app.state.openai_serving_models.base_model_paths[0].name))
        except SteerError as error:
            return JSONResponse({"error": {"message": str(error)}}, 500)


def _dial(base: str) -> dict[str, Any]:
    """The vectors as they are on the disk now."""
    cards = {name: _card(folder) for name, folder in served_vectors(os.environ.get(VECTORS, "")).items()}
    return described(base, cards, "vllm", "warn")


def _card(folder: Path) -> RunCard:
    """A vector's card; an adapter that others made has none."""
    return RunCard.load(folder) if (folder / CARD_FILE).is_file() else RunCard("adapter")

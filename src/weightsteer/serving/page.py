"""The playground's one page: its parts put together once, and the headers that hold a browser to them."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from ..reporting.palette import VECTORS

SCRIPTS = ("words.js", "server.js", "dials.js", "replies.js", "chat.js", "fan.js", "code.js", "start.js")
# Only the page's own script and style, requests to the server that sent it alone, and no text made into markup.
POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page, with its style and script inlined, and its HTTP headers.

    The policy names the script and the style by their hashes, so no other would run, whatever a model writes. The
    look and the vectors' colours are those of the reports.
    """
    colours = " ".join(f"--vector{number}: {colour};" for number, colour in enumerate(VECTORS))
    style = "\n".join([_text("reporting", "style.css"), f":root {{ {colours} }}", _text("serving", "playground.css")])
    script = "\n".join([f"const COLOURS = {len(VECTORS)};", *(_text("serving", name) for name in SCRIPTS)])
    html = _text("serving", "playground.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    return html, {
        "content-security-policy": POLICY.format(script=_hash(script), style=_hash(style)),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _text(package: str, name: str) -> str:
    return files("weightsteer").joinpath(package, "templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

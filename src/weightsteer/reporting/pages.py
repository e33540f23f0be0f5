"""Self-contained HTML pages: no external request, every text escaped (no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..files import write_text
from ..shown import visible


def write_page(path: Path, template: str, specs: Mapping[str, Mapping[str, Any]], **content: Any) -> Path:
    """Render a template with Vega-Lite charts (id -> spec) and the runtime that draws them inlined; written whole."""
    page = (
        _environment()
        .get_template(template)
        .render(
            specs={name: _script_json(spec) for name, spec in specs.items()},
            vega=Markup(vega_runtime()),
            **content,
        )
    )
    write_text(path, page)
    return path


def write_figures(
    path: Path,
    title: str,
    figures: Sequence[tuple[Mapping[str, Any], str]],
    *,
    intro: str = "",
    table: Sequence[Sequence[str]] = (),
) -> Path:
    """A page of charts, each with a caption, and a table whose first row is its head."""
    named = {f"figure{number}": spec for number, (spec, _) in enumerate(figures)}
    captions = {name: caption for name, (_, caption) in zip(named, figures, strict=True)}
    return write_page(path, "figures.html", named, title=title, intro=intro, captions=captions, table=list(table))


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("weightsteer.reporting"),
        autoescape=True,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """A text with what would turn its order around written out; the environment escapes it after that."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _script_json(value: Any) -> Markup:
    """JSON that is safe inside <script>: no '<' can close the element or open another."""
    return Markup(json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026"))


@cache
def vega_runtime() -> str:
    """The script that draws the charts, with no request."""
    import vl_convert

    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return bundle.replace("</script", "<\\/script")

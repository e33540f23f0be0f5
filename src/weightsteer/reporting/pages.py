"""Self-contained HTML pages: no external request, every text escaped (no torch).

A page is a template that extends `base.html`, which brings the look (light, dark, narrow, printed), the script that
sorts and downloads tables, and Vega-Lite where there are charts. `parts.html` has the macros for tables and figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..files import write_text
from ..shown import FORMULA, NUMBER, visible
from .tables import plain_table

Spec = Mapping[str, Any]


def write_page(path: Path, template: str, specs: Mapping[str, Spec] | None = None, **content: Any) -> Path:
    """Render a template and write it whole.

    Args:
        template: a file in `templates/` that extends `base.html`.
        specs: Vega-Lite charts, by the id of the element that each is drawn in (`parts.figure`); their runtime is
            inlined where there are any.
        content: what the template shows; `title` is needed. All texts are escaped.
    """
    specs = specs or {}
    page = (
        _environment()
        .get_template(template)
        .render(
            specs=script_json(specs),
            vega=Markup(vega_runtime()) if specs else "",
            csv_rules=script_json({"formula": FORMULA.pattern, "number": NUMBER.pattern}),
            **content,
        )
    )
    write_text(path, page)
    return path


def write_figures(
    path: Path,
    title: str,
    figures: Sequence[tuple[Spec, str]],
    *,
    intro: str = "",
    verdict: str = "",
    table: Sequence[Sequence[str]] = (),
    wide: bool = False,
) -> Path:
    """A page of charts, each under its heading, and a table whose first row is its head.

    Args:
        verdict: what the page comes to, in one sentence; it stands first.
        wide: the charts are as large as the window, in both directions.
    """
    named = {f"figure{number}": spec for number, (spec, _) in enumerate(figures)}
    return write_page(
        path,
        "figures.html",
        named,
        title=title,
        intro=intro,
        verdict=verdict,
        headings={name: heading for name, (_, heading) in zip(named, figures, strict=True)},
        table=plain_table(path.stem, table) if table else None,
        wide=wide,
    )


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


def script_json(value: Any) -> Markup:
    """JSON that is safe inside <script>: no '<' can close the element or open another."""
    return Markup(json.dumps(value).replace("<", "\\u003c").replace("&", "\\u0026"))


@cache
def vega_runtime() -> str:
    """The script that draws the charts, with no request."""
    import vl_convert

    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    return bundle.replace("</script", "<\\/script")

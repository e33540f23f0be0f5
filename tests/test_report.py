from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsteer import charts
from weightsteer.charts import place
from weightsteer.errors import SteerError
from weightsteer.matched import Matched
from weightsteer.pages import _vega_runtime
from weightsteer.records import Row, RunCard, StrengthRange
from weightsteer.report import PAGE, PLOT, Report, Sample, write_report

METRICS = (("preference", "margin"), ("false_beliefs", "follows"), ("facts", "accuracy"), ("prose", "nll"))
EVIL = '</script><img src=x onerror="alert(1)"><b>{{ 7*7 }}</b>'


def make_report() -> Report:
    rows = [
        row
        for method, ks in (("contrastive", (0.0, -1.0, 1.0)), ("tau+", (1.0,)))
        for k in ks
        for task, metric in METRICS
        for row in (
            Row(method if k else "base", k, task, metric, 0.5 + 0.1 * k, 20, 0.05),
            Row(method if k else "base", k, task, f"{metric} change", 0.1 * k, 20, 0.01),
        )
    ]
    return Report(
        title=f"Report {EVIL}",
        rows=rows,
        card=RunCard("vector", base_model=EVIL),
        strength=StrengthRange(1.0, -1.0, -1.0, 1.0, {"prose nll": 0.1}),
        norms={"model.layers.0.mlp.up_proj.weight": 1.0, "model.norm.weight": 0.5},
        samples=[Sample(EVIL, {-1.0: EVIL, 0.0: "plain", 1.0: "more"})],
        command="weightsteer run recipe.yaml",
        costs=[
            Row(EVIL, 0.0, "cost", "training tokens", 12345.0, 1, 0.0),
            Row(EVIL, 2.0, "cost", "time per token", 1.25, 5, 0.1),
        ],
        matched={("facts", "accuracy"): [Matched(EVIL, -1, 0.1, -0.2, 0.05, 20, False, -0.1, 0.02, 20, False)]},
    )


def test_page_is_self_contained_and_escapes_model_text(tmp_path: Path) -> None:
    page = write_report(make_report(), tmp_path).read_text()
    assert _vega_runtime() in page
    page = page.replace(_vega_runtime(), "")
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "{{ 7*7 }}" in page
    assert re.findall(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=", page) == []
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count("<script>") == page.count("</script>") == 2
    assert page.count("12,345") == 2  # its own table, and beside the method at the same loss
    for text in ("(-0.200 ± 0.050)", "1.25 ± 0.10", "k = +1", "k = -1", "weightsteer run recipe.yaml", "0.600 ± 0.050"):
        assert text in page
    assert '<div id="cost">' in page
    assert '"tokens": 12345.0' in page
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / PAGE).stat().st_size < 3_000_000


def test_a_margin_is_drawn_where_it_is_asked_for_and_an_overflow_is_not() -> None:
    margins = {("base", 0.0): (0.0, 0.0), ("tau+", 1.0): (0.5, 0.2), ("tau+", 2.0): (math.nan, math.inf)}
    rows = [
        Row(method, k, task, name, change, 5, math.nan)
        for (method, k), (margin, damage) in margins.items()
        for task, metric, change in (("a", "margin", margin), ("a", "share", 0.0), ("prose", "nll", damage))
        for name in (metric, f"{metric} change")
    ]
    key = [("a", "margin")]
    for chart in (charts.behaviour_against_capability(rows, key), charts.dose_response(rows, "tau+", key)):
        drawn = re.findall(r"'k': (\d\.\d)", str(chart.to_dict()))
        assert sorted(set(drawn)) == ["0.0", "1.0"]
        assert charts.png(chart).startswith(b"\x89PNG")


def test_no_test_rows_is_an_error(tmp_path: Path) -> None:
    report = make_report()
    rows = [Row("contrastive", 1.0, "prose", "nll", 3.0, 5, 0.1, "validation")]
    with pytest.raises(SteerError, match="test rows of the base"):
        write_report(Report(**{**vars(report), "rows": rows}), tmp_path)


def test_report_does_not_import_torch() -> None:
    code = "import sys, weightsteer.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_places_of_parameters() -> None:
    assert place("model.layers.3.mlp.up_proj.weight") == {"layer": 3, "module": "mlp.up_proj"}
    assert place("model.embed_tokens.weight") == {"layer": "-", "module": "embed_tokens.weight"}

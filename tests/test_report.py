from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsteer.errors import SteerError
from weightsteer.evaluation.compare import ComparisonAtLoss
from weightsteer.evaluation.results import MetricRow
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks import metrics_of
from weightsteer.reporting import charts
from weightsteer.reporting.charts import place
from weightsteer.reporting.pages import vega_runtime
from weightsteer.reporting.report import Report, write_report
from weightsteer.reporting.samples import Sample
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.run_folder import RunFolder

METRICS = (("preference", "margin"), ("false_beliefs", "follows"), ("facts", "accuracy"), ("prose", "nll"))
EVIL = '</script><img src=x onerror="alert(1)"><b>{{ 7*7 }}</b>'


def make_report() -> Report:
    rows = [
        row
        for method, ks in (("contrastive", (0.0, -1.0, 1.0)), ("tau+", (1.0,)))
        for k in ks
        for task, metric in METRICS
        for row in (
            MetricRow(method if k else "base", k, task, metric, 0.5 + 0.1 * k, 20, 0.05),
            MetricRow(method if k else "base", k, task, metric, 0.1 * k, 20, 0.01, change=True),
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
            MetricRow(EVIL, 0.0, "cost", "training tokens", 12345.0, 1, 0.0),
            MetricRow(EVIL, 2.0, "cost", "time per token", 1.25, 5, 0.1),
        ],
        comparisons={
            ("facts", "accuracy"): [ComparisonAtLoss(EVIL, -1, 0.1, -0.2, 0.05, 20, False, -0.1, 0.02, 20, False)]
        },
    )


def test_page_is_self_contained_and_escapes_model_text(tmp_path: Path) -> None:
    page = write_report(make_report(), RunFolder(tmp_path)).read_text()
    assert vega_runtime() in page
    page = page.replace(vega_runtime(), "")
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "{{ 7*7 }}" in page
    assert re.findall(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=", page) == []
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert page.count("<script>") == page.count("</script>") == 2
    for text in ("(-0.200 ± 0.050)", "1.25 ± 0.10", "k = +1", "k = -1", "weightsteer run recipe.yaml", "0.600 ± 0.050"):
        assert text in page
    assert "12,345</td>" in page
    assert '"tokens": 12345.0' in page
    assert RunFolder(tmp_path).plot.read_bytes().startswith(b"\x89PNG")
    assert RunFolder(tmp_path).page.stat().st_size < 3_000_000


def test_a_margin_is_drawn_where_it_is_asked_for_and_an_overflow_is_not() -> None:
    margins = {("base", 0.0): (0.0, 0.0), ("tau+", 1.0): (0.5, 0.2), ("tau+", 2.0): (math.nan, math.inf)}
    rows = [
        MetricRow(method, k, task, metric, value, 5, math.nan, change=change)
        for (method, k), (margin, increase) in margins.items()
        for task, metric, value in (("a", "margin", margin), ("a", "share", 0.0), ("prose", "nll", increase))
        for change in (False, True)
    ]
    key = [("a", "margin")]
    picture = charts.behaviour_against_capability(rows, key, {})
    for chart in (picture, charts.dose_panel(rows, "tau+", key[0], {})):
        drawn = re.findall(r"'k': (\d\.\d)", str(chart.to_dict()))
        assert sorted(set(drawn)) == ["0.0", "1.0"]
    assert charts.png(picture).startswith(b"\x89PNG")


def test_no_test_rows_is_an_error(tmp_path: Path) -> None:
    report = make_report()
    rows = [MetricRow("contrastive", 1.0, "prose", "nll", 3.0, 5, 0.1, "validation")]
    with pytest.raises(SteerError, match="test rows of the base"):
        write_report(Report(**{**vars(report), "rows": rows}), RunFolder(tmp_path))


def test_report_does_not_import_torch() -> None:
    code = "import sys, weightsteer.reporting.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_places_of_parameters() -> None:
    assert place("model.layers.3.mlp.up_proj.weight") == {"layer": 3, "module": "mlp.up_proj"}
    assert place("model.embed_tokens.weight") == {"layer": "-", "module": "embed_tokens.weight"}


def test_no_internal_label_is_shown(tmp_path: Path) -> None:
    report = Report(**{**vars(make_report()), "title": "T", "card": RunCard("vector", base_model="m"), "samples": ()})
    report = Report(**{**vars(report), "metrics": metrics_of([TaskSpec(task) for task, _ in METRICS])})
    page = write_report(report, RunFolder(tmp_path)).read_text().replace(vega_runtime(), "")
    shown = re.sub(r"<script>.*?</script>|<style>.*?</style>|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    for label in ("prose nll", "prose/nll", "false_beliefs", "preference/margin"):
        assert label not in shown
    assert "loss on ordinary text by at most 0.1 nats per token" in shown


def test_what_the_folder_lacks_is_left_out(tmp_path: Path) -> None:
    bare = Report(title="T", rows=make_report().rows, card=RunCard("vector"), strength=make_report().strength, norms={})
    page = write_report(bare, RunFolder(tmp_path)).read_text().replace(vega_runtime(), "")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Dose and response",
        "Methods at the same loss increase",
        "Provenance",
    ]

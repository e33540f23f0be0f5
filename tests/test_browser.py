"""The pages in a real browser: nothing overflows, nothing is fetched, no script fails, tables sort and download.

Skipped where Playwright or Chromium (Debian's package `chromium`) is not installed.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from test_report import EVIL, make_report
from weightsteer.reporting.direction_charts import heatmap, layer_panels, step_panels
from weightsteer.reporting.pages import write_figures
from weightsteer.reporting.report import write_report
from weightsteer.run_folder import RunFolder
from weightsteer.shown import csv_cell

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PAGES = ("report", "monitor", "cosines")
PAPER = 688  # A4 without its margins, in CSS pixels
READING = {"cosine": 0.1, "centre": 0.0, "band": 0.02, "z": 5.0, "projection": 0.3}
CELLS = ["=1+1", " +cmd", "-3.5", "@x", 'a "b", c', "-a", "1e-3"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    names = [f"runs/a-long-name-of-a-behaviour-{n}/vector" for n in range(12)]
    rows = [{**READING, "vector": name, "step": step} for name in names[:2] for step in (1, 2)]
    layers = [{**row, "part": f"layer {n}"} for row in rows for n in range(4)]
    charts = [*step_panels(rows, alert=4.0).items(), *layer_panels(layers).items()]
    return {
        "report": write_report(make_report(), RunFolder(folder)),
        "monitor": write_figures(
            folder / "monitor.html",
            EVIL,
            [(chart.to_dict(), title) for title, chart in charts],
            verdict="No alert",
            table=[["text", "z"], *([cell, f"{n:+.1f}"] for n, cell in enumerate(CELLS))],
        ),
        "cosines": write_figures(
            folder / "cosines.html", "Cosines", [(heatmap(names, np.eye(12), fill=True).to_dict(), "")], wide=True
        ),
    }


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page with its charts drawn, and what went wrong so far: errors of scripts, requests."""
    page, wrong = browser.new_page(**options), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else wrong.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("[...document.querySelectorAll('.chart')].every((place) => place.querySelector('svg'))")
    return page, wrong


OUTSIDE = """() => [...document.querySelectorAll("main *:not(.scroll *)")]
  .filter((part) => part.getClientRects().length && part.getBoundingClientRect().right > innerWidth + 1)
  .map((part) => part.tagName + " " + part.className + " " + part.textContent.slice(0, 40))"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_overflows_and_nothing_is_fetched(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    page, wrong = opened(browser, pages[name], viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []
    ink = page.evaluate("getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color")  # charts follow dark mode
    assert (ink == "rgb(227, 233, 239)") == (scheme == "dark")
    assert wrong == []
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_on_paper_nothing_is_cropped_and_folds_are_open(browser: Any, pages: dict[str, Path], name: str) -> None:
    page, wrong = opened(browser, pages[name], viewport={"width": PAPER, "height": 1000})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER
    assert page.evaluate(OUTSIDE.replace(":not(.scroll *)", "")) == []
    assert page.evaluate("document.querySelectorAll('details:not([open]):not(.kept)').length") == 0
    assert wrong == []
    page.close()


def test_tables_sort_and_download_without_formulas(browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = opened(browser, pages["monitor"])
    head, column = page.locator("thead button", has_text="z"), page.locator("tbody td:nth-child(2)")
    for way in (1, -1):
        head.click()
        assert [float(text) for text in column.all_inner_texts()] == list(range(len(CELLS)))[::way]
    head.click()
    with page.expect_download() as download:
        page.locator("button.download").click()
    saved = download.value
    assert saved.suggested_filename == "monitor.csv"
    rows = list(csv.reader(io.StringIO(Path(saved.path()).read_text())))
    assert [row[0] for row in rows] == ["text", *(str(csv_cell(cell.strip())) for cell in CELLS)]
    assert wrong == []
    page.close()


def test_an_estimate_is_two_columns_of_the_download(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["report"])
    text = page.evaluate("csvOf(document.querySelector('table[data-name=numbers]'))")
    head, first, *_ = csv.reader(io.StringIO(text))
    assert head[2].endswith("margin")
    assert head[3] == f"{head[2]}, standard error"
    assert first[:4] == ["base", "0.0", "0.5", "0.05"]
    page.close()

"""Draw the pictures of the published runs again, from their measurements in docs/runs: python docs/figures.py."""

from __future__ import annotations

from pathlib import Path

from weightsteer.evaluation.metrics import metric_key
from weightsteer.evaluation.results import BASE, MetricRow, measurements_by_key
from weightsteer.files import read_jsonl
from weightsteer.reporting.charts import behaviour_against_capability, png
from weightsteer.run_folder import RunFolder
from weightsteer.runs.recipe import Recipe

HERE = Path(__file__).parent
PICTURES = {  # picture -> run
    "laptop-sycophancy": "laptop-sycophancy-seed1",
    "laptop-four-way": "laptop-four_way-seed0",
    "laptop-evil": "laptop-evil-seed0",
    "laptop-gcd": "laptop-gcd-seed0",
    "laptop-refusal": "laptop-refusal-seed1",
}


def test_rows(folder: RunFolder) -> list[MetricRow]:
    """What was measured on test items."""
    path = folder.measurements
    found = measurements_by_key(read_jsonl(path), str(path))
    rows = [row for each in found.values() for row in each.rows(found[BASE, 0.0, each.task])]
    return [row for row in rows if row.split == "test"]


def main() -> None:
    for picture, run in PICTURES.items():
        folder = RunFolder(HERE / "runs" / run)
        recipe = Recipe.load_kept(folder.recipe)
        chart = behaviour_against_capability(test_rows(folder), [*map(metric_key, recipe.plot)], recipe.metrics)
        (HERE / f"{picture}.png").write_bytes(png(chart))


if __name__ == "__main__":
    main()

"""The package as `pip install weightsteer` leaves it, without what its extras bring."""

from __future__ import annotations

import subprocess
import sys

BARE = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

EXTRAS = ("openai", "lm_eval", "fastapi", "uvicorn", "trl", "bitsandbytes", "ray", "vllm")


class Without(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in EXTRAS else PathFinder.find_spec(fullname, path, target)


sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import weightsteer

for module in pkgutil.walk_packages(weightsteer.__path__, "weightsteer.", onerror=lambda name: None):
    try:
        module.name.endswith("__main__") or importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        print(module.name, error.name)
from weightsteer.cli import app

app(["list", "tasks"], standalone_mode=False)
"""
NEEDS = (
    "weightsteer.serving.",
    "weightsteer.vllm.",
    "weightsteer.evaluation.served_harness",
    "weightsteer.training.dpo",
)


def test_nothing_but_what_an_extra_is_for_needs_it() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("harness") for line in lines)
    assert [line for line in lines if line.startswith("weightsteer.") and not line.startswith(NEEDS)] == []

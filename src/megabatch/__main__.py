"""`python -m megabatch`: the same as the `megabatch` command."""

from megabatch.cli.main import main

main()

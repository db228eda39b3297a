"""`python -m fedprune_cli` is `fedprune`."""

from fedprune_cli.cli import main

main()

"""`python -m fedprune_cli` is `fedprune`."""

from fedprune_cli.commands.app import main

main()

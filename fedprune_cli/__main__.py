"""`python -m fedprune_cli` is `fedprune`. Signals are heeded from here on, before anything large is imported."""

from typing import NoReturn

from fedprune_cli import interrupt


def main() -> NoReturn:
    """Runs the command line."""
    interrupt.heed()
    from fedprune_cli.commands import app

    app.main()


if __name__ == "__main__":
    main()

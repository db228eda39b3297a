"""`python -m fedprune_cli` is `fedprune`. Signals are heeded from here on, before anything large is imported."""

import os
from typing import NoReturn

from fedprune_cli import interrupt


def main() -> NoReturn:
    """Runs the command line."""
    interrupt.heed()
    try:
        from fedprune_cli.commands import app
    except Exception as error:
        _fail(error)
    app.main()


def _fail(error: Exception) -> NoReturn:
    """Says in one line why the command line itself cannot be imported; with what it needs for that, as far as that can be imported."""
    try:
        from fedprune_cli.errors import explained

        known = explained(error)
        text, code = str(known), known.exit_code
    except Exception:
        text, code = f"cannot be started: {' '.join(str(error).split())}", 7
    try:
        os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()

"""pytest's option `--plugin`: the laws are then run on the parts of that file, and each broken one is named at the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedprune_cli import plugins
from fedprune_cli.errors import ConfigError

PLACE = f"{__package__}."
BROKEN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    group = parser.getgroup("fedprune")
    group.addoption(
        "--plugin", action="append", default=[], metavar="FILE.py", dest="fedprune_plugins",
        help="with --pyargs fedprune_cli.contracts: hold the parts of this file, or of this installed distribution, to fedprune's laws",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Gives the process the files before any law is collected."""
    config.addinivalue_line("markers", "foreign: a law on a part from outside the package")
    config.addinivalue_line("markers", "slow: a law that takes long")
    config.stash[BROKEN] = []
    if not (asked := config.getoption("fedprune_plugins")):
        return
    files = [one for one in asked if one.endswith(".py") or os.path.exists(one)]
    installed = [one for one in asked if one not in files]
    try:
        plugins.give([plugins.read(Path(one)) for one in files])
        from fedprune_cli.contracts import parts

        parts.check(installed)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the laws that are on none of the parts asked about."""
    if config.getoption("fedprune_plugins"):
        out = [item for item in items if item.get_closest_marker("foreign") is None]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item.get_closest_marker("foreign") is not None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """Notes a broken law and what was wrong, in one line."""
    report = yield
    if (
        item.get_closest_marker("foreign")
        and call.excinfo is not None
        and not call.excinfo.errisinstance(pytest.skip.Exception)
    ):
        law, _, part = item.name.partition("[")
        why = next(iter(call.excinfo.exconly().removeprefix("AssertionError: ").strip().splitlines()), "")
        item.config.stash[BROKEN].append(f"{part.rstrip(']')}: {law.removeprefix('test_').replace('_', ' ')}: {why}")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints which laws are broken."""
    for line in config.stash[BROKEN]:
        terminalreporter.write_line(f"law broken by {line}", red=True)

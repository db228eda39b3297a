"""The layers point down, and heavy imports live in one home each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fedprune_cli

ROOT = Path(fedprune_cli.__file__).parent
LAYERS = (  # from the ground up: a part imports from lower rows only, never from its own row
    ("errors", "forked", "interrupt", "rng", "sections"),
    ("store",),
    ("wire",),
    ("world", "allocate", "learn"),
    ("execute", "meter", "serve", "track", "terminal"),
    ("config",),
    ("round",),
    ("runs",),
    ("report",),
    ("many", "audit", "bench"),
    ("commands",),
)
HEIGHT = {part: at for at, row in enumerate(LAYERS) for part in row}


def imported(path: Path) -> set[str]:
    """Returns the parts of fedprune_cli that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fedprune_cli":
            parts |= {alias.name for alias in node.names if alias.name in HEIGHT}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedprune_cli."):
            parts.add(str(node.module).split(".")[1])
    return parts


def test_imports_point_down() -> None:
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in ("__main__", "__init__"):
            upward = {other for other in imported(path) - {part} if HEIGHT[other] >= HEIGHT[part]}
            assert not upward, f"{path} imports from {upward}"


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'hydra', 'cvxpy', 'matplotlib', 'scipy', 'sklearn', 'omegaconf'}"
    code = (
        "import sys, fedprune_cli.commands.app; from typer.main import get_command; get_command(fedprune_cli.commands.app.app); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_allocator_needs_no_torch_and_the_world_no_cvxpy() -> None:
    for module, heavy in (
        ("allocate", "{'torch', 'cvxpy', 'hydra'}"),
        ("world.scenario", "{'torch', 'torchvision', 'cvxpy', 'sklearn'}"),
    ):
        code = f"import sys, fedprune_cli.{module}; print(sorted({heavy} & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]", module

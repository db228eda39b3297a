"""The layers point down, and heavy imports live in one home each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fedprune_cli

ROOT = Path(fedprune_cli.__file__).parent
BASE = {"errors", "files", "rng", "state"}
ALLOWED = {
    "errors": set(),
    "completion": set(),
    "files": {"errors"},
    "rng": set(),
    "state": {"errors"},
    "world": BASE,
    "allocate": BASE,
    "learn": BASE,
    "execute": {"errors"},
    "folder": {"errors", "files", "state"},
    "track": {"errors", "files", "folder"},
    "meter": BASE | {"world", "allocate", "learn"},
    "failsafe": BASE | {"world", "allocate", "learn"},
    "config": BASE | {"world", "allocate", "learn", "meter", "execute", "track", "failsafe"},
    "run": BASE | {"world", "allocate", "learn", "meter", "execute", "failsafe", "config", "folder", "track"},
    "page": {"folder", "figures"},
    "report": {"errors", "files", "folder", "figures", "page"},
    "figures": set(),
    "planning": BASE | {"world", "allocate", "learn", "meter", "config", "run"},
    "bench": BASE | {"world", "allocate", "learn", "config", "execute", "folder", "run"},
    "calibrate": BASE | {"learn", "config", "folder", "figures", "run"},
    "members": {"errors", "config", "execute", "report", "run"},
    "terminal": {"config", "run"},  # for type checkers only
    "runs": {"errors", "files", "folder", "page"},
    "watch": {"errors", "files", "folder", "page"},
    "sweep": {"errors", "config", "execute", "figures", "files", "folder", "page", "report", "run", "terminal"},
    "verify": BASE | {"failsafe", "allocate", "learn", "meter", "folder", "run"},
}


def imported(path: Path) -> set[str]:
    """Returns the parts of fedprune_cli that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fedprune_cli":
            parts |= {alias.name for alias in node.names if alias.name.islower()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedprune_cli."):
            parts.add(str(node.module).split(".")[1])
    return parts


def test_imports_point_down() -> None:
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in ("cli", "__main__", "__init__"):
            assert imported(path) <= ALLOWED[part] | {part}, path


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'hydra', 'cvxpy', 'matplotlib', 'scipy', 'sklearn', 'omegaconf'}"
    code = (
        "import sys, fedprune_cli.cli; from typer.main import get_command; get_command(fedprune_cli.cli.app); "
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

"""The layers point down, heavy imports live in one home each, and the code keeps the form that `make shape` prints."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fedprune_cli

ROOT = Path(fedprune_cli.__file__).parent
LAYERS = (  # from the ground up: a part imports from lower rows only, never from its own row
    ("errors", "forked", "interrupt", "processor", "rng", "sections"),
    ("store",),
    ("plugins", "wire"),
    ("privacy",),
    ("world", "allocate", "learn"),
    ("on_ray",),
    ("execute", "meter", "serve", "track", "terminal"),
    ("config",),
    ("round",),
    ("runs", "nodes"),
    ("report",),
    ("many", "audit", "bench", "take_home"),
    ("commands", "contracts", "templates", "api"),
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


def shape() -> ModuleType:
    """Returns the module that measures the code's form."""
    spec = importlib.util.spec_from_file_location("shape", ROOT.parent / ".ci" / "shape.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["shape"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


SHAPE = shape()
MODULES = SHAPE.read_modules(ROOT.parent)


def test_no_modules_import_each_other_in_a_ring() -> None:
    """Neither when they are loaded, nor within functions, nor for type checkers."""
    found = [one for module in MODULES.values() for one in SHAPE.imports(module, MODULES)]
    assert len(found) > len(MODULES)
    assert SHAPE.cycles([(one.source, one.target) for one in found]) == []


def test_no_class_overrides_a_concrete_method_of_another() -> None:
    assert not SHAPE.overrides(MODULES)


def test_few_functions_take_more_than_six_parameters() -> None:
    wide = {
        name
        for module in MODULES.values()
        if module.part != "commands"  # whose functions are the options of a command line
        for name, node, method in SHAPE.functions(module)
        if SHAPE.count_parameters(node, method=method) > SHAPE.PARAMETERS
    }
    assert not wide


def test_a_bad_form_is_seen(tmp_path: Path) -> None:
    """What these tests look for, in a package that has it."""
    package = tmp_path / "fedprune_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text(
        "class A:\n    def f(self, a, b, c, d, e, f, *, g): return 1\n    def g(self): ...\n"
        "def late():\n    from fedprune_cli.b import B\n    return B\n"
    )
    (package / "b.py").write_text(
        "from fedprune_cli.a import A\nclass B(A):\n    def f(self): return 2\n    def g(self): return 3\n"
    )
    modules = SHAPE.read_modules(tmp_path)
    assert SHAPE.overrides(modules) == ["B.f of A"]
    found = [(one.source, one.target) for module in modules.values() for one in SHAPE.imports(module, modules)]
    assert SHAPE.cycles(found) == [["a", "b"]]
    counts = {name: SHAPE.count_parameters(node, method=method) for name, node, method in SHAPE.functions(modules["a"])}
    assert counts == {"a.A.f": 7, "a.A.g": 0, "a.late": 0}


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = (
        "{'torch', 'numpy', 'hydra', 'cvxpy', 'matplotlib', 'scipy', 'sklearn', 'omegaconf', 'grpc', 'cryptography'}"
    )
    code = (
        "import sys, fedprune_cli.commands.app; from typer.main import get_command; get_command(fedprune_cli.commands.app.app); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_allocator_needs_no_torch_and_the_world_no_cvxpy() -> None:
    for module, heavy in (
        ("nodes.attend", "{'torch', 'hydra', 'omegaconf'}"),  # so that a node that starts again is heard at once
        ("allocate", "{'torch', 'cvxpy', 'hydra'}"),
        ("world.scenario", "{'torch', 'torchvision', 'cvxpy', 'sklearn'}"),
    ):
        code = f"import sys, fedprune_cli.{module}; print(sorted({heavy} & set(sys.modules)))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]", module


def test_a_run_imports_no_compiler() -> None:
    """PyTorch's own takes as long as everything else that a short run imports."""
    code = (
        "import sys; from fedprune_cli import api; api.run(api.compose('rounds=1', 'devices.count=2')); "
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'cvxpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

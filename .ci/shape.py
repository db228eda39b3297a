"""Prints the shape of fedprune_cli in one table, and fails where a limit is broken: python .ci/shape.py [FOLDER]

It reads the source with `ast` and imports nothing of it. FOLDER is another checkout, by default this one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "fedprune_cli"
LONGEST, PARAMETERS, MANY, ANYS, NARROWING, DEEPEST = 400, 6, 3, 15, 5, 4
Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True)
class Module:
    """A module: its dotted name within the package (`learn.prune`; `` for the package itself), its text as a tree, and its lines."""

    name: str
    is_package: bool
    tree: ast.Module
    lines: int

    @property
    def part(self) -> str:
        """Returns the top-level part that it belongs to."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Row:
    """A line of the table: a figure, its limit, None where there is none, and what it counts."""

    title: str
    figure: int
    limit: int | None
    found: Sequence[str] = ()
    text: str = ""  # in place of the figure

    @property
    def broken(self) -> bool:
        """Whether the figure is beyond its limit."""
        return self.limit is not None and self.figure > self.limit


def read_modules(root: Path) -> dict[str, Module]:
    """Returns the modules of the package in a checkout, by name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name, text = ".".join(parts[:-1] if is_package else parts), path.read_text()
        modules[name] = Module(name, is_package, ast.parse(text), text.count("\n"))
    return modules


# --- functions and classes ------------------------------------------------------------------------------------------


def functions(module: Module) -> Iterator[tuple[str, Function, bool]]:
    """Yields the functions of a module with their names, and whether each is a method; those within functions as well."""

    def walk(node: ast.AST, where: str, *, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{where}.{child.name}", child, in_class
            inner = (
                f"{where}.{child.name}" if isinstance(child, SCOPES) and not isinstance(child, ast.Lambda) else where
            )
            is_class = isinstance(child, ast.ClassDef) or (in_class and not isinstance(child, SCOPES))
            yield from walk(child, inner, in_class=is_class)

    yield from walk(module.tree, module.name or PACKAGE, in_class=False)


def decorators(node: Function | ast.ClassDef) -> list[str]:
    """Returns the decorators as they are written."""
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def is_decorated_command(node: Function) -> bool:
    """Whether a decorator such as `@app.command()` makes a function's parameters the options of a command."""
    return any(
        name.split("(")[0].split(".")[-1] in ("command", "callback") and "." in name for name in decorators(node)
    )


def registered_commands(module: Module) -> Iterator[str]:
    """Yields the functions that a module makes commands by a call, `app.command()(f)`, as `module.f` of where they are imported from.

    A name that a loop binds stands for every name in what the loop goes through.
    """
    homes = {
        alias.asname or alias.name: f"{(node.module or '').removeprefix(PACKAGE).removeprefix('.')}.{alias.name}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loops = {
        node.target.id: names_in(node.iter)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(module.tree):
        maker = node.func if isinstance(node, ast.Call) else None
        if isinstance(maker, ast.Call) and isinstance(maker.func, ast.Attribute) and maker.func.attr == "command":
            for name in [one for argument in node.args for one in names_in(argument)]:
                yield from (homes.get(one, f"{module.name}.{one}") for one in loops.get(name, [name]))


def names_in(node: ast.AST) -> list[str]:
    """Returns the names in an expression."""
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def count_parameters(node: Function, *, method: bool) -> int:
    """Returns how many parameters a call may give by name or position, self and cls apart."""
    of = node.args
    bound = method and "staticmethod" not in decorators(node)
    return len(of.posonlyargs) + len(of.args) + len(of.kwonlyargs) - bound


def depth(node: ast.AST) -> int:
    """Returns how many blocks are nested in a function's body, those of its inner functions apart; `elif` nests nothing."""

    def below(child: ast.AST, parent: ast.AST) -> int:
        if isinstance(child, SCOPES):
            return 0
        chained = isinstance(parent, ast.If) and isinstance(child, ast.If) and parent.orelse == [child]
        return depth(child) + (isinstance(child, BLOCKS) and not chained)

    return max((below(child, node) for child in ast.iter_child_nodes(node)), default=0)


def is_abstract(node: Function) -> bool:
    """Whether a method says what is wanted and does nothing: a decorator, or no body but a docstring, `...` or NotImplementedError."""
    if any(name.split(".")[-1] in ("abstractmethod", "overload") for name in decorators(node)):
        return True
    body = [
        statement
        for statement in node.body
        if not isinstance(statement, ast.Pass)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
    ]
    return not body or (
        len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])
    )


def overrides(modules: Mapping[str, Module]) -> list[str]:
    """Returns the methods that replace a concrete one of a base class of ours; classes are told apart by their names alone.

    `__init__` is how an object is made and nothing that it does: an exception may ask for more than the one that it is a kind of.
    """
    classes = {
        node.name: node
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }

    def methods(of: ast.ClassDef) -> dict[str, Function]:
        return {node.name: node for node in of.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}

    def ancestors(of: ast.ClassDef) -> Iterator[ast.ClassDef]:
        for base in of.bases:
            name = ast.unparse(base).split("[")[0].split(".")[-1]
            if name in classes and name != of.name:
                yield classes[name]
                yield from ancestors(classes[name])

    found = []
    for own in classes.values():
        for name in methods(own).keys() - {"__init__"}:
            first = next((base for base in ancestors(own) if name in methods(base)), None)
            if first is not None and not is_abstract(methods(first)[name]):
                found.append(f"{own.name}.{name} of {first.name}")
    return sorted(found)


# --- names and statements -------------------------------------------------------------------------------------------


def anys(module: Module) -> int:
    """Returns how often the module says `Any`."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(module.tree))


def narrows(node: ast.AST) -> bool:
    """Whether an assert only tells a type checker what a value is: `assert x`, `x is not None`, `isinstance(...)`, or several at once."""
    if isinstance(node, ast.Assert):
        return narrows(node.test)
    if isinstance(node, ast.BoolOp):
        return all(map(narrows, node.values))
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "isinstance"
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], ast.IsNot) and ast.unparse(node.comparators[0]) == "None"
    return isinstance(node, ast.Name | ast.Attribute | ast.Subscript)


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a string by itself."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def hidden_imports(module: Module) -> list[str]:
    """Returns the strings that name a module of the package, which no tool sees as an import."""
    docstrings = {id(node.value) for node in ast.walk(module.tree) if isinstance(node, ast.Expr) and is_docstring(node)}
    return [
        f"{module.name}:{node.lineno} {node.value!r}"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if node.value.startswith(f"{PACKAGE}.") and " " not in node.value
    ]


# --- imports --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """A module of ours that another one imports: at its top, or `late` within a function, or for type checkers only."""

    source: str
    target: str
    late: bool
    for_types: bool


def imports(module: Module, modules: Mapping[str, Module]) -> Iterator[Import]:
    """Yields what a module imports of the package."""

    def walk(node: ast.AST, *, late: bool, for_types: bool) -> Iterator[Import]:
        for target in targets(node):
            yield Import(module.name, target, late, for_types)
        guarded = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, SCOPES[:2])
            yield from walk(child, late=inside, for_types=for_types or child in guarded)

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [name for alias in node.names for name in ours(alias.name)]
        if not isinstance(node, ast.ImportFrom):
            return []
        base = node.module or ""
        if node.level:
            up = module.name.split(".")[: len(module.name.split(".")) - node.level + module.is_package]
            base = ".".join([PACKAGE, *filter(None, up), *filter(None, [base])])
        if base != PACKAGE and not base.startswith(f"{PACKAGE}."):
            return []
        names = [name for alias in node.names for name in ours(f"{base}.{alias.name}")]
        return names or ours(base)

    def ours(dotted: str) -> list[str]:
        name = dotted.removeprefix(PACKAGE).removeprefix(".")
        return [name] if (dotted == PACKAGE or dotted.startswith(f"{PACKAGE}.")) and name in modules else []

    yield from (found for found in walk(module.tree, late=False, for_types=False) if found.target != module.name)


def cycles(edges: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Returns the sets of modules that import each other in a ring, directly or by way of others."""
    onward: dict[str, set[str]] = {}
    for source, target in edges:
        onward.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [*onward.get(start, ())]
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += onward.get(name, ())
        return seen

    reach = {name: reached(name) for name in onward}
    rings = {
        frozenset(other for other in reach[name] if name in reach.get(other, ()))
        for name in onward
        if name in reach[name]
    }
    return sorted(sorted(ring) for ring in rings)


def read_layers(root: Path) -> tuple[tuple[str, ...], ...] | None:
    """Returns the literal LAYERS of a test, from the lowest up, each a tuple of parts of the package; None where no test has it."""
    for path in sorted((root / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            if any(isinstance(target, ast.Name) and target.id == "LAYERS" for target in targets):
                layers: tuple[tuple[str, ...], ...] = ast.literal_eval(node.value)  # type: ignore[union-attr, arg-type]
                return layers
    return None


def upward(found: Sequence[Import], modules: Mapping[str, Module], layers: Sequence[Sequence[str]]) -> list[str]:
    """Returns the imports that do not point down, and the parts that no layer names."""
    height = {part: at for at, layer in enumerate(layers) for part in layer}
    lost = sorted({module.part for module in modules.values()} - {*height, "", "__main__"})
    wrong = [
        f"{one.source} -> {one.target}{' (for types)' if one.for_types else ''}"
        for one in found
        if (a := modules[one.source].part) != (b := modules[one.target].part)
        if a in height and b in height and height[a] <= height[b]
    ]
    return [*(f"{part}: in no layer" for part in lost), *wrong]


# --- the table ------------------------------------------------------------------------------------------------------


def measure(root: Path) -> list[Row]:
    """Returns the rows of the table."""
    modules = read_modules(root)
    if not modules:
        raise SystemExit(f"error: {root}: no {PACKAGE}")
    by_length = sorted(modules.values(), key=lambda module: -module.lines)
    defined = [entry for module in modules.values() for entry in functions(module)]
    commands = {name for module in modules.values() for name in registered_commands(module)}
    wide = [
        (count, f"{name} {count}", name in commands or is_decorated_command(node))
        for name, node, method in defined
        if (count := count_parameters(node, method=method)) > PARAMETERS
    ]
    wide.sort(key=lambda entry: -entry[0])
    any_by = sorted(((anys(module), module.name) for module in modules.values()), reverse=True)
    asserts = [
        f"{module.name}:{node.lineno}"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert) and narrows(node)
    ]
    nested = sorted(((depth(node), name) for name, node, _ in defined), reverse=True)
    found = [one for module in modules.values() for one in imports(module, modules)]
    top = [(one.source, one.target) for one in found if not (one.late or one.for_types)]
    with_types = [(one.source, one.target) for one in found if not one.late]
    whole = [(one.source, one.target) for one in found]
    layers = read_layers(root)
    rings, typed, late = ([" - ".join(ring) for ring in cycles(edges)] for edges in (top, with_types, whole))
    hidden = [text for module in modules.values() for text in hidden_imports(module)]
    points_up = [] if layers is None else upward(found, modules, layers)
    return [
        Row("lines of the longest module", by_length[0].lines, LONGEST, [
            f"{module.name} {module.lines}" for module in by_length if module.lines > LONGEST]),
        Row(f"functions with over {PARAMETERS} parameters", sum(not command for _, _, command in wide), MANY, [
            text for _, text, command in wide if not command]),
        Row("  commands among them, not counted", sum(command for _, _, command in wide), None, [
            text for _, text, command in wide if command]),
        Row("Any", sum(count for count, _ in any_by), ANYS, [f"{name} {count}" for count, name in any_by if count]),
        Row("asserts that only narrow a type", len(asserts), NARROWING, asserts),
        Row("deepest nesting", nested[0][0], DEEPEST, [f"{name} {count}" for count, name in nested if count > DEEPEST]),
        Row("overridden concrete methods", len(found_overrides := overrides(modules)), 0, found_overrides),
        Row("import cycles", len(rings), 0, rings),
        Row("  with imports for types, not counted", len(typed), None, typed),
        Row("  with those within functions as well", len(late), None, late),
        Row("upward imports", len(points_up), 0, points_up, "no LAYERS yet" if layers is None else ""),
        Row("modules named by a string", len(hidden), None, hidden),
        Row("modules", len(modules), None, [], f"{len(modules)}, {sum(module.lines for module in by_length)} lines"),
    ]  # fmt: skip


def main() -> int:
    """Prints the table; returns the exit code."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    rows = measure(root)
    for row in rows:
        limit = "" if row.limit is None else f"<= {row.limit}"
        verdict = "BROKEN" if row.broken else ""
        print(f"{row.title:40}{row.text or row.figure!s:>8}  {limit:8}{verdict}".rstrip())
        for text in row.found:
            print(f"        {text}")
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

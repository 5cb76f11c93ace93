"""The product's source as the tidy tests read it: files, syntax trees (parsed once), imports, classes."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "supervisor" / "mlx_supervisor"
WORKER = ROOT / "worker" / "mlx_worker"
PRODUCT = (SUPERVISOR, WORKER)
FOLDERS = [*PRODUCT, *(ROOT / name for name in ("tests", "bench", "examples"))]


@cache
def files_of(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files
    return files


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file's syntax tree."""
    return list(ast.walk(tree(path)))


@cache
def imports(path: Path, root: Path) -> list[str]:
    """Every module that a file imports, anywhere in it, by its full dotted name (`from a import b` gives `a.b`)."""
    package = list(path.relative_to(root).parent.parts)
    found = []
    for node in (inner for each in tree(path).body if not is_main_block(each) for inner in ast.walk(each)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def is_main_block(node: ast.AST) -> bool:
    """`if __name__ == "__main__":` runs as a command, never as part of the program that imports it."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def top(module: str) -> str:
    return module.partition(".")[0]


def root_of(top_package: str) -> Path:
    """The folder that holds it."""
    return (SUPERVISOR if top_package == "mlx_supervisor" else WORKER).parent


def module_of(dotted: str, root: Path) -> list[str]:
    """The parts of the module that a dotted import means: `a.b.c` may be a module, or a name in `a.b`."""
    parts = dotted.split(".")
    while not root.joinpath(*parts).is_dir() and not root.joinpath(*parts).with_suffix(".py").is_file():
        parts.pop()
    return parts


def parts_of(path: Path, root: Path) -> list[str]:
    """The parts of a file's own module."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def edges(top_package: str) -> list[tuple[list[str], list[str]]]:
    """Every import of one module from another, of the same top package; both by their parts."""
    root = root_of(top_package)
    found = []
    for path in files_of(root / top_package):
        importer = parts_of(path, root)
        for dotted in imports(path, root):
            if top(dotted) == top_package:
                imported = module_of(dotted, root)
                if imported not in (importer, [top_package]):
                    found.append((importer, imported))
    return found


def classes(folder: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    for path in files_of(folder):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node


def methods(node: ast.ClassDef) -> int:
    return sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)

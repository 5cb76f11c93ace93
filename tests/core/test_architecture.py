"""Who may import whom: a core that touches the world can't be simulated, a daemon with MLX in it is a worker's size."""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "supervisor" / "mlx_supervisor"
WORKER = ROOT / "worker" / "mlx_worker"
FOLDERS = [SUPERVISOR, WORKER, *(ROOT / name for name in ("tests", "bench", "examples"))]

LAYERS = {
    "mlx_supervisor": [
        *("wire", "core", "core.diagnosis", "core.restart", "core.memory", "core.machine", "host", "journal", "logs"),
        *("state_dir", "settings", "process", "sampling", "telemetry", "control", "daemon", "cli", "cli.ctl"),
        "__main__",
    ],
    "mlx_worker": [
        *("errors", "task", "memory", "data", "supervision", "autopsy", "checkpoint", "tasks", "tasks.mlx_lm"),
        *("training", "__main__"),
    ],
}
"""Packages, lowest first. A package may import those before it and itself, never one after it."""

PURE = {
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "itertools", "math", "random", "re"),
    *("statistics", "types", "typing"),
}
"""What `core` may import of the standard library: nothing that can touch the world."""
FOUNDATION = {"wire", "core", "core.diagnosis", "core.machine", "core.memory", "core.restart", "state_dir"}
"""What every adapter may import; `daemon` and `cli` join the adapters."""
USES = {"process": {"host", "settings"}, "sampling": {"host"}, "host": set(), "settings": set()}
"""Besides: host and settings only read, so these build on them."""
ADAPTERS = {"journal", "logs", "telemetry", "control", *USES}
HEAVY = {"mlx", "mlx_lm", "numpy", "mlx_worker", "torch", "transformers"}
TERMINAL = {"rich", "typer"}
LINES_LIMIT = 600
MODULES_LIMIT = 12
METHODS_LIMIT = 20


def files_of(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.py"))
    assert files
    return files


def imports(path: Path, root: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full dotted name (`from a import b` gives `a.b`)."""
    package = list(path.relative_to(root).parent.parts)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_main_block(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_main_block(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":` runs as a command, never as part of the program that imports it."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def top(module: str) -> str:
    return module.partition(".")[0]


def module_of(dotted: str, root: Path) -> list[str]:
    """The parts of the module that a dotted import means: `a.b.c` may be a module, or a name in `a.b`."""
    parts = dotted.split(".")
    while not root.joinpath(*parts).is_dir() and not root.joinpath(*parts).with_suffix(".py").is_file():
        parts.pop()
    return parts


def package_of(parts: list[str], root: Path) -> str:
    """`core.machine` for mlx_supervisor/core/machine/table.py, `telemetry` for mlx_supervisor/telemetry.py."""
    inner = parts[1:] if root.joinpath(*parts).is_dir() or len(parts) == 2 else parts[1:-1]
    return ".".join(inner)


def edges(top_package: str) -> Iterator[tuple[list[str], list[str]]]:
    """Every import of one of our modules from another, of the same top package; both by their parts."""
    root = (SUPERVISOR if top_package == "mlx_supervisor" else WORKER).parent
    for path in files_of(root / top_package):
        importer = list(path.relative_to(root).with_suffix("").parts)
        if importer[-1] == "__init__":
            importer.pop()
        for dotted in imports(path, root):
            if top(dotted) == top_package:
                imported = module_of(dotted, root)
                if imported not in (importer, [top_package]):
                    yield importer, imported


def wrong_in_core(path: Path, root: Path) -> list[str]:
    return [
        module
        for module in imports(path, root)
        if not module.startswith("mlx_supervisor.core") and top(module) not in PURE
    ]


@pytest.mark.parametrize("top_package", LAYERS)
def test_imports_go_down(top_package: str) -> None:
    root = (SUPERVISOR if top_package == "mlx_supervisor" else WORKER).parent
    order = LAYERS[top_package]
    found = []
    for importer, imported in edges(top_package):
        if len(importer) > 1:
            lower, upper = package_of(imported, root), package_of(importer, root)
            if order.index(lower) > order.index(upper):
                found.append((".".join(importer), ".".join(imported)))
    assert found == []


@pytest.mark.parametrize("top_package", LAYERS)
def test_no_module_imports_itself_by_a_detour(top_package: str) -> None:
    imported_by: dict[str, set[str]] = {}
    for importer, imported in edges(top_package):
        imported_by.setdefault(".".join(importer), set()).add(".".join(imported))
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for each in sorted(imported_by.get(module, ())):
                visit(each, [*trail, module])
            done.add(module)

    for module in sorted(imported_by):
        visit(module, [])


@pytest.mark.parametrize("path", files_of(SUPERVISOR / "core"), ids=lambda path: path.name)
def test_core_cannot_touch_the_world(path: Path) -> None:
    assert wrong_in_core(path, SUPERVISOR.parent) == []


def test_adapters_do_not_import_each_other() -> None:
    found = set()
    for importer, imported in edges("mlx_supervisor"):
        package, other = package_of(importer, SUPERVISOR.parent), package_of(imported, SUPERVISOR.parent)
        if package in ADAPTERS and other not in {package} | FOUNDATION | USES.get(package, set()):
            found.add((".".join(importer), other))
    assert found == set()


def test_the_daemon_never_imports_mlx_or_the_worker() -> None:
    found = {
        (path.name, module)
        for path in files_of(SUPERVISOR)
        for module in imports(path, SUPERVISOR.parent)
        if top(module) in HEAVY
    }
    assert found == set()


def test_only_the_command_line_imports_rich_and_typer() -> None:
    found = {
        (path.name, module)
        for path in files_of(SUPERVISOR)
        for module in imports(path, SUPERVISOR.parent)
        if top(module) in TERMINAL and path.relative_to(SUPERVISOR).parts[0] != "cli"
    }
    assert found == set()


def test_the_worker_knows_only_the_wire() -> None:
    found = {
        (path.name, module)
        for path in files_of(WORKER)
        for module in imports(path, WORKER.parent)
        if top(module) == "mlx_supervisor" and module.split(".")[:2] != ["mlx_supervisor", "wire"]
    }
    assert found == set()


@pytest.mark.parametrize("package", ["mlx_supervisor", "mlx_worker"])
def test_only_declared_packages_are_imported(package: str) -> None:
    ours = {"mlx_supervisor", "mlx_worker"}
    declared = {"h11", "msgpack", "msgspec", "platformdirs", "psutil", "zmq", "structlog", "pynvml", *TERMINAL}
    if package == "mlx_worker":
        declared = {"mlx", "mlx_lm", "msgspec", "numpy", "psutil", "zmq", "tqdm"}
        declared |= {"huggingface_hub", "transformers", "yaml"}  # mlx-lm's own: they define its models and files
    folder = SUPERVISOR if package == "mlx_supervisor" else WORKER
    found = {top(module) for path in files_of(folder) for module in imports(path, folder.parent)}
    assert found - set(sys.stdlib_module_names) - ours - declared == set()


def test_no_pickle() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for folder in (SUPERVISOR, WORKER):
        for path in files_of(folder):
            assert not {top(module) for module in imports(path, folder.parent)} & unsafe, path


def test_every_file_can_be_read_in_one_sitting() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in FOLDERS
        for path in files_of(folder)
    }
    assert {name: length for name, length in lengths.items() if length >= LINES_LIMIT} == {}


def test_every_folder_can_be_taken_in_at_a_glance() -> None:
    """`__init__.py` says what a package is for; it is not counted."""
    modules = Counter(
        str(path.parent.relative_to(ROOT))
        for folder in FOLDERS
        for path in files_of(folder)
        if path.name != "__init__.py"
    )
    assert {folder: count for folder, count in modules.items() if count > MODULES_LIMIT} == {}


def classes(folder: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    for path in files_of(folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(ROOT)}: {node.name}", node


def methods(node: ast.ClassDef) -> int:
    return sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)


def test_no_class_has_too_many_methods() -> None:
    counts = {name: methods(node) for folder in (SUPERVISOR, WORKER) for name, node in classes(folder)}
    assert {name: count for name, count in counts.items() if count > METHODS_LIMIT} == {}


def test_no_class_of_the_core_inherits_methods_from_another() -> None:
    bearing = {node.name for _, node in classes(SUPERVISOR / "core") if methods(node)}
    bases = {name: {ast.unparse(base) for base in node.bases} for name, node in classes(SUPERVISOR / "core")}
    assert {name: found & bearing for name, found in bases.items() if found & bearing} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from os import path",
        "from mlx_supervisor import wire",
        "from .. import settings",
        "import structlog",
    ],
)
def test_the_check_of_the_core_sees_each_way_to_cheat(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mlx_supervisor" / "core" / "cheat.py"
    path.parent.mkdir(parents=True)
    path.write_text(f"def late():\n    {line}\n")
    assert len(wrong_in_core(path, tmp_path)) == 1
    path.write_text("from . import events\nfrom mlx_supervisor.core.policy import MIB\nimport math\n")
    assert wrong_in_core(path, tmp_path) == []

"""Allowed imports: a core that reads files can't be simulated, and a daemon with MLX would be as large as a worker."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.core.source import (
    FOLDERS,
    PRODUCT,
    ROOT,
    SUPERVISOR,
    WORKER,
    classes,
    edges,
    files_of,
    imports,
    methods,
    root_of,
    top,
)

LAYERS = {
    "mlx_supervisor": [
        *("wire", "core", "core.diagnosis", "core.restart", "core.memory", "core.machine", "host", "journal", "logs"),
        *("state_dir", "settings", "process", "sampling", "telemetry"),
        *(
            "control",
            "control.handlers",
            "control.transport",
            "daemon",
            "cli.request",
            "cli",
            "cli.ctl",
            "cli.offline",
            "cli.check",
            "cli.main",
            "__main__",
        ),
    ],
    "mlx_worker": [
        *(
            "errors",
            "words",
            "task",
            "memory",
            "data",
            "supervision",
            "autopsy",
            "checkpoint",
            "last_message",
            "extras",
        ),
        *("tasks", "tasks.mlx_lm", "training", "check", "export", "__main__"),
    ],
}
"""Packages, lowest first. A package may import those before it and itself, never one after it."""

PURE = {
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "itertools", "math", "random", "re"),
    *("statistics", "types", "typing"),
}
"""What `core` may import of the standard library: nothing with access to clocks, files or processes."""
FOUNDATION = {"wire", "core", "core.diagnosis", "core.machine", "core.memory", "core.restart", "state_dir"}
"""What every adapter may import; `daemon` and `cli` join the adapters."""
USES = {
    "process": {"host", "settings"},
    "sampling": {"host"},
    "host": set(),
    "settings": set(),
    "control.handlers": {"control"},
    "control.transport": {"control", "control.handlers"},
}
"""Besides: host and settings only read, so these build on them."""
ADAPTERS = {"journal", "logs", "telemetry", "control", *USES}
HEAVY = {"mlx", "mlx_lm", "numpy", "mlx_worker", "torch", "transformers"}
TERMINAL = {"rich", "typer"}
LINES_LIMIT = 600
MODULES_LIMIT = 12
METHODS_LIMIT = 20


def package_of(parts: list[str], root: Path) -> str:
    """`core.machine` for mlx_supervisor/core/machine/table.py, `telemetry` for mlx_supervisor/telemetry.py.

    `cli.main` stands alone: it joins the commands of the packages in `cli`.
    """
    if parts == ["mlx_supervisor", "cli", "main"]:
        return "cli.main"
    inner = parts[1:] if root.joinpath(*parts).is_dir() or len(parts) == 2 else parts[1:-1]
    return ".".join(inner)


def wrong_in_core(path: Path, root: Path) -> list[str]:
    return [
        module
        for module in imports(path, root)
        if not module.startswith("mlx_supervisor.core") and top(module) not in PURE
    ]


@pytest.mark.parametrize("top_package", LAYERS)
def test_imports_go_down(top_package: str) -> None:
    root = root_of(top_package)
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
    own = {"mlx_supervisor", "mlx_worker"}
    declared = {"h11", "msgpack", "msgspec", "platformdirs", "psutil", "zmq", "structlog", *TERMINAL}
    if package == "mlx_worker":
        declared = {"mlx", "mlx_lm", "msgspec", "numpy", "psutil", "zmq", "tqdm"}
        declared |= {"huggingface_hub", "transformers", "yaml"}  # mlx-lm's own: they define its models and files
    folder = SUPERVISOR if package == "mlx_supervisor" else WORKER
    found = {top(module) for path in files_of(folder) for module in imports(path, folder.parent)}
    assert found - set(sys.stdlib_module_names) - own - declared == set()


def test_no_pickle() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for folder in PRODUCT:
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


def test_no_class_has_too_many_methods() -> None:
    counts = {name: methods(node) for folder in PRODUCT for name, node in classes(folder)}
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
    honest = path.with_name("honest.py")
    honest.write_text("from . import events\nfrom mlx_supervisor.core.policy import MIB\nimport math\n")
    assert wrong_in_core(honest, tmp_path) == []

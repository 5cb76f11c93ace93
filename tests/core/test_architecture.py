"""Who may import whom: a core that touches the world can't be simulated, a daemon with MLX in it is a worker's size."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "supervisor" / "mlx_supervisor"
WORKER = ROOT / "worker" / "mlx_worker"

PURE = {
    *(
        "__future__",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "itertools",
        "math",
        "re",
        "statistics",
    ),
    *("types", "typing"),
}
HEAVY = {"mlx", "mlx_lm", "numpy", "mlx_worker", "torch", "transformers"}
TERMINAL = {"rich", "typer"}
LINES_LIMIT = 600

JOINERS = {"daemon", "supervised_run", "recovery", "ledger", "control_target", "cli", "__main__"}
"""They put adapters together; everything else beside the core is an adapter or a contract."""
CONTRACTS = {"core", "wire", "settings"}
"""What every adapter may import."""
READERS = {"control_group", "jetsam"}
"""Likewise: they read one thing of the operating system, and import nothing of ours."""
PARTS_OF = {
    "journal_file": "journal",
    "journal_writer": "journal",
    "settings_rules": "settings",
    "sizes": "settings",
    "tables": "settings",
    "darwin_memory": "sampler",
    "device_memory": "sampler",
    "footprint": "sampler",
    "machine_memory": "sampler",
    "lookout": "sampler",
    "processes": "sampler",
}
"""A noun that takes more than one file; its parts may import each other."""


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


def noun_of(path: Path) -> str:
    """`journal` for journal.py and journal_writer.py, `control` for everything in control/."""
    name = path.relative_to(SUPERVISOR).parts[0].removesuffix(".py")
    return PARTS_OF.get(name, name)


def noun_imported(module: str) -> str | None:
    """The noun of an import from our own package; None for any other, and for the package itself."""
    parts = module.split(".")
    if parts[0] != "mlx_supervisor" or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return PARTS_OF.get(parts[1], parts[1])


def wrong_in_core(path: Path, root: Path) -> list[str]:
    return [
        module
        for module in imports(path, root)
        if not module.startswith("mlx_supervisor.core") and top(module) not in PURE
    ]


def wrong_in_adapter(path: Path) -> list[str]:
    noun = noun_of(path)
    allowed = {None, noun, *([] if noun in READERS else CONTRACTS | READERS)}
    return [module for module in imports(path, SUPERVISOR.parent) if noun_imported(module) not in allowed]


@pytest.mark.parametrize("path", files_of(SUPERVISOR / "core"), ids=lambda path: path.name)
def test_core_cannot_touch_the_world(path: Path) -> None:
    assert wrong_in_core(path, SUPERVISOR.parent) == []


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
        if top(module) in TERMINAL and noun_of(path) != "cli"
    }
    assert found == set()


def test_the_worker_knows_only_the_wire() -> None:
    found = {
        (path.name, module)
        for path in files_of(WORKER)
        for module in imports(path, WORKER.parent)
        if top(module) == "mlx_supervisor"
        and module != "mlx_supervisor.wire"
        and not module.startswith("mlx_supervisor.wire.")
    }
    assert found == set()


def test_adapters_do_not_import_each_other() -> None:
    found = {
        (path.name, module)
        for path in files_of(SUPERVISOR)
        if noun_of(path) not in {*JOINERS, "core"}
        for module in wrong_in_adapter(path)
    }
    assert found == set()


def test_nothing_imports_those_who_join_but_themselves() -> None:
    found = {
        (path.name, module)
        for path in files_of(SUPERVISOR)
        if noun_of(path) not in JOINERS
        for module in imports(path, SUPERVISOR.parent)
        if noun_imported(module) in JOINERS
    }
    assert found == set()


@pytest.mark.parametrize("package", ["mlx_supervisor", "mlx_worker"])
def test_only_declared_packages_are_imported(package: str) -> None:
    ours = {"mlx_supervisor", "mlx_worker"}
    declared = {"h11", "msgspec", "platformdirs", "psutil", "zmq", "structlog", "pynvml", *TERMINAL}
    if package == "mlx_worker":
        declared = {"mlx", "mlx_lm", "msgspec", "numpy", "psutil", "zmq", "tqdm"}
        declared |= {
            "huggingface_hub",
            "transformers",
            "yaml",
        }  # mlx-lm's own, which decide what its models and files are
    folder = SUPERVISOR if package == "mlx_supervisor" else WORKER
    found = {top(module) for path in files_of(folder) for module in imports(path, folder.parent)}
    assert found - set(sys.stdlib_module_names) - ours - declared == set()


def test_no_pickle() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for folder in (SUPERVISOR, WORKER):
        for path in files_of(folder):
            assert not {top(module) for module in imports(path, folder.parent)} & unsafe, path


def test_every_file_can_be_read_in_one_sitting() -> None:
    folders = [SUPERVISOR, WORKER, *(ROOT / name for name in ("tests", "bench", "examples"))]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in files_of(folder)
    }
    assert {name: length for name, length in lengths.items() if length >= LINES_LIMIT} == {}


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

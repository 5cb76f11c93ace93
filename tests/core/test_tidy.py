"""The product has no unused parts: no module without an importer, no field without a reader."""

import ast
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import msgspec
import pytest
from tests.core.source import (
    PRODUCT,
    ROOT,
    SUPERVISOR,
    WORKER,
    files_of,
    imports,
    is_main_block,
    module_of,
    nodes,
    parts_of,
    top,
    tree,
)

from mlx_supervisor import wire
from mlx_supervisor.core import events
from mlx_supervisor.wire import job, messages


def commands() -> set[str]:
    """Modules that the project's scripts start."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    return {entry.partition(":")[0] for entry in scripts.values()}


def is_command(path: Path) -> bool:
    return path.name == "__main__.py" or any(map(is_main_block, tree(path).body))


def without_importer(folders: Iterable[Path]) -> set[str]:
    """Modules that are no commands and that no other module imports; a package counts by its modules."""
    roots = {folder.name: folder.parent for folder in folders}
    modules, imported = set(), commands()
    for root in roots.values():
        for path in files_of(root):
            name = ".".join(parts_of(path, root))
            if path.name != "__init__.py" and not is_command(path):
                modules.add(name)
            own = [each for each in imports(path, root) if top(each) in roots]
            imported |= {".".join(module_of(each, roots[top(each)])) for each in own} - {name}
    return modules - imported


def test_every_module_has_an_importer() -> None:
    assert without_importer(PRODUCT) == set()


def test_a_module_without_an_importer_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "package"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text("from package import used\n")
    (folder / "command.py").write_text('if __name__ == "__main__":\n    print()\n')
    (folder / "used.py").write_text("")
    (folder / "alone.py").write_text("import package.alone\n")
    assert without_importer([folder]) == {"package.alone"}


def reads(path: Path, constructors: set[str]) -> Iterator[str]:
    """Attributes that a file reads: no calls, and none that it only hands to one of these constructors."""
    calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
    no_reads: set[ast.AST] = {call.func for call in calls}
    for call in calls:
        if ast.unparse(call.func) in constructors:
            no_reads.update(ast.walk(call))
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in no_reads:
            yield node.attr
        elif isinstance(node, ast.MatchClass):
            yield from node.kwd_attrs


def fields_of(kind: type) -> set[str]:
    """The fields that a class defines itself; the decoder checks a literal of one value."""
    return {name for name, value in vars(kind).get("__annotations__", {}).items() if len(get_args(value)) != 1}


def kinds_of(module: ModuleType) -> list[type]:
    found = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    return [each for each in found if fields_of(each) and not each.__name__.startswith("_")]


def unread(kinds: Iterable[type], prefix: str, *readers: Path) -> set[str]:
    """The fields of these classes that no file in `readers` reads."""
    constructors = {name for kind in kinds for name in (kind.__name__, f"{prefix}.{kind.__name__}")}
    seen = {name for folder in readers for path in files_of(folder) for name in reads(path, constructors)}
    return {f"{kind.__name__}.{name}" for kind in kinds for name in fields_of(kind) - seen}


def test_every_field_of_an_event_has_a_reader() -> None:
    kinds = kinds_of(events)
    assert events.StepReport in kinds
    assert unread(kinds, "ev", SUPERVISOR) == set()


def test_every_field_of_a_frame_has_a_reader_on_the_other_side() -> None:
    to_worker = list(get_args(wire.SupervisorMessage))
    to_supervisor = [kind for kind in kinds_of(messages) if kind not in to_worker]
    assert wire.Step in to_supervisor
    assert unread(to_worker, "wire", WORKER) == set()
    events_take = {name for kind in kinds_of(events) for name in fields_of(kind)}  # by name, from the message
    unseen = unread(to_supervisor, "wire", SUPERVISOR, ROOT / "bench")  # the benchmarks measure by frames
    assert {each for each in unseen if each.partition(".")[2] not in events_take} == set()


def test_every_field_of_a_job_has_a_reader() -> None:
    kinds = kinds_of(job)
    assert wire.Job in kinds
    assert unread(kinds, "wire", WORKER) == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("print(event.size)", set()),
        ("match event:\n    case Kept(size=1):\n        pass", set()),
        ("Kept(size=event.size)", {"Kept.size"}),
        ("ev.Kept(max(event.size, 0))", {"Kept.size"}),
        ("other.Kept(event.size)", set()),
        ("event.size = 1", {"Kept.size"}),
        ("host.size()", {"Kept.size"}),
    ],
)
def test_what_counts_as_a_reader(tmp_path: Path, line: str, found: set[str]) -> None:
    class Kept(msgspec.Struct):
        size: int

    (tmp_path / "module.py").write_text(line + "\n")
    assert unread([Kept], "ev", tmp_path) == found

"""What the worker knows of mlx_lm and MLX without importing them, held against the installed packages."""

import inspect
import subprocess
import sys

import mlx.optimizers as optim
import pytest
import yaml
from mlx_lm import lora

from mlx_worker.tasks.mlx_lm import defaults, optimizing
from mlx_worker.tasks.mlx_lm.task import OPTIMIZER_CLASSES
from mlx_worker.tasks.mlx_lm.yaml_file import read_yaml

NUMBERS = [
    "1e-5",
    "1E5",
    "-1.5e+3",
    ".5",
    "1_000",
    "0x10",
    "010",
    "1:30",
    "1:30.5",
    ".inf",
    ".nan",
    "+1e4",
    "12",
    "1.",
    "e5",
]


def test_the_defaults_are_those_of_mlx_lm(monkeypatch):
    monkeypatch.delitem(sys.modules, "mlx_lm.lora")
    assert defaults.config_defaults() == lora.CONFIG_DEFAULTS
    assert "mlx_lm.lora" not in sys.modules, "read from the source, without the import"


def test_numbers_are_read_as_by_mlx_lm(tmp_path):
    path = tmp_path / "c.yaml"
    for text in NUMBERS:
        path.write_text(f"key: {text}\n")
        expected = yaml.load(path.read_text(), lora.yaml_loader)
        assert repr(read_yaml(path)) == repr(expected), text


@pytest.mark.parametrize("name", OPTIMIZER_CLASSES)
def test_the_options_of_optimizers(name):
    parameters = set(inspect.signature(OPTIMIZER_CLASSES[name]).parameters) - {"learning_rate"}
    assert set(optimizing.OPTIMIZER_OPTIONS[name]) == parameters
    kinds = {"pair": [0.5, 0.5], "number": 0.5, "boolean": False, "count": 2}
    OPTIMIZER_CLASSES[name](
        learning_rate=1e-3, **{key: kinds[kind] for key, kind in optimizing.OPTIMIZER_OPTIONS[name].items()}
    )


def test_the_arguments_of_schedules():
    found = {}
    for name, function in inspect.getmembers(optim.schedulers, inspect.isfunction):
        parameters = inspect.signature(function).parameters.values()
        required = sum(each.default is inspect.Parameter.empty for each in parameters)
        found[name] = (tuple(each.name for each in parameters), required)
    del found["join_schedules"]  # takes functions
    assert found == optimizing.SCHEDULES


def test_what_is_read_first_imports_no_mlx():
    """The time of a refusal depends on it."""
    code = "import sys, mlx_worker.training.inputs; print({'mlx', 'mlx_lm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

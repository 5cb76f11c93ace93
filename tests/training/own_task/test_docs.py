"""The examples in docs/python-task.md run, and resume with the same bits."""

import re
from pathlib import Path

import pytest
from tests.training.own_task import harness

from mlx_worker.checkpoint import rng_state

DOCS = Path(__file__).parents[3] / "docs" / "python-task.md"
CODE = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL))
BUILDERS = re.findall(r"^def (build\w*)\(", CODE, re.MULTILINE)


def build(name):
    namespace = {}
    exec(compile(CODE, DOCS.name, "exec"), namespace)
    rng_state.seed_generators(7)
    return namespace[name](hidden=16, seed=7)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_example_runs_and_resumes_with_the_same_bits(tmp_path, monkeypatch, name):
    batch = {"size": 32}
    harness.run(tmp_path / "whole", monkeypatch, build(name), steps=20, batch=batch)
    harness.run(tmp_path / "cut", monkeypatch, build(name), steps=17, batch=batch)
    resumed = harness.run(tmp_path / "cut", monkeypatch, build(name), steps=20, generation=2, batch=batch)
    assert [step.step for step in resumed.steps] == [18, 19, 20]
    assert harness.digests(tmp_path / "cut", 20) == harness.digests(tmp_path / "whole", 20)


def test_every_feature_has_an_example():
    assert len(BUILDERS) >= 8

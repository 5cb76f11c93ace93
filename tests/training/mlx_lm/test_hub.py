"""A hub that does not answer: the copy that was downloaded before is used; without one the job is refused."""

import pytest
from tests.training.mlx_lm import mlx_lm_runs

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm import task

Disconnected = type("RemoteProtocolError", (Exception,), {"__module__": "httpx"})


@pytest.fixture
def hub(monkeypatch):
    """Every load of a name fails as without a network."""
    load = task.load

    def failing(source, **options):
        if source == "org/name":
            raise Disconnected("Server disconnected\nwithout a response.")
        return load(source, **options)

    monkeypatch.setattr(task, "load", failing)


def config(llama_dir, tmp_path):
    return mlx_lm_runs.write(tmp_path, "lora", model="org/name", data=str(llama_dir / "chat"))


@pytest.mark.usefixtures("hub")
def test_without_a_downloaded_copy_the_job_is_refused(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "hf_repo_to_path", lambda _: 1 / 0)
    with pytest.raises(RefusedError, match=r"lora\.yaml: model: there is no folder .*, and the hub cannot be reached"):
        mlx_lm_runs.run_worker(llama_dir, config(llama_dir, tmp_path), tmp_path / "run")


@pytest.mark.usefixtures("hub")
def test_the_downloaded_copy_is_used(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "hf_repo_to_path", lambda _: llama_dir / "model")
    assert len(mlx_lm_runs.run_worker(llama_dir, config(llama_dir, tmp_path), tmp_path / "run").losses) == 6

"""`mlx-supervisor run lora.yaml`: from the command line to the adapters, with no settings file."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from tests.training.mlx_lm.mlx_lm_runs import run_worker, write

from mlx_supervisor.wire.owner import OWNER_FILE


@pytest.fixture
def project(llama_dir, tmp_path):
    """A folder with `lora.yaml`, whose model and data are elsewhere; its state folder is in it."""
    places = {"model": str(llama_dir / "model"), "data": str(llama_dir / "chat"), "adapter_path": "adapters"}
    write(tmp_path, "lora", iters=6, **places)
    return tmp_path


def start(project, *words):
    environment = os.environ | {"MLX_SUPERVISOR_STATE_DIR": str(project / "state")}
    command = [sys.executable, "-m", "mlx_supervisor", *words]
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def summary(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_the_file_alone_trains_with_its_own_seed(project, llama_dir):
    done = summary(start(project, "run", "lora.yaml", "--json"))
    assert (done["run"], done["step"], done["exported_to"]) == ("lora", 6, str(project / "adapters"))
    assert sorted(path.name for path in project.iterdir()) == ["adapters", "lora.yaml", "state"]
    adapters = (project / "adapters" / "adapters.safetensors").read_bytes()
    (project / "adapters" / OWNER_FILE).unlink()
    run_worker(llama_dir, project / "lora.yaml", project / "worker")  # with seed 7, as in the file
    assert (project / "adapters" / "adapters.safetensors").read_bytes() == adapters


@pytest.mark.long
def test_the_settings_that_init_writes_train_the_same(project):
    plain = summary(start(project, "run", "lora.yaml", "--json"))
    written = start(project, "init", "lora.yaml", "--adapter-path", "second", "--name", "again")
    assert written.wait(60) == 0
    again = summary(start(project, "run", "settings.toml", "--json"))
    assert again["weights_sha256"] == plain["weights_sha256"]
    # The file's seed decides both; another one trains other weights.
    other = summary(start(project, "train", "lora.yaml", "--seed", "8", "--adapter-path", "third", "--json"))
    assert other["weights_sha256"] != plain["weights_sha256"]
    assert json.loads((project / "third" / "adapter_config.json").read_text())["seed"] == 8


@pytest.mark.long
def test_the_printed_command_resumes_a_run_of_options(project):
    options = ["--config", "lora.yaml", "--iters", "400", "--adapter-path", "my adapters", "--memory-limit", "0.7"]
    whole = summary(start(project, "run", *options, "--name", "whole", "--json", "--state-dir", "state2"))
    (project / "my adapters" / OWNER_FILE).unlink()
    process = start(project, "run", *options)
    log = project / "state" / "runs" / "lora-my-adapters" / "logs" / "stdout.log"
    end_s = time.monotonic() + 60
    while not (log.exists() and "step" in log.read_text()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = [line for line in out.splitlines() if line.startswith("Resume with: ")]
    words = shlex.split(line.removeprefix("Resume with: "))
    resumed = summary(start(project, *words[1:], "--json"))
    assert [record["first_step"] == 1 for record in resumed["generations"]] == [True, False]
    assert resumed["weights_sha256"] == whole["weights_sha256"]

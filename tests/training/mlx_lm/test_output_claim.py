"""No run overwrites another run's adapters, and the options of mlx_lm.lora mean the same here."""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import get_args

import pytest
from tests.training import jobs

from mlx_supervisor import wire
from mlx_supervisor.cli.request.options import MLX_LM
from mlx_supervisor.wire.owner import BARE, OWNER_FILE
from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.config import load_config
from mlx_worker.tasks.output_claim import advice, check_output, claimed


def job(folder, file="a.yaml", run="run"):
    return jobs.job(run=run, settings_file=str(folder / file))


@pytest.fixture
def output(tmp_path):
    """A folder with the finished adapters of `run` of a.yaml."""
    folder = tmp_path / "adapters"
    with claimed(folder, job(tmp_path), "adapter_path"):
        os.utime(folder / OWNER_FILE, ns=(1, 1))  # the adapters are written later
        (folder / "adapters.safetensors").write_text("finished")
    return folder


def test_another_run_is_refused_with_both_named(tmp_path, output):
    for other in (job(tmp_path, "b.yaml"), job(tmp_path, run="other")):
        assert f"{output} holds the results of run 'run' of {tmp_path / 'a.yaml'}" in check_output(output, other)
        with pytest.raises(RefusedError, match=rf"adapter_path: {output} holds .* to overwrite them, add --fresh"):
            claimed(output, other, "adapter_path").__enter__()
    assert (output / "adapters.safetensors").read_text() == "finished"


def test_the_refusal_says_what_to_type(tmp_path, output):
    (tmp_path / "adapters-2").mkdir()
    (output / "previous").mkdir()
    keep, moves = "add --adapter-path adapters-3", f"to move the adapters to {output / 'previous-2'}, add --fresh"
    assert refusal(output, "b.yaml", {}).endswith(f"to keep them, {keep}; {moves}")
    toml = f"in {tmp_path / 'b.toml'}, or "
    assert f'add options = {{ adapter_path = "adapters-3" }} to [runs.run.task] {toml}' in refusal(output, "b.toml", {})
    given = {"iters": "b.toml: runs.run.task.options.iters"}
    assert f'set adapter_path = "adapters-3" in the options of [runs.run.task] {toml}' in refusal(
        output, "b.toml", given
    )
    python = jobs.job(run="run", settings_file=str(tmp_path / "b.toml"))
    refused = check_output(output, python)
    assert refused.endswith("to keep them, set Task.export_dir to another folder; to overwrite them, add --fresh")


def refusal(output, file, options_from):
    task = wire.TaskJob(
        kind="mlx_lm", base_dir=str(output.parent), config=None, entry=None, args={}, options_from=options_from
    )
    return check_output(output, jobs.job(run="run", settings_file=str(output.parent / file), task=task))


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_another_users_adapters_in_a_shared_folder_are_not_overwritten(tmp_path, output):
    output.chmod(0o777)
    for folder in (output, *output.parents):
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            os._exit("holds the results of run 'run'" not in check_output(output, job(tmp_path, "b.yaml")))
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_run_itself_may_write_again_and_keeps_its_claim(tmp_path, output):
    for _ in range(2):
        with claimed(output, job(tmp_path), "adapter_path"):
            assert check_output(output, job(tmp_path)) == ""
    assert check_output(output, job(tmp_path, "b.yaml")) != ""


def test_a_deleted_owner_file_gives_the_folder_free(tmp_path, output):
    (output / OWNER_FILE).unlink()
    with claimed(output, job(tmp_path, "b.yaml"), "adapter_path"):
        assert json.loads((output / OWNER_FILE).read_text())["settings_file"] == str(tmp_path / "b.yaml")


def test_a_run_that_delivered_nothing_holds_the_folder_only_while_it_runs(tmp_path):
    folder = tmp_path / "new" / "adapters"
    with claimed(folder, job(tmp_path), "adapter_path"):
        assert (
            f"in use by run 'run' of {tmp_path / 'a.yaml'} (its folder: /nowhere/runs/run), which is running"
            in check_output(folder, job(tmp_path, "b.yaml"))
        )
        with pytest.raises(RefusedError, match="in use by"):
            claimed(folder, job(tmp_path, "b.yaml"), "adapter_path").__enter__()
    assert check_output(folder, job(tmp_path, "b.yaml")) == ""


def test_a_copied_or_moved_project_is_another_run(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    with claimed(old / "adapters", job(old), "adapter_path"):
        os.utime(old / "adapters" / OWNER_FILE, ns=(1, 1))
        (old / "adapters" / "adapters.safetensors").write_text("finished")
    shutil.copytree(old, tmp_path / "copy")
    assert f"of {old / 'a.yaml'} (its" in check_output(tmp_path / "copy" / "adapters", job(tmp_path / "copy"))
    old.rename(new)
    assert f"of {old / 'a.yaml'}, which no longer exists (its" in check_output(new / "adapters", job(new))


def test_a_run_in_another_state_folder_is_another_run(tmp_path, output):
    for other in ("/elsewhere/runs/run", BARE):
        refused = check_output(output, again(tmp_path, results_of=other))
        assert f"run 'run' of {tmp_path / 'a.yaml'} (its folder: /nowhere/runs/run); to keep them" in refused
        assert refused.endswith(f"to move the adapters to {output / 'previous'}, add --fresh")
        assert check_output(output, again(tmp_path, results_of=other, fresh="1")) == ""


def test_a_moved_state_folder_keeps_its_results(tmp_path, output):
    (tmp_path / "state" / "runs" / "run" / "checkpoints" / "step-5").mkdir(parents=True)
    moved = again(tmp_path, results_of=str(tmp_path / "state" / "runs" / "run"))
    with claimed(output, moved, "adapter_path"):
        pass
    assert "state/runs/run); to keep them" in check_output(output, job(tmp_path))


def test_fresh_is_refused_while_the_other_run_is_running(tmp_path, output):
    with claimed(output, job(tmp_path), "adapter_path"):
        assert "which is running" in check_output(output, again(tmp_path, results_of="/else", fresh="1"))


def test_fresh_moves_the_former_adapters_once(tmp_path, output):
    (output / "0000050_adapters.safetensors").write_text("finished")
    (output / "notes.txt").write_text("the user's")
    with claimed(output, again(tmp_path, fresh="1"), "adapter_path"):
        assert (output / "adapters.safetensors").exists()  # a refusal before the first update changes nothing
    with claimed(output, again(tmp_path, fresh="1"), "adapter_path") as begin:
        assert begin() == [f"The former adapters in {output} were moved to {output / 'previous'}."]
        assert sorted(path.name for path in output.iterdir()) == [OWNER_FILE, "notes.txt", "previous"]
        (output / "adapters.safetensors").write_text("new")
    with claimed(output, again(tmp_path, fresh="1"), "adapter_path") as begin:  # the next generation
        assert begin() == []
    with claimed(output, again(tmp_path), "adapter_path") as begin:
        assert begin() == []
    kept = [output / "adapters.safetensors"]
    with claimed(output, again(tmp_path, fresh="2"), "adapter_path", kept) as begin:
        assert begin() == [f"The former adapters in {output} were moved to {output / 'previous-2'}."]
    found = [output / name / "adapters.safetensors" for name in ("previous", "previous-2", "")]
    assert [path.read_text() for path in found] == ["finished", "new", "new"]


def test_the_advice_says_what_fresh_overwrites(tmp_path, output):
    text = advice(output, again(tmp_path))
    assert f"--fresh moves the adapters in {output} to {output / 'previous'}" in text
    assert text.endswith("to keep them there, start another run: add --adapter-path adapters-2.")
    (output / "previous").mkdir()
    assert f"to {output / 'previous-2'}; " in advice(output, again(tmp_path))
    assert advice(tmp_path / "none", again(tmp_path)) == ""


def again(folder, **fields):
    """The job of `run` of a.yaml, of kind mlx_lm."""
    task = wire.TaskJob(kind="mlx_lm", base_dir=str(folder), config=None, entry=None, args={})
    return jobs.job(run="run", settings_file=str(folder / "a.yaml"), task=task, **fields)


def test_a_check_leaves_no_traces(tmp_path):
    assert check_output(tmp_path / "none", job(tmp_path)) == ""
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_mlx_lm_has_its_name_and_type():
    from mlx_lm.lora import build_parser

    theirs = {action.dest: action for action in build_parser()._actions if action.dest not in ("help", "config")}
    ours = {one.key: one for one in MLX_LM}
    assert set(ours) == set(theirs)
    for key, action in theirs.items():
        if isinstance(action, argparse._StoreTrueAction):
            assert ours[key].kind is bool
        elif action.choices:
            assert list(get_args(ours[key].kind)) == list(action.choices)
        elif key != "clear_cache_threshold":  # a size, which mlx_lm parses itself
            assert ours[key].kind is action.type


def test_options_override_the_file_or_replace_it(tmp_path):
    (tmp_path / "lora.yaml").write_text("iters: 5\nbatch_size: 2\n")
    both = load_config("lora.yaml", str(tmp_path), {"iters": 9}, {"iters": "--iters"})
    assert (both.values.iters, both.values.batch_size, both.given["iters"]) == (9, 2, 9)
    alone = load_config(None, str(tmp_path), {"model": "m", "iters": 3})
    assert (alone.values.iters, alone.values.model, alone.resolve("adapters")) == (3, "m", tmp_path / "adapters")


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ("lora.yaml", {"iters": 0}, r"^--iters: expected a whole number of at least 1, found 0"),
        ("lora.yaml", {"quantum": 1}, r"^--quantum: unknown key"),
        (None, {"grad_accumulation_steps": 2000}, r"^--iters: expected at least grad_accumulation_steps"),
        ("bad.yaml", {"iters": 5}, r"bad\.yaml: batch_size: expected"),
    ],
)
def test_an_error_names_the_option_or_the_file(tmp_path: Path, config, options, expected):
    (tmp_path / "lora.yaml").write_text("iters: 5\n")
    (tmp_path / "bad.yaml").write_text("iters: 5\nbatch_size: 0\n")
    with pytest.raises(RefusedError, match=expected):
        load_config(config, str(tmp_path), options, {key: f"--{key}" for key in options})


def test_a_default_is_named_where_it_would_be_set(tmp_path):
    options = {"model": "m", "grad_accumulation_steps": 5000}
    file = {key: f"/p/s.toml: runs.a.task.options.{key}" for key in options}
    with pytest.raises(RefusedError, match=r"^/p/s\.toml: runs\.a\.task\.options\.iters: "):
        load_config(None, str(tmp_path), options, file)

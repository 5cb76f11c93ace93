"""Every option of mlx_lm.lora's file works as in mlx_lm.lora, or is refused by name."""

import importlib.machinery
import json
import re
import shutil
import sys
import types
from pathlib import Path

import mlx.core as mx
import pytest
from tests.training.mlx_lm.mlx_lm_runs import adapters, run_worker, write

from mlx_worker.checkpoint import durable_files
from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm import task

DOCUMENT = Path(__file__).parents[3] / "docs" / "mlx-lm.md"
Disconnected = type("RemoteProtocolError", (Exception,), {"__module__": "httpx"})
SGD = {"optimizer": "sgd", "learning_rate": 0.03}


@pytest.fixture(autouse=True)
def _interpreted():
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_every_option_of_mlx_lm_is_known_and_documented():
    from mlx_lm import lora

    from mlx_worker.tasks.mlx_lm.config import OPTIONS

    options = {action.dest for action in lora.build_parser()._actions} - {"help"} | set(lora.CONFIG_DEFAULTS)
    assert options <= OPTIONS, "mlx_lm has an option that is neither supported nor refused"
    table = DOCUMENT.read_text().partition("\n## ")[0]
    documented = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))))
    assert documented == OPTIONS


def test_an_option_that_mlx_lm_gains_is_refused_by_name(tmp_path, monkeypatch):
    from mlx_lm.lora import CONFIG_DEFAULTS

    from mlx_worker.tasks.mlx_lm.config import load_config

    monkeypatch.setitem(CONFIG_DEFAULTS, "quantum_leap", False)
    load_config(str(write(tmp_path, "silent")), str(tmp_path))
    with pytest.raises(RefusedError, match=r"quantum_leap: this mlx_lm\.lora option is newer than mlx-supervisor"):
        load_config(str(write(tmp_path, "named", quantum_leap=True)), str(tmp_path))


def test_the_test_set_is_evaluated_at_the_end(llama_dir, tmp_path, capsys, monkeypatch):
    from mlx_lm import lora

    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text((llama_dir / "chat" / "train.jsonl").read_text())
    config = write(tmp_path, "worker", data=str(data), test=True, test_batches=-1, iters=2)
    run_worker(llama_dir, config, tmp_path / "run", batch={"size": 3, "effective": 4})
    found = re.findall(r"^Test loss .*", capsys.readouterr().out, re.MULTILINE)
    values = {"model": str(llama_dir / "model"), "data": str(data), "adapter_path": str(tmp_path / "adapters-worker")}
    values |= {"test": True, "test_batches": -1, "max_seq_length": 64, "mask_prompt": True}
    lora.run(types.SimpleNamespace(**lora.CONFIG_DEFAULTS | values))
    assert found == re.findall(r"Test loss .*", capsys.readouterr().out)
    (data / "test.jsonl").unlink()
    with pytest.raises(RefusedError, match=r"worker\.yaml: test: .* has no test\.jsonl"):
        run_worker(llama_dir, config, tmp_path / "run")


def test_adapters_are_saved_as_often_as_the_file_says(llama_dir, tmp_path, monkeypatch):
    from mlx_lm.lora import CONFIG_DEFAULTS

    monkeypatch.setitem(CONFIG_DEFAULTS, "save_every", 1)
    run_worker(llama_dir, write(tmp_path, "silent", iters=2), tmp_path / "silent")
    assert sorted(path.name for path in (tmp_path / "adapters-silent").glob("[!.]*")) == FINAL
    changes = SGD | {"iters": 12, "grad_accumulation_steps": 2, "save_every": 5}
    run_worker(llama_dir, write(tmp_path, "often", **changes), tmp_path / "often")
    folder = tmp_path / "adapters-often"
    numbered = [f"{iteration:07d}_adapters.safetensors" for iteration in (4, 8, 12)]
    assert sorted(path.name for path in folder.glob("[!.]*")) == numbered + FINAL
    run_worker(llama_dir, write(tmp_path, "short", **changes | {"iters": 4}), tmp_path / "short")
    early, expected = mx.load(str(folder / numbered[0])), adapters(tmp_path, "short")
    assert all(mx.array_equal(early[name], expected[name]).item() for name in expected)
    assert not mx.array_equal(mx.load(str(folder / numbered[1]))[name := next(iter(early))], early[name]).item()


FINAL = ["adapter_config.json", "adapters.safetensors"]


def test_adapters_that_cannot_be_saved_on_the_way_do_not_end_the_run(llama_dir, tmp_path, capsys, monkeypatch):
    from mlx_worker.tasks.mlx_lm import task

    real, calls = task.export, []

    def export(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("no space left")
        real(*arguments)

    monkeypatch.setattr(task, "export", export)
    run_worker(llama_dir, write(tmp_path, "full_disk", iters=2, save_every=1), tmp_path / "run")
    assert "cannot save the adapters of iteration 1" in capsys.readouterr().err
    assert (tmp_path / "adapters-full_disk" / "0000002_adapters.safetensors").exists()

    def full(files, source, target):
        if target.name.endswith("_adapters.safetensors"):
            raise OSError("no space left")
        source.replace(target)

    monkeypatch.setattr(durable_files.SharedFiles, "rename", full)
    run_worker(llama_dir, write(tmp_path, "half", iters=2, save_every=1), tmp_path / "half_run")
    names = sorted(path.name for path in (tmp_path / "adapters-half").glob("*adapters.*"))
    assert names == ["adapters.safetensors"], "half a copy takes room that the result needs"


def test_training_can_start_from_other_adapters(llama_dir, tmp_path):
    run_worker(llama_dir, write(tmp_path, "first", iters=4), tmp_path / "first")
    file = str(tmp_path / "adapters-first" / "adapters.safetensors")
    second = run_worker(llama_dir, write(tmp_path, "second", resume_adapter_file=file), tmp_path / "second")
    fresh = run_worker(llama_dir, write(tmp_path, "fresh"), tmp_path / "fresh")
    assert second.losses[0] < fresh.losses[0] - 0.5


def test_an_ignored_cache_threshold_is_reported(llama_dir, tmp_path):
    link = run_worker(llama_dir, write(tmp_path, "cache", clear_cache_threshold=1000, iters=1), tmp_path / "run")
    assert any("clear_cache_threshold is ignored" in note for note in link.notes)


@pytest.mark.parametrize(("policy", "clears"), [("adaptive", False), ("never", False), ("always", True)])
def test_an_evaluation_goes_by_the_memory_policy(llama_dir, tmp_path, monkeypatch, policy, clears):
    from mlx_lm.tuner import trainer

    thresholds = []
    monkeypatch.setattr(trainer, "_clear_cache", thresholds.append)
    config = write(tmp_path, "evaluated", iters=1, val_batches=2)
    run_worker(llama_dir, config, tmp_path / "run", memory={"policy": policy})
    assert thresholds
    assert all((threshold == 0) is clears for threshold in thresholds)


class Service(types.ModuleType):
    """A double of wandb or swanlab that records its calls and environment."""

    def __init__(self, name):
        super().__init__(name)
        self.inits, self.logs, self.fails_at = [], [], None

    def init(self, **options):
        import os

        if self.fails_at == "init":
            raise RuntimeError("no network")
        prefix = self.__name__.upper()
        self.inits.append(options | {name: os.environ.get(f"{prefix}_{name.upper()}") for name in ("run_id", "resume")})

    def log(self, values, step):
        if self.fails_at == step:
            raise RuntimeError("no network")
        self.logs.append((step, values))


@pytest.fixture
def services(monkeypatch):
    from mlx_lm.tuner import callbacks

    for name in ("WANDB", "SWANLAB"):
        for variable in ("RUN_ID", "RESUME"):
            monkeypatch.setenv(f"{name}_{variable}", "")  # so that it is restored
            monkeypatch.delenv(f"{name}_{variable}")
    found = {name: Service(name) for name in ("wandb", "swanlab")}
    for name, service in found.items():
        install(monkeypatch, name, service)
        monkeypatch.setattr(callbacks, name, service)
    return found


def install(monkeypatch, name, module):
    """Make a package importable."""
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)


def fresh_process(monkeypatch):
    for name in ("WANDB", "SWANLAB"):
        for variable in ("RUN_ID", "RESUME"):
            monkeypatch.delenv(f"{name}_{variable}", raising=False)


def test_reports_continue_under_the_same_id_after_a_restart(llama_dir, tmp_path, monkeypatch, services):
    changes = {"report_to": "wandb, swanlab", "project_name": "moon", "steps_per_report": 4, "iters": 8, "data": "text"}
    changes |= {"grad_accumulation_steps": 2, "val_batches": 2, "steps_per_eval": 4, "mask_prompt": False}
    config = write(tmp_path, "reported", **changes)
    whole = [run_worker(llama_dir, config, tmp_path / "run", steps=3)]
    fresh_process(monkeypatch)
    whole.append(run_worker(llama_dir, config, tmp_path / "run", generation=2))
    losses = [loss for link in whole for loss in link.losses]
    for name, service in services.items():
        first, second = service.inits
        assert first["run_id"] == second["run_id"] == json.loads((tmp_path / "run" / "reports.json").read_text())["id"]
        assert len(first["run_id"]) == 21, name
        assert (first["resume"], second["resume"]) == ("allow", "allow")
        assert (first["project"], first["config"]["iters"]) == ("moon", 8)
        trained = {step: values for step, values in service.logs if "train_loss" in values}
        # By updates: the second, then the third, which was the last for now, then the fourth.
        assert {step: values["train_loss"] for step, values in trained.items()} == pytest.approx(
            {4: sum(losses[:2]) / 2, 6: losses[2], 8: losses[3]}
        )
        assert trained[8]["trained_tokens"] == sum(step.tokens for link in whole for step in link.steps)
        assert {"learning_rate", "iterations_per_second", "tokens_per_second", "peak_memory"} < trained[8].keys()
        assert [step for step, values in service.logs if "val_loss" in values] == [0, 4, 6, 8]
    fresh_process(monkeypatch)
    run_worker(llama_dir, config, tmp_path / "other", steps=1)
    assert services["wandb"].inits[2]["run_id"] != services["wandb"].inits[0]["run_id"]


class EventFiles:
    """A double of tensorboardX; shows its files as TensorBoard does: from a session's start on, the later counts."""

    def __init__(self, monkeypatch):
        self.files, self.flushed, self.shown = [], 0, {}
        names = ("", ".event_file_writer", ".proto", ".proto.event_pb2", ".proto.summary_pb2")
        modules = {name: types.ModuleType(f"tensorboardX{name}") for name in names}
        for module in modules.values():
            install(monkeypatch, module.__name__, module)
        modules[".event_file_writer"].EventsWriter = self.open
        events, summaries = modules[".proto.event_pb2"], modules[".proto.summary_pb2"]
        events.Event = types.SimpleNamespace
        events.SessionLog = type("SessionLog", (types.SimpleNamespace,), {"START": 1})
        summaries.Summary = type("Summary", (types.SimpleNamespace,), {"Value": types.SimpleNamespace})

    def open(self, prefix, suffix):
        self.files.append(prefix)
        return types.SimpleNamespace(write_event=self.write, flush=self.flush)

    def write(self, event):
        if hasattr(event, "session_log"):
            self.shown = {(tag, step): value for (tag, step), value in self.shown.items() if step < event.step}
            return
        for value in event.summary.value:
            assert (value.tag, event.step) not in self.shown, "twice in one curve"
            self.shown[value.tag, event.step] = value.simple_value

    def flush(self):
        self.flushed += 1


def test_a_restart_continues_tensorboards_curve_without_duplicates(llama_dir, tmp_path, monkeypatch, services):
    package = EventFiles(monkeypatch)
    changes = {"report_to": "tensorboard, wandb", "steps_per_report": 2, "iters": 12, "grad_accumulation_steps": 2}
    changes |= {"val_batches": 2, "steps_per_eval": 4, "mask_prompt": False}
    config = write(tmp_path, "reported", **changes)
    checkpoints = {"checkpoint": {"every_steps": 2, "keep": 10}}
    run_worker(llama_dir, config, tmp_path / "run", steps=5, **checkpoints)
    before = dict(package.shown)
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:09d}")
    run_worker(llama_dir, config, tmp_path / "run", generation=2, **checkpoints)
    first, second = package.files
    identity = json.loads((tmp_path / "run" / "reports.json").read_text())["id"]
    assert first == second == str(tmp_path / "adapters-reported" / "tensorboard" / f"run-{identity[:6]}" / "events")
    assert sorted(step for name, step in package.shown if name == "train_loss") == [2, 4, 6, 8, 10, 12]
    assert sorted(step for name, step in package.shown if name == "val_loss") == [0, 4, 8, 12]
    assert before["train_loss", 4] == package.shown["train_loss", 4], "not reported again"
    assert before["train_loss", 6] == package.shown["train_loss", 6], "repeated, with the same bits"
    assert package.flushed == 1 + 5 + 4 + 1 + 4 + 2
    assert {step for step, values in services["wandb"].logs if "train_loss" in values} == {2, 4, 6, 8, 10, 12}


@pytest.mark.parametrize("fails_at", ["init", 1])
def test_a_service_that_fails_does_not_end_the_run(llama_dir, tmp_path, capsys, services, fails_at):
    services["wandb"].fails_at = fails_at
    link = run_worker(llama_dir, write(tmp_path, "reported", report_to="wandb", iters=3), tmp_path / "run")
    assert len(link.steps) == 3
    if fails_at == "init":
        assert (
            "report_to: wandb could not start; training continues without it: RuntimeError: no network" in link.notes[0]
        )
    else:
        text = "report_to: stopped reporting after a failure at iteration 1: RuntimeError: no network"
        assert text in capsys.readouterr().err
    assert services["wandb"].logs == []


@pytest.mark.parametrize("damaged", ["short", "../" * 7, 3])
def test_a_damaged_id_is_replaced(llama_dir, tmp_path, services, damaged):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reports.json").write_text(json.dumps({"id": damaged}))
    run_worker(llama_dir, write(tmp_path, "reported", report_to="wandb", iters=1), tmp_path / "run")
    assert re.fullmatch("[a-z0-9]{21}", services["wandb"].inits[0]["run_id"])


@pytest.mark.parametrize(
    ("report_to", "reason"),
    [
        ("wandb", r"report_to: the package wandb is not installed \(pip install wandb\)"),
        ("wandb,other", "report_to: allowed: wandb, swanlab, tensorboard; found 'other'"),
        (
            "tensorboard",
            r"report_to: tensorboard needs the package tensorboardX or tensorboard \(pip install tensorboardX\)",
        ),
    ],
)
def test_a_missing_or_unknown_service_is_refused(llama_dir, tmp_path, monkeypatch, report_to, reason):
    if "," in report_to:
        install(monkeypatch, "wandb", Service("wandb"))
    with pytest.raises(RefusedError, match=reason):
        run_worker(llama_dir, write(tmp_path, "reported", report_to=report_to), tmp_path / "run")


def rows(llama_dir, kind="text"):
    return [json.loads(line) for line in (llama_dir / kind / "train.jsonl").read_text().splitlines()]


@pytest.fixture
def hub(llama_dir, monkeypatch):
    """Stands for the package datasets."""
    module, exceptions = types.ModuleType("datasets"), types.ModuleType("datasets.exceptions")
    exceptions.DatasetNotFoundError = type("DatasetNotFoundError", (Exception,), {})
    module.exceptions, module.requests = exceptions, []
    module.subsets = {"train": rows(llama_dir), "valid": rows(llama_dir)[:8]}

    def load_dataset(path, split=None, **options):
        module.requests.append((path, split, options))
        if path == "no/such":
            raise exceptions.DatasetNotFoundError(path)
        return module.subsets if split is None else module.subsets["train"]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return module


def test_hub_data_trains_like_the_same_files(llama_dir, tmp_path, hub):
    common = {"mask_prompt": False, "iters": 3}
    local = run_worker(llama_dir, write(tmp_path, "local", data="text", **common), tmp_path / "local")
    named = run_worker(llama_dir, write(tmp_path, "named", data="some/words", **common), tmp_path / "named")
    listed = {"path": "some/words", "train_split": "train[:90%]", "config": {"name": "x"}}
    custom = run_worker(llama_dir, write(tmp_path, "custom", hf_dataset=listed, **common), tmp_path / "custom")
    assert local.losses == named.losses == custom.losses
    assert hub.requests[0] == ("some/words", None, {})
    assert hub.requests[1] == ("some/words", "train[:90%]", {"name": "x"})


def test_hub_data_that_changed_are_refused_at_resume(llama_dir, tmp_path, hub):
    config = write(tmp_path, "named", data="some/words", mask_prompt=False, iters=3)
    run_worker(llama_dir, config, tmp_path / "run", steps=1)
    hub.subsets["train"][5] = {"text": "another line of that very lengt"}
    with pytest.raises(RefusedError, match="The training data differ"):
        run_worker(llama_dir, config, tmp_path / "run", generation=2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "no/such"}, r"data: cannot load no/such: ValueError: Not found Hugging Face dataset: no/such"),
        ({"data": "./nowhere"}, r"data: no such folder: .*nowhere"),
        ({"data": "some/words", "test": True}, "test: some/words has no test samples"),
        ({"hf_dataset": {"path": "x", "text_feature": "body"}}, "hf_dataset: x has none of the columns that mlx_lm"),
    ],
)
def test_hub_data_that_cannot_be_used(llama_dir, tmp_path, hub, changes, reason):
    with pytest.raises(RefusedError, match=reason):
        run_worker(llama_dir, write(tmp_path, "wrong", mask_prompt=False, **changes), tmp_path / "run")


def test_a_row_of_hub_data_without_text_is_refused_by_its_number(llama_dir, tmp_path, hub):
    hub.subsets["train"][5] = {"text": None}
    config = write(tmp_path, "wrong", mask_prompt=False, data="some/words")
    with pytest.raises(RefusedError, match=r"some/words \(train\):6: expected text under 'text', found None"):
        run_worker(llama_dir, config, tmp_path / "run")


def test_adapters_of_another_shape_are_refused(llama_dir, tmp_path):
    run_worker(llama_dir, write(tmp_path, "first", iters=1), tmp_path / "first")
    file = str(tmp_path / "adapters-first" / "adapters.safetensors")
    other = {"rank": 8, "scale": 10.0, "dropout": 0.0}
    config = write(tmp_path, "second", resume_adapter_file=file, lora_parameters=other)
    with pytest.raises(RefusedError, match=r"resume_adapter_file: .*has the shape .*lora_parameters\.rank"):
        run_worker(llama_dir, config, tmp_path / "second")
    config = write(tmp_path, "third", resume_adapter_file=str(llama_dir / "other.safetensors"))
    mx.save_safetensors(str(llama_dir / "other.safetensors"), {"x": mx.zeros(3)})
    with pytest.raises(RefusedError, match=r"resume_adapter_file: none of the 1 arrays in .*; the first is x"):
        run_worker(llama_dir, config, tmp_path / "third")


def test_without_the_package_the_hub_is_refused_with_what_to_install(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RefusedError, match=r"no such folder: .*; hub datasets need the package datasets \(pip inst"):
        run_worker(llama_dir, write(tmp_path, "named", data="some/words"), tmp_path / "run")
    with pytest.raises(RefusedError, match="hf_dataset: hub datasets need the package datasets"):
        run_worker(llama_dir, write(tmp_path, "custom", hf_dataset={"path": "x"}), tmp_path / "run")


@pytest.fixture
def no_network(monkeypatch):
    """Every load of a name fails as without a network."""
    load = task.load

    def failing(source, **options):
        if source == "org/name":
            raise Disconnected("Server disconnected\nwithout a response.")
        return load(source, **options)

    monkeypatch.setattr(task, "load", failing)


def of_the_hub(llama_dir, tmp_path):
    return write(tmp_path, "lora", model="org/name", data=str(llama_dir / "chat"))


@pytest.mark.usefixtures("no_network")
def test_without_a_downloaded_copy_the_job_is_refused(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "hf_repo_to_path", lambda _: 1 / 0)
    with pytest.raises(RefusedError, match=r"lora\.yaml: model: there is no folder .*, and the hub cannot be reached"):
        run_worker(llama_dir, of_the_hub(llama_dir, tmp_path), tmp_path / "run")


@pytest.mark.usefixtures("no_network")
def test_the_downloaded_copy_is_used(llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "hf_repo_to_path", lambda _: llama_dir / "model")
    assert len(run_worker(llama_dir, of_the_hub(llama_dir, tmp_path), tmp_path / "run").losses) == 6

"""mlx_lm.lora's configuration files, unchanged: trained, resumed, exported, or refused with a reason."""

import signal

import mlx.core as mx
import pytest
import yaml
from tests.training import jobs
from tests.training.mlx_lm import mlx_lm_runs

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError

BASE = {
    "model": "model", "train": True, "data": "text", "batch_size": 4, "iters": 6, "num_layers": 2,
    "learning_rate": 1e-3, "steps_per_eval": 3, "val_batches": 2, "max_seq_length": 64,
    "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1},
}  # fmt: skip


def write_config(folder, name, **changes):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**BASE, "adapter_path": f"adapters-{name}", **changes}))
    return {"kind": "mlx_lm", "base_dir": str(folder), "config": f"{name}.yaml"}


def finish(worker):
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    return worker


def adapters(folder, name):
    return mx.load(str(folder / f"adapters-{name}" / "adapters.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_killed_and_resumed_is_bit_equal_and_mlx_lm_loads_the_result(supervisor, llama_dir, kind):
    data = {"lora": "text", "dora": "chat", "full": "completions"}[kind]
    schedule = {"name": "cosine_decay", "arguments": [1e-3, 6], "warmup": 2}
    changes = {"fine_tune_type": kind, "data": data, "mask_prompt": data != "text", "lr_schedule": schedule}
    changes |= {"optimizer": {"lora": "adamw", "dora": "adafactor", "full": "sgd"}[kind]}
    whole = supervisor.start(supervisor.job(task=write_config(llama_dir, "whole", **changes)))

    task = write_config(llama_dir, "killed", **changes)
    job = {"task": task, "checkpoint": {"every_seconds": 0, "every_steps": 2}}
    job |= {"drill": {"hang_at_step": 4, "generations": [1]}}
    first = supervisor.start(supervisor.job("killed", **job))
    first.until(wire.Step, lambda message: message.step == 3)
    first.until_saved(2)
    first.signal(signal.SIGKILL)
    first.wait()
    second = finish(supervisor.run(supervisor.job("killed", generation=2, **job)))
    assert second.ready.step == 2

    whole.wait()
    finish(whole)
    assert (whole.ready.batch_size, whole.ready.target_steps) == (4, 6)
    assert all(message.tokens > 0 for message in whole.steps)
    assert whole.stdout.count("validation loss") == 3, "before the first update, at 3, and at 6"
    assert second.bye.weights_sha256 == whole.bye.weights_sha256

    exported, expected = adapters(llama_dir, "killed"), adapters(llama_dir, "whole")
    assert exported.keys() == expected.keys()
    assert all(mx.array_equal(exported[name], expected[name]).item() for name in expected)
    from mlx_lm.utils import load

    model, _ = load(str(llama_dir / "model"), adapter_path=str(llama_dir / "adapters-killed"))
    loaded = dict(_flat(model.parameters()))
    assert all(mx.array_equal(loaded[name], exported[name]).item() for name in exported)


def _flat(tree):
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


@pytest.fixture
def interpreted():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("interpreted")
def test_losses_and_validation_do_not_depend_on_the_micro_batch(llama_dir, tmp_path):
    config = mlx_lm_runs.write(tmp_path, "all", batch_size=24, iters=3, val_batches=1)
    whole = mlx_lm_runs.run_worker(llama_dir, config, tmp_path / "whole")
    halved = mlx_lm_runs.run_worker(llama_dir, config, tmp_path / "halved", batch={"size": 5, "effective": 24})
    assert [step.accumulation for step in halved.steps] == [5, 5, 5]
    assert halved.losses == pytest.approx(whole.losses, abs=1e-5)
    assert [step.tokens for step in halved.steps] == [step.tokens for step in whole.steps]
    validations = [[text for text in link.details if text.startswith("validation")] for link in (whole, halved)]
    assert len(validations[0]) == 2
    assert validations[0] == validations[1]


def test_accumulation_of_the_file_is_the_effective_batch(supervisor, llama_dir):
    task = write_config(llama_dir, "accumulated", grad_accumulation_steps=3, iters=6, steps_per_eval=100)
    worker = finish(supervisor.run(supervisor.job(task=task)))
    assert [(message.accumulation, message.samples) for message in worker.steps] == [(3, 12), (3, 12)]
    assert (worker.ready.batch_size, worker.ready.effective_batch, worker.ready.target_steps) == (4, 12, 2)


@pytest.mark.usefixtures("interpreted")
def test_other_data_or_adapters_are_refused_at_resume(llama_dir, tmp_path):
    mlx_lm_runs.run_worker(llama_dir, mlx_lm_runs.write(tmp_path, "data", iters=1), tmp_path / "run")
    changes = {"data": "text", "mask_prompt": False, "fine_tune_type": "dora"}
    changes |= {"lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.1}}
    with pytest.raises(RefusedError) as caught:
        mlx_lm_runs.run_worker(
            llama_dir, mlx_lm_runs.write(tmp_path, "data", **changes), tmp_path / "run", generation=2
        )
    for name in ("The training data differ", "lora_parameters", "fine_tune_type differs", "mask_prompt differs"):
        assert name in str(caught.value)


def load_text(folder, text):
    from mlx_worker.tasks.mlx_lm.config import load_config

    (folder / "c.yaml").write_text(text)
    return load_config("c.yaml", str(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty; it needs at least model: path/to/model and data"),
        ("a: [", "c.yaml:1: invalid YAML"),
        ("learning_rte: 1e-5", "learning_rte: unknown key; did you mean learning_rate?"),
        ("config: other.yaml", "config: not supported: a configuration file cannot include another"),
        ("report_to: 3", "report_to: expected text, found 3"),
        ("hf_dataset: [{name: x}]", "hf_dataset: expected a mapping with a path, or a list of them"),
        ("train: false", "train: must be true, found false"),
        ("batch_size: 0", "batch_size: expected a whole number of at least 1, found 0"),
        ("batch_size: true", "batch_size: expected a whole number of at least 1, found True"),
        ("iters: many", "iters: expected a whole number of at least 1, found 'many'"),
        ("learning_rate: [1]", "learning_rate: expected a number of at least 0, found [1]"),
        ("mask_prompt: 1", "mask_prompt: expected true or false, found 1"),
        ("model: 3", "model: expected text, found 3"),
        ("fine_tune_type: qlora", "fine_tune_type: allowed: lora, dora, full; found 'qlora'"),
        ("optimizer: lion", "optimizer: allowed: adam, adamw, muon, sgd, adafactor; found 'lion'"),
        ("lora_parameters: {rank: 8, alpha: 16, dropout: 0.0}", "lora_parameters.alpha: unknown key; use scale"),
        ("lora_parameters: {rank: 0, scale: 1.0, dropout: 0.0}", "lora_parameters.rank: expected a whole number of"),
        ("lora_parameters: {rank: 8, scale: 1.0, dropout: 1.0}", "lora_parameters.dropout: expected a number of"),
        ("lr_schedule: {name: cosine_decay}", "lr_schedule: expected the keys name and arguments"),
        ("iters: 2\ngrad_accumulation_steps: 3", "iters: expected at least grad_accumulation_steps (3), found 2"),
    ],
)
def test_wrong_configuration(tmp_path, text, expected):
    with pytest.raises(RefusedError) as caught:
        load_text(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "c.yaml"))
    assert expected in str(caught.value)


def test_a_configuration_without_a_file(tmp_path):
    from mlx_worker.tasks.mlx_lm.config import load_config

    with pytest.raises(RefusedError, match=r"task\.config: cannot read .*none\.yaml"):
        load_config("none.yaml", str(tmp_path))
    with pytest.raises(RefusedError, match=r"task\.config is missing"):
        load_config(None, str(tmp_path))


def test_harmless_keys_are_accepted(tmp_path):
    config = load_text(tmp_path, "test: false\nreport_to: null\nsave_every: 7\nlearning_rate: 2e-5")
    assert config.values.learning_rate == 2e-5, "mlx_lm's notation for floats"
    assert config.values.num_layers == 16, "mlx_lm's own defaults"


class Tokenizer:
    """Splits at blanks; knows no chat template."""

    eos_token_id = 0

    def encode(self, text):
        return [len(word) for word in text.split()]

    def apply_chat_template(self, *_arguments, **_options):
        raise ValueError("no chat template")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "train.jsonl: the file is empty"),
        (b'{"text": "a b"}\n\n{"text": "c"}\n', "train.jsonl:2: expected a JSON object, found an empty line"),
        (b'{"text": "a b"}\n{"text": "c\n', "train.jsonl:2: invalid JSON"),
        (b'{"text": "a b"}\n["c"]\n', "train.jsonl:2: expected a JSON object, found list"),
        (b'{"text": "a b"}\n{"txt": "c"}\n', "train.jsonl:2: expected text under 'text', found keys txt"),
        (b'{"text": "a b"}\n{"text": 3}\n', "train.jsonl:2: expected text under 'text', found 3"),
        (b'{"text": "a b"}\n{"text": "  "}\n', "train.jsonl:2: expected text under 'text', found only white space"),
        (b'{"texts": "a b"}\n', "train.jsonl:1: no known key; allowed are 'text', 'messages', or 'prompt' and"),
        (b'{"messages": []}\n', "train.jsonl:1: expected a list of messages under 'messages', found []"),
        (b'{"messages": ["x"]}\n', "train.jsonl:1: every message under 'messages' must be an object with a role"),
        (b'{"prompt": "a", "completion": null}\n', "train.jsonl:1: expected text under 'completion', found None"),
        (b'{"prompt": "a", "completion": "b"}\n', "train.jsonl:1: cannot tokenize this line: ValueError: no chat"),
        (b'{"text": "\xff"}\n', "train.jsonl:1: invalid JSON"),
    ],
)
def test_wrong_data(tmp_path, content, expected):
    from mlx_worker.tasks.mlx_lm.data import load

    (tmp_path / "train.jsonl").write_bytes(content)
    config = load_text(tmp_path, "model: m")
    with pytest.raises(RefusedError) as caught:
        load(tmp_path, "train", Tokenizer(), config)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_masking_plain_text_is_refused(tmp_path):
    from mlx_worker.tasks.mlx_lm.data import load

    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(RefusedError, match="mask_prompt needs prompts or messages"):
        load(tmp_path, "train", Tokenizer(), load_text(tmp_path, "mask_prompt: true"))


def test_sequences_are_cut_and_a_missing_subset_is_no_error(tmp_path):
    from mlx_worker.tasks.mlx_lm.data import load

    (tmp_path / "train.jsonl").write_text('{"text": "a b c d e f"}\n')
    config = load_text(tmp_path, "max_seq_length: 4")
    samples, digest = load(tmp_path, "train", Tokenizer(), config)
    assert (len(samples), len(samples[0][0]), len(digest)) == (1, 4, 64)
    assert load(tmp_path, "valid", Tokenizer(), config) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", "empty has no config.json"),
        ("bare", "bare has no model*.safetensors"),
        ("c.yaml", "expected a folder with config.json and model*.safetensors, found the file"),
        ("./nowhere", "no such folder"),
    ],
)
def test_not_a_model_folder(tmp_path, name, expected):
    from mlx_worker.tasks.mlx_lm.task import build

    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    load_text(tmp_path, f"model: {name}")
    job = jobs.job(run_dir=str(tmp_path), task={"kind": "mlx_lm", "base_dir": str(tmp_path), "config": "c.yaml"})
    with pytest.raises(RefusedError) as caught:
        build(job)
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}: model: ")
    assert expected in str(caught.value)


def test_refusals_reach_the_supervisor(supervisor, llama_dir):
    worker = supervisor.run(supervisor.job(task=write_config(llama_dir, "deep", num_layers=9)))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert worker.bye.reason.endswith("deep.yaml: num_layers: expected at most the model's 2 layers, found 9")
    assert worker.stderr.splitlines()[-1] == f"refused: {worker.bye.reason}"


class TestCounts:
    """What is cut, or teaches nothing, is counted before the first update."""

    LINES = (
        '{"text": "a b c d e f g"}\n{"text": "a b"}\n{"text": "' + "a " * 60 + '"}\n',
        '{"messages": [{"role": "user", "content": ""}, {"role": "user", "content": " "}]}\n'
        '{"messages": [{"role": "user", "content": "a b"}]}\n',
    )

    class Chat(Tokenizer):
        """The template's tokens are the words of the messages, plus one for each message."""

        def apply_chat_template(self, messages, **_options):
            return [7 for message in messages for _ in ("role", *message["content"].split())]

    def loaded(self, folder, content, text, tokenizer):
        from mlx_worker.tasks.mlx_lm.data import load_all

        (folder / "train.jsonl").write_text(content)
        config = load_text(folder, f"data: {folder}\n{text}")
        return load_all(config, tokenizer), config

    def test_samples_over_the_limit(self, tmp_path):
        from mlx_worker.tasks.mlx_lm.data import DataCounts, count_notes

        data, config = self.loaded(tmp_path, self.LINES[0], "max_seq_length: 4", Tokenizer())
        # With the end of sequence, 8, 3 and 61 tokens.
        assert data.train.count() == DataCounts(3, 3, 2, 4 + 57, 0, 0)
        assert data.train.count(everything=True) == DataCounts(3, 3, 2, 61, 0, 0, longest=61, tokens=4 + 3 + 4)
        expected = "c.yaml: 2 of 3 training samples are longer than max_seq_length = 4: they lose 61 tokens"
        assert count_notes(data, config) == [expected]

    def test_samples_that_teach_nothing(self, tmp_path):
        from mlx_worker.tasks.mlx_lm.data import count_notes

        masked = "max_seq_length: 64\nmask_prompt: true"
        long = '{"prompt": "' + "a " * 90 + '", "completion": "b"}\n'
        data, config = self.loaded(
            tmp_path,
            long + '{"prompt": "a", "completion": "b"}\n',
            "max_seq_length: 64\nmask_prompt: true",
            self.Chat(),
        )
        notes = count_notes(data, config)
        assert "1 of 2 training samples teaches nothing: with mask_prompt, the prompt alone fills" in notes[1]
        data, config = self.loaded(tmp_path, long, masked, self.Chat())
        with pytest.raises(RefusedError, match=r"train\.jsonl: with mask_prompt, no sample has anything to learn"):
            count_notes(data, config)

    def test_messages_without_content(self, tmp_path):
        from mlx_worker.tasks.mlx_lm.data import count_notes

        data, config = self.loaded(tmp_path, self.LINES[1] + self.LINES[1], "", self.Chat())
        assert count_notes(data, config) == ["2 of 4 training samples have no content in any message"]

    def test_a_short_sample_is_found_before_the_first_update(self, tmp_path):
        from mlx_worker.tasks.mlx_lm.data import count_notes

        class Bare(Tokenizer):
            eos_token_id = 1  # also the last token of "a": nothing is appended

        data, config = self.loaded(tmp_path, '{"text": "a b c d"}\n{"text": "bb a"}\n{"text": "a"}\n', "", Bare())
        with pytest.raises(RefusedError, match=r"train\.jsonl:3: expected at least 2 tokens, found 1"):
            count_notes(data, config)

    def test_a_conversation_that_the_template_refuses_is_found_before_the_first_update(self, tmp_path):
        from mlx_worker.tasks.mlx_lm.data import count_notes

        class Strict(self.Chat):
            def apply_chat_template(self, messages, **options):
                if messages[0]["role"] != "user":
                    raise ValueError("Conversation roles must alternate")
                return super().apply_chat_template(messages, **options)

        good = '{"messages": [{"role": "user", "content": "some words that are longer than that"}]}\n'
        data, config = self.loaded(tmp_path, good + good.replace("user", "assistant"), "", Strict())
        with pytest.raises(RefusedError, match=r"train\.jsonl:2: cannot tokenize this line: ValueError: Conversation"):
            count_notes(data, config)

    def test_counting_ends_in_time(self, tmp_path):
        data, _ = self.loaded(tmp_path, self.LINES[0], "max_seq_length: 4", Tokenizer())
        counts = data.train.count(limit_s=-1)
        assert (counts.samples, counts.checked) == (3, 0)

"""Mistakes that users make, one a row, each with the words that its refusal must have.

Each starts from a project that trains: `settings.toml`, `lora.yaml`, `model/` (a tiny Llama) and `data/train.jsonl`
with eight lines.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SETTINGS = """\
state_dir = "state"
[runs.run]
[runs.run.task]
kind = "mlx_lm"
config = "lora.yaml"
"""
YAML = {
    "model": "model", "data": "data", "iters": "4", "batch_size": "2", "num_layers": "2", "max_seq_length": "64",
    "val_batches": "0", "adapter_path": "adapters",
}  # fmt: skip
LINES = "".join(json.dumps({"text": f"line {i} of some words"}) + "\n" for i in range(8))
CHAT = '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}\n'
TASK = """\
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_worker.task import Task


def build(width=4, **changes):
    model = nn.Linear(width, 2)
    values = {
        "model": model,
        "optimizer": optim.SGD(learning_rate=0.1),
        "loss": lambda model, x: model(x).square().mean(),
        "dataset": range(8),
        "collate": lambda ids: (mx.ones((len(ids), width)),),
    }
    return Task(**values | changes)
"""

Content = str | bytes | Callable[[bytes], bytes] | None
"""A file's new content, or a change of it; None: no file."""


@dataclass(frozen=True)
class Case:
    """`files`: contents that replace the project's; None removes one, a function changes its bytes.

    `arguments` follow `mlx-supervisor run`. `trains`: the mistake shows at the first update.
    """

    name: str
    words: tuple[str, ...]
    files: dict[str, Content] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("settings.toml",)
    trains: bool = False


def make(folder: Path, model: Path, case: Case) -> None:
    """Write the project of a case."""
    (folder / "data").mkdir(parents=True)
    (folder / "settings.toml").write_text(SETTINGS)
    (folder / "lora.yaml").write_text(yaml())
    (folder / "data" / "train.jsonl").write_text(LINES)
    (folder / "model").mkdir()
    for file in model.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    for name, content in case.files.items():
        path = folder / name
        if callable(content):
            content = content(path.read_bytes())
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def yaml(**changes: str | None) -> str:
    """The configuration with other values, as YAML writes them; None leaves a key out."""
    return "".join(f"{key}: {value}\n" for key, value in (YAML | changes).items() if value is not None)


def settings(name: str, text: str, *words: str) -> Case:
    """A mistake in the settings file."""
    return Case(name, ("settings.toml", *words), {"settings.toml": text})


def config(name: str, text: str, *words: str) -> Case:
    """A mistake in the configuration file, given whole."""
    return Case(name, ("lora.yaml", *words), {"lora.yaml": text})


def key(name: str, words: tuple[str, ...] | str, **changes: str | None) -> Case:
    """A mistake in keys of the configuration file."""
    return config(name, yaml(**changes), *((words,) if isinstance(words, str) else words))


def model(name: str, words: tuple[str, ...] | str, **files: Content) -> Case:
    """A mistake in files of the model's folder; in their names `__` stands for the dot."""
    changes = {f"model/{file.replace('__', '.')}": content for file, content in files.items()}
    return Case(name, ("lora.yaml: model: ", *((words,) if isinstance(words, str) else words)), changes)


def data(name: str, content: str | bytes | None, *words: str, **changes: str | None) -> Case:
    """A mistake in the training data."""
    return Case(name, words, {"data/train.jsonl": content, "lora.yaml": yaml(**changes)})


def python(name: str, source: str | None, *words: str, entry: str = "mine:build", lines: str = "") -> Case:
    """A mistake in a python task: `source` follows the correct task of `mine.py`; None: no file."""
    text = 'state_dir = "state"\n[runs.run]\nsteps = 2\n[runs.run.batch]\nsize = 2\n[runs.run.task]\nkind = "python"\n'
    text += f'entry = "{entry}"\n{lines}'
    files: dict[str, str | bytes | Callable[[bytes], bytes] | None] = {"settings.toml": text}
    if source is not None:
        files["mine.py"] = TASK + source
    return Case(name, words, files)


def header(shape: list[int]) -> bytes:
    """A safetensors file that promises a tensor of this shape and has none of it."""
    size = 4 * shape[0] * shape[1]
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text


def without(key_: str) -> Callable[[bytes], bytes]:
    """Removes a key of a JSON file."""
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != key_}).encode()


def changed(**changes: object) -> Callable[[bytes], bytes]:
    """Changes keys of a JSON file."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


RUN = "[runs.run.task]\nkind = 'mlx_lm'\nconfig = 'lora.yaml'\n"
CASES = [
    # ---- the command line
    Case("no such settings file", ("none.toml: no such file",), arguments=("none.toml",)),
    Case("no such run", ("settings.toml: runs: no run 'other'; allowed: run",), arguments=("settings.toml", "other")),
    Case("a folder as settings file", ("data: this is a folder",), arguments=("data",)),
    # ---- settings.toml
    settings("empty settings", "", "runs: found no run", "[runs.NAME]"),
    settings("broken TOML", "[runs.run\n", "invalid TOML", "line 1"),
    settings("a misspelt key", RUN + "[runs.run]\nstep = 3\n", "runs.run.step: found an unknown key",
        "did you mean runs.run.steps?"),
    settings("a misspelt table", RUN + "[runs.run.memroy]\nlimit = 0.5\n", "runs.run.memroy",
        "did you mean runs.run.memory?"),
    settings("a key of another table", RUN + "[runs.run]\nlimit = 0.5\n", "did you mean runs.run.memory.limit?"),
    settings("[run.x] for [runs.x]", RUN.replace("[runs.run.task]", "[run.task]"), "run: found an unknown key"),
    settings("steps as text", RUN + "[runs.run]\nsteps = '3'\n", 'runs.run.steps: found "3"', "a whole number from 1"),
    settings("steps of 0", RUN + "[runs.run]\nsteps = 0\n", "runs.run.steps: found the whole number 0"),
    settings("a limit without unit", RUN + "[runs.run.memory]\nlimit = '18'\n", "runs.run.memory.limit", "units are"),
    settings("a limit of 8 bytes", RUN + "[runs.run.memory]\nlimit = 8\n", "runs.run.memory.limit", "at least 64 MiB"),
    settings("minimum over size", RUN + "[runs.run.batch]\nsize = 2\nminimum = 4\n", "batch.minimum: found 4",
        "at most batch.size, 2"),
    settings("an unknown kind", RUN.replace("mlx_lm", "torch"), "runs.run.task.kind", '"mlx_lm" or "python"'),
    settings("no configuration", RUN.replace("lora.yaml", "none.yaml"), "runs.run.task.config", "none.yaml",
        "no file at"),
    settings("a bad name", RUN.replace("runs.run", "runs.'my run'"), "the run name", "A-Z a-z 0-9"),
    settings("no entry", "[runs.run]\nsteps = 2\n[runs.run.task]\nkind = 'python'\n", "runs.run.task.entry",
        "package.module:function"),
    settings("python without steps", "[runs.run.task]\nkind = 'python'\nentry = 'a:b'\n",
        "runs.run.steps: found nothing"),
    settings("no interval of checkpoints", RUN + "[runs.run.checkpoint]\nevery_steps = 0\n", "runs.run.checkpoint",
        "cannot be resumed"),
    Case(
        "batch.size over the samples",
        ("settings.toml: runs.run.batch: ", "is 16 samples per update", "data/train.jsonl has 8", "use at most 8"),
        {"settings.toml": SETTINGS + "[runs.run.batch]\nsize = 16\n"},
    ),
    settings("a limit over the machine's memory", RUN + "[runs.run.memory]\nlimit = '99999 GiB'\n",
        "runs.run.memory.limit: found", "at most this machine's memory"),
    settings("YAML as settings file", "model: model\ndata: data\n", "invalid TOML", "must end in .yaml or .yml"),
    # ---- lora.yaml: the file
    config("an empty YAML", "", "the file is empty", "model: path/to/model"),
    config("only comments", "# model: x\n", "the file is empty"),
    config("a list", "- model: model\n- data: data\n", "found a list", "remove the leading dashes"),
    config("no blank after the colon", "model:model\ndata:data\n", "a blank must follow each colon"),
    config("a tab", "model: model\nlora_parameters:\n\trank: 8\n", "lora.yaml:3: invalid YAML: this line has a tab"),
    config("a duplicate key", yaml() + "iters: 5\n", "lora.yaml:9: 'iters' is already given in line 3"),
    config("wrong indentation", "model: model\n  data: data\n", "lora.yaml:2: invalid YAML", "indentation"),
    config("an open bracket", yaml() + "lora_parameters: {rank: 8\n", "lora.yaml:10: invalid YAML"),
    config("a number as key", yaml() + "3: 4\n", "expected names as keys, found 3"),
    Case("YAML not UTF-8", ("lora.yaml", "byte 0xe9 is not UTF-8"), {"lora.yaml": b"model: caf\xe9\n"}),
    # ---- lora.yaml: keys
    key("iter for iters", "iter: unknown key; did you mean iters?", iter="4"),
    key("batch-size", "batch-size: unknown key; did you mean batch_size?", **{"batch-size": "4"}),
    key("learning_rte", "learning_rte: unknown key; did you mean learning_rate?", learning_rte="1e-5"),
    key("two mistakes", ("iter: unknown key; did you mean iters?", "Also: lr: unknown key; in mlx_lm this is learn"),
        iter="4", lr="1e-5"),
    key("epochs", "epochs: unknown key; in mlx_lm this is iters", epochs="3"),
    key("lora_layers", "lora_layers: unknown key; in mlx_lm this is num_layers", lora_layers="4"),
    key("rank at the top", "rank: unknown key; in mlx_lm this is lora_parameters.rank", rank="8"),
    key("a key of nowhere", ("zzz: unknown key; allowed are adapter_path", "val_batches"), zzz="1"),
    key("iters of 0", "iters: expected a whole number of at least 1, found 0", iters="0"),
    key("iters in quotes", "found '100'; write it without quotes", iters="'100'"),
    key("iters as 1e3", "iters: expected a whole number of at least 1, found 1000.0", iters="1e3"),
    key("a rate as text", "learning_rate: expected a number of at least 0, found 'small'", learning_rate="small"),
    key("an infinite rate", "learning_rate: expected a number of at least 0, found inf", learning_rate=".inf"),
    key("mask_prompt: 1", "mask_prompt: expected true or false, found 1", mask_prompt="1"),
    key("model as a list", "model: expected text, found ['model']", model="[model]"),
    key("train: false", "train: must be true", train="false"),
    key("config in config", "config: not supported", config="other.yaml"),
    key("qlora", ("fine_tune_type: allowed: lora, dora, full", "is QLoRA"), fine_tune_type="qlora"),
    key("an unknown optimizer",
        "optimizer: allowed: adam, adamw, muon, sgd, adafactor; found 'adamv'; did you mean adam", optimizer="adamv"),
    key("options not by optimizer", ("optimizer_config: options are given by optimizer", "{adam: {eps: …}}"),
        optimizer_config="{eps: 1e-8}"),
    key("an unknown option",
        ("optimizer_config.adam.beta: unknown option; allowed are betas, eps", "did you mean betas?"),
        optimizer_config="{adam: {beta: 0.9}}"),
    key("a rate among the options", "optimizer_config.adam.learning_rate: set the key learning_rate",
        optimizer_config="{adam: {learning_rate: 1}}"),
    key("betas of one number", "optimizer_config.adam.betas: expected a list of two numbers, found 0.9",
        optimizer_config="{adam: {betas: 0.9}}"),
    key("options of another optimizer", "optimizer_config.adm: unknown optimizer; did you mean adam?",
        optimizer_config="{adm: {eps: 1e-8}}"),
    key("a schedule without arguments", "lr_schedule: expected the keys name and arguments",
        lr_schedule="{name: cosine_decay}"),
    key("a misspelt schedule",
        ("lr_schedule.name: unknown schedule 'cosine'", "cosine_decay(init, decay_steps[, end])"),
        lr_schedule="{name: cosine, arguments: [1e-5, 10]}"),
    key("too few arguments", "cosine_decay(init, decay_steps[, end]), found 1 values",
        lr_schedule="{name: cosine_decay, arguments: [1e-5]}"),
    key("an argument as text", "expected a whole number of at least 1 for decay_steps, found 'x'",
        lr_schedule="{name: cosine_decay, arguments: [1e-5, x]}"),
    key("warmup_steps", "lr_schedule.warmup_steps: unknown key; did you mean lr_schedule.warmup?",
        lr_schedule="{name: cosine_decay, arguments: [1e-5, 9], warmup_steps: 3}"),
    key("alpha for scale", "lora_parameters.alpha: unknown key; use scale",
        lora_parameters="{rank: 8, alpha: 16, dropout: 0.0}"),
    key("no dropout", "lora_parameters.dropout: expected a number", lora_parameters="{rank: 8, scale: 20.0}"),
    key("a rank of 0", "lora_parameters.rank: expected a whole number of at least 1, found 0",
        lora_parameters="{rank: 0, scale: 1.0, dropout: 0.0}"),
    key("keys as text", "lora_parameters.keys: expected a list of module names",
        lora_parameters="{rank: 8, scale: 1.0, dropout: 0.0, keys: q_proj}"),
    key("keys that match nothing", ("self_attn.v_proj", "lora_parameters.keys: no module is named 'self_attn.query'"),
        lora_parameters="{rank: 8, scale: 1.0, dropout: 0.0, keys: [self_attn.query]}"),
    key("too many layers", "num_layers: expected at most the model's 2 layers, found 16", num_layers="16"),
    key("batch over the samples", ("batch_size: 32 samples per update", "data/train.jsonl has 8; use at most 8"),
        batch_size="32"),
    key("the default batch over the samples",
        ("grad_accumulation_steps: 16 samples per update (batch_size 4 × grad_accumulation_steps 4)", "has 8"),
        batch_size=None, grad_accumulation_steps="4", iters="8"),
    key("fewer iterations than accumulation", "iters: expected at least grad_accumulation_steps (8), found 4",
        grad_accumulation_steps="8"),
    key("no such adapters", "resume_adapter_file: no such file", resume_adapter_file="none.safetensors"),
    key("adapters of another kind", ("resume_adapter_file: cannot read ", "Unknown file format"),
        resume_adapter_file="settings.toml"),
    Case("adapters with a header of another form", ("resume_adapter_file: ", "own.safetensors cannot be read: TypeErr"),
        {"lora.yaml": yaml(resume_adapter_file="own.safetensors"),
         "own.safetensors": struct.pack("<Q", 8) + b'{"a": 1}'}),
    key("a seed too large", "seed: expected a whole number of at least 0 and at most 4294967295, found 99999999999",
        seed="99999999999"),
    key("an unknown service", "report_to: ", report_to="wandv"),
    key("hf_dataset without path", "hf_dataset: expected a mapping with a path", hf_dataset="{name: x}"),
    key("a misspelt key of hf_dataset", "hf_dataset.text_featur: unknown key; did you mean hf_dataset.text_feature?",
        hf_dataset="{path: x, text_featur: y}"),
    key("hf_dataset without the package", "hf_dataset: hub datasets need the package datasets (pip install datasets)",
        hf_dataset="{path: x}"),
    # ---- the model
    key("no model", ("model: not set; mlx_lm would download its default, Qwen/", "Set it to a model folder"),
        model=None),
    key("no such model folder", "model: no such folder: ", model="./nowhere"),
    key("a file as model", ("model: expected a folder with config.json", "found the file"), model="settings.toml"),
    model("no config.json", "has no config.json", config__json=None),
    model("config.json broken", ("model/config.json is no valid JSON", "line 1"), config__json="{"),
    model("config.json without type", "model/config.json has no model_type", config__json=without("model_type")),
    model("an unknown architecture", "Model type warp not supported", config__json=changed(model_type="warp")),
    model("no weights", "has no model*.safetensors", model__safetensors=None),
    model("truncated weights", ("model.safetensors is truncated: ", "bytes; copy or download it again"),
        model__safetensors=lambda old: old[:-100]),
    model("weights of another kind", "model.safetensors is no safetensors file",
        model__safetensors=b"PK\x03\x04" + b"\xff" * 100),
    model("a pointer for weights", ("is a Git LFS pointer", "git lfs pull"),
        model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    model("a shard missing", ("lacks model-2.safetensors", "index.json"),
        model__safetensors__index__json='{"weight_map": {"w": "model-2.safetensors"}}'),
    model("weights that do not fit", ("do not fit its config.json", "Expected shape"),
        config__json=changed(intermediate_size=128)),
    model("layers missing", ("do not fit its config.json: Missing 9 parameters: model.layers.2.input_layernorm",),
        config__json=changed(num_hidden_layers=3)),
    model("no tokenizer", "has no tokenizer (tokenizer.json or tokenizer.model)", tokenizer__json=None),
    model("a broken tokenizer", ("the tokenizer's file", "tokenizer.json is no valid JSON"), tokenizer__json="{"),
    model("another JSON as tokenizer", "cannot load the tokenizer", tokenizer__json="{}"),
    model("a broken tokenizer_config", ("the tokenizer's file", "tokenizer_config.json is no valid JSON"),
        tokenizer_config__json="{,}"),
    Case("messages without a chat template", ("train.jsonl:1: cannot tokenize", "has no chat template", "'text'"),
        {"data/train.jsonl": CHAT * 8, "model/chat_template.jinja": None}),
    # ---- the data
    key("no data", ("data: not set; mlx_lm would download its example data set", "train.jsonl"), data=None),
    key("no such data folder", "data: no such folder: ", data="./nowhere"),
    key("a file as data", "data: expected a folder with train.jsonl, found the file", data="data/train.jsonl"),
    data("no train.jsonl", None, "lora.yaml: data: ", "has no train.jsonl; the folder is empty"),
    key("no test.jsonl", "has no test.jsonl; add it, or set test: false", test="true"),
    data("an empty train.jsonl", "", "train.jsonl: the file is empty"),
    Case("a folder as train.jsonl", ("lora.yaml: data: expected the file ", "train.jsonl, found a folder"),
        {"data/train.jsonl": None, "data/train.jsonl/train.jsonl": LINES}),
    data("an empty line", LINES + "\n", "train.jsonl:9: expected a JSON object, found an empty line"),
    data("a line cut off", LINES + '{"text": "a', "train.jsonl:9: invalid JSON"),
    data("a JSON array", "[\n" + LINES + "]\n", "train.jsonl:1: invalid JSON", "one object per line"),
    data("lists for objects", '["a"]\n', "train.jsonl:1: expected a JSON object, found list"),
    data("a misspelt key in data", '{"txt": "a b c"}\n' * 8, "train.jsonl:1: no known key",
        "did you mean 'text' instead of 'txt'?"),
    data("columns of another format", '{"instruction": "a", "output": "b"}\n' * 8, "train.jsonl:1: no known key",
        "prompt_feature"),
    data("a line of another format", LINES + CHAT, "train.jsonl:9: expected text under 'text', found keys messages"),
    data("a number as text", LINES + '{"text": 3}\n', "train.jsonl:9: expected text under 'text', found 3"),
    data("blank lines of text", LINES + '{"text": " "}\n' * 2, "train.jsonl:9: expected text",
        "2 of 10 lines are like this"),
    data("no messages", '{"messages": []}\n', "train.jsonl:1: expected a list of messages"),
    data("a message without role", '{"messages": [{"content": "a"}]}\n',
        "train.jsonl:1: every message under 'messages' must be an object with a role"),
    data("content as a number", '{"messages": [{"role": "user", "content": 3}]}\n',
        "train.jsonl:1: expected text as content of the user message, found 3"),
    data("no content anywhere", '{"messages": [{"role": "user", "content": ""}]}\n' * 8,
        "train.jsonl: no message has any content"),
    data("mask_prompt on plain text", LINES, "train.jsonl:1: mask_prompt needs prompts or messages",
        "set mask_prompt: false", mask_prompt="true"),
    data("an answer without a prompt", '{"messages": [{"role": "user", "content": "a"}]}\n' * 8,
        "train.jsonl:1: mask_prompt needs a message before the answer", mask_prompt="true"),
    data("prompts over the limit", ('{"prompt": "' + "a" * 90 + '", "completion": "b"}\n') * 8,
        "train.jsonl: with mask_prompt, no sample has anything to learn", "max_seq_length (64 tokens)",
        mask_prompt="true"),
    data("a pointer for data", "version https://git-lfs.github.com/spec/v1\n",
        "train.jsonl:1: this is a Git LFS pointer", "git lfs pull"),
    data("text that is not UTF-8", b'{"text": "caf\xe9 au lait"}\n' * 8, "train.jsonl:1: invalid JSON"),
    Case("a broken valid.jsonl", ("valid.jsonl:2: invalid JSON",), {"data/valid.jsonl": '{"text": "a b"}\n{"text"}\n'}),
    # ---- python tasks
    python("no module", None, "settings.toml: runs.run.task.entry: cannot import mine from", "no file mine.py there"),
    python("a misspelt module", "", "no file mime.py there; did you mean mine?", entry="mime:build"),
    python("a misspelt function", "", "mine.py) has no 'bild'; did you mean build?", entry="mine:bild"),
    python("no function", "\nbuild = 3\n", "task.entry: mine:build must be a function that returns a Task, found int"),
    python("a syntax error", "\ndef x(:\n", "cannot import mine", "SyntaxError", "mine.py:18"),
    python("an undefined name", "\nnothing_here\n", "cannot import mine", "NameError", "mine.py:18"),
    python("a missing import", "\nimport no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'",
        "mine.py:18"),
    python("a misspelt argument", "\ndef other(width):\n    return build(width)\n",
        "settings.toml: runs.run.task.args: do not fit mine:other(width): ", entry="mine:other",
        lines="args = {wdth = 3}\n"),
    python("an error in the function", "\ndef other():\n    raise ValueError('no such column')\n",
        "task.entry: mine:other: ValueError: no such column (", "mine.py:19", entry="mine:other"),
    python("a missing file", "\ndef other():\n    open('none.csv')\n",
        "task.entry: mine:other: FileNotFoundError: ", "none.csv", "mine.py:19", entry="mine:other"),
    python("an exit", "\ndef other():\n    raise SystemExit('set HOST')\n",
        "task.entry: mine:other: SystemExit: set HOST (", "mine.py:19", entry="mine:other"),
    python("a misspelt field of Task", "\ndef other():\n    return build(optimiser=3)\n",
        "task.entry: mine:other: TypeError: ", "'optimiser' (", "mine.py:16", entry="mine:other"),
    python("nothing to train", "\ndef other():\n    model = nn.Linear(4, 2)\n    model.freeze()\n"
        "    return build(model=model)\n",
        "task.entry: mine:other: Task.model has no trainable parameters", entry="mine:other"),
    python("no task returned", "\ndef build():\n    return {}\n",
        "mine:build must return an mlx_worker.task.Task, found dict"),
    python("a wrong optimizer", "\ndef other():\n    return build(optimizer=3)\n",
        "Task.optimizer must be an mlx.optimizers.Optimizer, found int", entry="mine:other"),
    python("a generator as data", "\ndef other():\n    return build(dataset=3)\n", "Task.dataset must be ", "found int",
        entry="mine:other"),
    python("no samples", "\ndef other():\n    return build(dataset=[])\n", "Task.dataset is empty", entry="mine:other"),
    python("too few samples", "\ndef other():\n    return build(dataset=[1])\n",
        "exceeds the dataset's 1; use at most 1 (", entry="mine:other"),
    Case(
        "a loss that reads a value",
        ("Task.loss reads an array's value at ", "mine.py:19", "compile=False"),
        python("", "\ndef other():\n    return build(loss=lambda model, x: model(x).mean() * float(x.sum()))\n",
            entry="mine:other").files,
        trains=True,
    ),
    Case(
        "a loss of the wrong shapes",
        ("task.entry: mine:other: ValueError: [", "mine.py:19"),
        python("", "\ndef other():\n    return build(loss=lambda model, x: model(x[:, :2]).mean())\n",
            entry="mine:other").files,
        trains=True,
    ),
    Case(
        "an error in collate",
        ("task.entry: mine:other: KeyError: 'x' (", "mine.py:19"),
        python("", "\ndef other():\n    return build(collate=lambda ids: {}['x'])\n", entry="mine:other").files,
        trains=True,
    ),
    Case(
        "a loss that is no number",
        ("Task.loss must return a scalar mean",),
        python("", "\ndef other():\n    return build(loss=lambda model, x: model(x))\n", entry="mine:other").files,
        trains=True,
    ),
]  # fmt: skip

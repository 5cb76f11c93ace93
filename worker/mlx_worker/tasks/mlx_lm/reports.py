"""Reports to wandb and swanlab through mlx_lm's own callbacks, and to TensorBoard: one curve for all generations."""

import importlib.util
import json
import math
import os
import secrets
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_worker.checkpoint import durable_files
from mlx_worker.task import Update
from mlx_worker.tasks.mlx_lm import tensorboard
from mlx_worker.tasks.mlx_lm.config import LoraConfig
from mlx_worker.tasks.mlx_lm.tensorboard import TensorBoard

OF_MLX_LM = ("wandb", "swanlab")
TENSORBOARD = "tensorboard"
SERVICES = (*OF_MLX_LM, TENSORBOARD)

ID_FILE = "reports.json"
"""In the run's folder: the id under which every generation of the run reports."""
_ID_LENGTH = 21
"""Older versions of swanlab accept only this length; wandb accepts up to 128 characters."""


class Reports:
    """The same reports at the same iterations as mlx_lm.lora. After a failure, reporting ends with a message.

    Iterations are those of the configuration file: `grad_accumulation_steps` per update, whatever the micro-batch is.
    """

    def __init__(self, callbacks: list[Any], values: Any, last_step: int, notes: list[str]) -> None:
        self.notes = notes
        self._last_step = last_step
        self._callbacks = callbacks
        self._accumulation = values.grad_accumulation_steps
        self._every = max(1, values.steps_per_report // self._accumulation) if values.steps_per_report else 0
        self._since_report: list[Update] = []
        self._started = False

    def update(self, update: Update) -> None:
        """Record an update; report if due."""
        if not self._callbacks:
            return
        self._start((update.step - 1) * self._accumulation + 1)
        if not self._every:
            return
        self._since_report.append(update)
        if update.step % self._every and update.step != self._last_step:
            return
        updates, self._since_report = self._since_report, []
        losses = [one.loss for one in updates if one.tokens]  # without a token to learn it is NaN
        import mlx.core as mx

        seconds = max(sum(one.seconds for one in updates), 1e-9)
        info = {
            "iteration": update.step * self._accumulation,
            "train_loss": sum(losses) / len(losses) if losses else math.nan,
            "learning_rate": update.learning_rate,
            "iterations_per_second": len(updates) * self._accumulation / seconds,
            "tokens_per_second": sum(one.tokens for one in updates) / seconds,
            "trained_tokens": update.total_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._send("on_train_loss_report", info)

    def evaluation(self, step: int, loss: float, seconds: float) -> None:
        """Report a validation."""
        self._start(step * self._accumulation)
        self._send(
            "on_val_loss_report", {"iteration": step * self._accumulation, "val_loss": loss, "val_time": seconds}
        )

    def _start(self, iteration: int) -> None:
        """Before the first report, whose iteration says where this generation began."""
        if not self._started:
            self._started = True
            self._each(lambda callback: callback.start(iteration) if hasattr(callback, "start") else None, iteration)

    def _send(self, name: str, info: dict[str, Any]) -> None:
        self._each(lambda callback: getattr(callback, name)(info), info["iteration"])

    def _each(self, call: Callable[[Any], None], iteration: int) -> None:
        for callback in list(self._callbacks):
            try:
                call(callback)
            except Exception as error:  # a failing service must not end the run
                print(
                    f"report_to: stopped reporting after a failure at iteration {iteration}: {_text(error)}",
                    file=sys.stderr,
                )
                self._callbacks.remove(callback)


def check_services(config: LoraConfig) -> list[str]:
    """The services in `report_to`, without importing any. Raises RefusedError for an unknown or missing package."""
    names = [name.strip().lower() for name in (config.values.report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in SERVICES:
            raise config.refuse("report_to", f"allowed: {', '.join(SERVICES)}; found {name!r:.80}")
        if name == TENSORBOARD and not tensorboard.is_installed():
            raise config.refuse(
                "report_to", "tensorboard needs the package tensorboardX or tensorboard (pip install tensorboardX)"
            )
        if name in OF_MLX_LM and importlib.util.find_spec(name) is None:
            raise config.refuse("report_to", f"the package {name} is not installed (pip install {name})")
    return list(dict.fromkeys(names))


def start_reports(config: LoraConfig, run_dir: Path, last_step: int, *, connects: bool = True) -> Reports:
    """Connect to the services in `report_to`, or only check them. Raises RefusedError for an unknown or missing
    package."""
    values, names = config.values, check_services(config)
    if not names or not connects:
        return Reports([], values, last_step, [])
    identity = _identity(run_dir)
    folder = config.resolve(values.adapter_path)
    started, notes = [], []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if TENSORBOARD in names:
            started.append(TensorBoard(folder / TENSORBOARD / f"{run_dir.name}-{identity[:6]}"))
        others = [name for name in names if name in OF_MLX_LM]
        if others:
            started.append(_of_mlx_lm(others, values, folder, identity))
    except Exception as error:  # a missing network must not end the run
        failed = ", ".join(name for name in names if name in OF_MLX_LM) or TENSORBOARD
        notes = [f"report_to: {failed} could not start; training continues without it: {_text(error)}"]
    return Reports(started, values, last_step, notes)


def _of_mlx_lm(names: list[str], values: Any, folder: Path, identity: str) -> Any:
    from mlx_lm.tuner import callbacks

    for name in names:  # mlx_lm's callbacks have no parameter for it; the user's own variables take precedence
        os.environ.setdefault(f"{name.upper()}_RUN_ID", identity)
        os.environ.setdefault(f"{name.upper()}_RESUME", "allow")
    config: Any = dict(vars(values))
    settings = {"report_to": ",".join(names), "project_name": values.project_name, "log_dir": str(folder)}
    return callbacks.get_reporting_callbacks(**settings, config=config)


def _identity(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(identity, str) and len(identity) == _ID_LENGTH and identity.isalnum():
            return identity
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the first generation, or a damaged file: the charts then show a new run
    letters = string.ascii_lowercase + string.digits
    identity = "".join(secrets.choice(letters) for _ in range(_ID_LENGTH))
    content = json.dumps({"id": identity}).encode() + b"\n"
    try:
        durable_files.replace_file(path, lambda file: file.write(content))
    except OSError as error:
        print(f"cannot write {path}; a restart will report as a new run: {error}", file=sys.stderr)
    return identity


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]

"""Reports to wandb and swanlab through mlx_lm's own callbacks, under one id for all generations of a run."""

import json
import os
import secrets
import string
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tuner import callbacks

from mlx_worker.task import Update
from mlx_worker.tasks.mlx_lm.config import LoraConfig

ID_FILE = "reports.json"
"""In the run's folder: the id under which every generation of the run reports."""
_ID_LENGTH = 21
"""Older versions of swanlab accept only this length; wandb accepts up to 128 characters."""


class Reports:
    """The same reports at the same iterations as mlx_lm.lora. After a failure, reporting ends with a message.

    Iterations are those of the configuration file: `grad_accumulation_steps` per update, whatever the micro-batch is.
    """

    def __init__(self, callback: Any, values: Any, last_step: int, notes: list[str]) -> None:
        self.notes = notes
        self._last_step = last_step
        self._callback = callback
        self._accumulation = values.grad_accumulation_steps
        self._every = max(1, values.steps_per_report // self._accumulation) if values.steps_per_report else 0
        self._since_report: list[Update] = []

    def update(self, update: Update) -> None:
        """Record an update; report if due."""
        if self._callback is None or not self._every:
            return
        self._since_report.append(update)
        if update.step % self._every and update.step != self._last_step:
            return
        updates, self._since_report = self._since_report, []
        seconds = max(sum(one.seconds for one in updates), 1e-9)
        info = {
            "iteration": update.step * self._accumulation,
            "train_loss": sum(one.loss for one in updates) / len(updates),
            "learning_rate": update.learning_rate,
            "iterations_per_second": len(updates) * self._accumulation / seconds,
            "tokens_per_second": sum(one.tokens for one in updates) / seconds,
            "trained_tokens": update.total_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._send("on_train_loss_report", info)

    def evaluation(self, step: int, loss: float, seconds: float) -> None:
        """Report a validation."""
        self._send(
            "on_val_loss_report", {"iteration": step * self._accumulation, "val_loss": loss, "val_time": seconds}
        )

    def _send(self, name: str, info: dict[str, Any]) -> None:
        if self._callback is None:
            return
        try:
            getattr(self._callback, name)(info)
        except Exception as error:  # a failing service must not end the run
            print(
                f"report_to: stopped reporting after a failure at iteration {info['iteration']}: {_text(error)}",
                file=sys.stderr,
            )
            self._callback = None


def start_reports(config: LoraConfig, run_dir: Path, last_step: int) -> Reports:
    """Connect to the services in `report_to`. Raises RefusedError for an unknown or missing package."""
    values = config.values
    names = [name.strip().lower() for name in (values.report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in callbacks.SUPPORT_CALLBACK:
            allowed = ", ".join(callbacks.SUPPORT_CALLBACK)
            raise config.refuse("report_to", f"allowed: {allowed}; found {name!r:.80}")
        if getattr(callbacks, name) is None:
            raise config.refuse("report_to", f"the package {name} is not installed (pip install {name})")
    if not names:
        return Reports(None, values, last_step, [])
    identity = _identity(run_dir)
    for name in names:  # mlx_lm's callbacks have no parameter for it; the user's own variables take precedence
        os.environ.setdefault(f"{name.upper()}_RUN_ID", identity)
        os.environ.setdefault(f"{name.upper()}_RESUME", "allow")
    folder = config.resolve(values.adapter_path)
    settings: dict[str, Any] = {"report_to": ",".join(names), "project_name": values.project_name}
    settings |= {"log_dir": str(folder), "config": dict(vars(values))}
    callback, notes = None, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        callback = callbacks.get_reporting_callbacks(**settings)
    except Exception as error:  # a missing network must not end the run
        notes = [f"report_to: {settings['report_to']} could not start; training continues without it: {_text(error)}"]
    return Reports(callback, values, last_step, notes)


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
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        print(f"cannot write {path}; a restart will report as a new run: {error}", file=sys.stderr)
    return identity


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]

"""Drives the real command line from outside, with the misbehaving worker in place of the real one."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from mlx_supervisor.core import actions as act
from mlx_supervisor.daemon.shared import Observer
from mlx_supervisor.process.launch import WORKER_VARIABLE
from mlx_supervisor.wire import TOKEN_VARIABLE

MISBEHAVE = Path(__file__).with_name("misbehave.py")
PATIENCE_S = 60.0
"""A longer wait is a failure, even on a slow machine."""


def write_settings(
    folder: Path,
    *,
    args: Mapping[str, Any],
    steps: int = 20,
    entry: str = "unused:entry",
    **tables: Mapping[str, Any],
) -> Path:
    """A settings file with one run called `run`; `tables` are its sub-tables."""
    restart = {"stop_grace_s": 5, "term_grace_s": 2, "backoff_s": 0.01} | dict(tables.pop("restart", {}))
    lines = ['state_dir = "state"', "[runs.run]", f"steps = {steps}", "seed = 7"]
    task = {"kind": "python", "entry": entry}
    for name, table in {"task": task, "restart": restart, **tables}.items():
        lines.append(f"[runs.run.{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    lines.append("[runs.run.task.args]")
    lines += [f"{key} = {json.dumps(value)}" for key, value in args.items()]
    path = folder / "settings.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def environment() -> dict[str, str]:
    """The environment that starts the misbehaving worker."""
    return os.environ | {WORKER_VARIABLE: f"{sys.executable} {MISBEHAVE}"}


class NoticeList(Observer):
    """Keeps every notice."""

    def __init__(self) -> None:
        self.notices: list[act.Notice] = []

    def on_notice(self, notice: act.Notice) -> None:
        self.notices.append(notice)

    @property
    def kinds(self) -> list[str]:
        return [notice.kind for notice in self.notices]


class Foreground:
    """`mlx-supervisor run`, in the background of a test. Output goes to files, so that no pipe can fill.

    `trains`: with the real worker. `options` go to Popen.
    """

    def __init__(self, settings: Path, *arguments: str, trains: bool = False, **options: Any) -> None:
        self.folder = settings.parent
        self._out = (self.folder / "out.txt").open("w+")
        self._err = (self.folder / "err.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_supervisor", "run", str(settings), "--json", *arguments],
            env=dict(os.environ) if trains else environment(),
            start_new_session=True,
            **{"stdout": self._out, "stderr": self._err} | options,
        )

    @property
    def stdout(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "err.txt").read_text()

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_S)

    def summary(self) -> dict[str, Any]:
        """The last line of standard output."""
        result = json.loads(self.stdout.splitlines()[-1])
        assert isinstance(result, dict)
        return result

    def until(self, text: str) -> None:
        """Wait until stderr contains `text`."""
        eventually(lambda: text in self.stderr, lambda: f"{text!r} in:\n{self.stderr}")

    def __enter__(self) -> "Foreground":
        return self

    def __exit__(self, *_: object) -> None:
        tokens = tokens_of(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in carriers(tokens):
            process.kill()
        self._out.close()
        self._err.close()


def run(settings: Path, *arguments: str, trains: bool = False) -> Foreground:
    """Run to the end."""
    with Foreground(settings, *arguments, trains=trains) as foreground:
        foreground.wait()
    return foreground


def eventually(condition: Callable[[], bool], explain: Callable[[], str] = lambda: "") -> None:
    """Wait until `condition` holds; the test fails if it never does."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never came true: {explain()}"
        time.sleep(0.01)


def tokens_of(pid: int) -> set[str]:
    """The tokens of the workers that a supervisor has now."""
    try:
        children = psutil.Process(pid).children()
    except psutil.Error:
        return set()
    tokens = set()
    for child in children:
        try:
            tokens.add(child.environ().get(TOKEN_VARIABLE, ""))
        except psutil.Error:
            continue
    return tokens - {""}


def carriers(tokens: set[str]) -> list[psutil.Process]:
    """Running processes with one of the tokens in their environment, in any session."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TOKEN_VARIABLE) in tokens:
                found.append(process)
        except psutil.Error:
            continue
    return found


def journaled_steps(folder: Path) -> int:
    """How many step reports the journal has committed."""
    with closing(sqlite3.connect(f"file:{folder / 'state/journal.db'}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM steps").fetchone()[0])


def journaled_losses(folder: Path) -> dict[int, float]:
    """The loss of every step, as last reported."""
    with closing(sqlite3.connect(f"file:{folder / 'state/journal.db'}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("SELECT step, loss FROM steps ORDER BY id").fetchall())


def interrupt(foreground: Foreground) -> None:
    """Ctrl-C."""
    foreground.process.send_signal(signal.SIGINT)

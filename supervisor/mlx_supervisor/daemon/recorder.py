"""A run's records: in the journal, in its log, and in memory for the summary."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.daemon.step_line import step_line
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.logs.run_log import RunLog

RECORDS_KEPT = 1000
JOURNAL_SAMPLE_INTERVAL_S = 1.0
STEP_LINE_INTERVAL_S = 1.0
PRINTED_BY_WORKER = frozenset({"checkpoint_skipped", "note", "test", "validation"})
"""Kinds of notices whose text a worker prints into the same log."""

log = structlog.get_logger()


class Recorder:
    """Records one run. Methods that raise, raise JournalError."""

    def __init__(self, run: str, journal: Journal, run_log: RunLog) -> None:
        self._run = run
        self._journal = journal
        self._log = run_log
        self._records: deque[dict[str, object]] = deque(maxlen=RECORDS_KEPT)
        self._history_number = 0
        self._saving: asyncio.Future[None] | None = None
        self._sample_journaled_s = 0.0
        self._step_line_s = 0.0
        self._left_out: set[str] = set()

    def generations(self) -> list[Mapping[str, object]]:
        """The records of all ended generations, oldest first: from the journal, else from memory."""
        records: dict[Any, Mapping[str, Any]] = {record["generation"]: record for record in self._records}
        try:
            records |= {record["generation"]: record for record in self._journal.generations(self._run)}
        except JournalError as error:
            log.error("summary_without_journal", run=self._run, error=str(error))
        return [records[generation] for generation in sorted(records)]

    def notice(self, notice: act.Notice) -> None:
        """To the daemon's log, the journal and the run's log."""
        write = {act.Severity.ERROR: log.error, act.Severity.WARNING: log.warning}.get(notice.severity, log.info)
        write(notice.kind, run=self._run, generation=notice.generation, text=notice.text, **notice.fields)
        self._journal.event(self._run, notice, time.time())
        if notice.kind not in PRINTED_BY_WORKER:
            self._log.line(f"{time.strftime('%H:%M:%S')} [supervisor] {notice.text}")

    def sample(self, sample: ev.Sample) -> None:
        """To the journal, about one a second."""
        if sample.at_s - self._sample_journaled_s >= JOURNAL_SAMPLE_INTERVAL_S:
            self._sample_journaled_s = sample.at_s
            self._journal.sample(self._run, sample, time.time())

    def step(self, machine: Run, step: ev.StepReport) -> None:
        """To the journal; about one a second also to the run's log."""
        sample = machine.last_sample
        self._journal.step(self._run, step, None if sample is None else sample.footprint_bytes, time.time())
        last = step.step >= machine.history.target_steps
        if last or step.at_s - self._step_line_s >= STEP_LINE_INTERVAL_S:
            self._step_line_s = step.at_s
            self._log.line(step_line(machine, step, self._left_out))

    def save_history(self, action: act.SaveHistory) -> None:
        """Save in a thread unless the action asks to wait: a disk that hangs must not block the event loop."""
        self._history_number += 1
        if action.wait:
            self._journal.save_history(self._run, action.snapshot)
        elif self._saving is None or self._saving.done():
            loop = asyncio.get_running_loop()
            self._saving = loop.run_in_executor(None, self._save_if_newest, action.snapshot, self._history_number)

    def _save_if_newest(self, snapshot: Mapping[str, object], number: int) -> None:
        if number != self._history_number:
            return
        try:
            self._journal.save_history(self._run, snapshot)
        except JournalError as error:
            log.error("history_not_saved", run=self._run, error=str(error))

    def open_generation(self, spawn: act.Spawn, token: str, pid: int, create_time_s: float) -> None:
        """Call it before the start with pid 0, so that no worker runs unrecorded, and after it with the process."""
        plan = (spawn.batch_size, spawn.effective_batch)
        opened = OpenGeneration(self._run, spawn.generation, pid, create_time_s, token, boot_id(), *plan, time.time())
        self._journal.open_generation(opened)

    def close_generation(self, action: act.CloseGeneration) -> None:
        """The generation ended, unless its process can't be killed: then only the summary records it."""
        self._records.append({"generation": action.generation, **action.record})
        if not action.alive:
            self._journal.close_generation(self._run, action.generation, action.record)


def load_history(journal: Journal, run: str) -> RunHistory:
    """The run's history. Raises JournalError.

    Even with a history that is unreadable or older than the last start, no generation number is used twice.
    """
    snapshot = journal.load_history(run)
    history = RunHistory()
    try:
        history = history if snapshot is None else RunHistory.restore(snapshot)
    except ValueError as error:
        log.error("history_unreadable", run=run, error=str(error))
    last = journal.last_generation(run)
    if last > history.generation:
        history.generation = last
        history.begin_generation()
    return history

"""What is written down of a run as it goes on: in the journal, in its log, and in memory for the summary."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.daemon.step_line import step_line
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.journal import Journal
from mlx_supervisor.logs.run_log import RunLog

RECORDS_KEPT = 1000
JOURNAL_SAMPLE_INTERVAL_S = 1.0
STEP_LINE_INTERVAL_S = 1.0

log = structlog.get_logger()


class Recorder:
    """Of one run. What raises, raises JournalError."""

    def __init__(self, run: str, journal: Journal, run_log: RunLog) -> None:
        self._run = run
        self._journal = journal
        self._log = run_log
        self._records: deque[dict[str, object]] = deque(maxlen=RECORDS_KEPT)
        self._history_number = 0
        self._saving: asyncio.Future[None] | None = None
        self._sample_journaled_s = 0.0
        self._step_line_s = 0.0

    def load_history(self) -> RunHistory:
        """What the run has lived through.

        A history may be older than the last start, or unreadable: still no generation's number is used twice.
        """
        snapshot = self._journal.load_history(self._run)
        history = RunHistory()
        try:
            history = history if snapshot is None else RunHistory.restore(snapshot)
        except ValueError as error:
            log.error("the run's history can't be read; it begins without one", run=self._run, error=str(error))
        last = self._journal.last_generation(self._run)
        if last > history.generation:
            history.generation = last
            history.begin_generation()
        return history

    def lives(self) -> list[Mapping[str, object]]:
        """The records of all lives, oldest first. Those that the journal can't tell of are told from memory."""
        lives: dict[object, Mapping[str, object]] = {record["generation"]: record for record in self._records}
        try:
            lives |= {record["generation"]: record for record in self._journal.generations(self._run)}
        except JournalError as error:
            log.error("the summary lacks what only the journal knows", run=self._run, error=str(error))
        return [lives[key] for key in sorted(lives, key=_number)]

    def notice(self, notice: act.Notice) -> None:
        """To the daemon's log, the journal and the run's log."""
        now_s = time.time()
        write = {act.Severity.ERROR: log.error, act.Severity.WARNING: log.warning}.get(notice.severity, log.info)
        write(notice.text, run=self._run, generation=notice.generation, kind=notice.kind, **notice.fields)
        self._journal.event(
            self._run, notice.generation, notice.kind, notice.severity, notice.text, notice.fields, now_s
        )
        self._log.line(f"{time.strftime('%H:%M:%S')} [supervisor] {notice.text}")

    def sample(self, sample: ev.Sample) -> None:
        """About one a second goes to the journal."""
        if sample.at_s - self._sample_journaled_s >= JOURNAL_SAMPLE_INTERVAL_S:
            self._sample_journaled_s = sample.at_s
            self._journal.sample(
                self._run,
                sample.generation,
                sample.footprint_bytes,
                sample.available_bytes,
                sample.processes,
                time.time(),
            )

    def step(self, machine: Run, step: ev.StepReport) -> None:
        """Each goes to the journal, about one a second to the run's log."""
        sample = machine.last_sample
        self._journal.step(
            self._run,
            step.generation,
            step.step,
            step.loss,
            step.tokens,
            step.seconds,
            step.batch_size,
            step.accumulation,
            None if sample is None else sample.footprint_bytes,
            step.active_bytes,
            step.cache_bytes,
            step.learning_rate,
            time.time(),
        )
        last = step.step >= machine.history.target_steps
        if last or step.at_s - self._step_line_s >= STEP_LINE_INTERVAL_S:
            self._step_line_s = step.at_s
            self._log.line(step_line(machine, step))

    def save_history(self, action: act.SaveHistory) -> None:
        """What need not be waited for is saved in a thread: a disk that hangs must not keep the loop from its work."""
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
            log.error("the history could not be saved; the next one may be", run=self._run, error=str(error))

    def open_generation(self, spawn: act.Spawn, token: str, pid: int, create_time_s: float) -> None:
        """Before the start with pid 0, so that no worker can live unknown; after it with what identifies it."""
        self._journal.open_generation(
            self._run,
            spawn.generation,
            pid,
            create_time_s,
            token,
            boot_id(),
            spawn.batch_size,
            spawn.effective_batch,
            time.time(),
        )

    def close_generation(self, action: act.CloseGeneration) -> None:
        """A life is over."""
        self._records.append({"generation": action.generation, **action.record})
        if action.alive:
            return
        self._journal.close_generation(self._run, action.generation, action.record)


def _number(generation: object) -> int:
    return generation if isinstance(generation, int) else 0

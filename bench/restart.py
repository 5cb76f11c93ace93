"""How soon a killed run trains again: from SIGKILL to the next generation's first update, against a bare start.

`mlx-supervisor run` trains a small Llama and saves a checkpoint every second. Its worker is killed repeatedly, each
time after a new checkpoint; the times come from the journal. After each kill the same job is started unsupervised and
without a checkpoint, and timed from the start of the process to its first update.
"""

import contextlib
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from support import common

PATIENCE_S = 120.0
STEPS = 1_000_000


def until(what: str, holds: Callable[[], bool]) -> None:
    """Poll every 5 ms until `holds` is true. Raises RuntimeError after `PATIENCE_S`."""
    end_s = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end_s:
            raise RuntimeError(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.005)


class Supervised:
    """A run in the foreground, and its journal."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "state" / "runs" / "bench"
        self._journal = folder / "state" / "journal.db"
        command = [*common.SUPERVISOR, "run", str(folder / "settings.toml"), "--state-dir", str(folder / "state")]
        self._log = (folder / "supervisor.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def newest(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        steps = [int(path.name[5:]) for path in (self.run_dir / "checkpoints").glob("step-*")]
        return max(steps, default=0)

    def kill_worker(self) -> float:
        """Send SIGKILL; returns the wall-clock time."""
        (worker,) = psutil.Process(self.process.pid).children()
        now_s = time.time()
        worker.send_signal(signal.SIGKILL)
        return now_s

    def first(self, table: str, generation: int, condition: str = "1") -> float | None:
        """The wall-clock time of the generation's first such row; None before it is written."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self._journal, timeout=5)) as db:
            query = f"SELECT MIN(wall_s) FROM {table} WHERE generation = ? AND {condition}"
            found: float | None = db.execute(query, (generation,)).fetchone()[0]
            return found
        return None

    def close(self) -> None:
        """Interrupt the run, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self._log.close()


def bare_s(folder: Path, number: int) -> float:
    """Seconds from the start of an unsupervised process to its first update."""
    job = json.loads((folder / "state" / "runs" / "bench" / "job.json").read_bytes())
    alone = folder / f"bare-{number}"
    alone.mkdir()
    (alone / "job.json").write_text(json.dumps({**job, "run_dir": str(alone), "telemetry": None}))
    command = [sys.executable, "-P", "-m", "mlx_worker", str(alone / "job.json"), "--bare"]
    started_s = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        took_s = next((time.time() - started_s for line in process.stdout if line.startswith("step ")), None)
        process.kill()
    if took_s is None:
        raise RuntimeError("the bare worker made no update")
    return took_s


def kill_once(run: Supervised, folder: Path, generation: int) -> dict[str, float]:
    """Kill the generation after a new checkpoint; the seconds from the kill to each following event."""
    before = run.newest()
    until(f"generation {generation} trains", lambda: run.first("steps", generation) is not None)
    until(f"generation {generation} saves a new checkpoint", lambda: run.newest() > before)
    time.sleep(0.3)  # the end of a write is reported after the update that runs beside it
    killed_s = run.kill_worker()
    until(f"generation {generation + 1} trains", lambda: run.first("steps", generation + 1) is not None)
    first_s, ready_s = run.first("steps", generation + 1), run.first("events", generation + 1, "kind = 'ready'")
    noticed_s = run.first("events", generation, "kind = 'restart'")
    assert first_s is not None
    assert ready_s is not None
    assert noticed_s is not None
    os.kill(run.process.pid, signal.SIGSTOP)  # the supervised worker must not compete with the bare one
    (worker,) = psutil.Process(run.process.pid).children()
    worker.suspend()
    try:
        bare = bare_s(folder, generation)
    finally:
        worker.resume()
        os.kill(run.process.pid, signal.SIGCONT)
    restart = first_s - killed_s
    return {
        "noticed_s": noticed_s - killed_s, "ready_s": ready_s - killed_s, "first_update_s": restart,
        "bare_s": bare, "ratio": restart / bare,
    }  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--kills", type=int, default=12)
    options = parser.parse_args()
    settings = common.llama(STEPS, batch=4, length=64, extra="[runs.bench.checkpoint]\nevery_seconds = 1\n")
    kills = []
    with common.workplace(settings) as folder:
        common.with_examples(folder)
        run = Supervised(folder)
        try:
            for generation in range(1, options.kills + 1):
                kills.append(kill_once(run, folder, generation))
                print(f"{generation}/{options.kills}: {kills[-1]}", file=sys.stderr)
        finally:
            run.close()
    header = ["kill", "noticed s", "ready s", "first update s", "bare start s", "ratio"]
    common.table(header, [[number + 1, *kill.values()] for number, kill in enumerate(kills)])
    median = statistics.median(kill["ratio"] for kill in kills)
    print(f"median ratio {median:.3f}")
    common.write(options.json, {"kills": kills, "median_ratio": median})


if __name__ == "__main__":
    main()

"""A worker of many modes, for the supervisor's tests: speaks the protocol, trains nothing, and misbehaves on request.

Run as `python misbehave.py JOB_FILE`; the job's `task.args` choose the mode. Its "checkpoint" is one number in a file.
"""

import faulthandler
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deaths  # beside this file
import zmq

from mlx_supervisor import wire
from mlx_worker.supervision import run_lock
from mlx_worker.supervision.raised import errors_of

MIB = 1024 * 1024


class Worker:
    def __init__(self, job: wire.Job) -> None:
        self.job = job
        self.args: dict[str, Any] = job.task.args
        self.mode = self.args.get("mode", "normal")
        self.generations = self.args.get("generations", 1 if self.mode == "self_kill" else sys.maxsize)
        self.saved = Path(job.run_dir) / "saved"
        self.step = int(self.saved.read_text()) if self.saved.exists() else 0
        self.steps = job.steps or int(Path(job.task.config or "").read_text().split()[1])  # "iters: 20 …"
        self.seq = 0
        self.stop = False
        self.kept: list[bytearray] = []
        self.held = run_lock.hold(job)
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 500)
        assert job.telemetry is not None
        self.socket.connect(job.telemetry)

    @property
    def recomputes(self) -> bool:
        return self.job.memory.gradient_checkpointing and self.args.get("can_recompute", False)

    def send(self, kind: type[wire.Message], **fields: Any) -> None:
        message = kind(run=self.job.run, generation=self.job.generation, seq=self.seq, **fields)
        self.seq += 1
        self.socket.send(wire.encode(message))

    def poll(self) -> None:
        while self.socket.poll(0):
            message = wire.decode_supervisor(self.socket.recv())
            if isinstance(message, wire.Stop) and self.mode != "deaf":
                self.stop = True
            elif isinstance(message, wire.ClearCache):
                self.send(wire.Cleared, active_bytes=0, cache_bytes=0)
            elif isinstance(message, wire.Autopsy) and "finds" in self.args:
                finding = wire.Finding(kind="objects", what=self.args["finds"], count_before=1, count_now=9)
                self.send(wire.AutopsyReport, step=self.step, seconds=0.1, findings=[finding])

    def save(self) -> None:
        temporary = self.saved.with_suffix(".tmp")
        temporary.write_text(str(self.step))
        temporary.replace(self.saved)  # a kill may come between any two lines
        self.send(wire.Checkpoint, step=self.step, ok=True, seconds=0.001, stall_s=0.0, size_bytes=3)

    def report(self, seconds: float) -> None:
        size = self.job.batch.size or 1
        effective = self.job.batch.effective or size
        self.held.trained(self.step)
        if "made" in self.args:
            with Path(self.job.task.base_dir, self.args["made"]).open("a") as file:
                file.write(f"{self.step}\n")
        self.send(
            wire.Step,
            step=self.step,
            loss=1.0 / self.step,
            tokens=10,
            samples=effective,
            learning_rate=0.1,
            seconds=seconds,
            batch_size=size,
            accumulation=-(-effective // size),
            active_bytes=0,
            cache_bytes=0,
            peak_bytes=0,
            resident_bytes=0,
        )

    def bye(self, outcome: str, reason: str = "", errors: Sequence[wire.Raised] = ()) -> None:
        self.send(
            wire.Bye,
            outcome=outcome,
            reason=reason,
            step=self.step,
            loss=1.0,
            weights_sha256="0" * 64,
            errors=list(errors),
        )
        self.socket.close()
        zmq.Context.instance().term()

    def start(self) -> None:
        self.send(wire.Hello, pid=os.getpid(), token=os.environ[wire.TOKEN_VARIABLE])
        if self.mode == "ramp_loading":
            self.ramp()
        if self.mode == "refuse" and "at_step" not in self.args:
            self.misbehave()
        size = self.job.batch.size or 1
        self.send(
            wire.Ready,
            step=self.step,
            target_steps=self.steps,
            batch_size=size,
            effective_batch=self.job.batch.effective or size,
            can_checkpoint_gradients=self.args.get("can_recompute", False),
            gradient_checkpointing=self.recomputes,
        )

    def ramp(self) -> None:
        """Allocate at a given rate without telemetry, and record the amount, until killed."""
        rate = self.args.get("mib_per_s", 256) * MIB
        chunk = max(rate // 1000, 4096)
        began_s = time.monotonic()
        held = 0
        while True:
            self.kept.append(bytearray(b"x" * chunk))
            held += chunk
            time.sleep(max(began_s + held / rate - time.monotonic(), 0))

    def misbehave(self) -> None:
        """At the step named by `at_step`, in the first `generations` generations."""
        if self.mode in deaths.WAYS:
            deaths.WAYS[self.mode](self)
        if self.mode == "crash":
            raise RuntimeError(self.args.get("says", "the user's code is broken"))
        if self.mode == "hang":
            time.sleep(3600)
        if self.mode == "ramp" and not self.recomputes:
            self.ramp()
        if self.mode == "not_finite":
            print("failed: loss became NaN", file=sys.stderr, flush=True)
            self.bye("failed", "loss became NaN", [wire.Raised(kind="NotFiniteError", message="loss became NaN")])
            sys.exit(wire.EXIT_NOT_FINITE)
        if self.mode == "self_kill":
            time.sleep(0.1)  # lets its messages arrive
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == "refuse":
            print("refused: data/train.jsonl:3: empty line", file=sys.stderr, flush=True)
            self.bye("refused", "data/train.jsonl:3: empty line")
            sys.exit(wire.EXIT_REFUSED)
        if self.mode == "flood_output":
            for _ in range(self.args.get("lines", 1000)):
                print("x" * 1000, flush=True)

    def run(self) -> int:
        self.start()
        while self.step < self.steps:
            time.sleep(self.args.get("delay_s", 0.005))
            if self.step + 1 == self.args.get("at_step") and self.job.generation <= self.generations:
                self.misbehave()
            self.kept.append(bytearray(b"x" * int(self.args.get("leak_mib", 0) * MIB)))
            self.step += 1
            self.report(0.005)
            if self.step % self.args.get("save_every", 5) == 0:
                self.save()
            self.poll()
            if self.stop:
                self.save()
                self.bye("stopped", "requested")
                return wire.EXIT_STOPPED
        self.save()
        self.bye("completed", "all steps done")
        return wire.EXIT_COMPLETED


def train_alone(job: wire.Job) -> int:
    """A lock of the task's own, held until the end; the file `overlaps` records a second worker of the run."""
    folder = Path(job.task.base_dir)
    descriptor = os.open(folder / "alone", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (folder / "overlaps").open("a") as file:
            file.write(f"generation {job.generation}\n")
    return descriptor


def watch_lifeline(worker: Worker) -> None:
    """As in the real worker: the supervisor's death is a stop request."""
    import threading

    def wait() -> None:
        os.read(int(os.environ[wire.LIFELINE_VARIABLE]), 1)
        worker.stop = True

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    job = wire.load_job(Path(sys.argv[1]).read_bytes())
    train_alone(job)
    worker = Worker(job)
    if worker.mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: setattr(worker, "stop", True))
        watch_lifeline(worker)
    if worker.args.get("children"):
        hold = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(3600)"]
        subprocess.Popen(hold)
        subprocess.Popen(hold, start_new_session=True)
    try:
        return worker.run()
    except Exception as error:
        if worker.args.get("says_bye", True):
            errors = errors_of(error)
            worker.bye("failed", f"{type(error).__name__}: {errors[0].message}", errors)
        raise


if __name__ == "__main__":
    sys.exit(main())

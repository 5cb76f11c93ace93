"""A supervisor small enough for the tests: it binds the socket, starts workers, and records their messages."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import zmq
from tests.training import jobs

from mlx_supervisor import wire

HERE = Path(__file__).parent
DEADLINE_S = 60.0
TOKEN = "token of the tests"


class Worker:
    """One worker process."""

    def __init__(self, supervisor, job, *, compiled, bare, options):
        self.supervisor, self.job = supervisor, job
        self.messages, self.identity, self.seq = [], None, 0
        self.folder = Path(job.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        job_file = self.folder / "job.json"
        job_file.write_bytes(wire.dump_json(job))
        self.stdout_path, self.stderr_path = self.folder / "stdout.log", self.folder / "stderr.log"
        read_end, self.lifeline = os.pipe()
        environment = os.environ | {
            wire.TOKEN_VARIABLE: f"{TOKEN} {secrets.token_hex(8)}",  # a worker kills what has the same
            wire.LIFELINE_VARIABLE: str(read_end),
            "MLX_DISABLE_COMPILE": "" if compiled else "1",
        }
        if compiled:
            del environment["MLX_DISABLE_COMPILE"]
        command = [sys.executable, "-P", "-m", "mlx_worker", str(job_file), *(["--bare"] if bare else []), *options]
        with self.stdout_path.open("wb") as out, self.stderr_path.open("wb") as err:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=err, pass_fds=[read_end], start_new_session=True
            )
        os.close(read_end)

    def until(self, kind, holds=lambda message: True):
        """Wait for a message of that kind for which `holds` is true; messages received earlier count, too."""
        end_s = time.monotonic() + DEADLINE_S
        seen = 0
        while True:
            for message in self.messages[seen:]:
                if isinstance(message, kind) and holds(message):
                    return message
            seen = len(self.messages)
            if time.monotonic() > end_s or not (self.supervisor.receive(0.2) or self.process.poll() is None):
                raise AssertionError(f"no such {kind.__name__}: {self.messages[-3:]}\n{self.stderr}")

    def until_saved(self, step):
        """Wait until that checkpoint exists; it is written in the background and reported after the next update."""
        end_s = time.monotonic() + DEADLINE_S
        while step not in self.saved_steps:
            assert time.monotonic() < end_s, f"no checkpoint of step {step}: {self.saved_steps}\n{self.stderr}"
            self.supervisor.receive(0.02)

    def send(self, kind, **fields):
        self.supervisor.socket.send_multipart(
            [self.identity, wire.encode(kind(run=self.job.run, generation=self.job.generation, seq=self.seq, **fields))]
        )
        self.seq += 1

    def send_raw(self, *frames):
        self.supervisor.socket.send_multipart([self.identity, *frames])

    def signal(self, number):
        os.kill(self.process.pid, number)

    def sever(self):
        """Close the lifeline, as the supervisor's death does."""
        os.close(self.lifeline)
        self.lifeline = None

    def wait(self):
        """The exit code, once the worker has ended and all its messages are received."""
        end_s = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:  # receives meanwhile, so that no queue fills up
            assert time.monotonic() < end_s, f"still running: {self.messages[-3:]}\n{self.stderr}"
            self.supervisor.receive(0.02)
        while self.supervisor.receive(0.1):
            pass
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        if self.lifeline is not None:
            self.sever()

    def of(self, kind):
        return [message for message in self.messages if isinstance(message, kind)]

    @property
    def bye(self):
        return self.of(wire.Bye)[-1]

    @property
    def ready(self):
        return self.of(wire.Ready)[0]

    @property
    def steps(self):
        return self.of(wire.Step)

    @property
    def stderr(self):
        return self.stderr_path.read_text(errors="replace")

    @property
    def stdout(self):
        return self.stdout_path.read_text(errors="replace")

    @property
    def samples(self):
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]

    @property
    def saved_steps(self):
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-*"))


class FakeSupervisor:
    """The supervisor's end of the socket."""

    def __init__(self, folder):
        self.folder = folder
        self.endpoint = f"ipc://{folder}/t.sock"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(self.endpoint)
        self.workers = []
        self.names = 0

    def job(self, name=None, *, entry="toy_task:build", args=None, task=None, generation=1, **fields):
        """A job for the toy task; a new name makes a new run."""
        if name is None:
            self.names += 1
            name = f"run{self.names}"
        task = task or {"kind": "python", "base_dir": str(HERE), "entry": entry, "args": args or {}}
        toy = {"steps": 12, "batch": {"size": 8}} if task["kind"] == "python" else {}
        paths = {"run": name, "run_dir": str(self.folder / name), "telemetry": self.endpoint}
        return jobs.job(**paths | {"generation": generation, "seed": 7, "task": task} | toy | fields)

    def start(self, job, *, compiled=False, bare=False, options=()):
        worker = Worker(self, job, compiled=compiled, bare=bare, options=list(options))
        self.workers.append(worker)
        return worker

    def run(self, job, **how):
        """A worker, after its end."""
        worker = self.start(job, **how)
        worker.wait()
        return worker

    def receive(self, seconds):
        """Receive one message, if one arrives in time."""
        if not self.socket.poll(int(seconds * 1000)):
            return False
        identity, frame = self.socket.recv_multipart()
        message = wire.decode_worker(frame)
        for worker in reversed(self.workers):
            if (worker.job.run, worker.job.generation) == (message.run, message.generation):
                worker.identity = identity
                worker.messages.append(message)
                break
        return True

    def close(self):
        for worker in self.workers:
            worker.close()
        self.socket.close()
        self.context.term()


@pytest.fixture(scope="session")
def session_supervisor():
    """For runs that several tests share."""
    folder = Path(tempfile.mkdtemp(prefix="mw-", dir="/tmp"))
    supervisor = FakeSupervisor(folder)
    yield supervisor
    supervisor.close()
    shutil.rmtree(folder)


@pytest.fixture
def supervisor():
    folder = Path(tempfile.mkdtemp(prefix="mw-", dir="/tmp"))  # a socket's path must be short
    supervisor = FakeSupervisor(folder)
    yield supervisor
    supervisor.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def llama_dir():
    """A folder with a tiny model, `model`, and data of three kinds."""
    folder = Path(tempfile.mkdtemp(prefix="mw-llama-", dir="/tmp"))
    # In a subprocess: the tests' process stays small and imports mlx_lm only in tests of it.
    code = "import sys, pathlib; import tiny_llama; tiny_llama.make(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder / "model")], cwd=HERE, check=True, capture_output=True)
    lines = {
        "text": [{"text": f"line {i} of some words " + "x" * (3 * i)} for i in range(24)],
        "chat": [
            {"messages": [{"role": "user", "content": f"q{i}" * 5}, {"role": "assistant", "content": "a" * (i + 1)}]}
            for i in range(24)
        ],
        "completions": [{"prompt": f"p{i}" * 5, "completion": "c" * (i + 1)} for i in range(24)],
    }
    for kind, samples in lines.items():
        (folder / kind).mkdir()
        for name in ("train", "valid"):
            (folder / kind / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    yield folder
    shutil.rmtree(folder)

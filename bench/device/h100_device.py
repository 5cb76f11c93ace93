"""Device memory on one NVIDIA GPU: its limit, its driver, and another process that takes the memory.

Run it from the repository's root: PYTHONPATH=supervisor:worker python bench/device/h100_device.py. Nothing is
downloaded: a small Llama learns Python's standard library. Needs nvidia-ml-py for the driver. The cases:

calm        no fault, under the limit of 24 GiB: the weights and losses to compare with
leak        500 MiB of arrays leak in every update, under 24 GiB: soft trips, no step replayed, never above the limit by
            more than one update's growth, weights and losses equal to calm's bit by bit
large       2,500 MiB leak in every update, under the default limit: no integer overflows, soft trips, no step replayed
silent      one update allocates 40 GiB under 24 GiB and hangs in native code: the driver's figure kills it
crowded     another process leaves 8 GiB of the device: the failed allocation is named, the run waits, then completes

`--stand-in` uses the tests' stand-in for the device, on any machine. Prints each case at once, then a table.
"""

import argparse
import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import common

STARTED_S = time.monotonic()
GIB = 2**30
LIMIT_MIB, LEAK_MIB, LARGE_MIB, SUDDEN_MIB = 24 * 1024, 500, 2500, 40 * 1024
STEPS, LARGE_STEPS, OTHER_STEPS = 120, 40, 40
LEFT_GIB = 8
STAND_IN = common.BENCH.parent / "tests" / "training" / "memory" / "device_stand_in"
CASES = ("calm", "leak", "large", "silent", "crowded")


class Case:
    """One run: its summary, its output, and the loss of each step."""

    def __init__(self, stderr: str, stdout: str, folder: Path) -> None:
        self.stderr = stderr
        self.summary: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        with contextlib.closing(sqlite3.connect(folder / "state" / "journal.db")) as journal:
            self.losses = dict(journal.execute("SELECT step, loss FROM steps ORDER BY id").fetchall())
        log = (folder / "state" / "runs" / "bench" / "logs" / "stdout.log").read_text()
        shown = re.search(r"step (\d+)/\d+ .*leak=([\d.,]+) MiB/step", log)
        self.leak_shown = f"{shown[2]} MiB/step at step {shown[1]}" if shown else "not shown"

    @property
    def peak_mib(self) -> float:
        return float(max(each["peak_device_mib"] for each in self.summary["generations"]))

    @property
    def causes(self) -> list[str]:
        return [str(each["cause"]) for each in self.summary["generations"]]


def main() -> None:
    options = parse()
    say(f"python {sys.version.split()[0]}, {device(options)}")
    results: dict[str, Any] = {"failures": []}
    cases: dict[str, Case] = {}
    for name in options.only.split(","):
        attempt(results, name, lambda name=name: CHECKS[name](options, cases))
    print()
    rows = [[name, *results[name].values()] for name in CASES if name in results]
    common.table(("case", "outcome", "trips", "replayed", "peak MiB", "causes", "required"), rows)
    for failure in results["failures"]:
        print(f"FAILED  {failure[:2000]}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(1 if results["failures"] else 0)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--stand-in", action="store_true", help="use the tests' stand-in for the device")
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated cases; leak needs calm")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(CASES):
        parser.error(f"--only: found {', '.join(sorted(unknown))}; allowed: {', '.join(CASES)}")
    return options


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:5.0f} s] {text}", flush=True)


def device(options: argparse.Namespace) -> str:
    """MLX's device, read in a subprocess: this process must hold no device memory."""
    if options.stand_in:
        return "a stand-in for the device"
    code = "import json, mlx.core as mx; print(mx.default_device(), json.dumps(mx.device_info()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def attempt(results: dict[str, Any], name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Print and record a failure, and continue with the rest."""
    try:
        results[name] = work()
    except Exception as error:
        traceback.print_exc()
        results["failures"].append(f"{name}: {type(error).__name__}: {error}")
        say(f"FAILED {name}: {type(error).__name__}: {error!s:.3000}")


@contextlib.contextmanager
def running(options: argparse.Namespace, steps: int, tables: str, limit: str = '"24 GiB"') -> Iterator[Any]:
    """A run in the background; yields its process, its folder, and a function that gives its output so far."""
    model = "hidden = 32, layers = 1, length = 24" if options.stand_in else "hidden = 256, layers = 4, length = 128"
    settings = (
        f"[runs.bench]\nsteps = {steps}\nautostart = true\ndeterministic = true\nseed = 7\n"
        f'task = {{ kind = "python", entry = "device_task:build", args = {{ {model} }} }}\n'
        "[runs.bench.batch]\nsize = 8\nhalve_on_leak = false\n"
        f"[runs.bench.memory]\ndevice_limit = {limit}\n{tables}"
    )
    with common.workplace(settings) as folder:
        common.with_examples(folder)
        (folder / "device_task.py").symlink_to(common.SUPPORT / "device_task.py")
        command = [*common.SUPERVISOR, "run", str(folder / "settings.toml"), "--json", "--state-dir"]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            process = subprocess.Popen(
                [*command, str(folder / "state")], stdout=out, stderr=err, env=environment(options, folder)
            )
            try:
                yield process, folder
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    if not options.stand_in:
        return dict(os.environ)
    state = folder / "device.json"
    state.write_text(json.dumps({"uuid": "GPU-1", "total": 80 * GIB, "others": 0, "pid": 0, "used": 0}))
    path = os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")])
    worker = f"{sys.executable} {STAND_IN / 'worker_on_device.py'}"
    return os.environ | {"FAKE_DEVICE": str(state), "PYTHONPATH": path, "MLX_SUPERVISOR_WORKER": worker}


def finish(process: subprocess.Popen[bytes], folder: Path) -> Case:
    """Wait for the end, at most 150 s. Raises RuntimeError if the run did not complete."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(150)
    stderr, stdout = (folder / "err").read_text(), (folder / "out").read_text()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}:\n{stderr[-4000:]}")
    return Case(stderr, stdout, folder)


def whole(options: argparse.Namespace, steps: int, tables: str = "", limit: str = '"24 GiB"') -> Case:
    with running(options, steps, tables, limit) as (process, folder):
        return finish(process, folder)


def row(case: Case, required: str, *problems: str) -> dict[str, Any]:
    """Print the run's notices and figures. Raises RuntimeError if a requirement is missed."""
    for line in case.stderr.splitlines():
        if re.search(r"evice|trip|leak|Memory|memory", line) and " step " not in line:
            print(f"          {line[:220]}")
    counted = {cause: case.causes.count(cause) for cause in case.causes}
    found = {
        "outcome": case.summary["outcome"], "trips": case.summary["trips"],
        "replayed": case.summary["replayed_steps"], "peak_mib": round(case.peak_mib),
        "causes": ", ".join(f"{count} × {cause}" for cause, count in counted.items()), "required": required,
    }  # fmt: skip
    say(f"{found}; leak {case.leak_shown}")
    missed = [problem for problem in problems if problem]
    if missed:
        raise RuntimeError(f"{'; '.join(missed)}\n{case.stderr[-3000:]}")
    return found


def calm(options: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Any]:
    cases["calm"] = case = whole(options, STEPS)
    return row(case, "no trip", "trips" * bool(case.summary["trips"]))


def leak(options: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Any]:
    case, undisturbed = whole(options, STEPS, f"[runs.bench.drill]\nleak_mib_per_step = {LEAK_MIB}\n"), cases["calm"]
    differing = [step for step, loss in case.losses.items() if undisturbed.losses.get(step) != loss]
    return row(
        case,
        f"soft trips, 0 replayed, peak up to {LIMIT_MIB + LEAK_MIB:,}, bit-equal",
        "too few trips" * (case.summary["trips"] < 2),
        "a trip was not soft" * ("worker killed" in case.stderr),
        "replayed" * bool(case.summary["replayed_steps"]),
        f"peak {case.peak_mib:,.0f} MiB" * (case.peak_mib > LIMIT_MIB + LEAK_MIB),
        f"losses differ at {differing[:5]}" * bool(differing),
        "weights differ" * (case.summary["weights_sha256"] != undisturbed.summary["weights_sha256"]),
    )


def large(options: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Any]:
    case = whole(options, LARGE_STEPS, f"[runs.bench.drill]\nleak_mib_per_step = {LARGE_MIB}\n", "0.8")
    return row(
        case, "soft trips, 0 replayed",
        "no trip" * (not case.summary["trips"]), "replayed" * bool(case.summary["replayed_steps"]),
        "a trip was not soft" * ("worker killed" in case.stderr),
    )  # fmt: skip


def silent(options: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Any]:
    drill = (
        f"[runs.bench.checkpoint]\nevery_steps = 5\n[runs.bench.drill]\ngenerations = [1]\nhang_at_step = 15\n"
        f'hang_kind = "native"\nallocate_mib = {SUDDEN_MIB}\nallocate_at_step = 15\n'
    )
    case = whole(options, OTHER_STEPS, drill)
    return row(
        case, "1 hard trip by the driver's figure",
        "no hard trip" * ("Device memory used " not in case.stderr or "worker killed" not in case.stderr),
        "trips" * (case.summary["trips"] != 1),
    )  # fmt: skip


def crowded(options: argparse.Namespace, cases: dict[str, Case]) -> dict[str, Any]:
    drill = f"[runs.bench.drill]\ngenerations = [1]\nleak_mib_per_step = {LEAK_MIB}\n"
    holder = None
    if not options.stand_in:
        command = [sys.executable, str(common.SUPPORT / "device_task.py"), str(LEFT_GIB)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        say(f"another process is {holder.stdout.readline().strip()}")
    try:
        with running(options, OTHER_STEPS, drill) as (process, folder):
            if holder is None:
                take(folder, 80 - LEFT_GIB)
            until(process, folder, "Device out of memory: this run held ")
            if holder is None:
                take(folder, 0)
            else:
                time.sleep(2)
                holder.kill()
                holder.wait()
            case = finish(process, folder)
    finally:
        if holder is not None and holder.poll() is None:
            holder.kill()
            holder.wait()
    return row(
        case, "named, waited for, completed",
        "not named" * ("other processes held" not in case.stderr),
        "not device out of memory" * ("device out of memory" not in case.causes),
        "halved" * (len({each["batch_size"] for each in case.summary["generations"]}) > 1),
    )  # fmt: skip


def take(folder: Path, others_gib: float) -> None:
    """The stand-in: another process holds this much. Again and again, as the worker writes the file as well."""
    state = folder / "device.json"
    for _ in range(20):
        temporary = state.with_suffix(".bench")
        temporary.write_text(json.dumps(json.loads(state.read_text()) | {"others": int(others_gib * GIB)}))
        temporary.replace(state)
        time.sleep(0.01)


def until(process: subprocess.Popen[bytes], folder: Path, text: str) -> None:
    """Wait for a text in the run's output. Raises RuntimeError if it does not come."""
    end_s = time.monotonic() + 90
    while text not in (folder / "err").read_text():
        if process.poll() is not None or time.monotonic() > end_s:
            raise RuntimeError(f"never printed {text!r}:\n{(folder / 'err').read_text()[-4000:]}")
        time.sleep(0.05)


CHECKS: dict[str, Callable[[argparse.Namespace, dict[str, Case]], dict[str, Any]]] = {
    "calm": calm, "leak": leak, "large": large, "silent": silent, "crowded": crowded,
}  # fmt: skip

if __name__ == "__main__":
    main()

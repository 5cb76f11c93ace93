"""A LoRA fine-tune with the shape of Qwen3-0.6B on one NVIDIA GPU: the worker against mlx_lm.lora's defaults.

Run it from the repository's root: PYTHONPATH=supervisor:worker python bench/h100.py. Weights and tokens are random;
nothing is downloaded. Batch 4 x 512 tokens, bfloat16, rank 8 on 16 layers: mlx_lm.lora's defaults. Both train on the
same samples in the same batches. The worker sends telemetry to a listener, takes a checkpoint every 5 s, and applies
its memory policy under the device limit that is printed. mlx_lm.tuner.train clears the cache after every step. Prints
each result at once, then a table. Also checks bit-equal resume: 30 updates in one generation, against 15, SIGKILL, and
the rest in a second generation. `--tiny` uses a model of a few thousand weights, on any machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import paired

REQUIRED = {"fixed": 1.6, "varied": 1.15}
"""How many times as fast as mlx_lm, by kind of data."""
STARTED_S = time.monotonic()
KILL_AT_STEP, LAST_STEP = 15, 30
MIB = 1024 * 1024


def main() -> None:
    options = parse()
    say(f"python {sys.version.split()[0]}, device {device()}")
    memory: dict[str, Any] = {"limit_bytes": options.limit_gib * 2**30}
    if options.device_limit_gib is not None:
        memory["device_limit_bytes"] = int(options.device_limit_gib * 2**30)
    say(f"the worker gets {memory}; the default device limit is 80 % of the device's memory")
    results: dict[str, Any] = {"device": device(), "memory": memory, "failures": []}
    for kind in options.only.split(","):
        attempt(results, kind, lambda kind=kind: resume(options) if kind == "resume" else race(options, kind, memory))
    show(results)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    say(f"written to {options.json}")
    sys.exit(1 if results["failures"] else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same architecture, for any machine")
    parser.add_argument("--pairs", type=int, default=2, help="pairs for each kind of data")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run; the first 50 are not timed")
    parser.add_argument("--device-limit-gib", type=float, help="device limit in GiB; default: 80 %% of its memory")
    parser.add_argument("--limit-gib", type=int, default=64, help="memory limit of the worker's process group, in GiB")
    parser.add_argument("--only", default="fixed,varied,resume", help="comma-separated; any of fixed, varied, resume")
    parser.add_argument("--budget-s", type=float, default=330.0, help="start no further pair after this many seconds")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "h100.json")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - {"fixed", "varied", "resume"}
    if unknown:
        parser.error(f"--only: found {', '.join(sorted(unknown))}; allowed: fixed, varied, resume")
    if options.steps <= warm_up(options):
        parser.error(f"--steps: found {options.steps}; allowed: more than {warm_up(options)}, the untimed warm-up")
    return options


def warm_up(options: argparse.Namespace) -> int:
    return 20 if options.tiny else 50


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED_S:5.0f} s] {text}", flush=True)


def device() -> dict[str, Any]:
    """MLX's device, read in a subprocess: this process must hold no device memory."""
    code = "import json, mlx.core as mx; print(json.dumps({'default': str(mx.default_device()), **mx.device_info()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"MLX cannot be used: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def attempt(results: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Print and record a failure, and continue with the rest."""
    try:
        results[name] = work()
    except Exception as error:
        traceback.print_exc()
        results["failures"].append(f"{name}: {type(error).__name__}: {error!s:.3000}")
        say(f"FAILED {name}: {type(error).__name__}: {error!s:.500}")


def setup(options: argparse.Namespace, kind: str, steps: int) -> paired.Setup:
    if options.tiny:
        return paired.Setup("tiny-qwen3", 64, kind == "varied", 256, 4, steps, warm_up(options))
    return paired.Setup("qwen3", 512, kind == "varied", 512, 4, steps, warm_up(options))


def race(options: argparse.Namespace, kind: str, memory: dict[str, Any]) -> dict[str, Any]:
    """The worker and mlx_lm in alternating order."""
    runs: dict[str, list[dict[str, Any]]] = {"worker": [], "mlx_lm": []}
    chosen = setup(options, kind, options.steps)
    for number in range(options.pairs):
        if runs["worker"] and time.monotonic() - STARTED_S > options.budget_s:
            say(f"{kind}: no time for pair {number + 1}")
            break
        order = ["worker", "mlx_lm"] if number % 2 == 0 else ["mlx_lm", "worker"]
        losses = {}
        for side in order:
            result = paired.worker(chosen, memory) if side == "worker" else paired.mlx_lm(chosen)
            losses[side] = result.losses
            runs[side].append(paired.plain(result))
            say(
                f"{kind} {number + 1}: {side} {result.step_ms:.2f} ms, peak {result.peak_bytes / MIB:,.0f} MiB, "
                f"cache {result.cache_bytes / MIB:,.0f} MiB, {result.checkpoints} checkpoints"
            )
        compare(kind, losses, options.steps)
    pairs = zip(runs["worker"], runs["mlx_lm"], strict=True)
    ratios = [mlx_lm["step_ms"] / worker["step_ms"] for worker, mlx_lm in pairs]
    return {"setup": vars(chosen), **runs, "ratios": ratios, "median_ratio": statistics.median(ratios)}


def compare(kind: str, losses: dict[str, dict[int, float]], last: int) -> None:
    """Raises RuntimeError if the final losses differ by over 2 %. mlx_lm reports the mean of ten steps."""
    worker = statistics.mean(losses["worker"][step] for step in range(last - 9, last + 1))
    mlx_lm = losses["mlx_lm"][last]
    say(f"{kind}: mean loss of the last ten steps: worker {worker:.5f}, mlx_lm {mlx_lm:.5f}")
    if abs(worker - mlx_lm) > 0.02 * abs(mlx_lm):
        raise RuntimeError(f"the losses differ by over 2 %: worker {worker}, mlx_lm {mlx_lm}")


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Varied lengths, deterministic kernels, a checkpoint every 5 updates.

    Raises RuntimeError when the weights or a loss differ by a bit.
    """
    chosen = setup(options, "varied", LAST_STEP)
    every = {"every_steps": 5, "every_seconds": 0}
    memory = {"limit_bytes": options.limit_gib * 2**30}
    with tempfile.TemporaryDirectory(prefix="bench-") as one, tempfile.TemporaryDirectory(prefix="bench-") as two:
        uninterrupted = paired.generation(Path(one), chosen, memory, every, deterministic=True)
        say(f"resume: uninterrupted run {uninterrupted.weights_sha256}")
        first = paired.generation(Path(two), chosen, memory, every, 1, KILL_AT_STEP, deterministic=True)
        say(f"resume: killed at step {max(first.losses)}, {first.checkpoints} checkpoints reported")
        second = paired.generation(Path(two), chosen, memory, every, 2, deterministic=True)
        begun = min(second.losses)
        say(f"resume: resumed with step {begun}, {second.weights_sha256}")
    differing = [step for step, loss in (first.losses | second.losses).items() if uninterrupted.losses[step] != loss]
    found = {
        "uninterrupted": uninterrupted.weights_sha256, "resumed": second.weights_sha256, "resumed_with_step": begun,
        "killed_at_step": max(first.losses), "steps_whose_loss_differs": differing,
    }  # fmt: skip
    if begun == 1:
        raise RuntimeError(f"the second generation started from the beginning: {found}")
    if second.weights_sha256 is None or uninterrupted.weights_sha256 != second.weights_sha256 or differing:
        raise RuntimeError(f"not bit-equal: {found}")
    say("resume: bit-equal, weights and losses")
    return found


def show(results: dict[str, Any]) -> None:
    for kind, required in REQUIRED.items():
        if kind not in results:
            continue
        found = results[kind]
        for side in ("worker", "mlx_lm"):
            for run in found[side]:
                print(
                    f"{kind:7} {side:7} {run['step_ms']:9.2f} ms/step  peak {run['peak_bytes'] / MIB:9,.0f} MiB  "
                    f"cache {run['cache_bytes'] / MIB:9,.0f} MiB"
                )
        ratios = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
        print(f"{kind:7} mlx_lm/worker: {ratios}; median {found['median_ratio']:.3f} (required: {required})")
    if "resume" in results:
        found = results["resume"]
        print(f"resume  bit-equal after SIGKILL at step {found['killed_at_step']}: {found['uninterrupted']}")
    for failure in results["failures"]:
        print(f"FAILED  {failure[:1000]}")


if __name__ == "__main__":
    main()

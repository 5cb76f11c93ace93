"""How much a healthy worker grows in a long run of varied lengths: MiB/step of resident memory after the warm-up.

Trains a tiny Llama for 10,000 updates on sequences of many lengths, which accumulate compiled programs and cached
buffers. The growth is the Theil-Sen slope, the median over all pairs of points, which a single jump hardly changes.
"""

import statistics
import tempfile
from pathlib import Path

from support import common, paired

POINTS = 400
REQUIRED_MIB_PER_STEP = 0.05
LIMIT_BYTES = 2 * 2**30


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=1_000, help="updates that are not measured")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest sample; the shortest: an eighth")
    options = parser.parse_args()
    setup = paired.Setup(
        shape="micro-llama", length=options.length, varied=True, count=2000, batch=2, steps=options.steps, warm_up=0
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as name, paired.listening(Path(name)) as listener:
        memory = {"limit_bytes": LIMIT_BYTES}
        command = paired.worker_command(Path(name), setup, listener.endpoint, memory, {"every_seconds": 5.0})
        code = paired.run_worker(Path(name), command, listener, timeout_s=3600.0)
        if code != 0:
            raise RuntimeError(f"the worker ended with {code}: {(Path(name) / 'output.log').read_text()[-3000:]}")
        steps = listener.steps
    counted = [step for step in steps if step.step > options.warm_up]
    chosen = counted[:: max(1, len(counted) // POINTS)]
    fields = ("resident_bytes", "active_bytes", "cache_bytes")
    slopes = {name: slope([(step.step, getattr(step, name) / common.MIB) for step in chosen]) for name in fields}
    rows = [
        [name, *(f"{getattr(step, name) / common.MIB:.1f}" for step in (chosen[0], chosen[-1])), f"{value:.6f}"]
        for name, value in slopes.items()
    ]
    common.table(["", f"MiB at step {chosen[0].step}", f"MiB at step {chosen[-1].step}", "MiB/step"], rows)
    good = slopes["resident_bytes"] < REQUIRED_MIB_PER_STEP
    print(f"{len(steps)} updates; required: under {REQUIRED_MIB_PER_STEP} MiB/step: {'met' if good else 'MISSED'}")
    common.write(options.json, {
        "steps": len(steps), "mib_per_step": slopes,
        "resident_mib": [[step.step, round(step.resident_bytes / common.MIB, 2)] for step in chosen],
    })  # fmt: skip


def slope(points: list[tuple[int, float]]) -> float:
    """The Theil-Sen slope."""
    return statistics.median(
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 != x1
    )


if __name__ == "__main__":
    main()

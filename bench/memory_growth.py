"""What our worker grows by in a long run of varied lengths: MB of resident memory a step, after the warm-up.

A tiny Llama, 10,000 real updates, sequences of many lengths: what makes compiled programs and cached buffers pile up.
The growth is the Theil-Sen slope, the median over all pairs of points, which a single jump does not move.
"""

import statistics
import tempfile
from pathlib import Path

from support import common, paired

POINTS = 400
WANTED_MB_PER_STEP = 0.05
LIMIT_BYTES = 2 * 2**30


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warm-up", type=int, default=1_000)
    parser.add_argument("--length", type=int, default=512, help="of the longest sample; the shortest has an eighth")
    options = parser.parse_args()
    setup = paired.Setup(
        shape="micro-llama", length=options.length, varied=True, count=2000, batch=2, steps=options.steps, warm_up=0
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as name, paired.listening(Path(name)) as listener:
        memory = {"limit_bytes": LIMIT_BYTES}
        command = paired.worker_command(Path(name), setup, listener.endpoint, memory, {"every_seconds": 5.0})
        code = paired.live(Path(name), command, listener, timeout_s=3600.0)
        if code != 0:
            raise RuntimeError(f"our worker ended with {code}: {(Path(name) / 'output.log').read_text()[-3000:]}")
        steps = listener.steps
    counted = [step for step in steps if step.step > options.warm_up]
    chosen = counted[:: max(1, len(counted) // POINTS)]
    fields = ("resident_bytes", "active_bytes", "cache_bytes")
    slopes = {name: slope([(step.step, getattr(step, name) / 1e6) for step in chosen]) for name in fields}
    rows = [
        [name, f"{getattr(chosen[0], name) / 1e6:.1f}", f"{getattr(chosen[-1], name) / 1e6:.1f}", f"{value:.6f}"]
        for name, value in slopes.items()
    ]
    common.table(["", f"MB at step {chosen[0].step}", f"MB at step {chosen[-1].step}", "MB a step"], rows)
    good = slopes["resident_bytes"] < WANTED_MB_PER_STEP
    print(f"{len(steps)} updates; wanted: less than {WANTED_MB_PER_STEP} MB a step: {'kept' if good else 'MISSED'}")
    common.write(options.json, {
        "steps": len(steps), "mb_per_step": slopes,
        "resident_mb": [[step.step, round(step.resident_bytes / 1e6, 2)] for step in chosen],
    })  # fmt: skip


def slope(points: list[tuple[int, float]]) -> float:
    """Theil-Sen."""
    return statistics.median(
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 != x1
    )


if __name__ == "__main__":
    main()

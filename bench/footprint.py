"""What the daemon costs: its resident memory and its share of a core, with one run sampled at 20 Hz.

Measures the daemon's own process, without its worker, from outside and once a second, after a warm-up of one minute
(of a tenth of the measurement, if that is shorter). The slope is a least-squares line through the resident set.
"""

import contextlib
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from support import common

START_DEADLINE_S = 60.0


def wait_for_worker(daemon: psutil.Process) -> None:
    """Return once the daemon has a worker. Raises RuntimeError after `START_DEADLINE_S`."""
    deadline_s = time.monotonic() + START_DEADLINE_S
    while not daemon.children():
        if time.monotonic() > deadline_s or not daemon.is_running():
            raise RuntimeError("the daemon started no worker")
        time.sleep(0.1)


def measure(daemon: psutil.Process, seconds: float) -> list[tuple[float, float, float, float]]:
    """Once a second: time in seconds, resident MiB, private MiB (USS), CPU seconds."""
    rows = []
    start_s = time.monotonic()
    while (now_s := time.monotonic() - start_s) < seconds:
        memory, cpu = daemon.memory_full_info(), daemon.cpu_times()
        rows.append((now_s, memory.rss / common.MIB, memory.uss / common.MIB, cpu.user + cpu.system))
        time.sleep(max(0.0, start_s + len(rows) - time.monotonic()))
    if not daemon.children():
        raise RuntimeError("the worker ended before the measurement did, so the daemon was idle")
    return rows


def main() -> None:
    parser = common.parser(__doc__, Path(__file__).stem)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    settings = common.llama(
        steps=10_000_000, batch=8, length=64, extra="[runs.bench.memory]\nsample_interval_s = 0.05\n"
    )
    with common.workplace(settings) as folder, (folder / "daemon.log").open("wb") as log:
        common.with_examples(folder)
        command = [
            *common.SUPERVISOR,
            "serve",
            "-c",
            str(folder / "settings.toml"),
            "--state-dir",
            str(folder / "state"),
        ]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            daemon = psutil.Process(process.pid)
            wait_for_worker(daemon)
            time.sleep(min(60.0, options.minutes * 60 / 10))
            rows = measure(daemon, options.minutes * 60)
        except (RuntimeError, psutil.Error) as error:
            sys.exit(f"{error}\n{(folder / 'daemon.log').read_text()[-2000:]}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            process.wait()
    seconds, rss, uss, cpu = zip(*rows, strict=True)
    slope = statistics.linear_regression(seconds, rss).slope * 3600
    cpu_share = 100 * (cpu[-1] - cpu[0]) / (seconds[-1] - seconds[0])
    result = {
        "minutes": options.minutes,
        "rss_mib": common.spread(rss),
        "uss_mib": common.spread(uss),
        "rss_slope_mib_per_hour": slope,
        "cpu_percent_of_a_core": cpu_share,
        "cpu_seconds_per_minute": cpu_share * 0.6,
    }
    common.table(
        ["the daemon", "min", "median", "p95", "max"],
        [["resident MiB", *result["rss_mib"].values()], ["private (USS) MiB", *result["uss_mib"].values()]],
    )
    print(f"resident slope {slope:+.2f} MiB/h; {cpu_share:.2f} % of a core, {cpu_share * 0.6:.2f} CPU s per minute")
    common.write(options.json, result)


if __name__ == "__main__":
    main()

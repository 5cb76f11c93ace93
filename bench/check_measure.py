"""`mlx-supervisor check --measure` against real supervised runs: predicted and measured peaks, and the size it names.

For each architecture: a check under a limit of `--limit-mib`, then runs at three batch sizes with MLX's cache switched
off (`memory.cache_limit = 0`: the prediction leaves the cache out), then runs as a user has them at the batch size
that the check named, which must not trip, and at the next larger, which must.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from support import common, tiny_models

STEPS = 16
SIZES = (3, 5)
"""And the largest that fits."""


def main() -> None:
    parser = common.parser(__doc__, "check_measure")
    parser.add_argument("--architectures", nargs="+", default=["llama", "qwen3", "mamba2"])
    parser.add_argument("--limit-mib", type=int, default=280)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    named: list[dict[str, Any]] = []
    for architecture in arguments.architectures:
        with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
            peaks, trips = compare(Path(text), architecture, arguments.limit_mib)
        rows += peaks
        named.append(trips)
        print(f"{architecture}: done", file=sys.stderr)
    common.table(
        ["architecture", "batch size", "check MiB", "run MiB", "error %"],
        [
            [row["architecture"], row["batch_size"], row["check_mib"], row["run_mib"], 100 * row["error"]]
            for row in rows
        ],
    )
    print()
    common.table(
        ["architecture", "named", "trips there", "trips at the next"],
        [[row["architecture"], row["named"], row["trips"], row["next_trips"]] for row in named],
    )
    common.write(arguments.json, {"limit_mib": arguments.limit_mib, "peaks": rows, "named": named})


def compare(folder: Path, architecture: str, limit_mib: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Peaks by batch size, and trips at the size that the check names and at the next."""
    tiny_models.make_model(folder / "model", architecture)
    tiny_models.make_data(folder / "data", train=160, valid=16)
    checked = check(folder, limit_mib)
    largest = checked["largest"]
    line = checked["line"]
    peaks = []
    for size in (*SIZES, largest):
        predicted_mib = (line["base_bytes"] + size * line["bytes_per_sample"]) / common.MIB
        run_mib = max(each["peak_footprint_mib"] for each in run(folder, size, 8192, "cache_limit = 0")["generations"])
        peaks.append(
            {
                "architecture": architecture, "batch_size": size, "check_mib": predicted_mib, "run_mib": run_mib,
                "error": predicted_mib / run_mib - 1,
            }
        )  # fmt: skip
    trips, next_trips = (run(folder, size, limit_mib)["trips"] for size in (largest, largest + 1))
    return peaks, {"architecture": architecture, "named": largest, "trips": trips, "next_trips": next_trips}


def check(folder: Path, limit_mib: int) -> dict[str, Any]:
    """The measured part of the check's report."""
    settings = write_settings(folder, 4, limit_mib)
    command = [*common.SUPERVISOR, "check", str(settings), "--measure", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured: dict[str, Any] = json.loads(done.stdout)["measured"]
    return measured


def run(folder: Path, size: int, limit_mib: int, extra: str = "") -> dict[str, Any]:
    """The summary of a supervised run at a batch size."""
    write_settings(folder, size, limit_mib, extra)
    subprocess.run(["rm", "-rf", folder / "state", folder / "adapters"], check=True)
    return common.run(folder)


def write_settings(folder: Path, size: int, limit_mib: int, extra: str = "") -> Path:
    """`settings.toml` and `lora.yaml`."""
    (folder / "lora.yaml").write_text(
        f"model: model\ndata: data\nadapter_path: adapters\nbatch_size: {size}\niters: {STEPS}\nnum_layers: 2\n"
        f"learning_rate: 1e-4\nmax_seq_length: {tiny_models.LENGTH}\nval_batches: 2\nsteps_per_eval: {STEPS}\n"
        "lora_parameters: {rank: 4, scale: 10.0, dropout: 0.0}\n"
    )
    path = folder / "settings.toml"
    path.write_text(
        '[runs.run.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n'
        f'[runs.run.memory]\nlimit = "{limit_mib} MiB"\n{extra}\n'
    )
    return path


if __name__ == "__main__":
    main()

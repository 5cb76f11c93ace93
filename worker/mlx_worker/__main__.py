"""`python -m mlx_worker JOB_FILE`: one generation of a run, from its job file to its exit status."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - nothing imported yet
    del sys.path[0]  # a file of the user's in the working directory must not shadow a library

import argparse
import contextlib
import io
import traceback
from pathlib import Path
from typing import NoReturn

from mlx_supervisor import wire
from mlx_worker import last_message
from mlx_worker.errors import NotFiniteError, RefusedError
from mlx_worker.supervision import run_lock
from mlx_worker.supervision.lifeline import watch_supervisor
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.raised import errors_of
from mlx_worker.supervision.stop import StopFlag, install_signals
from mlx_worker.training import determinism, inputs


def main() -> NoReturn:
    """Parse the arguments, run the job, exit."""
    _make_output_lossy()
    arguments = _parse()
    stop = StopFlag()
    try:
        if arguments.data_limit_mib is not None:
            _limit_data(arguments.data_limit_mib)
        job = _read_job(arguments.job_file)
    except RefusedError as error:
        _print_refused(error)
        sys.exit(wire.EXIT_REFUSED)
    if arguments.check is not None:
        sys.exit(_check(arguments, job, stop))
    held = _hold(job)
    drilled = not job.drill.generations or job.generation in job.drill.generations
    install_signals(stop, ignore_sigterm=job.drill.ignore_sigterm and drilled)
    if not arguments.bare:
        watch_supervisor(stop, job.grace_s)
    link = Link(job.run, job.generation, None if arguments.bare else job.telemetry)
    link.on_step, link.on_bye = held.trained, last_message.writer(Path(job.run_dir))
    link.hello()
    link.phase("load")
    code = _run(job, link, stop)
    link.close()
    sys.stdout.flush()
    sys.exit(code)


def _check(arguments: argparse.Namespace, job: wire.Job, stop: StopFlag) -> int:
    from mlx_worker.check import command

    install_signals(stop)
    watch_supervisor(stop, job.grace_s)
    return command.run(job, arguments.check, stop, measures=arguments.measure, checkpoints=arguments.checkpoints)


def _run(job: wire.Job, link: Link, stop: StopFlag) -> int:
    try:
        determinism.prepare(job.deterministic)
        found = inputs.read(job)
        from mlx_worker.training import loop  # after the hello: importing MLX takes seconds

        ending = loop.run(job, link, stop, found)
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        return _report(error, link)
    outcome = "completed" if ending.completed else "stopped"
    link.send(
        wire.Bye,
        outcome=outcome, reason=ending.reason, step=ending.progress.step, loss=ending.progress.loss,
        weights_sha256=ending.weights_sha256, lost=ending.lost, exported=ending.exported,
    )  # fmt: skip
    if ending.lost:
        print(ending.lost, file=sys.stderr)
    rate = ending.steps / ending.seconds if ending.seconds > 0 else 0.0
    print(
        f"{outcome}: step={ending.progress.step} steps={ending.steps} seconds={ending.seconds:.3f} "
        f"steps_per_second={rate:.3f}"
    )
    return wire.EXIT_COMPLETED if ending.completed else wire.EXIT_STOPPED


def _report(error: BaseException, link: Link) -> int:
    """Send the error in the bye, print it, and return the exit status that it has."""
    errors = errors_of(error)
    refused, not_finite = isinstance(error, RefusedError), isinstance(error, NotFiniteError)
    reason = (
        " ".join(errors[0].message.split()) if refused or not_finite else f"{type(error).__name__}: {errors[0].message}"
    )
    outcome = "refused" if refused else "failed"
    held_bytes, free_bytes = _device_at_death() if outcome == "failed" else (None, None)
    link.send(
        wire.Bye,
        outcome=outcome, reason=reason, step=link.last_step, loss=link.last_loss, errors=errors,
        device_held_bytes=held_bytes, device_free_bytes=free_bytes,
    )  # fmt: skip
    if refused:
        _print_refused(error)
        return wire.EXIT_REFUSED
    if not_finite:
        print(f"failed: {error}", file=sys.stderr)
        return wire.EXIT_NOT_FINITE
    traceback.print_exception(error)
    return wire.EXIT_FAILED


def _device_at_death() -> tuple[int | None, int | None]:
    """What MLX held of a device's own memory, and what all processes left of it; None: unknown."""
    if "mlx.core" not in sys.modules:
        return None, None
    from mlx_worker.memory.device import at_death

    return at_death()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mlx_worker", description=__doc__)
    parser.add_argument("job_file", type=Path, help="job.json, as the supervisor writes it")
    parser.add_argument("--bare", action="store_true", help="run the same loop without a supervisor")
    parser.add_argument("--check", type=Path, metavar="FILE", help="train nothing; write a report of the job to FILE")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="with --check: the run's own, to compare with"
    )
    parser.add_argument("--measure", action="store_true", help="with --check: measure a few updates")
    parser.add_argument(
        "--data-limit-mib", type=int, metavar="N", help="allow at most N MiB of data memory (Linux: RLIMIT_DATA)"
    )
    return parser.parse_args()


def _limit_data(limit_mib: int) -> None:
    import resource

    if sys.platform != "linux":
        raise RefusedError("--data-limit-mib: only Linux enforces RLIMIT_DATA")
    if limit_mib < 1:
        raise RefusedError(f"--data-limit-mib: expected at least 1, found {limit_mib}")
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * 2**20, limit_mib * 2**20))


def _read_job(path: Path) -> wire.Job:
    try:
        return wire.load_job(path.read_bytes())
    except (OSError, wire.WireError) as error:
        raise RefusedError(f"{path}: {error}") from None


def _hold(job: wire.Job) -> run_lock.HeldRun:
    try:
        return run_lock.hold(job)
    except RefusedError as error:
        _print_refused(error)
        sys.exit(wire.EXIT_REFUSED)


def _print_refused(error: BaseException) -> None:
    sys.stdout.flush()
    print("refused: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


class _LossyOutput(io.TextIOWrapper):
    """Output that drops what it cannot write (a closed pipe, a full disk) and raises nothing."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _make_output_lossy() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        setattr(sys, name, _LossyOutput(stream.detach(), "utf-8", "backslashreplace", line_buffering=True))


if __name__ == "__main__":
    main()

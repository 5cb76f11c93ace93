"""The causes of a worker's death, and how one is found. docs/causes.md explains each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mlx_supervisor.core.diagnosis.stderr import TEXT_LIMIT, StderrEnd, printable, read_end
from mlx_supervisor.core.events import Raised


class Cause(StrEnum):
    """Every cause of a death. The values are in journals and must not change."""

    COMPLETED = "completed"
    REQUESTED = "requested"
    PRESSURE = "memory pressure"
    LEAK = "memory leak"
    OOM_KILL = "killed by the kernel for memory"
    DEVICE_OOM = "device out of memory"
    OUT_OF_MEMORY = "out of memory"
    RESOURCE_LIMIT = "Metal resource limit"
    GPU_WATCHDOG = "GPU watchdog"
    GPU_ERROR = "GPU error"
    NOT_FINITE = "the loss is not a finite number"
    HANG = "hang"
    START_TIMEOUT = "not ready in time"
    CRASH = "crash"
    KILLED = "killed externally"
    INTERRUPTED = "stopped externally"
    REFUSED = "refused its job"
    SPAWN_FAILED = "could not be started"
    BLIND = "memory could not be measured"
    SUPERVISOR_LOST = "the supervisor died"
    HOST_LOST = "the machine restarted"


MEMORY_CAUSES = frozenset({Cause.PRESSURE, Cause.LEAK, Cause.OOM_KILL, Cause.DEVICE_OOM, Cause.OUT_OF_MEMORY})
"""Only these halve the micro-batch."""

EXIT_NOT_FINITE_CODE = 65
"""Equal to `wire.EXIT_NOT_FINITE`, which the core must not import; a test compares them."""
EXIT_HANG_CODE = 70
"""Equal to `wire.EXIT_HANG`; likewise."""
TEXT_CHARS = 300
SIGABRT, SIGKILL, SIGSEGV = 6, 9, 11
POLITE_SIGNALS = frozenset({1, 2, 15})
"""SIGHUP, SIGINT, SIGTERM: a request to stop, before the worker handled signals itself."""
BAD_ACCESS_SIGNALS = frozenset({SIGSEGV, 7, 10})
"""SIGSEGV, and SIGBUS by its number on Linux and on macOS."""
SHELL_SIGNAL_CODES = range(128 + 1, 128 + 32)
"""A shell between supervisor and worker turns the worker's signal into such an exit code."""
SIGNAL_NAMES = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 8: "SIGFPE", 9: "SIGKILL",
    11: "SIGSEGV", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM", 24: "SIGXCPU", 25: "SIGXFSZ",
}  # fmt: skip
"""Signals with the same number on Linux and macOS."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a worker died.

    `text`: what happened, at most 300 characters: a sentence, or the error with its place. `advice`: what helps, "" if
    unknown. `error_key`: equal in two generations that crashed with the same error; "" for other causes.
    """

    cause: Cause
    text: str
    advice: str = ""
    error_key: str = ""


@dataclass(frozen=True, slots=True)
class _Mark:
    """The cause of errors of these types whose message begins like this."""

    kinds: frozenset[str]
    message: re.Pattern[str]
    cause: Cause
    advice: str = ""


_RUNTIME = frozenset({"RuntimeError", "runtime_error"})
"""MLX's errors: in Python, and in C++ where nothing catches them."""
_OS = frozenset({"OSError", "BlockingIOError", "SafetensorError", "RuntimeError"})
_METAL = r"\[METAL\] Command buffer execution failed: .{0,200}?"
_CUDA = r"(?:CUDA error: |(?:cuda|cu|cublas|cublasLt|cudnn|nccl)[A-Z]\w{0,100}.{0,1000}? failed(?: with code)?: )"

SMALLER = "use a smaller batch or shorter sequences, or close other programs that use the GPU"
DISPLAY = (
    "not the batch: let the display sleep (pmset displaysleepnow) or close programs that draw on it; setting "
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment has helped others"
)
SHORTER_WORK = (
    "not the batch: set smaller MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER in the environment, so that each "
    "command buffer takes less time; plug a display emulator into a Mac without a display"
)
VICTIM = "an error of another program on the GPU aborted this run's work; the run itself is not at fault"
DRIVER = "if it happens again: read the driver's log (dmesg, Console), restart the machine, then check the hardware"
DISK = "free space on the disk that the task writes to"

_MARKS = tuple(
    _Mark(kinds, re.compile(pattern), cause, advice)
    for kinds, pattern, cause, advice in (
        (_RUNTIME, _METAL + r"(?:Insufficient Memory|kIOGPU\w+ErrorOutOfMemory)", Cause.DEVICE_OOM, SMALLER),
        (_RUNTIME, _METAL + r"(?:Impacting Interactivity|0000000e:)", Cause.GPU_WATCHDOG, DISPLAY),
        (_RUNTIME, _METAL + r"(?:Caused GPU Timeout Error|kIOGPU\w+ErrorTimeout)", Cause.GPU_WATCHDOG, SHORTER_WORK),
        (_RUNTIME, _METAL + r"(?:victim of GPU error|kIOGPU\w+ErrorInnocentVictim)", Cause.GPU_ERROR, VICTIM),
        (_RUNTIME, _METAL, Cause.GPU_ERROR, DRIVER),
        (_RUNTIME, r"\[metal::malloc\] Resource limit \(\d+\) exceeded", Cause.RESOURCE_LIMIT, ""),
        (_RUNTIME, r"\[metal::malloc\] (?:Attempting|Unable) to allocate", Cause.DEVICE_OOM, SMALLER),
        (_RUNTIME, r"\[malloc(?:_or_wait)?\] Unable to allocate", Cause.DEVICE_OOM, SMALLER),
        (
            _RUNTIME,
            _CUDA + r"(?:out of memory|CUDA_ERROR_OUT_OF_MEMORY|CU\w+_STATUS_ALLOC_FAILED|memory allocation)",
            Cause.DEVICE_OOM,
            SMALLER,
        ),
        (_RUNTIME, r"CUDA out of memory", Cause.DEVICE_OOM, SMALLER),
        (frozenset({"OutOfMemoryError"}), r"", Cause.DEVICE_OOM, SMALLER),
        (_RUNTIME, _CUDA + r"the launch timed out and was terminated", Cause.GPU_WATCHDOG, SHORTER_WORK),
        (
            _RUNTIME,
            _CUDA + r"(?:an illegal (?:memory access|instruction) was encountered|uncorrectable (?:ECC|NVLink) error|"
            r"unspecified launch failure|misaligned address|hardware stack error|invalid program counter|"
            r"unknown error|all CUDA-capable devices are busy|no CUDA-capable device|initialization error|"
            r"system not yet initialized)",
            Cause.GPU_ERROR,
            DRIVER,
        ),
        (frozenset({"MemoryError", "_ArrayMemoryError", "bad_alloc"}), r"", Cause.OUT_OF_MEMORY, ""),
        (_OS, r"\[Errno 12\]", Cause.OUT_OF_MEMORY, ""),
        (frozenset({"KeyboardInterrupt"}), r"", Cause.INTERRUPTED, ""),
        (_OS, r"\[Errno (?:28|122|69)\]|.{0,200}No space left on device", Cause.CRASH, DISK),
        (_OS, r"\[Errno 24\]", Cause.CRASH, "too many open files: close them in the task, or raise ulimit -n"),
        (
            frozenset({"ModuleNotFoundError"}),
            r"",
            Cause.CRASH,
            "install the module in the worker's environment, or run in an environment that has it",
        ),
        (
            _RUNTIME,
            r"\[metal::load_device\] No Metal device",
            Cause.CRASH,
            "macOS offers the GPU only in a session of a user who is logged in at the screen: start the run there",
        ),
    )
)  # fmt: skip
"""Messages of MLX, Metal, CUDA and Python. tests/core/diagnosis has an example of each, with its source."""

ADVICE = {
    Cause.OOM_KILL: "set memory.limit below what the machine or its control group has, so that the breaker acts first",
    Cause.PRESSURE: SMALLER,
    Cause.OUT_OF_MEMORY: "use a smaller batch, or find what the task keeps in main memory",
    Cause.RESOURCE_LIMIT: "too many buffers, not too many bytes: pad sequences to a few fixed lengths",
    Cause.NOT_FINITE: "try a lower learning rate, a longer warm-up or clipping",
}
LOST_CHILD = re.compile(
    r"(?:concurrent\.futures\.process\.)?BrokenProcessPool|EOFError|ConnectionResetError|BrokenPipeError|"
    r"RuntimeError: DataLoader worker"
)
"""Errors of a process that lost a child of its own. If the kernel killed for memory, it killed that child."""


def diagnose(
    exit_code: int | None,
    signal: int | None,
    stderr_tail: str,
    *,
    oom_killed: bool | None,
    near_limit: bool,
    errors: tuple[Raised, ...] = (),
) -> Diagnosis:
    """The cause of a death that the supervisor did not bring about.

    `oom_killed`: whether the kernel counted a kill for memory during this generation; None if unknown. `near_limit`:
    whether the last sample was near `memory.limit`. `errors`: the bye's, the one that ended the worker first.
    `stderr_tail` counts only without them, or after a signal.
    """
    if exit_code is not None and exit_code in SHELL_SIGNAL_CODES:
        signal = exit_code - 128
    if signal == SIGKILL:
        return _killed(oom_killed, near_limit)
    if signal in POLITE_SIGNALS:
        return _diagnosis(Cause.INTERRUPTED, f"another process sent the worker {SIGNAL_NAMES[signal]}")
    if exit_code is None and signal is None:
        return _diagnosis(Cause.KILLED, "the worker ended, and its exit status is unknown")
    end = read_end(stderr_tail)
    named = _by_exit_code(exit_code, end, errors)
    if named is not None:
        return named
    if signal is not None and signal != SIGABRT:
        return _by_signal(signal, end, near_limit)
    aborted = end.aborted if signal == SIGABRT else None
    candidates = (*errors, aborted) if errors else (aborted, end.raised)
    chain = tuple(each for each in candidates if each is not None)
    if oom_killed and chain and LOST_CHILD.match(_line(chain[0])):
        return _diagnosis(Cause.OOM_KILL, f"the kernel killed a child of the worker for memory; then {_said(chain[0])}")
    if chain:
        return _by_error(chain)
    if signal is not None:
        return _by_signal(signal, end, near_limit=False)
    return _diagnosis(Cause.CRASH, end.last or f"exit code {exit_code}, nothing printed")


def _killed(oom_killed: bool | None, near_limit: bool) -> Diagnosis:
    if oom_killed:
        return _diagnosis(Cause.OOM_KILL, "the kernel killed the worker: out of memory")
    if oom_killed is None and near_limit:
        return _diagnosis(Cause.PRESSURE, "the worker was killed near the memory limit (sender unknown)")
    return _diagnosis(Cause.KILLED, "another process sent the worker SIGKILL")


def _by_exit_code(exit_code: int | None, end: StderrEnd, errors: tuple[Raised, ...]) -> Diagnosis | None:
    """A cause that the worker itself names by its exit status, or by Python's fault handler; None: another one."""
    if exit_code == EXIT_NOT_FINITE_CODE:
        said = errors[0].message if errors else end.last.removeprefix("failed: ")
        return _diagnosis(Cause.NOT_FINITE, said or "loss became NaN or infinite")
    if exit_code == EXIT_HANG_CODE:
        silence = end.last.removeprefix("watchdog: ").partition(";")[0]
        return _diagnosis(Cause.HANG, f"its own watchdog ended it: {silence}")
    if exit_code == 1 and end.timed_out and not errors:
        return _diagnosis(Cause.HANG, "its own watchdog ended it: no progress")
    return None


def _by_error(chain: tuple[Raised, ...]) -> Diagnosis:
    """The cause of the first error in the chain that has a known one; else a crash.

    `chain`: the error that ended the worker, then those that led to it.
    """
    found = next(((each, mark) for each in chain if (mark := _mark(each)) is not None), None)
    if found is not None and found[1].cause is not Cause.CRASH:
        each, mark = found
        then = "" if each is chain[0] else f", then {_line(chain[0])}"
        return _diagnosis(mark.cause, _said(each) + then, mark.advice)
    advice = found[1].advice if found is not None else ""
    first = chain[1] if len(chain) > 1 and chain[0].name.endswith("ExceptionGroup") else chain[0]
    text = _said(first) if first is chain[0] else f"{_line(chain[0])}: {_said(first)}"
    return Diagnosis(Cause.CRASH, text[:TEXT_CHARS], advice, _key(first))


def _by_signal(signal: int, end: StderrEnd, near_limit: bool) -> Diagnosis:
    """A crash in native code. MLX on the CPU crashes like this after a failed allocation, which it does not check."""
    name = SIGNAL_NAMES.get(signal, f"signal {signal}")
    place = end.fatal.place if end.fatal else ""
    where = f"{name} at {place}" if place else name
    if near_limit and signal in BAD_ACCESS_SIGNALS:
        text = f"{where}, near the memory limit: native code crashes like this when an allocation fails"
        return _diagnosis(Cause.PRESSURE, text)
    said = end.fatal.kind if end.fatal else end.last if signal == SIGABRT else ""
    text = f"{where}: {said}" if said else where
    return Diagnosis(Cause.CRASH, text[:TEXT_CHARS], error_key=where if place else "")


def _mark(raised: Raised) -> _Mark | None:
    name = raised.name.rpartition(":")[2]
    for mark in _MARKS:
        if name in mark.kinds and mark.message.match(raised.message):
            return mark
    return None


def _line(raised: Raised) -> str:
    return f"{raised.kind}: {raised.message}" if raised.message else raised.kind


def _said(raised: Raised) -> str:
    """The error in one line, with its place; a long message is cut."""
    line = _line(raised)
    place = f" ({raised.place})"[:100] if raised.place else ""
    room = TEXT_CHARS - len(place)
    return (line if len(line) <= room else line[: room - 1] + "…") + place


_CHANGING = re.compile(r"0x[0-9a-fA-F]+|/tmp/\S+|\b[0-9a-fA-F]{8,}\b|\d+")


def _key(raised: Raised) -> str:
    """Equal in two generations that died of the same error."""
    place = f"{raised.file}:{raised.line}" if raised.file else ""
    return f"{raised.name} at {place}: {_CHANGING.sub('#', raised.message)}"[: 2 * TEXT_CHARS]


def _diagnosis(cause: Cause, text: str, advice: str = "") -> Diagnosis:
    return Diagnosis(cause, text[:TEXT_CHARS], advice or ADVICE.get(cause, ""))


def last_line(text: str, limit_chars: int = TEXT_CHARS) -> str:
    """The last line of `text` that is not empty, shortened."""
    lines = [line.strip() for line in printable(text[-TEXT_LIMIT:]).splitlines() if line.strip()]
    return lines[-1][:limit_chars] if lines else ""


def refused_at_start(record: Mapping[str, Any]) -> bool:
    """Whether a generation is a start that was refused: it changed nothing, and tables leave it out."""
    return record.get("cause") == Cause.REFUSED.value and record.get("first_step") is None

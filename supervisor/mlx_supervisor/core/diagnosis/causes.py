"""Why a worker died, named before anything is decided from it. docs/causes.md lists them all."""

import re
from dataclasses import dataclass
from enum import StrEnum

from mlx_supervisor.core.diagnosis.stderr import TEXT_LIMIT, StderrEnd, printable, read_end
from mlx_supervisor.core.events import Raised


class Cause(StrEnum):
    """Only the memory causes halve the batch. The values are in journals: they stay as they are."""

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

EXIT_NOT_FINITE_CODE = 65
"""`wire.EXIT_NOT_FINITE`, which the core may not import; a test holds them equal."""
TEXT_CHARS = 300
SIGABRT, SIGKILL, SIGSEGV = 6, 9, 11
POLITE_SIGNALS = frozenset({1, 2, 15})
"""SIGHUP, SIGINT, SIGTERM: somebody asked for the end, before the worker could answer in its own way."""
BAD_ACCESS_SIGNALS = frozenset({SIGSEGV, 7, 10})
"""SIGSEGV, and SIGBUS by its number on Linux and on macOS."""
SHELL_SIGNAL_CODES = range(128 + 1, 128 + 32)
"""A shell between us and the worker passes its child's signal on as such an exit code."""
SIGNAL_NAMES = {
    1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 5: "SIGTRAP", 6: "SIGABRT", 8: "SIGFPE", 9: "SIGKILL",
    11: "SIGSEGV", 13: "SIGPIPE", 14: "SIGALRM", 15: "SIGTERM", 24: "SIGXCPU", 25: "SIGXFSZ",
}  # fmt: skip
"""Those that have the same number on Linux and on macOS."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a worker died, for people and for what is decided from it.

    `text`: a sentence, or the last lines of the traceback; at most 300 characters. `advice`: what helps, "" if nothing
    is known. `error_key`: equal in two lives that died of the same error of the user's code; "" for other causes.
    """

    cause: Cause
    text: str
    advice: str = ""
    error_key: str = ""

    @property
    def memory(self) -> bool:
        """Whether less memory would have helped."""
        return self.cause in MEMORY_CAUSES


@dataclass(frozen=True, slots=True)
class _Mark:
    """How the message of an error begins, in errors of these types (any type when empty), and what that means."""

    kinds: frozenset[str]
    message: re.Pattern[str]
    cause: Cause
    advice: str = ""


_RUNTIME = frozenset({"RuntimeError", "runtime_error"})
"""What MLX raises in Python, and what it is in C++ where nothing catches it."""
_OS = frozenset({"OSError", "BlockingIOError", "SafetensorError", "RuntimeError"})
_METAL = r"\[METAL\] Command buffer execution failed: .{0,200}?"
_CUDA = r"(?:CUDA error: |(?:cuda|cu|cublas|cublasLt|cudnn|nccl)[A-Z]\w{0,100}.{0,1000}? failed(?: with code)?: )"

SMALLER = "a smaller batch or shorter sequences; close what else uses the GPU"
DISPLAY = (
    "not the batch: let the display sleep (pmset displaysleepnow) or close what draws on it; "
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment helped others"
)
SHORTER_WORK = (
    "not the batch: smaller MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER in the environment make each piece of "
    "work on the GPU shorter; a Mac without a display wants a dummy plug"
)
VICTIM = "another program's error took this one's work along; nothing of the run's own is wrong"
DRIVER = "if it comes again: read the driver's log (dmesg, Console), restart the machine, then suspect the hardware"
DISK = "make room on the disk that the task writes to"

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
        (_OS, r"\[Errno 24\]", Cause.CRASH, "too many files are open: the task forgets to close them, or ulimit -n"),
        (
            frozenset({"ModuleNotFoundError"}),
            r"",
            Cause.CRASH,
            "install it where the worker runs, or run in the environment that has it",
        ),
        (
            _RUNTIME,
            r"\[metal::load_device\] No Metal device",
            Cause.CRASH,
            "macOS gives the GPU only to a session of a user who is logged in at the screen",
        ),
    )
)  # fmt: skip
"""Texts of MLX, Metal, CUDA and Python, as the fixtures in tests/core/diagnosis/stderr have them."""

ADVICE = {
    Cause.OOM_KILL: "set memory.limit below what the machine or its control group can give: the breaker acts first",
    Cause.PRESSURE: SMALLER,
    Cause.OUT_OF_MEMORY: "a smaller batch; look for what the task keeps in the machine's memory",
    Cause.RESOURCE_LIMIT: "too many buffers, not too many bytes: pad the sequences to a few lengths",
    Cause.NOT_FINITE: "a lower learning rate, a longer warm-up or clipped gradients; look at that update's samples",
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
    """Name the cause of a generation's end that the supervisor did not bring about.

    `oom_killed`: whether the kernel reports a kill for memory meanwhile; None where it can't tell. `near_limit`:
    whether the last sample was near the limit. `errors`: of the worker's bye, the one that ended it first. Without
    them, and after a signal, `stderr_tail` counts.
    """
    if exit_code in SHELL_SIGNAL_CODES and signal is None:
        assert exit_code is not None
        signal = exit_code - 128
    if signal == SIGKILL:
        return _killed(oom_killed, near_limit)
    if signal in POLITE_SIGNALS:
        return _diagnosis(Cause.INTERRUPTED, f"another process sent it {SIGNAL_NAMES[signal]}")
    if exit_code is None and signal is None:
        return _diagnosis(Cause.KILLED, "it ended, and its exit status is unknown")
    end = StderrEnd() if errors and signal is None else read_end(stderr_tail)
    if exit_code == EXIT_NOT_FINITE_CODE:
        said = errors[0].message if errors else end.last.removeprefix("failed: ")
        return _diagnosis(Cause.NOT_FINITE, said or "the loss is not a finite number")
    if signal is not None and signal != SIGABRT:
        return _by_signal(signal, end, near_limit)
    aborted = end.aborted if signal == SIGABRT else None
    candidates = (*errors, aborted) if errors else (aborted, end.raised)
    chain = tuple(each for each in candidates if each is not None)
    if oom_killed and chain and LOST_CHILD.match(_line(chain[0])):
        return _diagnosis(Cause.OOM_KILL, f"the kernel killed one of its processes for memory; then {_said(chain[0])}")
    if chain:
        return _by_error(chain)
    if signal is not None:
        return _by_signal(signal, end, near_limit=False)
    return _diagnosis(Cause.CRASH, end.last or f"it ended with exit code {exit_code} and printed nothing")


def _killed(oom_killed: bool | None, near_limit: bool) -> Diagnosis:
    if oom_killed:
        return _diagnosis(Cause.OOM_KILL, "the kernel killed it: out of memory")
    if oom_killed is None and near_limit:
        return _diagnosis(Cause.PRESSURE, "it was killed near the memory limit; the sender is unknown")
    return _diagnosis(Cause.KILLED, "another process sent it SIGKILL")


def _by_error(chain: tuple[Raised, ...]) -> Diagnosis:
    """The cause that any error of the chain has; else a crash. `chain`: the error that ended the worker first."""
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
    """A crash in native code. MLX on the CPU crashes so when it is refused memory: it does not check what it got."""
    name = SIGNAL_NAMES.get(signal, f"signal {signal}")
    place = end.fatal.place if end.fatal else ""
    where = f"{name} at {place}" if place else name
    if near_limit and signal in BAD_ACCESS_SIGNALS:
        text = f"{where}, near the memory limit: native code that is refused memory crashes like this"
        return _diagnosis(Cause.PRESSURE, text)
    said = end.fatal.kind if end.fatal else end.last if signal == SIGABRT else ""
    text = f"{where}: {said}" if said else where
    return Diagnosis(Cause.CRASH, text[:TEXT_CHARS], error_key=where if place else "")


def _mark(raised: Raised) -> _Mark | None:
    name = raised.name.rpartition(":")[2]
    for mark in _MARKS:
        if (not mark.kinds or name in mark.kinds) and mark.message.match(raised.message):
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
    """What two generations that die of the same error have in common."""
    place = f"{raised.file}:{raised.line}" if raised.file else ""
    return f"{raised.name} at {place}: {_CHANGING.sub('#', raised.message)}"[: 2 * TEXT_CHARS]


def _diagnosis(cause: Cause, text: str, advice: str = "") -> Diagnosis:
    return Diagnosis(cause, text[:TEXT_CHARS], advice or ADVICE.get(cause, ""))


def last_line(text: str, limit_chars: int = TEXT_CHARS) -> str:
    """The last line of `text` that is not empty, shortened."""
    lines = [line.strip() for line in printable(text[-TEXT_LIMIT:]).splitlines() if line.strip()]
    return lines[-1][:limit_chars] if lines else ""

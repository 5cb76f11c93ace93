"""Reads the end of a dead process's stderr: native deaths, and Python's last traceback where no bye arrived.

What user code logged earlier must not count, however much it resembles an error. Only the last traceback near the end
counts, or the message of a C++ abort, or the dump of a fatal signal.
"""

import re
from dataclasses import dataclass

from mlx_supervisor.core.events import Raised

TEXT_LIMIT = 64 * 1024
LINE_LIMIT = 2000
FRAMES_LIMIT = 64
LINES_AFTER = 40
"""An error followed by more lines than this was caught and logged."""
ABORT_LINES = 12
"""How far before the end of the text, or before a dump of stacks, a C++ abort's message may stand."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, marks that change the direction of writing, and line ends that only some programs know."""
_LINE_ENDS = re.compile(r"\r\n|\n|\r")
_HEADER = "Traceback (most recent call last):"
_FRAME = re.compile(r'^ +File "([^"]{0,1000})", line (\d{1,9})(?:,? in (.{1,200}))?$')
"""In a traceback ("line 3, in f"), in a dump of stacks ("line 3 in f"), and of a syntax error."""
_RAISED = re.compile(r"^((?:[^\W\d]\w*\.)[\w.<>]{1,200}|_?[A-Z]\w{0,100}[a-z]\w{0,100})(?:: (.*))?$")
"""`Type: message`. The type is dotted or in camel case: "INFO: ..." and "loss: ..." are log lines."""
_SIDE = re.compile(
    r"^(?:Exception ignored |Exception in thread |Process \S{1,100}:$|--- Logging error ---$|"
    r"Task exception was never retrieved|Future exception was never retrieved|future: <)"
)
"""The line above the traceback of an error that did not end the process."""
_DUMP = re.compile(
    r"^(?:Fatal Python error: |(?:Current thread|Thread) 0x[0-9a-f]+ |Timeout \(|Extension modules: |"
    r"Python runtime state: |Current thread's C stack trace |<no Python frame>)"
)
_FATAL = re.compile(r"^Fatal Python error: (.*)$")
_ABORTED = re.compile(r"libc\+\+abi: terminating (?:due to|with) uncaught exception of type (\S+):\s?(.*)$")
_THROWN = re.compile(r"^terminate called after throwing an instance of '(.{1,200})'$")
_WHAT = re.compile(r"^ +what\(\): +(.*)$")
_NOISE = re.compile(r"resource_tracker|^ +warnings\.warn|^\S+\.py:\d+: \w+Warning")
_LIBRARIES = ("/site-packages/", "/dist-packages/", "/lib/python", "<frozen ", "/mlx_worker/", "/mlx_supervisor/")


@dataclass(frozen=True, slots=True)
class StderrEnd:
    """`raised`: the error of the last traceback. `aborted`: the C++ exception that nothing caught.

    `fatal`: the signal by the name that Python's fault handler printed, with the place in the dumped thread.
    `last`: the last line with a letter or digit in it. `timed_out`: Python's fault handler ended a hung process.
    """

    raised: Raised | None = None
    aborted: Raised | None = None
    fatal: Raised | None = None
    last: str = ""
    timed_out: bool = False


def printable(text: str) -> str:
    """The text without terminal escapes and control characters; tabs and line ends stay."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def first_line(text: str) -> str:
    """The first line of a message, or the second where the first is empty."""
    return next((line for line in _LINE_ENDS.split(printable(text))[:2] if line.strip()), "")


def read_end(text: str) -> StderrEnd:
    """The errors at the end of a stderr, whatever else stands in it."""
    cut = printable(text[-TEXT_LIMIT:])
    lines = [line[:LINE_LIMIT] for line in _LINE_ENDS.split(cut)]
    if len(text) > TEXT_LIMIT:
        lines[0] = ""  # its beginning is missing
    start = _dump_start(lines)
    dump = lines[start:]
    before = [line for line in lines[:start] if line.strip() and not _NOISE.search(line)]
    name = next((found[1] for line in dump if (found := _FATAL.match(line))), None)
    last = next((line.strip() for line in reversed(before) if any(map(str.isalnum, line))), "")
    timed_out = any(line.startswith("Timeout (") for line in dump)
    return StderrEnd(_last_raised(before), _aborted(before), _fatal(name, dump) if name else None, last, timed_out)


def _last_raised(lines: list[str]) -> Raised | None:
    """The error of the last traceback. A thread's, child's or destructor's counts only where there is no other."""
    found: tuple[int, Raised] | None = None
    frames: list[tuple[str, int, str]] = []
    found_side = side = False
    for index, line in enumerate(lines):
        if frame := _FRAME.match(line):
            frames.append((frame[1], int(frame[2]), frame[3] or ""))
        elif frames and (error := _RAISED.match(line)):
            if found is None or found_side or not side:
                found, found_side = (index, Raised(error[1], error[2] or "", *_innermost(frames))), side
            frames, side = [], False
        elif _SIDE.match(line) or line.endswith(_HEADER):
            frames, side = [], side or _SIDE.match(line) is not None
        elif not frames:
            side = False
    if found is not None:
        return found[1] if len(lines) - found[0] <= LINES_AFTER else None
    bare = _RAISED.match(lines[-1]) if lines else None  # the traceback above it is cut off
    return Raised(bare[1], bare[2] or "") if bare else None


def _innermost(frames: list[tuple[str, int, str]]) -> tuple[str, int, str]:
    """The last frame outside libraries, of frames in the order of the calls; else the last of all."""
    own = [frame for frame in frames if not any(part in frame[0] for part in _LIBRARIES)]
    return (own or frames or [("", 0, "")])[-1]


def _dump_start(lines: list[str]) -> int:
    """The index of the dump of stacks that ends the text; the number of lines if none does.

    A process can dump its stacks on request and continue: then its later output counts.
    """
    start = len(lines)
    for index in reversed(range(len(lines))):
        line = lines[index]
        if _DUMP.match(line):
            start = index
        elif line.strip() and not line.startswith("  ") and not _NOISE.search(line):
            break
    return start


def _fatal(name: str, dump: list[str]) -> Raised:
    """The signal, and the place in the thread that it hit; in the main thread, the last, if that ran no Python."""
    heads = [index for index, line in enumerate(dump) if line.startswith(("Current thread 0x", "Thread 0x"))]
    current = [index for index in heads if dump[index].startswith("Current")]
    start = (current or heads or [0])[-1]
    frames = []
    for line in dump[start + 1 : start + 1 + FRAMES_LIMIT]:
        if (found := _FRAME.match(line)) is None:
            break
        frames.append((found[1], int(found[2]), found[3] or ""))
    return Raised(name, "", *_innermost(frames[::-1]))


def _aborted(lines: list[str]) -> Raised | None:
    """The C++ exception that nothing caught, if its message is among the last lines."""
    end = lines[-ABORT_LINES:]
    for index in reversed(range(len(end))):
        following = [line.strip() for line in end[index + 1 : index + 3]]
        if found := _ABORTED.search(end[index]):
            return Raised(found[1].rstrip(":"), " ".join([found[2], *following]).strip())
        if found := _THROWN.match(end[index]):
            what = _WHAT.match(end[index + 1]) if index + 1 < len(end) else None
            return Raised(found[1], what[1] if what else "")
    return None

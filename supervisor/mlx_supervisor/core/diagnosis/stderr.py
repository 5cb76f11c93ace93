"""The last words of a dead process: which error ended it, read from the end of its stderr.

What user code logged earlier must not count, however much it looks like the end: only the last traceback that nobody
caught does, with what it was raised from, or the message of a C++ abort, or a fatal signal's dump.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

TEXT_LIMIT = 64 * 1024
LINE_LIMIT = 2000
MESSAGE_LINES = 8
CHAIN_LIMIT = 16
FRAMES_LIMIT = 64
INTERRUPTED_LINES = 5
WORDS_AFTER = 40
"""A traceback with more lines than this after it was of an error that somebody caught and wrote down."""
ABORT_LINES = 12
"""How far before the end of the text, or before a dump of stacks, a C++ abort's message may stand."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Besides those of a terminal, what changes the direction of writing, and what only some take for the end of a line."""
_LINE_ENDS = re.compile(r"\r\n|\n|\r")
_GUTTER = re.compile(r"^\s+[|+](?:-\+)? ?")
_RULE = re.compile(r"^-{3,}.*$")
_HEADER = re.compile(r"^(?:Exception Group )?Traceback \(most recent call last\):$")
_FRAME = re.compile(r'^ +File "([^"]{0,1000})", line (\d{1,9})(?:, in (.{1,200}))?$')
_DUMP_FRAME = re.compile(r'^ +File "([^"]{0,1000})", line (\d{1,9}) in (.{1,200})$')
_RAISED = re.compile(r"^([^\W\d][\w.<>]{0,200})(?:: ?(.*))?$")
_SIDE = re.compile(
    r"^(?:Exception ignored |Exception in thread |Process \S{1,100}:$|--- Logging error ---$|"
    r"Task exception was never retrieved|Future exception was never retrieved|future: <)"
)
"""What stands above the traceback of an error that did not end the process."""
_CHAINED = (
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
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
class Frame:
    """A line of code. `function` is "" where a traceback names none (a syntax error)."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        place = f"{self.file.rpartition('/')[2]}:{self.line}"
        return f"{place} in {self.function}" if self.function else place


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as it was printed. `kind`: its type, as dotted as the traceback has it; `lines`: of its message."""

    kind: str
    lines: tuple[str, ...] = ()
    frames: tuple[Frame, ...] = ()

    @property
    def name(self) -> str:
        """The type's own name, without its module."""
        return self.kind.rpartition(".")[2]

    @property
    def message(self) -> str:
        """The first line of the message, or the second where the first is empty."""
        return next((line for line in self.lines[:2] if line.strip()), "")

    @property
    def place(self) -> Frame | None:
        """Where in the user's code it happened, as far in as can be told."""
        return innermost(self.frames)


@dataclass(frozen=True, slots=True)
class LastWords:
    """`raised`: the error that ended the process, then what it was raised from, or, for a group, its parts.

    `aborted`: the message of a C++ exception that nobody caught, with its type as kind. `fatal`: the signal by the name
    that Python's fault handler gave it, "" without; `dumped`: where the dumped thread stood. `last`: the last line.
    """

    raised: tuple[Raised, ...] = ()
    aborted: Raised | None = None
    fatal: str = ""
    dumped: Frame | None = None
    last: str = ""


@dataclass(slots=True)
class _Block:
    """One traceback, from its header, or its first frame where the header is cut off.

    `part`: of a group. `side`: it did not end the process. `chained`: the one before it led to it. `said`: the line
    that names the exception.
    """

    start: int
    end: int
    part: bool
    side: bool
    chained: bool
    raised: Raised | None = None
    said: int = 0


def innermost(frames: Sequence[Frame]) -> Frame | None:
    """The last frame that is in no library's code, of frames in the order of the calls; else the last of all."""
    own = [frame for frame in frames if not any(part in frame.file for part in _LIBRARIES)]
    return own[-1] if own else frames[-1] if frames else None


def printable(text: str) -> str:
    """The text without what a terminal obeys: it is shown to people, and comes from a process that may say anything."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def last_words(text: str) -> LastWords:
    """Read the end of a stderr; anything may stand in it."""
    lines = _lines(text)
    dump = _dump_start(lines)
    spoken = lines[:dump]
    chain = _final(_blocks(spoken))
    aborted = _aborted(spoken)
    if not chain and aborted is None:
        chain = _bare(spoken)
    fatal = next((found for line in lines[dump:] if (found := _FATAL.match(line))), None)
    said = [line.strip() for line in spoken if line.strip() and not _NOISE.search(line)]
    return LastWords(
        chain, aborted, fatal[1] if fatal else "", _dumped(lines[dump:]) if fatal else None, said[-1] if said else ""
    )


def _dumped(dump: list[str]) -> Frame | None:
    """Where the thread stood that the signal hit; the main thread, which comes last, where that one ran no Python."""
    heads = [index for index, line in enumerate(dump) if line.startswith(("Current thread 0x", "Thread 0x"))]
    current = [index for index in heads if dump[index].startswith("Current")]
    start = (current or heads or [0])[-1]
    frames = []
    for line in dump[start + 1 : start + 1 + FRAMES_LIMIT]:
        if (found := _DUMP_FRAME.match(line)) is None:
            break
        frames.append(Frame(found[1], int(found[2]), found[3]))
    return innermost(list(reversed(frames)))


def raised_in(line: str) -> Raised | None:
    """`Type: message`, as the end of a traceback has it; None when it is anything else."""
    found = _RAISED.match(line)
    return Raised(found[1], (found[2] or "",)) if found else None


def _lines(text: str) -> list[str]:
    cut = text[-TEXT_LIMIT:]
    lines = _LINE_ENDS.split(printable(cut))
    if len(text) > TEXT_LIMIT:
        lines[0] = ""  # its beginning is missing: it could seem to say anything
    return [line[:LINE_LIMIT] for line in lines]


def _dump_start(lines: list[str]) -> int:
    """Where the dump of stacks begins that the text ends with; the number of lines when it ends with none.

    A process may be asked for its stacks and go on: then what it said afterwards is what counts.
    """
    start = len(lines)
    for index in reversed(range(len(lines))):
        line = lines[index]
        if _DUMP.match(line):
            start = index
        elif line.strip() and not line.startswith("  ") and not _NOISE.search(line):
            break
    return start


def _blocks(lines: list[str]) -> list[_Block]:
    """Every traceback that names its exception and stands near enough to the end to be the end, in order."""
    plain, grouped = _without_gutters(lines)
    scan = _Scan(len(lines))
    for index, line in enumerate(plain):
        under_rule = index > 0 and grouped[index - 1] and _RULE.match(plain[index - 1]) is not None
        scan.take(index, line, grouped[index], under_rule)
    for block in scan.blocks:
        _read(plain, block)
    named = [block for block in scan.blocks if block.raised is not None]
    after = sum(1 for line in plain[named[-1].said :] if line.strip() and not _NOISE.search(line)) if named else 0
    return named if after <= WORDS_AFTER else []


def _without_gutters(lines: list[str]) -> tuple[list[str], list[bool]]:
    """The lines with the margins of exception groups taken off, and which of them had one."""
    plain, grouped = [], []
    inside = False
    for line in lines:
        gutter = _GUTTER.match(line)
        rest = line[gutter.end() :] if gutter else line
        inside = gutter is not None and (inside or _HEADER.match(rest) is not None or _FRAME.match(rest) is not None)
        plain.append(rest if inside else line)
        grouped.append(inside)
    return plain, grouped


class _Scan:
    """Finds where tracebacks begin and end, and which belong together."""

    def __init__(self, length: int) -> None:
        self.blocks: list[_Block] = []
        self._length = length
        self._open = self._side = self._chained = self._in_group = False

    def take(self, index: int, line: str, grouped: bool, under_rule: bool) -> None:
        """The next line. `under_rule`: the one before it parts the members of a group."""
        self._in_group = self._in_group and grouped
        member = under_rule and _RAISED.match(line) is not None
        if _HEADER.match(line) or member or (not self._open and _FRAME.match(line)):
            self._begin(index, grouped)
        elif line.strip() in _CHAINED:
            self._end(index)
            self._chained = bool(self.blocks)
        elif _SIDE.match(line) or (grouped and _RULE.match(line)):
            self._end(index)
            self._side, self._chained = _SIDE.match(line) is not None, False
        elif not self._open and line.strip(' "'):
            self._side = self._chained = False

    def _begin(self, index: int, grouped: bool) -> None:
        self._end(index)
        self.blocks.append(_Block(index, self._length, self._in_group, self._side, self._chained))
        self._in_group = grouped
        self._open, self._side, self._chained = True, False, False

    def _end(self, index: int) -> None:
        if self._open:
            self.blocks[-1].end = index
        self._open = False


def _read(plain: list[str], block: _Block) -> None:
    """The exception at the end of a traceback: the first line after its last frame that is not indented."""
    body = plain[block.start : block.end]
    frames = [(index, found) for index, line in enumerate(body) if (found := _FRAME.match(line))]
    after = frames[-1][0] + 1 if frames else int(_HEADER.match(body[0]) is not None)
    candidates = [(index, found) for index in range(after, len(body)) if (found := _RAISED.match(body[index]))]
    if not candidates:
        return
    first = candidates[0][0]
    # what another thread printed into the traceback ("INFO: ...", "loss: ...") is no exception
    likely = [each for each in candidates if each[0] < first + INTERRUPTED_LINES and _like_a_class(each[1][1])]
    index, found = (likely or candidates)[0]
    rest = body[index + 1 : index + MESSAGE_LINES]
    seen = tuple(Frame(each[1], int(each[2]), each[3] or "") for _, each in frames[-FRAMES_LIMIT:])
    block.raised = Raised(found[1], (found[2] or "", *rest), seen)
    block.said = block.start + index


def _like_a_class(kind: str) -> bool:
    name = kind.rpartition(".")[2].lstrip("_")
    return "." in kind or (name[:1].isupper() and not name.isupper())


def _final(blocks: list[_Block]) -> tuple[Raised, ...]:
    """The last error that nobody caught, with all that belongs to it; the last of any kind when each was caught."""
    chains: list[list[_Block]] = []
    for block in blocks:
        if chains and (block.chained or block.part):
            chains[-1].append(block)
        else:
            chains.append([block])
    if not chains:
        return ()
    uncaught = [chain for chain in chains if not chain[0].side]
    chain = (uncaught or chains)[-1]
    heads = [block for block in chain if not block.part]
    parts = [block for block in chain if block.part]
    ordered = [*reversed(heads), *parts]
    return tuple(block.raised for block in ordered[:CHAIN_LIMIT] if block.raised is not None)


def _aborted(lines: list[str]) -> Raised | None:
    """The message of a C++ exception that nobody caught, when it is among the last words."""
    said = [line for line in lines if line.strip() and not _NOISE.search(line)][-ABORT_LINES:]
    for index in reversed(range(len(said))):
        following = [line.strip() for line in said[index + 1 : index + 3]]
        if found := _ABORTED.search(said[index]):
            return Raised(found[1].rstrip(":"), (" ".join([found[2], *following]).strip(),))
        if found := _THROWN.match(said[index]):
            what = _WHAT.match(said[index + 1]) if index + 1 < len(said) else None
            return Raised(found[1], (what[1] if what else "",))
    return None


def _bare(lines: list[str]) -> tuple[Raised, ...]:
    """The last line that could be an exception's, where the traceback above it is cut off."""
    said = [line for line in lines if line.strip() and not _NOISE.search(line)]
    found = raised_in(said[-1]) if said else None
    return (found,) if found else ()

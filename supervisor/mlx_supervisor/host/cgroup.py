"""The memory control group (cgroup) of a process: its limit, what is left of it, and the kills counted there.

Versions 1 and 2, and both at once (hybrid). A limit is a group's own or an ancestor's, as far up as can be seen from
here. What is not there or can't be read counts as no limit: the machine's own memory is the bound then. Only reads.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60
"""Version 1 spells "no limit" as the largest number of whole pages; nothing real comes near this."""

GROUPS_AT_MOST = 16
"""How many moves of one process are followed."""


@dataclass(frozen=True)
class _Names:
    """How a version calls its files."""

    limit: str
    usage: str
    inactive_file: str
    oom_kills: str


_NAMES = {
    1: _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"),
    2: _Names("memory.max", "memory.current", "inactive_file", "memory.events"),
}


@dataclass(frozen=True)
class ControlGroup:
    """Where a process stands in the hierarchy that counts memory. `mount`: as far up as can be seen."""

    folder: Path
    mount: Path
    version: int

    def levels(self) -> Iterator[Path]:
        """The group's folder and its ancestors', the innermost first."""
        folder = self.folder
        while folder != self.mount:
            yield folder
            folder = folder.parent
        yield folder

    def limit_bytes(self) -> int | None:
        """The least limit that holds for the group; None without one."""
        limits = [limit for level in self.levels() if (limit := self._limit_bytes(level)) is not None]
        return min(limits, default=None)

    def available_bytes(self) -> int | None:
        """What the group may still take: the least over all limits, never below 0; None without a limit."""
        return min((left for level in self.levels() if (left := self._left_bytes(level)) is not None), default=None)

    def oom_kills(self) -> int | None:
        """Processes of this group that the kernel's out-of-memory killer has ended; None where it doesn't count.

        Version 2 counts those of the groups below too, version 1 doesn't.
        """
        names = _NAMES[self.version]
        for level in self.levels():
            if (kills := _field(level / names.oom_kills, "oom_kill")) is not None:
                return kills
            if self.version == 1:  # an ancestor's count has nothing of ours in it
                return None
        return None

    def _limit_bytes(self, level: Path) -> int | None:
        limit = _number(level / _NAMES[self.version].limit)
        return limit if limit is not None and limit < NO_LIMIT_BYTES else None

    def _left_bytes(self, level: Path) -> int | None:
        limit = self._limit_bytes(level)
        if limit is None:
            return None
        names = _NAMES[self.version]
        usage = _number(level / names.usage) or 0
        # the kernel takes back file pages not lately used before it kills
        reclaimable = min(_field(level / "memory.stat", names.inactive_file) or 0, usage)
        return max(limit - usage + reclaimable, 0)


class OomKills:
    """Whether the kernel's out-of-memory killer was at work where a process lives, from now on.

    By the counter of the process's control group, which knows nothing of other containers. Where there is none, by the
    machine's.
    """

    def __init__(self, pid: int, root: Path = ROOT) -> None:
        self._pid = pid
        self._root = root
        self._machine = machine_oom_kills(root)
        self._seen: dict[Path, tuple[ControlGroup, int | None]] = {}
        self.follow()

    def follow(self) -> None:
        """Take note of a group that the process has moved to. To be called while it lives, now and then."""
        group = find(self._pid, self._root)
        if group is not None and group.folder not in self._seen and len(self._seen) < GROUPS_AT_MOST:
            self._seen[group.folder] = group, group.oom_kills()

    def happened(self) -> bool | None:
        """None: this kernel does not count."""
        counts = [(before, group.oom_kills()) for group, before in self._seen.values()]
        if not counts or any(None in each for each in counts):  # a group may be gone by now
            counts.append((self._machine, machine_oom_kills(self._root)))
        grown = [now > before for before, now in counts if before is not None and now is not None]
        return any(grown) if grown else None


def machine_oom_kills(root: Path = ROOT) -> int | None:
    """Out-of-memory kills since the machine started, in whatever container; None where the kernel doesn't count."""
    return _field(root / "proc" / "vmstat", "oom_kill")


def find(pid: int | None = None, root: Path = ROOT) -> ControlGroup | None:
    """The memory control group of a process, or our own. None: there is none, or it can't be told.

    `root`: the folder that holds `proc` and the mounts.
    """
    text = _text(root / "proc" / ("self" if pid is None else str(pid)) / "cgroup")
    return _resolve(text, root) if text else None


@lru_cache(maxsize=8)
def _resolve(cgroup: str, root: Path) -> ControlGroup | None:
    """Kept, as the table of mounts can be long: a process that changes its group has another text."""
    mounts = _text(root / "proc" / "self" / "mountinfo")
    for version, path in _paths(cgroup):
        for top, point in _mounts(mounts, version):
            mount = root / point.lstrip("/")
            folder = _folder(mount, path, top)
            if folder is not None:
                return ControlGroup(folder, mount, version)
    return None


def _paths(cgroup: str) -> Iterator[tuple[int, str]]:
    """Version and path out of /proc/PID/cgroup; version 1 first: where it has the memory controller, 2 has not."""
    lines = [line.split(":", 2) for line in cgroup.splitlines() if line.count(":") >= 2]
    yield from ((1, path) for _, controllers, path in lines if "memory" in controllers.split(","))
    yield from ((2, path) for number, controllers, path in lines if number == "0" and not controllers)


def _mounts(mountinfo: str, version: int) -> list[tuple[str, str]]:
    """The root within the hierarchy and the mount point of each mount that counts memory; those that show most first.

    A line of proc_pid_mountinfo(5): id, parent, device, root, point, options, …, "-", type, source, options.
    """
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        v1 = kind[0] == "cgroup" and "memory" in kind[2].split(",")
        if v1 if version == 1 else kind[0] == "cgroup2":
            found.append((_unescaped(fields[3]), _unescaped(fields[4])))
    return sorted(found, key=lambda each: len(each[0]))


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _folder(mount: Path, path: str, top: str) -> Path | None:
    """A group's folder under a mount. Within a container the path may be the host's: then the mount is the group."""
    if not mount.is_dir():
        return None
    parts = path.strip("/").split("/")
    tops = [part for part in top.split("/") if part]
    if parts[: len(tops)] == tops and ".." not in parts:
        folder = mount.joinpath(*parts[len(tops) :])
        if folder.is_dir():
            return folder
    return mount


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The one number that the file holds; None for "max" and for all else."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """A number out of a file of names and numbers, one pair a line."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isascii() and value.isdigit():
            return int(value)
    return None

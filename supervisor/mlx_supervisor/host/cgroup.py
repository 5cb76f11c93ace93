"""The memory control group (cgroup) of a process: its limit, the memory left, and the kills counted there.

Versions 1 and 2, and both at once (hybrid). A limit is a group's own or an ancestor's, as far up as is visible. A limit
that is missing or unreadable counts as none: the machine's memory is the bound then. Only reads.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest number of whole pages, which is above this."""
GROUPS_AT_MOST = 16
"""How many groups of one process are followed."""


@dataclass(frozen=True)
class _Names:
    """File names of a version."""

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
    """A group in the hierarchy that counts memory. `mount`: the topmost visible folder."""

    folder: Path
    mount: Path
    version: int

    def levels(self) -> Iterator[Path]:
        """Folders of the group and its ancestors, innermost first."""
        folder = self.folder
        while folder != self.mount:
            yield folder
            folder = folder.parent
        yield folder

    def limit_bytes(self) -> int | None:
        """The lowest limit that applies to the group; None without one."""
        return min((limit for level in self.levels() if (limit := self._limit_bytes(level)) is not None), default=None)

    def available_bytes(self) -> int | None:
        """Memory the group may still take: the minimum over all limits, at least 0; None without a limit."""
        return min((left for level in self.levels() if (left := self._left_bytes(level)) is not None), default=None)

    def oom_kills(self) -> int | None:
        """Processes of this group that the kernel's out-of-memory killer has killed; None where it doesn't count.

        Version 2 counts those of the groups below too, version 1 doesn't.
        """
        levels = self.levels() if self.version == 2 else [self.folder]  # version 1: ancestors don't count this group's
        counts = (_field(level / _NAMES[self.version].oom_kills, "oom_kill") for level in levels)
        return next((count for count in counts if count is not None), None)

    def _limit_bytes(self, level: Path) -> int | None:
        limit = _number(level / _NAMES[self.version].limit)
        return limit if limit is not None and limit < NO_LIMIT_BYTES else None

    def _left_bytes(self, level: Path) -> int | None:
        limit = self._limit_bytes(level)
        if limit is None:
            return None
        names = _NAMES[self.version]
        usage = _number(level / names.usage) or 0
        # the kernel reclaims inactive file pages before it kills
        reclaimable = min(_field(level / "memory.stat", names.inactive_file) or 0, usage)
        return max(limit - usage + reclaimable, 0)


class OomKills:
    """Whether the kernel's out-of-memory killer has killed in a process's control group since this was created.

    Reads the group's counter, which excludes other containers; where there is none, the machine's.
    """

    def __init__(self, pid: int, root: Path = ROOT) -> None:
        self._pid = pid
        self._root = root
        self._machine = machine_oom_kills(root)
        self._seen: dict[Path, tuple[ControlGroup, int | None]] = {}
        self.follow()

    def follow(self) -> None:
        """Add the group that the process is in now. Call it repeatedly while the process runs."""
        group = find(self._pid, self._root)
        if group is not None and group.folder not in self._seen and len(self._seen) < GROUPS_AT_MOST:
            self._seen[group.folder] = group, group.oom_kills()

    def happened(self) -> bool | None:
        """None where the kernel doesn't count."""
        counts = [(before, group.oom_kills()) for group, before in self._seen.values()]
        if not counts or any(None in each for each in counts):  # a group may have been removed
            counts.append((self._machine, machine_oom_kills(self._root)))
        grown = [now > before for before, now in counts if before is not None and now is not None]
        return any(grown) if grown else None


def machine_oom_kills(root: Path = ROOT) -> int | None:
    """Out-of-memory kills since boot, in all containers; None where the kernel doesn't count."""
    return _field(root / "proc" / "vmstat", "oom_kill")


def find(pid: int | None = None, root: Path = ROOT) -> ControlGroup | None:
    """The memory control group of a process, by default this one. None: there is none, or it can't be read.

    `root`: the folder that holds `proc` and the mounts.
    """
    text = _text(root / "proc" / ("self" if pid is None else str(pid)) / "cgroup")
    return _resolve(text, root) if text else None


@lru_cache(maxsize=8)
def _resolve(cgroup: str, root: Path) -> ControlGroup | None:
    """Cached, as the mount table can be long. A process that moves has a different `cgroup` text."""
    mounts = _text(root / "proc" / "self" / "mountinfo")
    for version, path in _paths(cgroup):
        for top, point in _mounts(mounts, version):
            mount = root / point.lstrip("/")
            folder = _folder(mount, path, top)
            if folder is not None:
                return ControlGroup(folder, mount, version)
    return None


def _paths(cgroup: str) -> Iterator[tuple[int, str]]:
    """Version and path from /proc/PID/cgroup; version 1 first: if it has the memory controller, 2 does not."""
    lines = [line.split(":", 2) for line in cgroup.splitlines() if line.count(":") >= 2]
    yield from ((1, path) for _, controllers, path in lines if "memory" in controllers.split(","))
    yield from ((2, path) for number, controllers, path in lines if number == "0" and not controllers)


def _mounts(mountinfo: str, version: int) -> list[tuple[str, str]]:
    """Root and mount point of each mount that counts memory; those that show most of the hierarchy first.

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
    """A group's folder under a mount. In a container the path may be the host's: then the mount is the group."""
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
    """The number in the file; None for "max" and anything else."""
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """A value from a file with one name and number per line."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isascii() and value.isdigit():
            return int(value)
    return None

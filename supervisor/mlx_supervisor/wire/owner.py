"""The record of the run that a folder of results belongs to."""

from pathlib import Path

import msgspec

OWNER_FILE = ".mlx-supervisor-owner.json"
"""In the folder: the run that writes it. Deleting it gives the folder free."""
LIMIT_BYTES = 64 * 1024
BARE = "unsupervised"
"""In place of the run's folder, for runs with `--bare`."""


class Owner(msgspec.Struct, frozen=True):
    """What identifies a run. `folder`: in its state folder, or BARE. `fresh`: which `--fresh` began it, if any."""

    run: str
    settings_file: str
    folder: str = ""
    fresh: str = ""

    def __str__(self) -> str:
        where = {"": "", BARE: " (--bare)"}.get(self.folder, f" (its folder: {self.folder})")
        moved = "" if Path(self.settings_file).parent.exists() else ", which no longer exists"
        return f"run '{self.run}' of {self.settings_file}{moved}{where}"

    def is_run_of(self, other: "Owner") -> bool:
        """Whether both are the same run; a record without the run's folder leaves that open."""
        same = (self.run, self.settings_file) == (other.run, other.settings_file)
        return same and (self.folder == other.folder or "" in (self.folder, other.folder))


def decoded(data: bytes) -> Owner | None:
    """The owner in an owner file; None for other contents."""
    try:
        return msgspec.json.decode(data, type=Owner)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def owner_of(folder: Path) -> Owner | None:
    """The run that a folder of results belongs to, as far as recorded."""
    try:
        with (folder / OWNER_FILE).open("rb") as file:
            return decoded(file.read(LIMIT_BYTES))
    except OSError:
        return None

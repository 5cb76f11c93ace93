"""For all tests: what they start must not inherit how they themselves were started."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP; both pass to every child, and the
# supervisor honours them. A handler of our own is what the children see as the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Examples of each property: 100 by default, fewer where an answer is awaited, more where there is time. None has a
# deadline: a busy machine is no error.
for profile, examples in {"quick": 15, "default": 100, "long": 1000}.items():
    settings.register_profile(profile, max_examples=examples, deadline=None)
settings.load_profile("default")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short path, unlike pytest's own: sockets stand below it, and theirs may have 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-", dir=Path("/tmp").resolve(), ignore_cleanup_errors=True) as name:
        yield Path(name)

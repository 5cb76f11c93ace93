"""For all tests: processes that they start must not inherit ignored signals."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP; both pass to every child, and the
# supervisor honours them. A handler in this process becomes the default in its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Examples of each property: 100 by default, fewer in quick runs, more in long ones. None has a
# deadline: a busy machine is no error.
for profile, examples in {"quick": 15, "default": 100, "long": 1000}.items():
    settings.register_profile(profile, max_examples=examples, deadline=None)
settings.load_profile("default")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short path, unlike pytest's own: a socket's path may have at most 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-", dir=Path("/tmp").resolve(), ignore_cleanup_errors=True) as name:
        yield Path(name)

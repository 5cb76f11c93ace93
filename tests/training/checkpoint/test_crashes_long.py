"""Ten thousand random crashes of the store: no acknowledged checkpoint is lost, none that is damaged is loaded."""

import collections
import random
import time
from pathlib import Path

import pytest
from tests.training.checkpoint.crashing_disk import FAULTS, FORGETS, NAMES_ONLY, ZEROS, Killed, anything
from tests.training.checkpoint.crashing_store import Trial, fast_folder

from mlx_worker.checkpoint.manifest import UnusableError, name_of, verify
from mlx_worker.checkpoint.store import CheckpointError

CHAINS, CRASHES = 500, 20
"""One disk from crash to crash: each process starts from the state that the last one left."""
SAVES_LIMIT = 3
CALLS_LIMIT = 70
"""More calls than most processes make: some crash after the last save."""


class Chain:
    def __init__(self, root: Path, seed: int, counts: collections.Counter[str]) -> None:
        self.rng = random.Random(seed)
        self.counts = counts
        self.trial = Trial(root, keep=self.rng.randrange(1, 4))

    def crash(self) -> None:
        """One process, possibly with a fault, and its end."""
        if self.trial.keep > 1 and self.rng.random() < 0.05:
            self._damage()
        kills = [name for name, fault in FAULTS.items() if fault.kills]
        name = self.rng.choice(kills if self.rng.random() < 0.6 else [*FAULTS])
        self.trial.disk.arm(FAULTS[name], self.rng.randrange(CALLS_LIMIT))
        try:
            self._live()
        except Killed:
            self.counts["killed in a call"] += 1
        if self.rng.random() < 0.3:
            self.counts["kills"] += 1
            return  # the next process sees everything written, flushed or not
        self.counts["power losses"] += 1
        survival = self.rng.choice([FORGETS, NAMES_ONLY, ZEROS, *[anything(self.rng.randrange(2**32))] * 5])
        self.trial.disk.power_loss(survival)

    def _live(self) -> None:
        try:
            store = self.trial.open()
            step = self.trial.load(store)
        except CheckpointError:
            self.counts["processes that could not open"] += 1
            return
        self.counts["loads"] += 1
        for _ in range(self.rng.randrange(SAVES_LIMIT + 1)):
            step += self.rng.choice([0, 1, 1, 1, 5]) if step else 1
            try:
                self.trial.save(store, step)
                self.counts["acknowledged"] += 1
            except CheckpointError:
                self.counts["failed saves"] += 1

    def _damage(self) -> None:
        """A bit of the newest checkpoint flips between two processes; an older intact one still loads."""
        newest = self.trial.check()
        intact = [step for step in self._steps() if step < newest and self._is_intact(step)]
        if not intact:
            return
        file = self.rng.choice(sorted((self.trial.folder / name_of(newest)).iterdir()))
        self.trial.disk.flip(file, self.rng.randrange(file.stat().st_size), self.rng.randrange(8))
        self.trial.acknowledged = max(intact)
        self.counts["flipped bits"] += 1

    def _steps(self) -> list[int]:
        return [int(path.name[5:]) for path in self.trial.folder.glob("step-*")]

    def _is_intact(self, step: int) -> bool:
        try:
            verify(self.trial.folder / name_of(step), "a", step)
        except UnusableError:
            return False
        return True


@pytest.mark.long
def test_ten_thousand_crashes(capsys: pytest.CaptureFixture[str]) -> None:
    counts: collections.Counter[str] = collections.Counter()
    started_s = time.monotonic()
    with fast_folder() as folder:
        for seed in range(CHAINS):
            chain = Chain(folder / "disk", seed, counts)
            for number in range(CRASHES):
                try:
                    chain.crash()
                except Exception as error:
                    raise AssertionError(f"seed {seed}, crash {number}: {error}") from error
            chain.trial.check_on()
    assert counts["kills"] + counts["power losses"] == CHAINS * CRASHES
    assert min(counts[kind] for kind in ("killed in a call", "failed saves", "flipped bits")) > 100
    assert counts["loads"] > CHAINS * CRASHES / 2
    with capsys.disabled():
        print(f"\ncheckpoint store: {CHAINS * CRASHES} crashes, 0 bad loads, {time.monotonic() - started_s:.0f} s")
        print(dict(counts))

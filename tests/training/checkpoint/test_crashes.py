"""Every call of a commit, combined with every fault that can happen there.

What is promised each time: the newest acknowledged checkpoint or a newer one loads, what is damaged is named, and the
next save works, and is durable.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.training.checkpoint.crashing_disk import CALLS, FAULTS, FORGETS, KEEPS, NAMES_ONLY, ZEROS, Survival, anything
from tests.training.checkpoint.crashing_store import Trial, fast_folder

POWER_LOSSES: dict[str, Callable[[int], Survival]] = {
    "nothing unflushed is kept": lambda seed: FORGETS,
    "all is kept": lambda seed: KEEPS,
    "names are kept, contents are not": lambda seed: NAMES_ONLY,
    "names and lengths are kept, contents are zeros": lambda seed: ZEROS,
    "anything, 1": lambda seed: anything(seed),
    "anything, 2": lambda seed: anything(1_000 + seed),
    "anything, 3": lambda seed: anything(2_000 + seed),
}


def saved(*steps: int) -> Callable[[Trial], None]:
    def begin(trial: Trial) -> None:
        store = trial.open()
        for step in steps:
            trial.save(store, step)

    return begin


def flipped(name: str, find: bytes | None = None) -> Callable[[Trial], None]:
    """Steps 1 and 2, and a bit of step 2 is wrong."""

    def begin(trial: Trial) -> None:
        saved(1, 2)(trial)
        file = trial.folder / "step-000000002" / name
        content = file.read_bytes()
        offset = len(content) - 5 if find is None else content.index(find) + len(find)
        trial.disk.flip(file, offset, 1)
        trial.acknowledged = 1

    return begin


def left_behind(trial: Trial) -> None:
    """The folders that a killed writer and a killed deleter leave behind."""
    saved(1)(trial)
    whole = trial.snapshot()[0]
    here: object = whole
    for name in trial.folder.relative_to(trial.disk.root).parts:
        assert isinstance(here, dict)
        here = here[name]
    assert isinstance(here, dict)
    files = here["step-000000001"]
    here[".tmp-old-step-000000000-0"] = {"model.safetensors": files["model.safetensors"]}
    here[".tmp-step-000000002-0"] = dict(files)
    trial.disk.install(whole)


SCENES: dict[str, tuple[Callable[[Trial], None], int, int]] = {
    "the first one": (lambda trial: None, 1, 2),
    "an older one stays": (saved(1), 2, 2),
    "an older one is deleted": (saved(1, 2), 3, 2),
    "a damaged one is deleted": (flipped("model.safetensors"), 3, 1),
    "a damaged one is replaced": (flipped("optimizer.safetensors"), 2, 2),
    "a foreign one is renamed and replaced": (flipped("MANIFEST.json", b'"run": "'), 2, 2),
    "the same step again": (saved(1, 2), 2, 2),
    "temporary folders of crashed saves are deleted": (left_behind, 2, 2),
}
"""The initial state; the step to save; how many checkpoints are kept."""


class Matrix:
    """The cells: scene x fault x number of the call."""

    def __init__(self, root: Path) -> None:
        self.calls: dict[str, list[str]] = {}
        self.begun = {}
        for scene, (begin, step, keep) in SCENES.items():
            trial = Trial(root / scene)
            begin(trial)
            trial.keep = keep
            self.begun[scene] = (trial, trial.snapshot())
            assert trial.strike(step, None, -1) == ""
            self.calls[scene] = list(trial.disk.calls)

    def cells(self, scene: str, wrong: str) -> list[int]:
        where = FAULTS[wrong].calls if wrong in FAULTS else CALLS
        return [at for at, call in enumerate(self.calls[scene]) if call in where]

    def trials(self, scene: str, wrong: str) -> Iterator[tuple[int, int, Trial]]:
        """Each call where the fault can happen, the step to save, and the disk before."""
        trial, snapshot = self.begun[scene]
        for at in self.cells(scene, wrong):
            trial.restore(snapshot)
            yield at, SCENES[scene][1], trial


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    with fast_folder() as folder:
        yield Matrix(folder)


def test_the_matrix_is_as_large_as_promised(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {wrong: sum(len(matrix.cells(scene, wrong)) for scene in SCENES) for wrong in [*FAULTS, *POWER_LOSSES]}
    assert sum(counts.values()) >= 300
    assert {call for calls in matrix.calls.values() for call in calls} == set(CALLS), "a call that no scene makes"
    with capsys.disabled():
        steps = sum(map(len, matrix.calls.values()))
        print(f"\ncheckpoint commit: {steps} calls in {len(SCENES)} scenes, {sum(counts.values())} cells: {counts}")


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wrong", FAULTS)
def test_a_call_goes_wrong(matrix: Matrix, scene: str, wrong: str) -> None:
    for at, step, trial in matrix.trials(scene, wrong):
        where = f"{scene}, {wrong}, call {at} ({matrix.calls[scene][at]})"
        try:
            outcome = trial.strike(step, FAULTS[wrong], at)
            assert trial.disk.struck
            assert (outcome == "killed") == FAULTS[wrong].kills
            if FAULTS[wrong].short == 0.5:
                assert outcome == "", "a short write is no error"
            trial.check_on()
            trial.disk.power_loss(FORGETS)
            trial.check()
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wrong", [name for name, fault in FAULTS.items() if fault.code])
def test_a_call_goes_wrong_and_then_the_power_fails(matrix: Matrix, scene: str, wrong: str) -> None:
    """A failed save must not be trusted; an acknowledged one must load."""
    for at, step, trial in matrix.trials(scene, wrong):
        trial.strike(step, FAULTS[wrong], at)
        trial.disk.power_loss(anything(at))
        trial.check_on()


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wrong", [name for name, fault in FAULTS.items() if fault.code])
def test_a_call_goes_wrong_and_the_same_process_saves_again(matrix: Matrix, scene: str, wrong: str) -> None:
    """The same step again, as after a full disk: files of the first attempt must not count as durable."""
    tried = 0
    for at, step, trial in matrix.trials(scene, wrong):
        error = trial.strike(step, FAULTS[wrong], at)
        if not error or trial.store is None:
            continue
        tried += 1
        trial.disk.arm(None, -1)
        trial.save(trial.store, step)
        trial.disk.power_loss(FORGETS)
        assert trial.check() == step, f"after {error}"
    assert tried or scene == "the same step again"


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wrong", POWER_LOSSES)
def test_the_power_fails(matrix: Matrix, scene: str, wrong: str) -> None:
    for at, step, trial in matrix.trials(scene, wrong):
        where = f"{scene}, {wrong}, after call {at} ({matrix.calls[scene][at]})"
        try:
            assert trial.strike(step, FAULTS["kill amid or after"], at) == "killed"
            trial.disk.power_loss(POWER_LOSSES[wrong](at))
            trial.check_on()
            trial.disk.power_loss(FORGETS)
            trial.check()
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("wrong", POWER_LOSSES)
def test_the_power_fails_once_it_is_acknowledged(matrix: Matrix, scene: str, wrong: str) -> None:
    trial, snapshot = matrix.begun[scene]
    for seed in range(4):
        trial.restore(snapshot)
        step = SCENES[scene][1]
        assert trial.strike(step, None, -1) == ""
        assert trial.acknowledged == step
        trial.disk.power_loss(POWER_LOSSES[wrong](seed))
        trial.check_on()


@pytest.mark.parametrize("scene", SCENES)
def test_a_loaded_checkpoint_does_not_vanish(matrix: Matrix, scene: str) -> None:
    """The previous process may have been killed between the rename and its flush."""
    for at, step, trial in matrix.trials(scene, "kill amid or after"):
        trial.strike(step, FAULTS["kill amid or after"], at)
        loaded = trial.check()
        trial.disk.power_loss(FORGETS)
        assert trial.check() >= loaded

"""Damage of any file, anywhere: it is reported, an intact checkpoint loads, and the next save works."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.training.checkpoint.crashing_store import Trial, fast_folder

FILES = ("model.safetensors", "optimizer.safetensors", "trainer.json", "MANIFEST.json")
NEWEST, MIDDLE, OLDEST = "step-000000003", "step-000000002", "step-000000001"


@pytest.fixture(scope="module")
def begun() -> Iterator[tuple[Trial, object]]:
    with fast_folder() as folder:
        trial = Trial(folder / "disk", keep=3)
        store = trial.open()
        for step in (1, 2, 3):
            trial.save(store, step)
        yield trial, trial.snapshot()


@pytest.fixture
def trial(begun: tuple[Trial, object]) -> Trial:
    begun[0].restore(begun[1])
    return begun[0]


def goes_on(trial: Trial, intact: int) -> None:
    """`Trial.check_on` requires all newer ones named; the first save is of the step that was damaged."""
    trial.acknowledged = intact
    trial.check_on()
    assert trial.check() == intact + 1


def positions(size_bytes: int, rng: random.Random) -> set[int]:
    """Header, middle, end, and anywhere."""
    near = {*range(10), *range(size_bytes // 2, size_bytes // 2 + 4), *range(size_bytes - 10, size_bytes)}
    return {offset for offset in near | {rng.randrange(size_bytes) for _ in range(20)} if 0 <= offset < size_bytes}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(begun: tuple[Trial, object], name: str) -> None:
    trial, snapshot = begun
    rng = random.Random(name)
    size_bytes = (trial.folder / NEWEST / name).stat().st_size
    everywhere = range(size_bytes) if name == "MANIFEST.json" else positions(size_bytes, rng)
    for offset in sorted(everywhere):  # the manifest has no hash of its own: every byte of it
        trial.restore(snapshot)
        bit = rng.randrange(8)
        trial.disk.flip(trial.folder / NEWEST / name, offset, bit)
        try:
            goes_on(trial, 2)
        except AssertionError as error:
            raise AssertionError(f"{name}, byte {offset}, bit {bit}: {error}") from error


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_the_two_newest(trial: Trial, name: str) -> None:
    for step in (NEWEST, MIDDLE):
        trial.disk.flip(trial.folder / step / name, 4, 4)
    goes_on(trial, 1)


def cut(to: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(to * path.stat().st_size)])


def zero(start: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = int(start * (len(content) - 16))
        content[at : at + 16] = bytes(16)
        path.write_bytes(content)

    return damage


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": cut(0),
    "half": cut(0.5),
    "all but the last bytes": cut(0.99),
    "something appended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros at the start": zero(0),
    "zeros amid": zero(0.5),
    "zeros at the end": zero(1),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "a folder": become_folder,
    "the one of the step before": lambda path: shutil.copyfile(path.parent.parent / MIDDLE / path.name, path),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(trial: Trial, name: str, damage: str) -> None:
    DAMAGES[damage](trial.folder / NEWEST / name)
    trial.restore(trial.snapshot())  # the simulated disk holds it so, too
    goes_on(trial, 2)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_two_checkpoints_swapped(trial: Trial, name: str) -> None:
    swap(trial.folder / NEWEST / name, trial.folder / MIDDLE / name)
    trial.restore(trial.snapshot())
    goes_on(trial, 1)


def test_two_checkpoints_swapped(trial: Trial) -> None:
    """Each file is intact, but belongs to the other checkpoint."""
    swap(trial.folder / NEWEST, trial.folder / MIDDLE)
    trial.restore(trial.snapshot())
    goes_on(trial, 1)


def test_an_older_one_under_a_newer_name(trial: Trial) -> None:
    """It would load as step 4, and the run would repeat steps under wrong numbers."""
    shutil.copytree(trial.folder / OLDEST, trial.folder / "step-000000004")
    trial.restore(trial.snapshot())
    goes_on(trial, 3)


def swap(left: Path, right: Path) -> None:
    moved = left.with_name("moved")
    left.rename(moved)
    right.rename(left)
    moved.rename(right)

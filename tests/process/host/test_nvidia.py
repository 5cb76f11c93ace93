"""What a driver charges, with a stand-in for its library; and what becomes of it without any."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mlx_supervisor.host import nvidia


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    nvidia._nvml.cache_clear()
    yield
    nvidia._nvml.cache_clear()


class Nvml:
    """Two GPUs. Process 7 is on both, process 8 on one, and of process 9 the driver does not say how much it has."""

    processes = ([(7, 100), (8, 30)], [(7, 20), (9, None)])

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes[device]]

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=device + 1, total=80)


def test_the_memory_of_a_worker_is_the_sum_over_its_processes_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert nvidia.used_bytes({7, 8}) == 150
    assert nvidia.used_bytes([1]) == 0
    assert nvidia.used_bytes({7, 9}) is None, "a part that can't be told makes the sum worthless"
    assert nvidia.device_bytes() == [(1, 80), (2, 80)]


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_fails_is_no_error(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("driver/library version mismatch")

    monkeypatch.setattr(Nvml, broken, fail)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert (nvidia.used_bytes({7}), nvidia.device_bytes()) == (None, None)


def test_without_the_library_nothing_is_told_and_nothing_is_imported_unasked() -> None:
    code = (
        "import sys; from mlx_supervisor.host import nvidia as device_memory; assert 'pynvml' not in sys.modules; "
        "sys.modules['pynvml'] = None; print(device_memory.used_bytes({1}), device_memory.device_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "None"]

"""End to end on a stand-in for a CUDA device: its memory has its own limit, its own trips, and other users."""

import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.process import harness
from tests.process.harness import WORKER_VARIABLE
from tests.training.test_supervised import settings_in

GIB, MIB = 2**30, 2**20
STAND_IN = Path(__file__).with_name("device_stand_in")
LEAK_MIB = 500
LIMIT = {"device_limit": "24 GiB"}


@pytest.fixture
def device(tmp_path, monkeypatch):
    """The device's state; writing it changes the device."""
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"uuid": "GPU-1", "total": 80 * GIB, "others": 0, "pid": 0, "used": 0}))
    monkeypatch.setenv("FAKE_DEVICE", str(path))
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}:{':'.join(sys.path)}")
    monkeypatch.setenv(WORKER_VARIABLE, f"{sys.executable} {STAND_IN / 'worker_on_device.py'}")
    return path


def test_a_leak_on_the_device_trips_softly_before_its_limit(tmp_path, device):
    calm = harness.run(settings_in(tmp_path / "calm", steps=90, pause_s=0.0, memory=LIMIT), trains=True).summary()
    wild = settings_in(
        tmp_path / "wild", steps=90, pause_s=0.01, memory=LIMIT, drill={"leak_mib_per_step": LEAK_MIB},
        batch={"size": 8, "halve_on_leak": False},
    )  # fmt: skip
    done = harness.run(wild, trains=True)
    summary = done.summary()
    assert summary["outcome"] == "completed", done.stderr
    causes = [record["cause"] for record in summary["generations"]]
    assert causes[:-1] == ["memory leak"] * summary["trips"], done.stderr
    assert summary["trips"] >= 2
    assert summary["replayed_steps"] == 0
    assert max(record["peak_device_mib"] for record in summary["generations"]) <= 24 * 1024 + LEAK_MIB
    assert summary["weights_sha256"] == calm["weights_sha256"]
    assert "device=" in done.stderr
    assert "Device memory grows by 500.0 MiB/step and would pass the limit of 24,576 MiB" in done.stderr


def test_a_silent_worker_over_the_limit_is_killed_by_what_the_driver_says(tmp_path, device):
    drill = {"allocate_mib": 40 * 1024, "allocate_at_step": 15, "hang_at_step": 15, "hang_kind": "native"}
    settings = settings_in(
        tmp_path / "run", steps=20, pause_s=0.0, memory=LIMIT, drill=drill | {"generations": [1]},
        checkpoint={"every_steps": 1},
    )  # fmt: skip
    began_s = time.monotonic()
    done = harness.run(settings, trains=True)
    assert time.monotonic() - began_s < 50  # the watchdog for hangs takes longer
    summary = done.summary()
    assert (summary["outcome"], summary["trips"]) == ("completed", 1), done.stderr
    assert re.search(r"Device memory used [\d,]+ MiB, limit 24,576: worker killed", done.stderr)
    assert summary["generations"][0]["ended"] == "signal 9"


def test_another_process_that_takes_the_memory_is_named_and_waited_for(tmp_path, device):
    settings = settings_in(
        tmp_path / "run", steps=40, pause_s=0.02, memory=LIMIT, checkpoint={"every_steps": 1},
        drill={"leak_mib_per_step": LEAK_MIB, "generations": [1]}, restart={"wait_for_memory_s": 60},
    )  # fmt: skip
    with harness.Foreground(settings, trains=True) as foreground:
        harness.eventually(lambda: json.loads(device.read_text())["used"] > 3 * GIB)
        crowd(device, 75 * GIB)
        foreground.until("Device out of memory: this run held ")
        foreground.until(" of the device's memory free, ")
        assert re.search(r"other processes held 7[45]\.\d GiB of 80\.0 GiB", foreground.stderr), foreground.stderr
        threading.Timer(0.5, crowd, (device, 0)).start()
        assert foreground.wait() == 0, foreground.stderr
    summary = foreground.summary()
    assert [record["cause"] for record in summary["generations"]] == ["device out of memory", "completed"]
    assert {record["batch_size"] for record in summary["generations"]} == {8}


def crowd(device, others_bytes):
    """Another process holds this much from now on; again and again, as the worker writes the file as well."""
    for _ in range(20):
        temporary = device.with_suffix(".test")
        temporary.write_text(json.dumps(json.loads(device.read_text()) | {"others": others_bytes}))
        temporary.replace(device)
        time.sleep(0.005)

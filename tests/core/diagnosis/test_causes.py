"""The cause of a death, from the exit status, the errors of the bye, and the end of stderr."""

import time
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlx_supervisor import wire
from mlx_supervisor.core.diagnosis.causes import (
    EXIT_HANG_CODE,
    EXIT_NOT_FINITE_CODE,
    MEMORY_CAUSES,
    TEXT_CHARS,
    Cause,
    Diagnosis,
    diagnose,
    last_line,
)
from mlx_supervisor.core.events import Raised

STDERR = Path(__file__).with_name("stderr")
INDEX: dict[str, dict[str, Any]] = tomllib.loads((STDERR / "index.toml").read_text())
RAISED: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("raised.toml").read_text())
ABORT = "libc++abi: terminating due to uncaught exception of type std::runtime_error: "
METAL_OOM = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
CUDA_OOM = "cudaMallocAsync(&data, size, stream) failed: out of memory"
MARKS = [
    METAL_OOM,
    CUDA_OOM,
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 9 bytes.",
]
GPU_MARKS = {Cause.DEVICE_OOM, Cause.RESOURCE_LIMIT, Cause.GPU_WATCHDOG, Cause.GPU_ERROR, Cause.OUT_OF_MEMORY}


def of(
    stderr: str = "",
    exit_code: int | None = 1,
    signal: int | None = None,
    oom_killed: bool | None = None,
    near_limit: bool = False,
    **more: Any,
) -> Diagnosis:
    return diagnose(exit_code, signal, stderr, oom_killed=oom_killed, near_limit=near_limit, **more)


def traceback(error: str, line: int = 58, file: str = "/home/user/run/train.py") -> str:
    return f'Traceback (most recent call last):\n  File "{file}", line {line}, in step\n    boom()\n{error}\n'


def raised(kind: str, message: str = "", line: int = 58, file: str = "/home/user/run/train.py") -> Raised:
    return Raised(kind, message, file, line, "step")


def errors_of(name: str) -> tuple[Raised, ...]:
    return tuple(Raised(**each) for each in RAISED[name]["errors"])


def recorded(name: str) -> str:
    """As the supervisor reads it from the log."""
    return (STDERR / f"{name}.txt").read_bytes().decode("utf-8", "replace")


@pytest.mark.parametrize("name", INDEX)
def test_what_processes_really_wrote(name: str) -> None:
    expected = INDEX[name]
    code = expected["exit"]
    found = of(recorded(name), code if code > 0 else None, -code if code < 0 else None)
    assert found.cause is Cause[expected["cause"]]
    assert expected["text"] in found.text
    assert expected["source"]


@pytest.mark.parametrize("name", RAISED)
def test_what_the_bye_reports(name: str) -> None:
    expected = RAISED[name]
    found = of("step 1\nKeyError: 'of a log'\n", errors=errors_of(name))
    assert found.cause is Cause[expected["cause"]]
    assert expected["text"] in found.text
    assert bool(found.error_key) is (found.cause is Cause.CRASH)
    assert expected["source"]


def test_every_recording_is_in_the_index() -> None:
    assert {path.stem for path in STDERR.glob("*.txt")} == set(INDEX)


@pytest.mark.parametrize(
    "name", [name for name, row in (INDEX | RAISED).items() if row["cause"] in ("GPU_WATCHDOG", "GPU_ERROR")]
)
def test_what_the_gpu_did_never_halves_the_batch_and_says_what_helps(name: str) -> None:
    if name in RAISED:
        found = of(errors=errors_of(name), near_limit=True)
    else:
        found = of(recorded(name), None, -INDEX[name]["exit"], near_limit=True)
    assert found.cause not in MEMORY_CAUSES
    assert found.advice


@pytest.mark.parametrize(
    ("exit_code", "signal", "oom_killed", "near_limit", "cause"),
    [
        (None, 9, True, False, Cause.OOM_KILL),
        (137, None, True, False, Cause.OOM_KILL),
        (None, 9, False, True, Cause.KILLED),
        (None, 9, None, True, Cause.PRESSURE),
        (None, 9, None, False, Cause.KILLED),
        (None, 15, None, True, Cause.INTERRUPTED),
        (143, None, None, True, Cause.INTERRUPTED),
        (None, 2, None, False, Cause.INTERRUPTED),
        (None, None, None, True, Cause.KILLED),
        (None, 11, None, False, Cause.CRASH),
        (None, 11, False, True, Cause.PRESSURE),
        (139, None, None, True, Cause.PRESSURE),
        (None, 7, None, True, Cause.PRESSURE),
        (None, 10, None, True, Cause.PRESSURE),
        (None, 4, None, True, Cause.CRASH),
        (None, 6, None, True, Cause.CRASH),
        (1, None, True, True, Cause.CRASH),
        (200, None, None, True, Cause.CRASH),
    ],
)
def test_exits_without_output(
    exit_code: int | None, signal: int | None, oom_killed: bool | None, near_limit: bool, cause: Cause
) -> None:
    found = of("", exit_code, signal, oom_killed, near_limit)
    assert found.cause is cause
    assert found.text


@pytest.mark.parametrize("mark", MARKS)
def test_stderr_does_not_change_the_cause_of_a_kill(mark: str) -> None:
    assert of(traceback(f"RuntimeError: {mark}"), None, 9, False).cause is Cause.KILLED
    assert of(traceback(f"RuntimeError: {mark}"), None, 11).cause is Cause.CRASH


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_that_user_code_logged_earlier_does_not_count(mark: str) -> None:
    user = traceback("KeyError: 'label'")
    for log in (f"{mark}\n", f"WARNING: skipped a batch: {mark}\n", ABORT + mark + "\n", f"RuntimeError: {mark}\n"):
        found = of(f"step 1\n{log}step 2\n{user}")
        assert found.cause is Cause.CRASH
        assert found.text == "KeyError: 'label' (train.py:58 in step)"
    handled = traceback(f"RuntimeError: {mark}") + "step 2: loss 2.0\n" + user
    assert of(handled).cause is Cause.CRASH
    assert of(traceback(f"RuntimeError: {mark}") + user).cause is Cause.CRASH, "not even with nothing in between"


@pytest.mark.parametrize("mark", MARKS)
def test_a_logged_traceback_does_not_explain_a_much_later_silent_exit(mark: str) -> None:
    log = "".join(f"step {step}: loss 2.0\n" for step in range(200))
    assert of(traceback(f"RuntimeError: {mark}") + log, 3).cause is Cause.CRASH


@pytest.mark.parametrize("mark", MARKS)
def test_a_message_of_the_users_that_quotes_a_mark_does_not_count(mark: str) -> None:
    for kind, message in (
        ("ValueError", mark),
        ("RuntimeError", f"sample 12 was skipped: {mark}"),
        ("AssertionError", f"MemoryError: {mark}"),
        ("KeyError", f"'{mark}'"),
    ):
        assert of(errors=(raised(kind, message),)).cause is Cause.CRASH, kind
        assert of(traceback(f"{kind}: {message}")).cause is Cause.CRASH, kind
    for error in (f"RuntimeError: two lines\n{mark}", f"AssertionError: {mark}\nRuntimeError: {mark}"):
        assert of(traceback(error)).cause is Cause.CRASH, error


@pytest.mark.parametrize("mark", MARKS)
def test_an_abort_message_counts_only_in_an_abort(mark: str) -> None:
    assert of(f"{ABORT}{mark}\n", None, 6).cause in GPU_MARKS
    assert of(f"{ABORT}{mark}\n", 134).cause in GPU_MARKS
    assert of(f"{ABORT}{mark}\n", None, 11).cause is Cause.CRASH
    log = "".join(f"step {step}\n" for step in range(50))
    assert of(f"{ABORT}{mark}\n{log}Assertion failed: (x), file y.c\n", None, 6).cause is Cause.CRASH


def test_the_errors_of_the_bye_take_precedence_over_stderr() -> None:
    noise = traceback(f"RuntimeError: {CUDA_OOM}")
    key, oom = (raised("KeyError", "'label'", 3),), (raised("RuntimeError", CUDA_OOM),)
    found = of(noise, errors=key)
    assert (found.cause, found.text) == (Cause.CRASH, "KeyError: 'label' (train.py:3 in step)")
    assert of(traceback("KeyError: 'label'"), errors=oom).cause is Cause.DEVICE_OOM
    assert of(noise, 65, errors=(Raised("NotFiniteError", "the loss is nan"),)).text == "the loss is nan"


def test_after_a_signal_stderr_counts_too() -> None:
    oom = (raised("RuntimeError", CUDA_OOM),)
    assert of(recorded("python-segv"), None, 11, errors=oom).text == of(recorded("python-segv"), None, 11).text
    assert of("", None, 9, errors=oom).cause is Cause.KILLED
    aborted_at_exit = of(recorded("cuda-illegal-access"), None, 6, errors=oom)
    assert aborted_at_exit.cause in MEMORY_CAUSES
    later = of(recorded("cuda-illegal-access"), None, 6, errors=(raised("KeyError", "'label'"),))
    assert later.cause is Cause.GPU_ERROR
    assert later.text.endswith(", then KeyError: 'label'")
    assert of(recorded("metal-oom-abort"), None, 6).cause in MEMORY_CAUSES, "without a bye"


def test_an_error_that_a_mark_led_to_is_that_marks() -> None:
    key, oom = raised("KeyError", "'label'", 60), raised("RuntimeError", CUDA_OOM)
    found = of(errors=(key, raised("ValueError"), oom))
    assert found.cause is Cause.DEVICE_OOM
    assert found.text == f"RuntimeError: {CUDA_OOM} (train.py:58 in step), then KeyError: 'label'"
    assert of(errors=(raised("ValueError", "b", 60), key)).text == "ValueError: b (train.py:60 in step)"


@pytest.mark.parametrize(
    "heading",
    [
        "Exception ignored in: <function Cursor.__del__ at 0x7ff1c58358a0>",
        "Exception in thread Thread-2 (_generate):",
        "Process SpawnProcess-1:",
        "--- Logging error ---",
        "Task exception was never retrieved\nfuture: <Task finished name='Task-2' exception=RuntimeError()>",
    ],
)
def test_errors_that_did_not_end_the_process_do_not_count(heading: str) -> None:
    side = f"{heading}\n" + traceback(f"RuntimeError: {CUDA_OOM}", 99)
    for text in (traceback("KeyError: 'label'") + side, side + traceback("KeyError: 'label'")):
        found = of(text)
        assert (found.cause, found.text) == (Cause.CRASH, "KeyError: 'label' (train.py:58 in step)")


def test_an_error_of_a_thread_counts_where_there_is_no_other() -> None:
    text = "Exception in thread Thread-2 (_generate):\n" + traceback("RuntimeError: " + MARKS[2])
    assert of(text).cause is Cause.RESOURCE_LIMIT
    another = "Exception in thread Thread-1 (load):\n" + traceback("KeyError: 'a'")
    assert of(another + text).cause is Cause.RESOURCE_LIMIT, "the last"


@pytest.mark.parametrize("name", [name for name in RAISED if "syntax" not in name])
def test_without_a_bye_the_last_traceback_has_the_same_key(name: str) -> None:
    """The bye of one generation may be lost: the same error still has to be recognised."""
    first = errors_of(name)[0]
    printed = f"{first.kind}: {first.message}" if first.message else first.kind
    text = traceback(printed, first.line, first.file).replace("in step", f"in {first.function}")
    assert of(text).error_key == of(errors=(first,)).error_key


def test_with_a_counted_kill_a_lost_child_was_killed_for_memory() -> None:
    for name in ("python-pool", "torch-loader-killed"):
        killed = of(errors=errors_of(name), oom_killed=True)
        assert killed.cause is Cause.OOM_KILL
        assert killed.text.startswith("the kernel killed a child of the worker for memory; then ")
        assert of(errors=errors_of(name), oom_killed=False).cause is Cause.CRASH
    assert of(errors=(raised("ValueError", "bad"),), oom_killed=True).cause is Cause.CRASH


@pytest.mark.parametrize("name", ["python-key", "python-colours", "cpp-abort-teardown", "worker-not-finite"])
def test_the_tail_may_begin_anywhere(name: str) -> None:
    """The tail begins 16 KiB before the end, possibly inside a character."""
    whole = (STDERR / f"{name}.txt").read_bytes()
    code = INDEX[name]["exit"]
    last = whole.rstrip().rfind(b"\n") if code > 0 else whole.find(b"terminate") - 1
    for start in range(0, last + 2, 7):
        tail = whole[start:].decode("utf-8", "replace")
        found = of(tail, code if code > 0 else None, -code if code < 0 else None)
        assert found.cause is Cause[INDEX[name]["cause"]], whole[start : start + 40]


@pytest.mark.parametrize("before", ["", "Prefill:  0%|    | 0/16722 [00:00<?, ?tok/s]", "10%\r20%\r", "\x1b[A"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_traceback_need_not_begin_a_line_nor_be_whole(before: str, line_end: str) -> None:
    whole = traceback("KeyError: 'label'")
    for text in (before + whole, whole.partition("\n")[2] + before, whole + before):
        assert of(text.replace("\n", line_end)).text == "KeyError: 'label' (train.py:58 in step)"


def test_code_that_looks_like_a_groups_margin() -> None:
    text = traceback("ZeroDivisionError: division by zero").replace("    boom()\n", "    a\n    + Total\n    | Mask\n")
    assert of(text).text == "ZeroDivisionError: division by zero (train.py:58 in step)"


def test_any_member_of_a_group_counts() -> None:
    group, key = Raised("ExceptionGroup", "shards (2 sub-exceptions)"), raised("KeyError", "'a'")
    assert of(errors=(group, key, Raised("MemoryError"))).cause is Cause.OUT_OF_MEMORY
    user = of(errors=(group, key, raised("TypeError", "b", 60)))
    assert user.cause is Cause.CRASH
    assert user.text == "ExceptionGroup: shards (2 sub-exceptions): KeyError: 'a' (train.py:58 in step)"
    assert user.error_key == of(errors=(key,)).error_key


def test_a_group_without_a_bye_is_a_crash_with_its_last_line() -> None:
    text = (
        "  + Exception Group Traceback (most recent call last):\n"
        '  |   File "/home/user/run/train.py", line 3, in step\n'
        "  | ExceptionGroup: shards (1 sub-exception)\n"
        "  +-+---------------- 1 ----------------\n"
        "    | KeyError: 'a'\n"
        "    +------------------------------------\n"
    )
    found = of(text)
    assert (found.cause, found.text) == (Cause.CRASH, "| KeyError: 'a'")


def test_other_output_between_the_lines_of_a_traceback() -> None:
    whole = traceback(f"RuntimeError: {CUDA_OOM}").splitlines()
    for between in ("INFO: shard 3 loaded", "loss: 0.3", "worker 3: loading", "Epoch 3", ""):
        for place in range(1, len(whole)):
            text = "\n".join([*whole[:place], between, *whole[place:]])
            assert of(text).cause is Cause.DEVICE_OOM, (between, place)


def test_the_same_error_in_two_generations_has_one_key() -> None:
    def key(kind: str, message: str, line: int = 58, **more: str) -> str:
        found = of(errors=(raised(kind, message, line, **more),))
        assert found.cause is Cause.CRASH
        return found.error_key

    first = key("ValueError", "bad sample 12 at 0x7ff1c58358a0 in /tmp/tmpx8_q/a.jsonl")
    assert first == key("ValueError", "bad sample 7312 at 0x7fe131e4bb80 in /tmp/tmpyz11/a.jsonl")
    assert first != key("ValueError", "bad sample 12 at 0x7ff1c58358a0 in /tmp/tmpx8_q/a.jsonl", line=59)
    assert first != key("TypeError", "bad sample 12 at 0x7ff1c58358a0 in /tmp/tmpx8_q/a.jsonl")
    assert first != key("ValueError", "no such column")
    assert key("KeyError", "'x'", file="/home/user/run/eval.py") != key("KeyError", "'x'")


def test_the_place_is_in_the_users_code() -> None:
    text = traceback("KeyError: 'x'").replace(
        "KeyError", '  File "/home/user/venv/lib/python3.12/site-packages/numpy/core.py", line 3, in take\nKeyError'
    )
    assert of(text).text == "KeyError: 'x' (train.py:58 in step)"
    assert "train.py:58" in of(text).error_key


def test_only_crashes_have_a_key() -> None:
    for name, row in INDEX.items():
        code = row["exit"]
        found = of(recorded(name), code if code > 0 else None, -code if code < 0 else None)
        assert bool(found.error_key) is (row["cause"] == "CRASH"), name


@pytest.mark.parametrize(
    ("name", "advice"),
    [("python-disk", "free space on the disk"), ("python-module", "install"), ("metal-no-device", "logged in")],
)
def test_some_errors_of_the_user_come_with_advice(name: str, advice: str) -> None:
    found = of(errors=errors_of(name)) if name in RAISED else of(recorded(name))
    assert advice in found.advice


def test_a_worker_that_received_ctrl_c_was_interrupted() -> None:
    assert of(errors=(Raised("KeyboardInterrupt"),)).cause is Cause.INTERRUPTED
    assert of(traceback("KeyboardInterrupt")).cause is Cause.INTERRUPTED, "before it could send a bye"


@pytest.mark.parametrize(
    "junk",
    [
        "\xff\xfe\x00\x1b[",
        "\ufffd" * 5000,
        "\x1b]" * 20_000,
        "x" * 1_000_000,
        "\n" * 100_000,
        "Thread 0x1 (most recent call first):\n" * 20_000,
        "Traceback (most recent call last):\n" * 20_000,
        '  File "a", line 1, in b\n' * 20_000,
        "  | " * 100_000,
        "During handling of the above exception, another exception occurred:\n" * 10_000,
        "cuda" + "A" * 100_000 + " failed",
        "a." * 100_000,
        ABORT * 5000,
    ],
    ids=lambda junk: junk[:8],
)
def test_anything_may_stand_in_a_stderr(junk: str) -> None:
    before_s = time.process_time()
    for text in (junk, junk + "\n" + traceback(f"RuntimeError: {CUDA_OOM}"), traceback("KeyError: 'a'") + junk):
        for code, signal in ((1, None), (None, 6), (None, 11), (65, None)):
            found = of(text, code, signal)
            assert len(found.text) <= TEXT_CHARS
            assert len(found.error_key) <= 2 * TEXT_CHARS
    assert of(junk + "\n" + traceback(f"RuntimeError: {CUDA_OOM}")).cause is Cause.DEVICE_OOM
    assert time.process_time() - before_s < 10, "the event loop waits for it"


def test_a_long_message_keeps_its_place() -> None:
    found = of(errors=(raised("ValueError", "x" * 2000),))
    assert len(found.text) <= TEXT_CHARS
    assert found.text.endswith("… (train.py:58 in step)")


def test_the_core_and_the_wire_agree() -> None:
    assert EXIT_NOT_FINITE_CODE == wire.EXIT_NOT_FINITE
    found = of("failed: the loss is nan", EXIT_NOT_FINITE_CODE)
    assert (found.cause, found.text) == (Cause.NOT_FINITE, "the loss is nan")
    assert found.cause not in MEMORY_CAUSES


def test_values_in_journals_stay_what_they_are() -> None:
    assert {cause.name: cause.value for cause in Cause}.items() >= {
        "PRESSURE": "memory pressure",
        "LEAK": "memory leak",
        "OOM_KILL": "killed by the kernel for memory",
        "DEVICE_OOM": "device out of memory",
        "RESOURCE_LIMIT": "Metal resource limit",
        "GPU_WATCHDOG": "GPU watchdog",
        "HANG": "hang",
        "CRASH": "crash",
        "KILLED": "killed externally",
        "SUPERVISOR_LOST": "the supervisor died",
        "HOST_LOST": "the machine restarted",
    }.items()


def test_last_line() -> None:
    assert last_line("") == last_line(" \n\n\t\n") == ""
    assert last_line("Traceback\n  ValueError: bad  \n\n") == "ValueError: bad"
    assert len(last_line("x" * 100_000)) == 300


def test_the_list_for_readers_is_whole_and_says_which_halve_the_batch() -> None:
    text = (Path(__file__).parents[3] / "docs" / "causes.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    batch = {row[0]: row[2] for row in rows[2:]}
    assert set(batch) == {cause.value for cause in Cause} - {"completed", "requested"}
    assert {Cause(name) for name, what in batch.items() if what.startswith("halved")} == MEMORY_CAUSES


def test_the_last_line_has_no_control_characters() -> None:
    assert last_line("one\n\x1b[31mtwo\x1b[0m \x85 three\x07\u202e\n\n") == "two  three"


DUMP = 'Thread 0x00007f (most recent call first):\n  File "/home/u/train.py", line 3 in step\n'


def test_the_end_by_the_workers_own_watchdog_is_a_hang() -> None:
    assert EXIT_HANG_CODE == wire.EXIT_HANG
    found = of(f"{DUMP}\n{wire.HANG_LINE} 450 s; ending the worker\n", EXIT_HANG_CODE)
    assert (found.cause, found.text) == (Cause.HANG, "its own watchdog ended it: no progress for 450 s")
    assert of(f"Timeout (0:05:00)!\n{DUMP}", 1).cause is Cause.HANG, "by Python's fault handler"
    assert of(f"Timeout (0:05:00)!\n{DUMP}\nepoch 2\n", 1).cause is Cause.CRASH, "a dump that the process survived"

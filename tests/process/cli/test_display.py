"""The texts of the live display and the summary at the end of a run."""

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.core.machine.timeline import MachineTimeline, policy

from mlx_supervisor.cli.display import PlainDisplay, batch_text, block, growth_text, progress_text
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.cli.summary_text import print_summary
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.memory.growth import Growth
from mlx_supervisor.daemon.step_line import WIDTH_CHARS, step_line
from mlx_supervisor.daemon.summary import summary_of
from mlx_supervisor.host.time_left import time_left

MIB = 2**20
LEAK = Growth(50.2 * MIB, {"arrays": 50.0 * MIB, "native": 0.2 * MIB, "cache": -3.0 * MIB}, True, 12.2, 130.0)


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        (Growth(), ""),
        (Growth(0.0), ""),
        (Growth(-2.0 * MIB, {"arrays": -2.0 * MIB}), ""),
        (Growth(2.0 * MIB, {}, False, 455.0, 45.0), "growth 2.0 MiB/step, limit in 455 steps (45 s)"),
        (LEAK, "leak 50.2 MiB/step (arrays 50.0, native 0.2), limit in 12 steps (2m10s)"),
    ],
)
def test_growth_is_shown_as_far_as_it_is_known(growth: Growth, text: str) -> None:
    assert growth_text(growth) == text


@pytest.fixture
def at_2047(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 20:47 in the local time zone."""
    now_s = time.mktime((2026, 3, 3, 20, 47, 0, 0, 0, -1))
    monkeypatch.setattr(time, "time", lambda: now_s)


@pytest.mark.usefixtures("at_2047")
@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0, ""),
        (130.0, "2 min left, done about 20:49"),
        (8 * 3600.0, "8 h left, done about 04:47"),
        (50 * 3600.0, "2 d 2 h left, done about 05 Mar 22:47"),
    ],
)
def test_the_time_left_comes_with_the_time_of_day(seconds: float | None, text: str) -> None:
    assert time_left(seconds) == text


def test_the_longest_time_left_has_a_date_too() -> None:
    assert ", done about " in time_left(1e300)


@pytest.mark.usefixtures("at_2047")
def test_speed_and_time_left_are_shown_once_they_are_known_and_only_while_the_worker_trains() -> None:
    timeline = MachineTimeline()
    run = timeline.machine
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running")
    assert run.last_step is not None
    assert progress_text(run) == "step 1/1000"
    assert step_line(run, run.last_step).endswith(" lr=0.001 batch=8x1 memory=500/2,200 MiB")
    timeline.play("steps 149 seconds=0.5 -> running")
    assert progress_text(run) == "step 150/1000, 200 tokens/s, 7 min left, done about 20:54"
    line = step_line(run, run.last_step)
    assert line.endswith(" lr=0.001 tokens/s=200 batch=8x1 memory=500/2,200 MiB, 7 min left, done about 20:54")
    timeline.play("stop -> draining: save, ask stop")
    assert progress_text(run) == "step 150/1000"


def after_150_steps() -> tuple[Run, ev.StepReport]:
    """A run in which updates of 0.5 s made the speed known, and its last step."""
    timeline = MachineTimeline()
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 150 seconds=0.5 -> running")
    assert timeline.machine.last_step is not None
    return timeline.machine, timeline.machine.last_step


@pytest.mark.usefixtures("at_2047")
def test_a_long_step_line_leaves_out_what_is_least_needed_and_one_without_tokens_says_so() -> None:
    run, last = after_150_steps()
    smoothed = run.history.smoothed_loss
    step = replace(last, loss=None, metrics={"grad_norm": 1.25})
    run.history.add_step(replace(step, step=151), step)
    line = step_line(run, replace(step, step=151))
    assert "step 151/1000 no tokens smoothed=" in line
    assert " lr=0.001 " in line
    assert line.endswith(" memory=500/2,200 MiB, 7 min left")
    assert len(line) <= WIDTH_CHARS
    assert run.history.smoothed_loss == smoothed, "an update without tokens has no loss"
    assert run.history.loss == last.loss


def fields_of(line: str) -> list[str]:
    return [word.partition("=")[0] for word in line.split() if "=" in word or word in ("left,", "left", "done")]


@pytest.mark.usefixtures("at_2047")
def test_a_field_that_was_left_out_does_not_come_back() -> None:
    (run, last), left_out = after_150_steps(), set[str]()
    step = replace(last, metrics={"grad_norm": 1.25})
    short, long = step, replace(step, metrics={"grad_norm": 1.23456e-05, "accuracy": 0.123})
    assert "done" in fields_of(step_line(run, replace(step, metrics={}), left_out))
    lines = [step_line(run, each, left_out) for each in (long, short, long, replace(step, metrics={}))]
    assert ["lr" in fields_of(line) for line in lines] == [True] * 4
    assert ["done" in fields_of(line) for line in lines] == [False] * 4


def summary(outcome: str, generations: int) -> dict[str, object]:
    record = {
        "batch_size": 4,
        "accumulation": 2,
        "first_step": 1,
        "last_step": 9,
        "seconds": 130.2,
        "ended": "signal 9",
    }
    return {
        "run": "night",
        "outcome": outcome,
        "reason": "SIGINT",
        "step": 9,
        "target_steps": 20,
        "loss": 2.5,
        "trips": 1,
        "replayed_steps": 0,
        "goodput": None,
        "checkpoint_stall_fraction": None,
        "weights_sha256": None,
        "generations": [record | {"generation": number + 1, "cause": "memory leak"} for number in range(generations)],
    }


def printed(outcome: str, generations: int, **changes: object) -> list[str]:
    stream, values = io.StringIO(), summary(outcome, generations) | changes
    print_summary(Console(file=stream, width=200), values, Path("state/runs/night"), "resume it")
    return stream.getvalue().splitlines()


def test_the_command_that_resumes_can_be_pasted_into_a_shell() -> None:
    command = RunRequest(Path("my runs/a.toml"), "night", Path("/tmp/state")).command()
    assert command == "mlx-supervisor run 'my runs/a.toml' night --state-dir /tmp/state"
    assert RunRequest(Path("a.toml")).command() == "mlx-supervisor run a.toml"
    typed = RunRequest(None, "b", None, {"model": "my model", "iters": 5, "mask_prompt": True}, "0.7").command()
    assert typed == ("mlx-supervisor run --name b --model 'my model' --iters 5 --mask-prompt --memory-limit 0.7")


def test_a_stopped_run_shows_its_generations_and_how_to_resume() -> None:
    lines = printed("stopped", 14)
    assert lines[1:3] == ["night: stopped at step 9 of 20: SIGINT.", "Loss 2.5."]
    assert lines[3] == "1 memory trip."
    assert lines[4].split() == ["generation", "batch", "steps", "time", "peak", "MiB", "ended"]
    assert [line.split()[0] for line in lines[5:17]] == [str(number) for number in range(3, 15)]
    assert lines[5].split("  ")[-1] == "memory leak (signal 9)"
    assert "2m10s" in lines[5]
    assert lines[17] == "(2 earlier generations are in summary.json)"
    assert lines[18] == f"Summary, logs and checkpoints: {Path('state/runs/night').absolute()}"
    assert lines[19] == "Resume with: resume it"


def test_a_run_without_a_generation_shows_no_table_and_a_failed_one_no_command() -> None:
    lines = printed("failed", 0, step=0, target_steps=0, loss=None, trips=0, reason="no such model")
    assert lines[1] == "night: failed before the first step: no such model."
    assert len(lines) == 3


def test_a_completed_run_names_its_result_and_how_to_write_a_deleted_one_again(tmp_path: Path) -> None:
    (tmp_path / ".owner").touch()
    again = printed("completed", 1, exported_to=str(tmp_path))[-2]
    state = Path("state").absolute()
    assert again == (
        f"Result: {tmp_path} is empty; write it again with: "
        f"mlx-supervisor export night --state-dir {state} -o {tmp_path}"
    )
    (tmp_path / "adapters.safetensors").touch()
    assert printed("completed", 1, exported_to=str(tmp_path))[-2] == f"Result: {tmp_path}"
    assert not any("Result" in line for line in printed("stopped", 1, exported_to=str(tmp_path)))


def test_a_completed_run_names_the_command_for_weights_that_are_not_exported(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "night"
    (folder / "checkpoints" / "step-000000007").mkdir(parents=True)
    export = f"mlx-supervisor export night --state-dir {tmp_path}"

    def shown(**changes: object) -> list[str]:
        stream = io.StringIO()
        print_summary(Console(file=stream, width=300), summary("completed", 1) | changes, folder, "")
        return stream.getvalue().splitlines()

    assert shown()[-2] == f"No export: `{export}` writes the weights."
    best = f"The best validation was at step 7: `{export} --step 7` writes its weights."
    assert shown(best_validation_step=7)[-2] == best
    for step in (9, 6):  # the last step, and one whose checkpoint was deleted
        assert shown(best_validation_step=step)[-2].startswith("No export")


def test_the_figures_name_the_time_spent_training() -> None:
    assert printed("completed", 1, goodput=0.742, restarts=2)[3] == (
        "1 memory trip, 2 restarts, 0 steps replayed, 74 % of the time spent training."
    )


RUNNING = "start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 150 grow=8 seconds=0.5 -> running"


@pytest.mark.parametrize("width", [1, 20, 60, 80, 120, 240])
def test_the_display_uses_the_width_and_never_wraps(width: int) -> None:
    timeline = MachineTimeline()
    timeline.play(RUNNING)
    for step, loss in ((30, 2.28), (40, 2.31)):
        timeline.feed(ev.ValidationReport(timeline.at_s, 1, step, loss))
    lines = [line.plain for line in block("night", timeline.machine, timeline.at_s, width)]
    assert [line for line in lines if cell_len(line) >= max(width, 2)] == []
    bars = [line.count("━") + line.count("─") for line in lines if "━" in line]
    if width >= 80:
        assert len(bars) == 2
        assert bars[0] == bars[1] >= 8 + (width - 80)
        assert any("2.31 at step 40 (best 2.28 at step 30)" in line for line in lines)
        assert lines[0] == "night  training"


def test_the_display_shows_what_a_run_does_before_its_first_step() -> None:
    timeline = MachineTimeline()
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8")
    shown = block("night", timeline.machine, timeline.at_s + 12.3, 80)[0].plain
    assert shown == "night  loading the model … 12 s"
    timeline.play("ready -> running")
    assert block("night", timeline.machine, timeline.at_s, 80)[0].plain == "night  compiling the first update"


def plain_lines(timeline: MachineTimeline, script: str) -> list[str]:
    """What a pipe shows of these events, without the clock."""
    stream = io.StringIO()
    display = PlainDisplay(Console(file=stream, width=200), "night")
    feed = timeline.feed

    def shown(event: ev.Event) -> list[act.Action]:
        done = feed(event)
        display.on_event(timeline.machine, event)
        for action in done:
            if isinstance(action, act.Notice):
                display.on_notice(action)
        return done

    timeline.feed = shown  # type: ignore[method-assign]
    timeline.play(script)
    return [line[10:] for line in stream.getvalue().splitlines()]


def test_a_long_phase_gets_a_line_after_5_10_and_20_seconds() -> None:
    silent = "".join("sample 100 after=1 -> {}\n" for _ in range(25))
    lines = plain_lines(
        MachineTimeline(),
        "start -> starting: save, spawn 1 batch 8 of 8\n"
        + silent.format(*["starting"] * 25)
        + "ready -> running\n"
        + silent.format(*["running"] * 25),
    )
    loading = [f"Loading the model … {seconds} s" for seconds in (5, 10, 20)]
    compiling = [f"Compiling the first update … {seconds} s" for seconds in (5, 10, 20)]
    assert lines[:4] == ["Starting.", *loading]
    assert lines[5:] == compiling


def test_short_phases_and_training_get_no_line() -> None:
    lines = plain_lines(
        MachineTimeline(),
        "start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 3 seconds=6 -> running\n"
        "phase eval -> running\nsample 100 after=4 -> running\nphase train -> running\nsample 100 after=9 -> running",
    )
    assert [line for line in lines if "…" in line] == ["Compiling the first update … 6 s"]


def test_the_summary_names_the_best_validation_and_the_speed() -> None:
    figures = {"smoothed_loss": 2.625, "validation_loss": 2.31, "validation_step": 40, "tokens_per_second": 2985.4}
    figures |= {"best_validation_loss": 2.28, "best_validation_step": 30}
    assert printed("completed", 1, reason="all steps done", step=20, **figures)[1:3] == [
        "night: completed at step 20 of 20.",
        "Loss 2.5 (smoothed 2.625), validation 2.31 at step 40 (best 2.28 at step 30), 2,985 tokens/s.",
    ]


def test_the_result_of_the_test_is_a_notice_and_in_the_summary() -> None:
    timeline = MachineTimeline()
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running")
    (notice, _) = timeline.feed(ev.Tested(timeline.at_s, 1, "Test loss 1.152, Test ppl 3.165.", 1.152))
    assert isinstance(notice, act.Notice)
    assert notice.text == "Test loss 1.152, Test ppl 3.165."
    found = summary_of("night", timeline.machine.history, [])
    assert found["test_loss"] == 1.152
    assert printed("completed", 1, test_loss=found["test_loss"])[2] == "Loss 2.5, test 1.152."
    timeline.play("steps 1 -> running")
    assert summary_of("night", timeline.machine.history, [])["test_loss"] is None, "it was that of another model"


def test_a_result_that_another_run_replaced_is_not_called_this_runs(tmp_path: Path) -> None:
    owner = {"run": "night", "settings_file": "/p/lora.yaml", "folder": "/other/runs/night"}
    (tmp_path / ".mlx-supervisor-owner.json").write_text(json.dumps(owner))
    (tmp_path / "adapters.safetensors").write_text("")
    (line,) = [line for line in printed("completed", 1, exported_to=str(tmp_path)) if line.startswith("Result: ")]
    assert "now belongs to run 'night' of /p/lora.yaml" in line
    assert "write this run's again with: mlx-supervisor export night --state-dir" in line


def test_the_summary_of_a_lowered_target_says_so() -> None:
    line = printed("completed", 1, reason="all steps done", step=20, target_steps=10)[1]
    assert line == "night: completed at step 20, past the target of 10."


def test_notices_for_the_log_alone_stay_off_the_screen() -> None:
    lines = plain_lines(
        MachineTimeline(),
        "start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running\nsaved -> running: save\n"
        "sample 2300.2 2 -> killing: kill\n"
        "exit signal=9 -> starting: close memory pressure, save, spawn 2 batch 4 of 8",
    )
    assert lines[-1] == "Used 2,300 MiB, limit 2,200: worker killed; restarting with batch 4 × 2, 0 steps lost."
    assert not any("Saved checkpoint" in line or "killing the worker" in line for line in lines)


def test_the_display_shows_a_growth_that_is_pending() -> None:
    timeline = MachineTimeline(policy(size=8, start=2, grow_after_steps=20))
    timeline.play("start -> starting: save, spawn 1 batch 2 of 8\nready -> running\nsteps 18 -> running")
    assert batch_text(timeline.machine) == "2 × 4, grows to 4 after 2 good steps"
    timeline.play("steps 2 -> running: save, resize 4 of 8")
    assert batch_text(timeline.machine) == "2 × 4, growing to 4"
    timeline.play("steps 1 batch=4 -> running")
    assert batch_text(timeline.machine) == "4 × 2, grows to 8 after 19 good steps"


def test_the_display_names_the_size_that_did_not_fit() -> None:
    timeline = MachineTimeline()
    timeline.play(
        "start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running\n"
        "sample 2300 2 -> killing: kill\n"
        "exit signal=9 -> starting: close memory pressure, save, spawn 2 batch 4 of 8 save 1\n"
        "ready -> running\nsteps 1 -> running"
    )
    assert "stays below 8, which did not fit" in batch_text(timeline.machine)


def test_a_start_by_a_person_is_no_restart() -> None:
    timeline = MachineTimeline()
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running")
    timeline.play("stop -> draining: save, ask stop\nexit 75 -> stopped: close requested, save, finish stopped")
    timeline.play("start -> starting: save, spawn 2 batch 8 of 8\nready -> running\nsteps 1 -> running")
    assert timeline.machine.history.restarts == 0
    timeline.play("exit signal=9 -> backoff: close killed externally, save")
    timeline.play("tick -> starting: save, spawn 3 batch 8 of 8 save 1")
    assert timeline.machine.history.restarts == 1


def test_in_a_pipe_no_cell_of_the_table_is_wrapped() -> None:
    stream, values = io.StringIO(), summary("stopped", 1)
    values["generations"][0] |= {"cause": "the loss is not a finite number", "ended": "exit code 65"}  # type: ignore[index]
    print_summary(Console(file=stream, width=80), values, Path("state/runs/night"), "resume it")
    assert "the loss is not a finite number (exit code 65)" in stream.getvalue()

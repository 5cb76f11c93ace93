"""The foreground command with misbehaving workers."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from tests.process import harness

SUMMARY_KEYS = [
    "run",
    "outcome",
    "reason",
    "step",
    "target_steps",
    "loss",
    "smoothed_loss",
    "validation_loss",
    "validation_step",
    "best_validation_loss",
    "best_validation_step",
    "test_loss",
    "tokens_per_second",
    "restarts",
    "metrics",
    "validation_metrics",
    "trips",
    "replayed_steps",
    "goodput",
    "checkpoint_stall_fraction",
    "weights_sha256",
    "exported_to",
    "generations",
]
GENERATION_KEYS = [
    "generation",
    "batch_size",
    "accumulation",
    "first_step",
    "last_step",
    "seconds",
    "peak_footprint_mib",
    "peak_device_mib",
    "ended",
    "cause",
    "error",
    "gradient_checkpointing",
    "autopsy",
]


def test_a_run_completes_and_prints_its_summary_in_the_last_line(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={}, batch={"size": 4})
    done = harness.run(settings)
    assert done.process.returncode == 0
    summary = done.summary()
    assert list(summary) == SUMMARY_KEYS
    assert [list(record) for record in summary["generations"]] == [GENERATION_KEYS]
    assert (summary["outcome"], summary["step"], summary["target_steps"]) == ("completed", 20, 20)
    assert (tmp_path / "state/runs/run/summary.json").read_text().startswith('{\n  "run": "run"')
    assert oct((tmp_path / "state").stat().st_mode)[-3:] == "700"


def test_second_run_of_a_completed_run_starts_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = harness.write_settings(tmp_path, args={})
    first = harness.run(settings).summary()
    job = tmp_path / "state/runs/run/job.json"
    job.unlink()
    again = harness.run(settings)
    assert again.process.returncode == 0
    assert "Already complete at step 20; nothing was trained. --fresh starts over." in again.stderr
    assert again.summary() == first | {"reason": "already complete; nothing was trained"}
    assert not job.exists(), "a worker was started"


def test_a_completed_run_continues_when_more_steps_are_requested(tmp_path: Path) -> None:
    harness.run(harness.write_settings(tmp_path, args={}))
    summary = harness.run(harness.write_settings(tmp_path, args={}, steps=30)).summary()
    assert (summary["outcome"], summary["step"], summary["target_steps"]) == ("completed", 30, 30)
    assert [record["first_step"] for record in summary["generations"]] == [1, 21]


def test_a_worker_that_cannot_be_started_is_reported_once_per_attempt(tmp_path: Path) -> None:
    harness.run(harness.write_settings(tmp_path, args={}))
    job = tmp_path / "state/runs/run/job.json"
    job.unlink()
    (job / "in the way").mkdir(parents=True)
    done = harness.run(harness.write_settings(tmp_path, args={}, steps=30, restart={"max_without_progress": 1}))
    assert done.process.returncode == 1
    assert done.stderr.count("Is a directory") == 1


def test_fresh_starts_over_and_keeps_the_old_folder(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    harness.run(settings)
    again = harness.run(settings, "--fresh")
    assert [record["first_step"] for record in again.summary()["generations"]] == [1]
    assert (tmp_path / "state/runs/run.previous/saved").read_text() == "20"


def test_fresh_does_not_replace_another_runs_folder(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    text = settings.read_text()
    settings.write_text(text + text[text.index("[runs.run]") :].replace("runs.run", 'runs."run.previous"'))
    assert harness.run(settings, "run.previous").process.returncode == 0
    assert harness.run(settings, "run").process.returncode == 0
    assert harness.run(settings, "run", "--fresh").process.returncode == 2
    assert (tmp_path / "state/runs/run.previous/saved").exists()


def test_soft_trips_halve_the_batch_down_to_the_minimum_and_replay_nothing(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path,
        args={"leak_mib": 16, "delay_s": 0.06, "finds": "a list of 16 MiB"},
        steps=100,
        batch={"size": 4, "minimum": 2},
        memory={"limit": "500 MiB", "soft_share": 0.9, "autopsy_limit_s": 1},
    )
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "completed"
    assert summary["replayed_steps"] == 0
    assert summary["trips"] >= 2
    sizes = [record["batch_size"] for record in summary["generations"]]
    assert sizes[:2] == [4, 2]
    assert set(sizes[2:]) == {2}
    assert "memory grows by" in summary["generations"][0]["error"]
    assert "a list of 16 MiB" in "".join(summary["generations"][0]["autopsy"])
    assert max(record["peak_footprint_mib"] for record in summary["generations"]) <= 500


def test_silent_growth_over_the_limit_is_killed_and_halves_the_batch(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path,
        args={"mode": "ramp", "at_step": 12, "mib_per_s": 512},
        steps=20,
        batch={"size": 4},
        memory={"limit": "300 MiB"},
    )
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "failed"
    assert "consecutive generations without a new checkpoint" in summary["reason"]
    records = summary["generations"]
    assert [record["batch_size"] for record in records][:3] == [4, 2, 1]
    assert {record["ended"] for record in records} == {"signal 9"}
    assert summary["trips"] == len(records)
    assert max(record["peak_footprint_mib"] for record in records) < 450


@pytest.mark.parametrize(("mode", "where"), [("ramp_loading", "before the model was loaded"), ("ramp", "first step")])
def test_a_limit_below_the_need_is_reported_at_once(tmp_path: Path, mode: str, where: str) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": mode, "at_step": 1}, batch={"size": 2}, memory={"limit": "200 MiB"}
    )
    done = harness.run(settings)
    summary = done.summary()
    assert done.process.returncode == 1
    assert "the limit of 200 MiB is too low for this run" in summary["reason"]
    assert where in summary["reason"]
    assert len(summary["generations"]) <= 2


def test_ctrl_c_checkpoints_and_the_next_start_resumes(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01, "save_every": 1000}, steps=300)
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        harness.interrupt(foreground)
        assert foreground.wait() == 130
    stopped = foreground.summary()
    assert stopped["outcome"] == "stopped"
    assert 0 < stopped["step"] < 300
    assert f"Resume with: mlx-supervisor run {settings}" in foreground.stderr
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "completed"
    assert summary["replayed_steps"] == 0
    assert summary["generations"][1]["first_step"] == stopped["step"] + 1


def test_second_ctrl_c_kills_a_worker_that_ignores_signals(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": "deaf", "children": True}, steps=100_000, restart={"stop_grace_s": 600}
    )
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        tokens = harness.tokens_of(foreground.process.pid)
        harness.interrupt(foreground)
        foreground.until("A second Ctrl-C kills")
        harness.interrupt(foreground)
        assert foreground.wait() == 130
        assert harness.carriers(tokens) == []
    assert foreground.summary()["generations"][0]["ended"] == "signal 9"


def test_sigterm_then_sigkill_to_a_worker_that_ignores_signals_and_its_children(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path,
        args={"mode": "deaf", "children": True},
        steps=100_000,
        restart={"stop_grace_s": 0.2, "term_grace_s": 0.2},
    )
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        tokens = harness.tokens_of(foreground.process.pid)
        assert len(harness.carriers(tokens)) == 3
        harness.interrupt(foreground)
        foreground.wait()
        assert harness.carriers(tokens) == []
    assert "sending SIGTERM" in foreground.stderr
    assert "sending SIGKILL to its process group" in foreground.stderr
    assert foreground.summary()["outcome"] == "stopped"


def test_children_of_a_completed_worker_are_killed(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"children": True, "delay_s": 0.05})
    with harness.Foreground(settings) as foreground:
        foreground.until("Ready")
        tokens = harness.tokens_of(foreground.process.pid)
        assert foreground.wait() == 0
        assert tokens
        assert harness.carriers(tokens) == []


def test_a_hang_is_found_by_missing_progress_and_shows_its_stacks(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": "hang", "at_step": 7}, restart={"hang_timeout_s": 0.5, "max_without_progress": 2}
    )
    done = harness.run(settings)
    summary = done.summary()
    assert (done.process.returncode, summary["outcome"]) == (1, "failed")
    assert {record["cause"] for record in summary["generations"]} == {"hang"}
    assert "misbehave" in (tmp_path / "state/runs/run/logs/stderr.log").read_text()
    assert summary["trips"] == 0


def test_a_crash_is_retried_a_bounded_number_of_times_and_reported(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"mode": "crash", "at_step": 8}, batch={"size": 4})
    done = harness.run(settings)
    summary = done.summary()
    assert done.process.returncode == 1
    assert "RuntimeError: the user's code is broken" in summary["reason"]
    assert "restart.max_same_error" in summary["reason"]
    assert len(summary["generations"]) == 2  # twice at step 7: deterministic
    assert {record["batch_size"] for record in summary["generations"]} == {4}
    assert all("the user's code is broken" in record["error"] for record in summary["generations"])


def test_a_crash_that_may_pass_is_retried_as_often_as_the_budget_allows(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": "crash", "at_step": 8}, batch={"size": 4}, restart={"max_same_error": 100}
    )
    summary = harness.run(settings).summary()
    assert "3 consecutive generations without a new checkpoint" in summary["reason"]
    assert len(summary["generations"]) == 4  # one that saved step 5, then three without a new checkpoint


def test_a_loss_that_is_not_finite_gets_one_more_chance(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"mode": "not_finite", "at_step": 8})
    summary = harness.run(settings).summary()
    assert "loss became NaN, 2 times in a row" in summary["reason"]
    assert [record["ended"] for record in summary["generations"]] == ["exit code 65"] * 2


def test_gradient_checkpointing_is_tried_before_a_run_is_given_up(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path,
        args={"mode": "ramp", "at_step": 1, "can_recompute": True},
        batch={"size": 1},
        memory={"limit": "200 MiB"},
    )
    done = harness.run(settings)
    summary = done.summary()
    assert summary["outcome"] == "completed"  # the worker does not grow with it
    assert [record["gradient_checkpointing"] for record in summary["generations"]] == [False, True]
    assert "restarting with batch 1 × 1 and gradient checkpointing" in done.stderr
    assert "with gradient checkpointing" in done.stderr


def test_a_refusal_is_final_and_said_once(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"mode": "refuse", "at_step": 1})
    done = harness.run(settings)
    assert done.process.returncode == 2
    assert done.summary()["reason"] == "data/train.jsonl:3: empty line"
    assert len(done.summary()["generations"]) == 1
    assert done.stderr.count("data/train.jsonl:3: empty line") == 1
    assert "Not started: data/train.jsonl:3: empty line." in done.stderr
    assert "0 trips" not in done.stderr


def test_a_refusal_at_resume_is_said_once_and_later_ones_fail_the_run(tmp_path: Path) -> None:
    harness.run(harness.write_settings(tmp_path, args={}, steps=5))
    resumed = harness.run(harness.write_settings(tmp_path, args={"mode": "refuse", "at_step": 6}, steps=8))
    assert resumed.process.returncode == 2
    assert "Not resumed at step 5: data/train.jsonl:3: empty line." in resumed.stderr
    summary = json.loads((tmp_path / "state/runs/run/summary.json").read_text())
    assert (summary["outcome"], summary["reason"], summary["step"]) == ("completed", "all steps done", 5)
    later = harness.run(harness.write_settings(tmp_path, args={"mode": "refuse", "at_step": 8}, steps=8))
    assert later.process.returncode == 1
    assert "failed at step 7 of 8: data/train.jsonl:3: empty line." in later.stderr


def test_a_run_killed_externally_resumes_at_the_same_batch(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": "self_kill", "at_step": 13, "generations": 2}, batch={"size": 4}
    )
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "completed"
    assert [record["cause"] for record in summary["generations"]] == ["killed externally"] * 2 + ["completed"]
    assert {record["batch_size"] for record in summary["generations"]} == {4}
    assert summary["replayed_steps"] == 4  # 11 and 12, twice


def test_a_run_survives_more_external_kills_than_generations_without_progress(tmp_path: Path) -> None:
    done = harness.run(
        harness.write_settings(
            tmp_path,
            args={"mode": "self_kill", "at_step": 2, "generations": 5},
            restart={"max_without_progress": 1, "backoff_s": 0.05, "backoff_max_s": 0.1},
        )
    )
    assert done.summary()["outcome"] == "completed"
    assert "SIGKILL (5 times within an hour; restart.max_external = 20)" in done.stderr


def test_the_worker_of_a_killed_supervisor_checkpoints_and_the_next_supervisor_resumes(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01, "save_every": 10_000}, steps=200)
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        tokens = harness.tokens_of(foreground.process.pid)
        harness.eventually(lambda: harness.journaled_steps(tmp_path) > 0)
        os.kill(foreground.process.pid, signal.SIGKILL)
        foreground.process.wait()
        harness.eventually(lambda: harness.carriers(tokens) == [])
    saved = int((tmp_path / "state/runs/run/saved").read_text())
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "completed"
    assert summary["replayed_steps"] == 0
    first, second = summary["generations"]
    assert (first["cause"], first["ended"], first["first_step"]) == ("the supervisor died", "lost", 1)
    assert 0 < first["last_step"] <= saved
    assert first["peak_footprint_mib"] > 0
    assert second["first_step"] == saved + 1


def test_the_next_supervisor_kills_an_orphan_that_ignores_signals_before_it_starts_a_worker(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path,
        args={"mode": "deaf", "children": True, "delay_s": 0.01},
        steps=400,
        restart={"stop_grace_s": 0.2, "term_grace_s": 0.2},
    )
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        tokens = harness.tokens_of(foreground.process.pid)
        os.kill(foreground.process.pid, signal.SIGKILL)
        foreground.process.wait()
        assert len(harness.carriers(tokens)) == 3
        with harness.Foreground(settings) as second:
            second.until("Killed orphaned worker")
            second.until("Ready")
            assert harness.carriers(tokens) == []


def test_floods_of_output_are_kept_within_bounds(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"mode": "flood_output", "at_step": 5, "lines": 30_000, "delay_s": 0.12}, steps=30
    )
    assert harness.run(settings).process.returncode == 0
    logs = tmp_path / "state/runs/run/logs"
    assert sum(file.stat().st_size for file in logs.iterdir()) < 45 * 2**20


def test_two_supervisors_cannot_have_one_state_folder(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={}, steps=100_000)
    with harness.Foreground(settings) as first:
        first.until("Ready")
        (tmp_path / "second").mkdir()
        other = tmp_path / "second/settings.toml"
        other.write_text(settings.read_text().replace('"state"', '"../state"'))
        second = harness.run(other)
        assert second.process.returncode == 2
        assert f"is in use by a running supervisor (process {first.process.pid})" in second.stderr
        assert "`supervisorctl -c FILE status`" in second.stderr


@pytest.mark.parametrize(("state", "words"), [("a/file", "can't be used"), ("x" * 90, "at most 100 are allowed")])
def test_an_unusable_state_folder_is_refused(tmp_path: Path, state: str, words: str) -> None:
    (tmp_path / "a").write_text("not a folder")
    settings = harness.write_settings(tmp_path, args={})
    settings.write_text(settings.read_text().replace('"state"', f'"{state}"'))
    done = harness.run(settings)
    assert done.process.returncode == 2
    assert re.search(f"state_dir .*{words}", done.stderr)
    assert done.stdout == ""


def test_unknown_run(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    done = harness.run(settings, "walk")
    assert done.process.returncode == 2
    assert "no run 'walk'; allowed: run" in done.stderr


def test_a_folder_with_other_contents_is_refused(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={})
    settings.write_text(settings.read_text().replace('"state"', '"."'))
    mode = tmp_path.stat().st_mode
    done = harness.run(settings)
    assert done.process.returncode == 2
    assert "has other contents" in done.stderr
    assert tmp_path.stat().st_mode == mode

"""The tokens per second in each step line, against the tokens and the wall time that the journal has."""

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from tests.process import harness
from tests.training.test_supervised import settings_in, worker_of

from mlx_supervisor.core.rate import WINDOW_S, WINDOW_STEPS

FROM_UPDATE = 10
WITHIN = 0.05


def shown_speeds(folder: Path) -> list[tuple[int, float]]:
    """Step and tokens per second of each step line, in the order of the log."""
    text = (folder / "state/runs/run/logs/stdout.log").read_text()
    return [
        (int(step), float(speed.replace(",", "")))
        for step, speed in re.findall(r" step (\d+)/.* tokens/s=([\d,.]+) ", text)
    ]


def updates(folder: Path) -> list[list[tuple[int, int, float]]]:
    """Step, tokens and Unix time of every update, by generation."""
    with closing(sqlite3.connect(f"file:{folder / 'state/journal.db'}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT generation, step, tokens, wall_s FROM steps ORDER BY id").fetchall()
    generations: dict[int, list[tuple[int, int, float]]] = {}
    for generation, *row in rows:
        generations.setdefault(generation, []).append(tuple(row))
    return list(generations.values())


def true_speed(rows: list[tuple[int, int, float]], at: int) -> float:
    """Over wall time, in the last 20 updates or 30 s before `rows[at]`, whichever is longer."""
    now_s = rows[at][2]
    first = max((i for i in range(at) if at - i >= WINDOW_STEPS and now_s - rows[i][2] >= WINDOW_S), default=0)
    return sum(tokens for _, tokens, _ in rows[first + 1 : at + 1]) / (now_s - rows[first][2])


@pytest.mark.long
def test_every_line_after_the_tenth_update_is_within_5_percent_of_tokens_over_wall_time(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, steps=900, pause_s=0.06)
    text = settings.read_text()
    settings.write_text(
        text.replace("[runs.run.task.args]", "[runs.run.task.args]\nweighted = true\nevaluate_every = 25")
    )
    with harness.Foreground(settings, trains=True) as foreground:
        harness.eventually(lambda: foreground.stderr.count("Ready at step") == 1)
        time.sleep(42)
        worker = worker_of(foreground)
        assert worker is not None
        worker.kill()
        foreground.process.wait(240)
        assert foreground.wait() == 0, foreground.stderr
    shown, checked, worst = shown_speeds(tmp_path), 0, 0.0
    for rows in updates(tmp_path):
        places = {step: at for at, (step, _, _) in enumerate(rows)}
        while shown and shown[0][0] in places:
            step, speed = shown.pop(0)
            if places[step] >= FROM_UPDATE - 1:
                worst = max(worst, abs(speed / true_speed(rows, places[step]) - 1))
                checked += 1
            if shown and shown[0][0] <= step:
                break  # the next generation repeats steps
    assert shown == []
    assert checked > 50
    print(f"{checked} lines, worst {worst:.1%}")
    assert worst <= WITHIN

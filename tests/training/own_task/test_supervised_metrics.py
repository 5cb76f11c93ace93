"""A task's metrics on their whole way: the step line, the journal, the summary."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.process import harness
from tests.training.own_task import feature_task


def test_metrics_reach_the_line_the_journal_and_the_summary(tmp_path):
    (tmp_path / "feature_task.py").write_text(Path(feature_task.__file__).read_text())
    args = {"features": ["metrics", "clipped"], "evaluate_every": 3}
    settings = harness.write_settings(
        tmp_path, args=args, steps=6, entry="feature_task:build", batch={"size": 8}, checkpoint={"every_steps": 3}
    )
    done = harness.run(settings, trains=True)
    assert done.process.returncode == 0, done.stderr
    summary = done.summary()
    assert set(summary["metrics"]) == {"accuracy", "broken", "grad_norm"}
    assert 0 <= summary["metrics"]["accuracy"] <= 1
    assert summary["metrics"]["broken"] is None
    assert 0 <= summary["validation_metrics"]["positive"] <= 1
    line = next(line for line in done.stderr.splitlines() if "step 6/6" in line)
    assert f" accuracy={summary['metrics']['accuracy']:.4g} " in line
    assert " broken=nan " in line
    assert f", positive={summary['validation_metrics']['positive']:.4g}." in done.stderr
    with closing(sqlite3.connect(tmp_path / "state/journal.db")) as connection:
        rows = connection.execute("SELECT metrics FROM steps ORDER BY step").fetchall()
    assert [set(json.loads(row[0])) for row in rows] == [{"accuracy", "broken", "grad_norm"}] * 6
    assert json.loads(rows[-1][0]) == summary["metrics"]

"""The toy task with what tests need to come at an exact moment."""

import os
import signal

from toy_task import build as build_toy

from mlx_worker.task import Task, Update


def stopping(seed: int, at: int, every: int) -> Task:
    """Asks for a stop once update `at` is done (0: while it is built). Evaluations and milestones every `every`."""
    task = build_toy(seed, evaluate_every=every)

    def stop_at(update: Update) -> None:
        if update.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    if at == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    task.after_update = stop_at
    task.milestone = lambda step: print(f"milestone {step}")
    task.milestone_every_steps = every
    return task

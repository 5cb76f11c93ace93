"""The batch that the user requests, where the task's configuration decides: a changed request counts at a resume."""

import msgspec

from mlx_supervisor import wire
from mlx_worker.task import Task


def with_request(job: wire.Job, task: Task) -> wire.Job:
    """The job with the requested batch filled in.

    With a changed request of the task, the batch in use changes too: to the request, or, if trips have reduced it, at
    most to the request.
    """
    batch, own = job.batch, _own(task)
    size, effective = batch.requested_size, batch.requested_effective
    if size is None or effective is None:  # the run's first generation, or a bare run
        size = batch.size or (own and own[0])
        effective = batch.effective or (size and size * task.accumulation)
        return _replaced(job, requested_size=size, requested_effective=effective)
    if not batch.from_task or batch.size is None or own is None or own == (size, effective):
        return job
    used = own[0] if batch.size == size else min(batch.size, own[0])
    shrunk = own[1] if batch.preserve_effective else max(1, own[1] * used // own[0])
    return _replaced(job, requested_size=own[0], requested_effective=own[1], size=used, effective=shrunk)


def _own(task: Task) -> tuple[int, int] | None:
    return None if task.batch_size is None else (task.batch_size, task.batch_size * task.accumulation)


def _replaced(job: wire.Job, **batch: int | None) -> wire.Job:
    return msgspec.structs.replace(job, batch=msgspec.structs.replace(job.batch, **batch))

"""Golden timelines of everything that is not memory: commands, crashes, hangs, timeouts, giving up."""

from tests.core.machine.timeline import policy

RUNNING = """
        start                       -> starting: save, spawn 1 batch 8 of 8
        spawned                     -> starting
        ready                       -> running
        steps 3                     -> running
"""
COMPLETED = """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
"""
STOPPED = "stopped: close requested, save, finish stopped"

ENDS = {
    "from the start to the end": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        spawned                     -> starting
        early                       -> starting
        ready target=6              -> running
        steps 3                     -> running
        phase eval                  -> running
        phase train                 -> running
        steps 3                     -> running
        saved                       -> running: save
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
        start                       -> starting: save, spawn 2 batch 8 of 8
        ready target=6              -> running
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
    """),
    "a completed run starts no worker": (policy(steps=6), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=6              -> running
        steps 6                     -> running
        saved                       -> running: save
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
        start                       -> completed: save
            | Already complete at step 6; nothing was trained. --fresh starts over.
        restart                     -> completed: save
            | Already complete at step 6; nothing was trained. --fresh starts over.
    """),
    "a stopped run starts even at its last step": (policy(steps=6), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=6              -> running
        steps 6                     -> running
        stop                        -> draining: save, ask stop
        exit 75                     -> stopped: close requested, save, finish stopped
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "a completed run continues when more steps are requested": (policy(steps=7), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=6              -> running
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "complete before it was ready": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        bye completed               -> starting
        exit 0                      -> completed: close completed, save, finish completed
    """),
    "exit status 0 before the last step is no completion": (policy(), RUNNING + """
        exit 0                      -> backoff: close crash, save
            | The worker crashed: exited with status 0 before the last step; restarting in 1 s with batch 8 × 1, 3
            | steps lost.
    """),
    "exit status 0 without a checkpoint of the last step is no completion": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        saved error=full            -> running
            | Full: step 3 not saved.
        exit 0                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
    """),
    "the worker waits for the disk after the last step: one notice at either end": (policy(steps=3), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        saved error=full            -> running
        phase checkpoint the disk of /c to save step 3 -> running
            | Waiting for the disk of /c to save step 3.
        phase checkpoint the disk of /c to save step 3 -> running
        saved                       -> running: save
        phase train                 -> running
            | The wait is over. The newest checkpoint is of step 3.
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
    """),
    "a stop during the wait names what is lost": (policy(steps=3), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        phase checkpoint the disk of /c to save step 3 -> running
            | Waiting for the disk of /c to save step 3.
        stop                        -> draining: save, ask stop
            | Stop requested; the worker tries to save once more and exits.
        bye stopped lost=three_steps -> draining
        exit 75                     -> stopped: close requested, save, finish stopped
            | Stopped at step 3: stop requested; three_steps.
    """),
    "failed checkpoints in a row: a notice on the 1st, 2nd and 4th": (policy(), RUNNING + """
        saved error=full            -> running
            | Full: step 3 not saved.
        saved error=full            -> running
            | Full: step 3 not saved (2 checkpoints failed in a row).
        saved error=full            -> running
        saved error=full            -> running
            | Full: step 3 not saved (4 checkpoints failed in a row).
        saved                       -> running: save
            | Checkpoints are saved again: step 3.
        saved error=full            -> running
            | Full: step 3 not saved.
    """),
    "a completed message without exit status 0 is no completion": (policy(), RUNNING + """
        bye completed               -> running
        exit 1                      -> backoff: close crash, save
    """),
    "crashes wait longer each time, then the run fails": (policy(max_same_error=9), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        exit 1 RuntimeError         -> backoff: close crash, save
            | The worker crashed: RuntimeError; restarting in 1 s with batch 8 × 1.
        early                       -> backoff
        tick                        -> starting: save, spawn 2 batch 8 of 8
        exit 1 RuntimeError         -> backoff: close crash, save
        early after=1.5             -> backoff
        tick                        -> starting: save, spawn 3 batch 8 of 8
        ready                       -> running
        exit 1 RuntimeError         -> fatal: close crash, save, finish failed
            | Failed before the first step: RuntimeError; 3 consecutive generations without a new checkpoint
            | (restart.max_without_progress).
    """),
    "progress resets the counts": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8
        ready                       -> running
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 3 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved                       -> running: save
        exit 1                      -> starting: close crash, save, spawn 4 batch 8 of 8  # progress: at once
        ready                       -> running
        saved 4                     -> running: save  # the same step again
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 5 batch 8 of 8
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 6 batch 8 of 8
        exit 1                      -> fatal: close crash, save, finish failed
        start                       -> starting: save, spawn 7 batch 8 of 8
        exit 1                      -> backoff: close crash, save
    """),
    "a failed checkpoint is no progress, but no reason to stop": (policy(max_without_progress=1), RUNNING + """
        saved error=full            -> running
        exit 1                      -> fatal: close crash, save, finish failed
    """),
    "generations without a checkpoint get a shorter interval": (policy(backoff_s=0.0, max_without_progress=9), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 9                     -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 4
        ready                       -> running
        steps 5                     -> running
        exit 1                      -> starting: close crash, save, spawn 3 batch 8 of 8 save 2
        exit 1                      -> starting: close crash, save, spawn 4 batch 8 of 8 save 2
    """),
    "longer generations with checkpoints widen the interval": (policy(backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 1
        ready                       -> running
        steps 50                    -> running
        saved                       -> running: save
        exit 1                      -> starting: close crash, save, spawn 3 batch 8 of 8 save 25
        ready                       -> running
        steps 10                    -> running
        saved                       -> running: save
        exit 1                      -> starting: close crash, save, spawn 4 batch 8 of 8 save 25
    """),
    "other processes that kill every worker": (policy(max_without_progress=1, max_external=3, jitter=0.0), RUNNING + """
        exit signal=9 oom=no        -> backoff: close killed externally, save
            | Another process sent the worker SIGKILL; restarting in 1 s with batch 8 × 1, 3 steps lost.
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
        exit signal=9 oom=no        -> backoff: close killed externally, save
            | Another process sent the worker SIGKILL (2 times within an hour; restart.max_external = 3); restarting in
            | 2 s with batch 8 × 1.
        tick                        -> starting: save, spawn 3 batch 8 of 8 save 1
        exit signal=9 oom=no        -> backoff: close killed externally, save
            | Another process sent the worker SIGKILL (3 times within an hour; restart.max_external = 3, which is
            | spent); restarting in 59m57s with batch 8 × 1.
        early after=3000            -> backoff
        tick                        -> starting: save, spawn 4 batch 8 of 8 save 1
    """),
    "killed externally keeps the batch": (policy(), RUNNING + """
        saved                       -> running: save
        exit signal=9 oom=no        -> starting: close killed externally, save, spawn 2 batch 8 of 8
        exit signal=15              -> backoff: close stopped externally, save
            | Another process sent the worker SIGTERM; restarting in 1 s with batch 8 × 1.
        tick                        -> starting: save, spawn 3 batch 8 of 8
        ready                       -> running
        exit 75                     -> backoff: close stopped externally, save
            | The worker was stopped, but not by the supervisor (2 times within an hour; restart.max_external = 20);
    """),
    "refused: the run fails at once": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        bye refused no such model   -> starting
        exit 78                     -> fatal: close refused its job, save, finish failed
            | Not started: no such model.
    """),
    "refused while running": (policy(), RUNNING + """
        exit 78                     -> fatal: close refused its job, save, finish failed
            | Failed at step 3: the worker refused its job without a reason.
    """),
    "another batch than requested is a bug: no endless loop": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready batch=4               -> killing: kill
            | Bug: the worker uses micro-batch 4, but 8 was requested.
        exit signal=9               -> fatal: close refused its job, save, finish failed
            | Not started: the worker uses micro-batch 4, but 8 was requested.
    """),
    "another batch than requested, reported by a step": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        steps 1 batch=4             -> killing: kill
        exit signal=9               -> fatal: close refused its job, save, finish failed
    """),
    "hang: stacks, SIGTERM, SIGKILL": (policy(hang_timeout_s=30.0), RUNNING + """
        early after=29              -> running
        sample 500                  -> running   # being alive is no progress
        tick                        -> terminating: dump, term
            | Hang: no progress for 30 s. Dumping the worker's stacks to its stderr, then sending SIGTERM.
        tick                        -> killing: kill
            | The worker ignored SIGTERM; sending SIGKILL to its process group.
        exit signal=9               -> backoff: close hang, save
            | The worker hung (no progress for 30 s); restarting in 1 s with batch 8 × 1, 3 steps lost.
    """),
    "a hanging worker that obeys SIGTERM and saves": (policy(hang_timeout_s=30.0, backoff_s=0.0), RUNNING + """
        tick                        -> terminating: dump, term
        saved                       -> terminating: save
        exit 75                     -> starting: close hang, save, spawn 2 batch 8 of 8
            | The worker hung (no progress for 30 s); restarting with batch 8 × 1, 0 steps lost.
    """),
    "hangs until the run fails": (policy(hang_timeout_s=30.0, max_without_progress=1), RUNNING + """
        tick                        -> terminating: dump, term
        exit 75                     -> fatal: close hang, save, finish failed
            | Failed at step 3: no progress for 30 s; 1 generation without a new checkpoint
            | (restart.max_without_progress).
    """),
    "a long evaluation is no hang, even with a checkpoint meanwhile": (policy(), RUNNING + """
        phase eval                  -> running
        saved after=200             -> running: save
        early after=500             -> running
        tick                        -> terminating: dump, term
            | Hang: no progress for 10m00s. Dumping the worker's stacks to its stderr, then sending SIGTERM.
    """),
    "a worker that is never ready": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        phase load after=500        -> starting
        tick                        -> terminating: term
            | The worker is not ready after 10m00s; sending SIGTERM.
        exit signal=15              -> backoff: close not ready in time, save
            | The worker was not ready after 10m00s; restarting in 1 s with batch 8 × 1.
    """),
    "a worker that survived SIGKILL has exited": (policy(), RUNNING + """
        kill                        -> killing: kill, save
            | Kill requested; killing the worker.
        tick                        -> killing: kill
            | The process group survived SIGKILL; sending it again.
        tick                        -> killing: kill
        tick                        -> fatal: close requested but alive, save, finish failed
            | Failed at step 3: a process of generation 1 survived 3 SIGKILLs; restart the machine.
        recovered                   -> fatal: close the supervisor died, save
            | Recovered generation 1: the supervisor died.
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "a missing program": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        fails other                 -> starting
        fails spawn                 -> backoff: close could not be started, save
            | Failed to start the worker: no such file; restarting in 1 s with batch 8 × 1.
        tick                        -> starting: save, spawn 2 batch 8 of 8
        fails spawn                 -> backoff: close could not be started, save
        tick                        -> starting: save, spawn 3 batch 8 of 8
        fails spawn                 -> fatal: close could not be started, save, finish failed
            | Failed before the first step: no such file; 3 consecutive generations without a new checkpoint
            | (restart.max_without_progress).
    """),
    "a missing program, without backoff": (policy(backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        fails spawn                 -> starting: close could not be started, save, spawn 2 batch 8 of 8
        spawned                     -> starting
        fails spawn                 -> starting   # it was running: no second start
    """),
    "a full disk delays the start, and is not counted against the run": (policy(max_without_progress=1), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        fails spawn passing         -> backoff: close could not be started
            | Failed to start the worker: no such file; next attempt in 1 s.
        tick                        -> starting: save, spawn 2 batch 8 of 8
        fails spawn passing         -> backoff: close could not be started
        tick                        -> starting: save, spawn 3 batch 8 of 8
        spawned                     -> starting
        ready                       -> running
    """),
    "a completed message before the last step is ignored": (policy(), RUNNING + """
        steps 3                     -> running
        saved                       -> running: save
        bye completed step=3        -> running
        exit 0                      -> starting: close crash, save, spawn 2 batch 8 of 8
            | The worker crashed: exited with status 0 before the last step; restarting with batch 8 × 1, 0 steps
            | lost.
    """),
    "a checkpoint during a stop extends the grace period once": (policy(), RUNNING + """
        stop                        -> draining: save, ask stop
            | Stop requested; the worker saves a checkpoint and exits.
        saved                       -> draining: save
        steps 1                     -> draining
        saved                       -> draining: save
        tick                        -> terminating: term
    """),
    "a worker that survives SIGKILL": (policy(), RUNNING + """
        stop                        -> draining: save, ask stop
        tick                        -> terminating: term
        tick                        -> killing: kill
        stop                        -> killing
        tick                        -> killing: kill
        kill                        -> killing: save
        tick                        -> killing: kill
        tick                        -> fatal: close requested but alive, save, finish failed
        start                       -> fatal   # it is still running
            | Start refused: a process of generation 1 survived SIGKILL and is still running.
        exit signal=9               -> fatal: close requested
            | Generation 1, which survived SIGKILL, has exited; starts are allowed again.
        exit signal=9               -> fatal
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "memory samples fail": (policy(), RUNNING + """
        saved                       -> running: save
        missing 19                  -> running
        sample 500                  -> running
        missing 20                  -> draining: ask stop
            | 20 consecutive memory samples failed (no such file); restarting the worker (memory.missing_samples).
        missing 20                  -> draining
        saved                       -> draining: save
        exit 75                     -> backoff: close memory could not be measured, save
            | Memory could not be measured; restarting in 1 s with batch 8 × 1, 0 steps lost.
        tick                        -> starting: save, spawn 2 batch 8 of 8
        missing 20                  -> terminating: term
        exit signal=15              -> backoff: close memory could not be measured, save
            | Memory could not be measured; restarting in 2 s with batch 8 × 1.
        tick                        -> starting: save, spawn 3 batch 8 of 8
        missing 20                  -> terminating: term
        exit 1                      -> fatal: close memory could not be measured, save, finish failed
            | Failed at step 3: 20 consecutive memory samples failed (no such file); 3 consecutive generations without
            | a new checkpoint (restart.max_without_progress).
    """),
    "memory samples fail until the run fails": (policy(max_without_progress=1), RUNNING + """
        missing 20                  -> draining: ask stop
        exit 75                     -> fatal: close memory could not be measured, save, finish failed
    """),
    "stop: a checkpoint first": (policy(), RUNNING + f"""
        stop                        -> draining: save, ask stop
        start                       -> draining: save
        stop                        -> draining: save
        saved                       -> draining: save
        exit 75                     -> {STOPPED}
            | Stopped at step 3: stop requested.
        stop                        -> stopped
        kill                        -> stopped
        restart                     -> starting: save, spawn 2 batch 8 of 8
    """),
    "a second interrupt kills": (policy(), RUNNING + f"""
        stop                        -> draining: save, ask stop
        kill                        -> killing: kill, save
        exit signal=9               -> {STOPPED}
            | Stopped at step 3: kill requested.
    """),
    "start during a stop restarts": (policy(), RUNNING + """
        stop                        -> draining: save, ask stop
        start                       -> draining: save
        exit 75                     -> starting: close requested, save, spawn 2 batch 8 of 8 save 1
    """),
    "stop, but it was complete": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        saved                       -> running: save
        stop                        -> draining: save, ask stop
        exit 0                      -> completed: close completed, save, finish completed
        """),
    "killed, but it was complete": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        saved                       -> running: save
        kill                        -> killing: kill, save
        exit 0                      -> completed: close completed, save, finish completed
        """),
    "terminated, but it was complete": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
        saved                       -> running: save
        tick                        -> terminating: dump, term
        exit 0                      -> completed: close completed, save, finish completed
        """),
    "restart": (policy(), RUNNING + """
        restart                     -> draining: ask stop
        exit 75                     -> starting: close requested, save, spawn 2 batch 8 of 8 save 1
        restart                     -> terminating: term
        exit 75                     -> starting: close requested, save, spawn 3 batch 8 of 8 save 1
    """),
    "over the limit during a stop: the request stays the cause": (
        policy(),
        RUNNING
        + f"""
        stop                        -> draining: save, ask stop
        sample 2300 2               -> killing: kill
        exit signal=9               -> {STOPPED}
    """,
    ),
    "a requested restart resets the counts": (
        policy(max_without_progress=2),
        RUNNING
        + """
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
        ready                       -> running
        restart                     -> draining: ask stop
        exit 75                     -> starting: close requested, save, spawn 3 batch 8 of 8 save 1
        exit 1                      -> backoff: close crash, save
    """,
    ),
    "stop before it is ready": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        start                       -> starting
        stop                        -> terminating: save, term
            | Stop requested; the worker is not ready yet, sending SIGTERM.
        exit signal=15              -> {STOPPED}
    """),
    "kill before it is ready": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        kill                        -> killing: kill, save
        exit signal=9               -> {STOPPED}
    """),
    "kill while running": (policy(), RUNNING + f"""
        start                       -> running
        kill                        -> killing: kill, save
        restart                     -> killing: save
        stop                        -> killing: save
        exit signal=9               -> {STOPPED}
    """),
    "kill while terminating": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        stop                        -> terminating: save, term
        kill                        -> killing: kill, save
        exit signal=9               -> {STOPPED}
    """),
    "stop and kill while the caches are cleared": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        stop                        -> draining: save, ask stop
        exit 75                     -> {STOPPED}
        start                       -> starting: save, spawn 2 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        kill                        -> killing: kill, save
        exit signal=9               -> {STOPPED}
    """),
    "refused while the caches are cleared": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        exit 78                     -> fatal: close refused its job, save, finish failed
    """),
    "a stop during a trip still halves": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        stop                        -> draining: save
        exit 75                     -> stopped: close memory leak, save, finish stopped
        start                       -> starting: save, spawn 2 batch 4 of 8
    """),
    "commands while waiting to restart": (policy(), RUNNING + """
        exit 1                      -> backoff: close crash, save
        stop                        -> stopped: save, finish stopped
        start                       -> starting: save, spawn 2 batch 8 of 8 save 1
        exit 1                      -> backoff: close crash, save
        start                       -> starting: save, spawn 3 batch 8 of 8 save 1
    """),
    "the stop request can't be sent": (policy(), RUNNING + f"""
        stop                        -> draining: save, ask stop
        fails SaveHistory           -> draining   # a full disk is not the worker's fault
        fails RequestStop           -> terminating: term
            | Failed to request the worker to stop (no such file); sending SIGTERM.
        exit 75                     -> {STOPPED}
    """),
    "the request to clear the caches can't be sent": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        fails RequestClearCache     -> terminating: term
            | Failed to request the worker to clear its caches (no such file); sending SIGTERM.
        exit 75                     -> starting: close memory pressure, save, spawn 2 batch 4 of 8 save 4
    """),
    "the supervisor died": (policy(), """
        recovered step=7            -> stopped: close the supervisor died, save
        start                       -> starting: save, spawn 1 batch 8 of 8
    """),
    "the machine restarts because of the run": (policy(max_reboots=1, max_without_progress=1), """
        recovered host              -> fatal: close the machine restarted, save, finish failed
    """),
    "the machine restarts after a failed run": (policy(max_reboots=1, max_without_progress=1), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        exit 1                      -> fatal: close crash, save, finish failed
        recovered host              -> fatal: close the machine restarted, save, finish failed
    """),
    "the machine restarts after a complete run": (policy(max_reboots=1, max_without_progress=1), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        bye completed               -> starting
        exit 0                      -> completed: close completed, save, finish completed
        recovered host              -> fatal: close the machine restarted, save, finish failed
    """),
}  # fmt: skip

"""Golden timelines of starts that wait for memory or after a reboot, and of workers that wait for the disk."""

from tests.core.machine.timeline import policy

NEEDS_2000 = """
        machine 9000                -> stopped
        start                       -> starting: save, spawn 1 batch 8 of 8
        spawned                     -> starting
        machine 7000                -> starting
        ready                       -> running
        steps 3 mib=2000            -> running
"""
"""9000 MiB available before the first start, 2000 used: 1800 are required."""

TRIPPED = """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        saved                       -> running: save
        steps 100 grow=60           -> draining: ask stop
"""

WAITING = {
    "a pause of the machine is no hang": (policy(hang_timeout_s=10.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        paused 45 after=46          -> running
            | The supervisor did not run for 45 s (the machine or its container was paused): the worker's deadlines are
            | moved by as much.
        early after=5               -> running
        tick                        -> terminating: dump, term  # the worker did not wake up
    """),
    "a pause is no part of a grace period": (policy(stop_grace_s=20.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        stop                        -> draining: save, ask stop
        paused 45 after=46          -> draining
        early after=10              -> draining
        exit 75                     -> stopped: close requested, save, finish stopped
    """),
    "memory that is freed at once costs no wait": (policy(backoff_s=0.0), NEEDS_2000 + """
        machine 1800                -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 1
    """),
    "without a reading there is no wait": (policy(backoff_s=0.0), """
        machine 9000                -> stopped
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3 mib=2000            -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 1
    """),
    "memory that is freed late": (policy(backoff_s=0.0), NEEDS_2000 + """
        machine 1700                -> running
        exit 1                      -> waiting: close crash, save
            | Waiting for memory: 1,700 MiB available, 1,800 MiB required; at most 10m00s (restart.wait_for_memory_s).
        early after=5               -> waiting
        machine 1799                -> waiting
        machine 1800                -> starting: save, spawn 2 batch 8 of 8 save 1
            | Memory is available again (1,800 MiB available, memory pressure normal): starting.
    """),
    "a busy machine delays only one start": (policy(backoff_s=0.0, wait_for_memory_s=100.0), NEEDS_2000 + """
        machine 1500                -> running
        saved                       -> running: save
        exit 1                      -> waiting: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8
            | Memory still short after 1m40s (1,500 MiB available, 1,800 MiB required); another program may hold it.
            | Starting anyway.
        ready                       -> running
        steps 3                     -> running
        saved                       -> running: save
        machine 1201                -> running
        exit 1                      -> starting: close crash, save, spawn 3 batch 8 of 8  # 80 % of the 1500
        ready                       -> running
        steps 3                     -> running
        machine 1199                -> running
        exit 1                      -> waiting: close crash, save
    """),
    "a small machine: 80 % of the baseline": (policy(backoff_s=0.0), """
        machine 2000                -> stopped
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3 mib=2100            -> running
        machine 1599                -> running
        exit 1                      -> waiting: close crash, save
        machine 1600                -> starting: save, spawn 2 batch 8 of 8 save 1
    """),
    "never for more than the limit": (policy(backoff_s=0.0, limit_bytes=2 * 2**30), """
        machine 9000                -> stopped
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        sample 4000 2               -> killing: kill
        machine 2047                -> killing
        exit signal=9               -> waiting: close memory pressure, save
        machine 2048                -> starting: save, spawn 2 batch 4 of 8 save 1
    """),
    "no wait if turned off": (policy(backoff_s=0.0, wait_for_memory_s=0.0), NEEDS_2000 + """
        machine 0                   -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 1
    """),
    "an old reading is discarded": (policy(backoff_s=0.0), """
        machine 9000 critical       -> stopped
        start                       -> waiting: save
            | Waiting for memory: 9,000 MiB available, memory pressure critical;
            | at most 10m00s (restart.wait_for_memory_s).
        tick                        -> starting: save, spawn 1 batch 8 of 8
            | Memory still short after 10m00s (9,000 MiB available, memory pressure critical);
            | another program may hold it. Starting anyway.
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8
    """),
    "a missing program leaves no memory to wait for": (policy(backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        machine 1 critical          -> starting
        fails spawn                 -> starting: close could not be started, save, spawn 2 batch 8 of 8
            | Failed to start the worker: no such file; restarting with batch 8 × 1.
    """),
    "critical memory pressure delays even the first start": (policy(), """
        machine 9000 critical       -> stopped
        start                       -> waiting: save
        machine 9000 critical       -> waiting
        machine 9000 warn           -> starting: save, spawn 1 batch 8 of 8
            | Memory is available again (9,000 MiB available, memory pressure warn): starting.
    """),
    "commands while it waits for memory": (policy(backoff_s=0.0, max_without_progress=9), NEEDS_2000 + """
        machine 1500                -> running
        exit 1                      -> waiting: close crash, save
        restart                     -> starting: save, spawn 2 batch 8 of 8 save 1
        machine 1000                -> starting
        exit 1                      -> waiting: close crash, save
        stop                        -> stopped: save, finish stopped
            | Stopped at step 3: stopped while waiting to restart.
        start                       -> starting: save, spawn 3 batch 8 of 8 save 1  # a person decided
    """),
    "a suspended run waits again": (policy(backoff_s=0.0), NEEDS_2000 + """
        machine 1500                -> running
        exit 1                      -> waiting: close crash, save
        suspend                     -> stopped: save, finish stopped
        start                       -> waiting: save
    """),
    "after a backoff": (policy(), NEEDS_2000 + """
        machine 1500                -> running
        exit 1                      -> backoff: close crash, save
        machine 1900                -> backoff
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
        machine 1500                -> starting
        exit 1                      -> backoff: close crash, save
        tick                        -> waiting: save
    """),
    "a death while relieving": (policy(backoff_s=0.0), """
        machine 9000                -> stopped
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        machine 9                   -> relieving
        exit 1                      -> waiting: close crash, save
    """),
    "a death while draining or terminating": (policy(), NEEDS_2000 + """
        restart                     -> draining: ask stop
            | Restart requested; the worker saves a checkpoint and exits.
        machine 9                   -> draining
        exit 75                     -> waiting: close requested, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
        restart                     -> terminating: term
        machine 1                   -> terminating
        exit 75                     -> waiting: close requested, save
    """),
    "waiting at the start, after the end and after a failure": (policy(max_without_progress=1), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        bye completed               -> starting
        exit 0                      -> completed: close completed, save, finish completed
        machine 9000 critical       -> completed
        start                       -> waiting: save
        start                       -> starting: save, spawn 2 batch 8 of 8
        exit 1                      -> fatal: close crash, save, finish failed
        machine 9000 critical       -> fatal
        start                       -> waiting: save
    """),
    "the machine restarted: a cooldown first": (policy(reboot_cooldown_s=60.0), """
        recovered host              -> stopped: close the machine restarted, save
            | Recovered generation 0: the machine restarted.
        start                       -> backoff: save
            | The machine restarted during this run; next start in 1m00s (restart.reboot_cooldown_s).
        early after=59              -> backoff
        tick                        -> starting: save, spawn 1 batch 8 of 8
        exit 1                      -> backoff: close crash, save
        stop                        -> stopped: save, finish stopped
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "the machine restarted long before the start": (policy(reboot_cooldown_s=60.0), """
        recovered host              -> stopped: close the machine restarted, save
        start after=60              -> starting: save, spawn 1 batch 8 of 8
    """),
    "the machine restarted, and a person starts the run": (policy(), """
        recovered host              -> stopped: close the machine restarted, save
        start                       -> backoff: save
        start                       -> starting: save, spawn 1 batch 8 of 8
        exit 1                      -> backoff: close crash, save
        stop                        -> stopped: save, finish stopped
        recovered host              -> stopped: close the machine restarted, save
        start                       -> backoff: save
        stop                        -> stopped: save, finish stopped
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "the machine restarted after the end and after a failure": (policy(max_without_progress=1), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        bye completed               -> starting
        exit 0                      -> completed: close completed, save, finish completed
        recovered host              -> completed: close the machine restarted, save
        start                       -> backoff: save
        start                       -> starting: save, spawn 2 batch 8 of 8
        exit 1                      -> fatal: close crash, save, finish failed
        recovered host              -> fatal: close the machine restarted, save
        start                       -> backoff: save
    """),
    "the machine restarts whenever the run starts": (policy(max_reboots=3, max_without_progress=1), """
        recovered host              -> stopped: close the machine restarted, save
        recovered host              -> stopped: close the machine restarted, save
        recovered host              -> fatal: close the machine restarted, save, finish failed
            | Recovered generation 0: the machine restarted.
            | Failed before the first step: 3 consecutive machine restarts during this run without a new checkpoint
            | (restart.max_reboots).
    """),
    "another process holds the run's folder": (policy(start_timeout_s=100.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        blocked a worker runs       -> starting
            | Start blocked: a worker runs.
        blocked it survived lasting=yes -> starting
        tick                        -> starting
            | Start still blocked: it survived.
        tick                        -> starting
        spawned                     -> starting
        early after=99              -> starting
        tick                        -> terminating: term
            | The worker is not ready after 1m40s; sending SIGTERM.
    """),
    "a blocked start is cancelled": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        blocked a worker runs       -> starting
        stop                        -> terminating: save, term
        exit                        -> stopped: close requested, save, finish stopped
        start                       -> starting: save, spawn 2 batch 8 of 8
    """),
    "a soft trip waits for the disk and loses no update": (policy(stop_grace_s=60.0), TRIPPED + """
        saved error=full            -> draining
        phase checkpoint the disk   -> draining
            | Waiting for the disk.
        early after=55              -> draining
        phase checkpoint the disk   -> draining
        early after=55              -> draining
        phase checkpoint the disk   -> draining
        saved                       -> draining: save
        phase train                 -> draining
            | The wait is over.
        bye stopped                 -> draining
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
            | 0 steps lost
    """),
    "a worker that waits and falls silent is stopped": (policy(stop_grace_s=60.0), TRIPPED + """
        phase checkpoint the disk   -> draining
        early after=59              -> draining
        tick                        -> terminating: term
    """),
    "a stop ends the wait of a soft trip": (policy(stop_grace_s=60.0), TRIPPED + """
        phase checkpoint the disk   -> draining
        stop                        -> draining: save, ask stop
            | Stop requested; the worker tries to save once more and exits.
        phase checkpoint the disk   -> draining
        early after=59              -> draining
        tick                        -> terminating: term
        exit 75                     -> stopped: close memory leak, save, finish stopped
    """),
    "a stop waits for the disk only within the grace period": (policy(stop_grace_s=60.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 3                     -> running
        stop                        -> draining: save, ask stop
        phase checkpoint the disk   -> draining
        early after=30              -> draining
        phase checkpoint the disk   -> draining
        tick                        -> terminating: term
    """),
}  # fmt: skip

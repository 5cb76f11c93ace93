"""Golden timelines of memory: trips, relief, halving, growth, limits that are too low."""

from tests.core.machine.timeline import policy

FULL = "exit 1 RuntimeError: [malloc] Unable to allocate 9 bytes."

OVER_LIMIT = """
    start                       -> starting: save, spawn 1 batch 8 of 8
    ready                       -> running
    steps 5                     -> running
    saved                       -> running: save
    sample 2300                 -> running
    sample 2100                 -> running
    sample 2300 2               -> killing: kill
    exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 4 of 8
"""
MEMORY = {
    "a leak stops the worker in time and restarts it with half the batch": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        spawned                     -> starting
        ready                       -> running
            | Ready at step 0 of 1000, from the beginning; micro-batch 8, effective batch 8.
        steps 40 grow=50            -> draining: ask stop
            | Memory grows by 50.0 MiB/step and would pass the limit of 2,200 MiB in 4 steps: saving a checkpoint,
            | then restarting.
        saved                       -> draining: save
            | Saved checkpoint of step 29: 10 MiB in 0.2 s.
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
            | Memory leak; restarting with batch 4 × 2, 0 steps lost.
        ready                       -> running
        steps 9 mib=500             -> running
        steps 19                    -> running
            | Stable for 10 updates since the restart.
        steps 1                     -> running: save, resize 8 of 8
            | Growing micro-batch to 8 from the next update.
        saved                       -> running: save
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
            | Completed at step 1000: all steps done.
    """),
    "a soft trip leaves time for a slow checkpoint": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 1                     -> running
        saved seconds=1             -> running: save
        steps 20 grow=50            -> running
        steps 6 grow=50             -> draining: ask stop
    """),
    "clearing the caches is enough": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
            | Memory with usual spikes is at 2,180 MiB, near the limit of 2,200 MiB: clearing the caches first.
        early                       -> relieving
        steps 1 mib=2180 cache=900  -> relieving
        cleared                     -> relieving
        sample 1300                 -> running
            | Clearing the caches was enough: footprint 1,300 MiB.
        steps 30 mib=1300 cache=0   -> running
    """),
    "clearing the caches is not enough": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        cleared                     -> relieving
        sample 2150                 -> relieving
        saved                       -> relieving: save
        tick                        -> draining: ask stop
            | Memory with usual spikes is at 2,180 MiB, near the limit of 2,200 MiB: saving a checkpoint, then
            | restarting.
        exit 75                     -> starting: close memory pressure, save, spawn 2 batch 4 of 8
            | Memory pressure; restarting with batch 4 × 2, 0 steps lost.
    """),
    "the answer to the request to clear is lost": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        sample 1300                 -> relieving
        tick                        -> draining: ask stop
    """),
    "over the limit while the caches are cleared": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        sample 2300 2               -> killing: kill
            | Used 2,300 MiB, limit 2,200: killing the worker.
        exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 4 of 8 save 4
            | Used 2,300 MiB, limit 2,200: worker killed; restarting with batch 4 × 2, 9 steps lost.
    """),
    "deaths while the caches are cleared": (policy(backoff_s=0.0, max_without_progress=2), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8 save 4
            | The worker crashed: exit code 1, nothing printed; restarting with batch 8 × 1, 9 steps lost.
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        exit 1                      -> fatal: close crash, save, finish failed
            | Failed at step 9: exit code 1, nothing printed; 2 consecutive generations without a new checkpoint
            | (restart.max_without_progress).
    """),
    "a crash while the caches are cleared waits too": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear
        exit 1                      -> backoff: close crash, save
            | The worker crashed: exit code 1, nothing printed; restarting in 1 s with batch 8 × 1, 9 steps lost.
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 4
    """),
    "completion while the caches are cleared": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=9              -> running
        steps 9 mib=2180 cache=900  -> relieving: ask clear
        saved                       -> relieving: save
        exit 0                      -> completed: close completed, save, finish completed
    """),
    "over the limit: killed at once, at two samples": (policy(), OVER_LIMIT),
    "over the limit while it checkpoints": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory leak, save, spawn 2 batch 4 of 8 save 14
            | Memory leak; restarting with batch 4 × 2, 29 steps lost.
    """),
    "over the limit while it is being terminated": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        tick                        -> terminating: term
            | The worker did not exit within 1m00s; sending SIGTERM.
        steps 1 mib=2100            -> terminating
        sample 2300 2               -> killing: kill
        steps 1                     -> killing
        exit signal=9               -> starting: close memory leak, save, spawn 2 batch 4 of 8 save 15
    """),
    "the kernel kills for memory: half, once per kill": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 5                     -> running
        exit signal=9 oom=yes     -> starting: close killed by the kernel for memory, save, spawn 2 batch 4 of 8 save 2
            | Advice: set memory.limit below what the machine or its control group has, so that the breaker acts
            | first.
            | The kernel killed the worker: out of memory; restarting with batch 4 × 2, 5 steps lost.
        ready                       -> running
        steps 1 mib=2100            -> running
        exit signal=9               -> starting: close memory pressure, save, spawn 3 batch 2 of 8 save 1
            | The worker was killed near the memory limit (sender unknown); restarting with batch 2 × 4, 1 step lost.
            | Advice: use a smaller batch or shorter sequences, or close other programs that use the GPU.
    """),
    "the device is out of memory before the model is loaded: not because of the limit": (policy(size=2), f"""
        start                       -> starting: save, spawn 1 batch 2 of 2
        {FULL}                      -> starting: close device out of memory, save, spawn 2 batch 1 of 2
            | Advice: use a smaller batch or shorter sequences, or close other programs that use the GPU.
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting with batch 1 × 2.
        {FULL}                      -> backoff: close device out of memory, save
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting in 1 s with batch 1
            | × 2; nothing smaller is left: batch.minimum = 1.
    """),
    "a limit below the model's size": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        phase load                  -> starting
        sample 2300 2               -> killing: kill
        exit signal=9               -> fatal: close memory pressure, save, finish failed
            | Failed before the first step: the limit of 2,200 MiB is too low for this run:
            | it used 2,300 MiB before the model was loaded; raise memory.limit or choose a smaller model.
    """),
    "a limit below what the loaded model holds": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        phase load                  -> starting
        sample 2150                 -> starting
        ready                       -> running
            | Little room: the worker holds 2,150 MiB before the first step; the limit is 2,200 MiB (memory.limit).
        sample 2300 2               -> killing: kill
        exit signal=9               -> fatal: close memory pressure, save, finish failed
            | Failed before the first step: the limit of 2,200 MiB is too low for this run:
            | it used 2,150 MiB with the model loaded, before the first step; raise memory.limit or choose a smaller
            | model.
    """),
    "a limit below the model's size, all messages lost": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 4 of 8  # ready lost?
        sample 2300 2               -> killing: kill
        exit signal=9               -> fatal: close memory pressure, save, finish failed
            | Failed before the first step: the limit of 2,200 MiB is too low for this run: it used 2,300 MiB before
            | the model was loaded; raise memory.limit or choose a smaller model.
    """),
    "a limit below the model's size, at the smallest batch": (policy(size=1), """
        start                       -> starting: save, spawn 1 batch 1 of 1
        sample 2300 2               -> killing: kill
        exit signal=9               -> fatal: close memory pressure, save, finish failed
    """),
    "a limit below the first step's need at every size": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 4 of 8
        ready                       -> running
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory pressure, save, spawn 3 batch 2 of 8
        ready                       -> running
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory pressure, save, spawn 4 batch 1 of 8
        ready                       -> running
        sample 2300 2               -> killing: kill
        exit signal=9               -> fatal: close memory pressure, save, finish failed
            | Failed before the first step: the limit of 2,200 MiB is too low for this run: it used 2,300 MiB before
            | the first step at micro-batch 1; raise memory.limit or choose a smaller model.
    """),
    "no growth to a size that tripped for pressure": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180           -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory pressure, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 12 mib=2180           -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory pressure, save, spawn 3 batch 2 of 8
        ready                       -> running
        steps 300 mib=500           -> running
    """),
    "a smaller start doubles up to the requested size": (policy(start=2, size=12), """
        start                       -> starting: save, spawn 1 batch 2 of 12
        ready                       -> running
        steps 20                    -> running: save, resize 4 of 12
        steps 20                    -> running: save, resize 8 of 12
        steps 20                    -> running: save, resize 12 of 12
        steps 60                    -> running
    """),
    "without preserve_effective the effective batch shrinks too": (policy(preserve_effective=False, accumulation=2), """
        start                       -> starting: save, spawn 1 batch 8 of 16
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 30 mib=500            -> running: save, resize 8 of 16
    """),
    "the worker chose the batch": (policy(size=None), """
        start                       -> starting: save, spawn 1 batch None
        ready batch=6 effective=12  -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 3 of 12
        ready                       -> running
        steps 30 mib=500            -> running: save, resize 6 of 12
    """),
    "a leak at the smallest batch restarts as long as it makes progress": (
        policy(size=1, max_memory_without_progress=3), """
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 1 of 1
            | Memory leak; restarting with batch 1 × 1, 0 steps lost.
        ready                       -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 3 batch 1 of 1
        ready                       -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 4 batch 1 of 1
        ready                       -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> backoff: close memory leak, save
            | Memory leak; restarting in 1 s with batch 1 × 1, 27 steps lost; nothing smaller is left: batch.minimum =
            | 1.
        tick                        -> starting: save, spawn 5 batch 1 of 1 save 13
        ready                       -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> backoff: close memory leak, save
        tick                        -> starting: save, spawn 6 batch 1 of 1 save 13
        ready                       -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> fatal: close memory leak, save, finish failed
            | Failed at step 110: memory grows by 50.0 MiB/step and would pass the limit of 2,200 MiB in 6 steps; 3
            | consecutive generations without a new checkpoint, ended by memory (restart.max_memory_without_progress).
    """),
    "near the limit at the smallest batch, but steady: no trip": (policy(size=1), """
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready                       -> running
        steps 2000 mib=2190         -> running
    """),
    "grown to the limit at the smallest batch: a new process needs less": (policy(size=1), """
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready                       -> running
        steps 20 mib=1500           -> running
        steps 20 mib=2190           -> draining: ask stop
    """),
    "no growth while it leaks": (
        policy(start=4),
        """
        start                       -> starting: save, spawn 1 batch 4 of 8
        ready                       -> running
        steps 60 grow=20            -> running
    """,
    ),
    "the ready message is lost": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        steps 1                     -> running
            | Ready (inferred from step 1; the ready message was lost).
        steps 10                    -> running
        saved                       -> running: save
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
    """),
}  # fmt: skip

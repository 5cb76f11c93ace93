"""Golden timelines of the escalation ladder: what each cause changes, and when the run fails."""

from tests.core.machine.golden_memory import FULL
from tests.core.machine.timeline import policy

ABORT = "exit signal=6 libc++abi: terminating due to uncaught exception of type std::runtime_error:"
WATCHDOG = f"{ABORT} [METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"  # noqa: E501
BUFFERS = "exit 1 RuntimeError: [metal::malloc] Resource limit (499000) exceeded."

LEAK_HALVES_ONCE = """
    start                       -> starting: save, spawn 1 batch 8 of 8
    ready                       -> running
    steps 40 grow=50            -> draining: ask stop
    saved                       -> draining: save
    exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
    ready                       -> running
    steps 40 mib=500 grow=50    -> draining: ask stop
    saved                       -> draining: save
    exit 75                     -> starting: close memory leak, save, spawn 3 batch 4 of 8
        | The worker ended (exit code 75):
        | memory leak (memory grows by 50.0 MiB/step and would pass the limit of 2,200 MiB in 6 steps);
        | micro-batch kept at 4: a restart cures the leak, one halving is enough (batch.halve_on_leak);
    ready                       -> running
    steps 40 mib=500 grow=50    -> draining: ask stop
    saved                       -> draining: save
    exit 75                     -> starting: close memory leak, save, spawn 4 batch 4 of 8
"""
LIMIT_BELOW_NEED = """
    start                       -> starting: save, spawn 1 batch 1 of 1
    ready can=yes               -> running
    sample 2300 2               -> killing: kill
    exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 1 of 1 recompute
        | The worker ended (signal 9): memory pressure (used 2,300 MiB, limit 2,200 MiB);
        | micro-batch kept at 1 (batch.minimum = 1),
        | gradient checkpointing turned on (memory.gradient_checkpointing); restarting.
    ready can=yes               -> running
    sample 2300 2               -> killing: kill
    exit signal=9               -> fatal: close memory pressure, save, finish failed
"""
LADDER = {
    "a leak halves the batch once, then restarts at that size": (policy(), LEAK_HALVES_ONCE),
    "grown back after a leak, the next leak halves again": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 60 mib=500            -> running: save, resize 8 of 8
        steps 200 grow=50           -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 3 batch 4 of 8
    """),
    "a leak without new checkpoints keeps halving, then turns on gradient checkpointing": (
        policy(size=4, max_memory_without_progress=1, backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 4 of 4
        ready can=yes               -> running
        steps 1                     -> running
        exit 1                      -> starting: close crash, save, spawn 2 batch 4 of 4 save 1
        ready can=yes               -> running
        steps 40 grow=50            -> draining: ask stop
        exit 75                     -> starting: close memory leak, save, spawn 3 batch 2 of 4 save 1
        ready can=yes               -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> starting: close memory leak, save, spawn 4 batch 1 of 4 save 1
        ready can=yes               -> running
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> starting: close memory leak, save, spawn 5 batch 1 of 4 save 1 recompute
            | The worker ended (exit code 75):
            | memory leak (memory grows by 50.0 MiB/step and would pass the limit of 2,200 MiB in 4 steps);
            | micro-batch kept at 1 (batch.minimum = 1),
            | gradient checkpointing turned on (memory.gradient_checkpointing); restarting.
        ready can=yes               -> running
            | Ready at step 0 of 1000, from the beginning;
            | micro-batch 1, effective batch 4, with gradient checkpointing.
        steps 40 mib=500 grow=50    -> draining: ask stop
        exit 75                     -> fatal: close memory leak, save, finish failed
    """),
    "a leak with halving turned off": (policy(halve_on_leak=False), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 8 of 8
            | The worker ended (exit code 75):
            | memory leak (memory grows by 50.0 MiB/step and would pass the limit of 2,200 MiB in 4 steps);
            | micro-batch kept at 8: a restart cures the leak (batch.halve_on_leak is off); restarting.
    """),
    "pressure after a leak's halving still halves": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 12 mib=2180           -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory pressure, save, spawn 3 batch 2 of 8
    """),
    "no clearing of the caches if turned off": (policy(clear_first=False), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> draining: ask stop
    """),
    "gradient checkpointing is the last resort at the smallest batch": (policy(size=2), f"""
        start                       -> starting: save, spawn 1 batch 2 of 2
        ready can=yes               -> running
        {FULL}                      -> starting: close device out of memory, save, spawn 2 batch 1 of 2
        ready can=yes               -> running
        {FULL}                      -> starting: close device out of memory, save, spawn 3 batch 1 of 2 recompute
            | The worker ended (exit code 1):
            | device out of memory (RuntimeError: [malloc] Unable to allocate 9 bytes.);
            | micro-batch kept at 1 (batch.minimum = 1),
            | gradient checkpointing turned on (memory.gradient_checkpointing);
        ready can=yes               -> running
        steps 2                     -> running
        saved                       -> running: save
        exit 1 ValueError: x        -> starting: close crash, save, spawn 4 batch 1 of 2 recompute
            | The worker ended (exit code 1): crash (ValueError: x); restarting.
        {FULL}                      -> backoff: close device out of memory, save
            | The worker ended (exit code 1):
            | device out of memory (RuntimeError: [malloc] Unable to allocate 9 bytes.);
            | micro-batch kept at 1 (batch.minimum = 1), gradient checkpointing is already on;
    """),
    "a limit below the need: gradient checkpointing before the end": (policy(size=1), LIMIT_BELOW_NEED),
    "gradient checkpointing never": (policy(size=1, gradient_checkpointing="never"), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready can=yes               -> running
        {FULL}                      -> backoff: close device out of memory, save
            | The worker ended (exit code 1):
            | device out of memory (RuntimeError: [malloc] Unable to allocate 9 bytes.);
            | micro-batch kept at 1 (batch.minimum = 1, memory.gradient_checkpointing = 'never');
    """),
    "gradient checkpointing always": (policy(size=1, gradient_checkpointing="always"), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1 recompute
        ready can=yes               -> running
        {FULL}                      -> backoff: close device out of memory, save
    """),
    "a task without gradient checkpointing": (policy(size=1), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready                       -> running
        {FULL}                      -> backoff: close device out of memory, save
        tick                        -> starting: save, spawn 2 batch 1 of 1
    """),
    "Metal's buffers run out: the same batch": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved                       -> running: save
        {BUFFERS}                   -> starting: close Metal resource limit, save, spawn 2 batch 8 of 8
            | The worker ended (exit code 1):
            | Metal resource limit (RuntimeError: [metal::malloc] Resource limit (499000) exceeded.);
            | micro-batch kept (this limit counts buffers, not bytes);
    """),
    "the GPU watchdog: the same batch": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        {WATCHDOG}                  -> backoff: close GPU watchdog, save
            | The worker ended (signal 6):
            | micro-batch kept (a smaller one would not help);
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 2
    """),
    "memory and crashes have budgets of their own": (
        policy(size=1, backoff_s=0.0, max_without_progress=2, max_memory_without_progress=3), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1
        exit 1                      -> starting: close crash, save, spawn 2 batch 1 of 1
        {FULL}                      -> starting: close device out of memory, save, spawn 3 batch 1 of 1
            | The worker ended (exit code 1):
            | device out of memory (RuntimeError: [malloc] Unable to allocate 9 bytes.);
            | micro-batch kept at 1 (batch.minimum = 1);
        {FULL}                      -> starting: close device out of memory, save, spawn 4 batch 1 of 1
        {BUFFERS}                   -> fatal: close Metal resource limit, save, finish failed
            | Failed at step 0: 3 consecutive generations without a new checkpoint,
            | ended by memory (restart.max_memory_without_progress);
            | last error: RuntimeError: [metal::malloc] Resource limit (499000) exceeded.;
    """),
    "the same error at the same step fails the run": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved 2                     -> running: save
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 2 batch 8 of 8
            | The worker ended (exit code 1): crash (ValueError: bad); restarting.
        ready step=2                -> running
        steps 2                     -> running
        saved 3                     -> running: save
        exit 1 ValueError: bad      -> fatal: close crash, save, finish failed
            | Failed at step 4: the same error 2 times in a row after step 4 (restart.max_same_error):
            | ValueError: bad.
    """),
    "the same error, with steps and the ready message lost": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        bye failed step=4           -> running
        exit 1 ValueError: bad      -> backoff: close crash, save
            | The worker ended (exit code 1): crash (ValueError: bad); next start in 1 s.
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 2
        bye failed step=4           -> starting
        exit 1 ValueError: bad      -> fatal: close crash, save, finish failed
    """),
    "the same error before the first step, at a later checkpoint": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        exit 1 ValueError: bad      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8
        ready step=5                -> running
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 3 batch 8 of 8
    """),
    "the same error after a requested restart": (policy(max_without_progress=9, backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 2 batch 8 of 8
        restart                     -> terminating: term
            | Restart requested; the worker is not ready yet, sending SIGTERM.
        exit 75                     -> starting: close requested, save, spawn 3 batch 8 of 8
            | The worker ended (exit code 75): requested; restarting.
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 4 batch 8 of 8
        exit 1 ValueError: bad      -> fatal: close crash, save, finish failed
    """),
    "the same error at another step, or another error": (policy(max_without_progress=9, backoff_s=0.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 2 batch 8 of 8 save 2
        ready                       -> running
        steps 5                     -> running
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 3 batch 8 of 8 save 2
        ready                       -> running
        steps 5                     -> running
        exit 1 KeyError: 5          -> starting: close crash, save, spawn 4 batch 8 of 8 save 2
            | The worker ended (exit code 1): crash (KeyError: 5); restarting.
        ready                       -> running
        steps 5                     -> running
        exit signal=9 oom=no        -> starting: close killed externally, save, spawn 5 batch 8 of 8 save 2
            | The worker ended (signal 9):
        ready                       -> running
        steps 5                     -> running
        exit 1 KeyError: 5          -> starting: close crash, save, spawn 6 batch 8 of 8 save 2
        ready                       -> running
        steps 5                     -> running
        exit 1 KeyError: 5          -> fatal: close crash, save, finish failed
            | Failed at step 5: the same error 2 times in a row after step 5 (restart.max_same_error): KeyError: 5.
    """),
    "a loss that is not finite: one retry, then the run fails": (policy(max_same_error=9), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved 2                     -> running: save
        bye failed                  -> running
        exit 65 nan                 -> starting: close the loss is not a finite number, save, spawn 2 batch 8 of 8
            | The worker ended (exit code 65): the loss is not a finite number (nan);
        ready step=2                -> running
        steps 2                     -> running
        bye failed                  -> running
        exit 65 nan                 -> fatal: close the loss is not a finite number, save, finish failed
            | Failed at step 4: 2 consecutive non-finite losses at step 4 (nan);
    """),
    "a loss that is not finite at other steps each time": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved                       -> running: save
        exit 65 nan                 -> starting: close the loss is not a finite number, save, spawn 2 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved                       -> running: save
        exit 65 nan                 -> starting: close the loss is not a finite number, save, spawn 3 batch 8 of 8
    """),
    "a confirmed leak gets one autopsy per generation": (policy(autopsy=True), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 11 grow=50            -> running
        steps 7 grow=50             -> running: ask autopsy
        autopsied a list, a dict    -> running
            | Autopsy at step 18: a list
            | Autopsy at step 18: a dict
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        autopsied again             -> draining
        exit 75                     -> starting: close memory leak, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 18 mib=500 grow=50    -> running: ask autopsy
        autopsied                   -> running
            | Autopsy at step 47: no growth found; the search took 0.1 s.
    """),
    "a trip without a leak gets an autopsy, requested before the stop": (policy(autopsy=True), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180           -> draining: ask autopsy, ask stop
    """),
    "no time for an autopsy": (policy(autopsy=True, stop_grace_s=9.0), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180           -> draining: ask stop
    """),
    "an autopsy while the caches are cleared": (policy(autopsy=True), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 12 mib=2180 cache=900 -> relieving: ask clear, ask autopsy
        autopsied a list            -> relieving
        fails RequestAutopsy        -> relieving
        tick                        -> draining: ask stop
        fails RequestAutopsy        -> draining
    """),
}  # fmt: skip

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
        | Memory leak; restarting with batch 4 × 2, 0 steps lost.
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
        | Used 2,300 MiB, limit 2,200: worker killed; restarting with batch 1 × 1 and gradient checkpointing.
    ready can=yes               -> running
    sample 2300 2               -> killing: kill
    exit signal=9               -> fatal: close memory pressure, save, finish failed
"""
NAN = "exit 65 loss became NaN at step 4 (no previous step; learning rate 0.01)"
LADDER = {
    "a leak halves the batch once, then restarts at that size": (policy(), LEAK_HALVES_ONCE),
    "a leak that halving makes faster restores the micro-batch": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 5 mib=500 grow=80     -> running
        saved                       -> running: save
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory pressure, save, spawn 2 batch 4 of 8
        ready                       -> running
        steps 5 mib=500 grow=160    -> running
        saved                       -> running: save
        sample 2300 2               -> killing: kill
        exit signal=9               -> starting: close memory leak, save, spawn 3 batch 8 of 8
            | Used 2,300 MiB, limit 2,200: worker killed; restarting with batch 8 × 1, 0 steps lost.
            | Micro-batch restored to 8
    """),
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
            | Memory leak; restarting with batch 1 × 4 and gradient checkpointing, 29 steps lost.
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
            | Memory leak; restarting with batch 8 × 1, 0 steps lost.
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
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting with batch 1 × 2 and
            | gradient checkpointing.
        ready can=yes               -> running
        steps 2                     -> running
        saved                       -> running: save
        exit 1 ValueError: x        -> starting: close crash, save, spawn 4 batch 1 of 2 recompute
            | The worker crashed: ValueError: x; restarting with batch 1 × 2 and gradient checkpointing, 0 steps lost.
        {FULL}                      -> backoff: close device out of memory, save
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting in 1 s with batch 1
            | × 2 and gradient checkpointing; nothing smaller is left: batch.minimum = 1.
    """),
    "a limit below the need: gradient checkpointing before the end": (policy(size=1), LIMIT_BELOW_NEED),
    "gradient checkpointing never": (policy(size=1, gradient_checkpointing="never"), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready can=yes               -> running
        {FULL}                      -> backoff: close device out of memory, save
            | Advice: use a smaller batch or shorter sequences, or close other programs that use the GPU.
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting in 1 s with batch 1
            | × 1; nothing smaller is left: batch.minimum = 1, memory.gradient_checkpointing = 'never'.
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
            | Advice: too many buffers, not too many bytes: pad sequences to a few fixed lengths.
            | Metal resource limit: RuntimeError: [metal::malloc] Resource limit (499000) exceeded; restarting with
            | batch 8 × 1, 0 steps lost.
    """),
    "the GPU watchdog: the same batch": (policy(), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        {WATCHDOG}                  -> backoff: close GPU watchdog, save
            | GPU watchdog: std::runtime_error: [METAL] Command buffer execution failed: Impacting Interact…;
            | restarting in 1 s with batch 8 × 1, 4 steps lost.
            | Advice: not the batch: let the display sleep (pmset displaysleepnow) or close programs that draw on it;
            | setting AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the environment has helped others.
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 2
    """),
    "memory and crashes have budgets of their own": (
        policy(size=1, backoff_s=0.0, max_without_progress=2, max_memory_without_progress=3), f"""
        start                       -> starting: save, spawn 1 batch 1 of 1
        exit 1                      -> starting: close crash, save, spawn 2 batch 1 of 1
        {FULL}                      -> starting: close device out of memory, save, spawn 3 batch 1 of 1
            | Advice: use a smaller batch or shorter sequences, or close other programs that use the GPU.
            | Device out of memory: RuntimeError: [malloc] Unable to allocate 9 bytes; restarting with batch 1 × 1;
            | nothing smaller is left: batch.minimum = 1.
        {FULL}                      -> starting: close device out of memory, save, spawn 4 batch 1 of 1
        {BUFFERS}                   -> fatal: close Metal resource limit, save, finish failed
            | Failed before the first step: RuntimeError: [metal::malloc] Resource limit (499000) exceeded; 3
            | consecutive generations without a new checkpoint, ended by memory (restart.max_memory_without_progress);
            | too many buffers, not too many bytes: pad sequences to a few fixed lengths.
    """),
    "the same error at the same step fails the run": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved 2                     -> running: save
        exit 1 ValueError: bad      -> starting: close crash, save, spawn 2 batch 8 of 8
            | The worker crashed: ValueError: bad; restarting with batch 8 × 1, 2 steps lost.
        ready step=2                -> running
        steps 2                     -> running
        saved 3                     -> running: save
        exit 1 ValueError: bad      -> fatal: close crash, save, finish failed
            | Failed at step 4: ValueError: bad; the same error 2 times in a row at step 4 (restart.max_same_error).
    """),
    "the same error, with steps and the ready message lost": (policy(), """
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        bye failed step=4           -> running
        exit 1 ValueError: bad      -> backoff: close crash, save
            | The worker crashed: ValueError: bad; restarting in 1 s with batch 8 × 1, 4 steps lost.
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
            | Restarting with batch 8 × 1.
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
            | The worker crashed: KeyError: 5; restarting with batch 8 × 1, 5 steps lost.
        ready                       -> running
        steps 5                     -> running
        exit signal=9 oom=no        -> starting: close killed externally, save, spawn 5 batch 8 of 8 save 2
            | Another process sent the worker SIGKILL; restarting with batch 8 × 1, 5 steps lost.
        ready                       -> running
        steps 5                     -> running
        exit 1 KeyError: 5          -> starting: close crash, save, spawn 6 batch 8 of 8 save 2
        ready                       -> running
        steps 5                     -> running
        exit 1 KeyError: 5          -> fatal: close crash, save, finish failed
            | Failed at step 5: KeyError: 5; the same error 2 times in a row at step 5 (restart.max_same_error).
    """),
    "a loss that is not finite: one retry, then the run fails": (policy(max_same_error=9), f"""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 4                     -> running
        saved 2                     -> running: save
        bye failed                  -> running
        {NAN}                       -> starting: close the loss is not a finite number, save, spawn 2 batch 8 of 8
            | Loss became NaN at step 4. Try a lower learning rate, a longer warm-up or clipping.
            | Restarting with batch 8 × 1, 2 steps lost.
        ready step=2                -> running
        steps 2                     -> running
        bye failed                  -> running
        {NAN}                       -> fatal: close the loss is not a finite number, save, finish failed
            | Failed at step 4: loss became NaN at step 4 (no previous step; learning rate 0.01), 2 times in a row.
            | Try a lower learning rate, a longer warm-up or clipping.
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

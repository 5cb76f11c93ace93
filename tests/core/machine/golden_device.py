"""Golden timelines of a device with its own memory: its limit, its driver, and other processes on it. In MiB."""

from tests.core.machine.timeline import policy

OOM = "exit 1 RuntimeError: cudaMallocAsync(&data, size, stream) failed: out of memory"
BEGUN = """
    start                       -> starting: save, spawn 1 batch 8 of 8
    device 10000 40000          -> starting
    ready                       -> running
    steps 5 active=2000         -> running
    saved                       -> running: save
"""
DEVICE = {
    "a leak on the device stops the worker in time": (policy(), """
        start                              -> starting: save, spawn 1 batch 8 of 8
        device 10000 40000                 -> starting
            | The worker computes on a device with its own memory: limit 10,000 of 40,000 MiB (memory.device_limit).
        ready                              -> running
        steps 60 active=2000 leak=300      -> draining: ask stop
            | Device memory grows by 300.0 MiB/step and would pass the limit of 10,000 MiB in 4 steps: saving a
        driver 9000 30000                  -> draining
        saved                              -> draining: save
        exit 75                            -> starting: close memory leak, save, spawn 2 batch 4 of 8
            | Memory leak; restarting with batch 4 × 2, 0 steps lost.
    """),
    "a need near the device's limit stops the worker, and halves": (policy(), BEGUN + """
        steps 20 active=9800               -> draining: ask stop
            | Device memory with usual spikes is at 9,800 MiB, near the limit of 10,000 MiB: saving a checkpoint
        exit 75                            -> starting: close memory pressure, save, spawn 2 batch 4 of 8
            | Memory pressure; restarting with batch 4 × 2,
    """),
    "over the device's limit at the end of an update, it saves": (policy(), BEGUN + """
        steps 1 active=12000               -> draining: ask stop
            | Device memory is at 12,000 MiB, over the limit of 10,000 MiB: saving a checkpoint, then restarting.
    """),
    "a silent worker over the device's limit is killed by what the driver says": (policy(), BEGUN + """
        driver 12000 28000                 -> running
        driver 2600 37000                  -> running
        driver 12000 28000 2               -> killing: kill
            | Device memory used 12,000 MiB, limit 10,000: killing the worker.
        exit signal=9                      -> starting: close memory pressure, save, spawn 2 batch 4 of 8
            | Device memory used 12,000 MiB, limit 10,000: worker killed; restarting with batch 4 × 2, 0 steps lost.
    """),
    "it is killed in every state": (policy(), """
        start                              -> starting: save, spawn 1 batch 8 of 8
        device 10000 40000                 -> starting
        driver 12000 28000 2               -> killing: kill
        exit signal=9                      -> starting: close memory pressure, save, spawn 2 batch 4 of 8
        ready                              -> running
        restart                            -> draining: ask stop
        driver 12000 28000 2               -> killing: kill
        exit signal=9                      -> starting: close requested, save, spawn 3 batch 4 of 8
        restart                            -> terminating: term
        driver 12000 28000 2               -> killing: kill
        exit signal=9                      -> starting: close requested, save, spawn 4 batch 4 of 8
    """),
    "and while the caches are cleared": (policy(), """
        start                              -> starting: save, spawn 1 batch 8 of 8
        ready                              -> running
        steps 12 mib=2180 cache=900        -> relieving: ask clear
        device 10000 40000                 -> relieving
        driver 12000 28000 2               -> killing: kill
    """),
    "the cache gives way first": (policy(), BEGUN + """
        steps 1 active=5000 cache=4800     -> running
        driver 10500 29000                 -> running: ask clear
            | Device memory is over the limit with MLX's cache: clearing the cache.
        driver 10500 29000 2               -> running
        steps 1 active=5000                -> running
        driver 5700 34000                  -> running
    """),
    "a cache that does not give way is over the limit": (policy(), BEGUN + """
        steps 1 active=5000 cache=4800     -> running
        driver 10500 29000                 -> running: ask clear
        driver 10500 29000 after=5         -> killing: kill
    """),
    "what the driver charges beyond MLX's counters counts": (policy(), BEGUN + """
        driver 2600 37000 3                -> running
        steps 20 active=9300               -> draining: ask stop
            | Device memory with usual spikes is at 9,900 MiB, near the limit of 10,000 MiB: saving a checkpoint
    """),
    "a driver that can't tell is no zero": (policy(), BEGUN + """
        driver ? 37000 30                  -> running
        steps 20 active=9800               -> draining: ask stop
    """),
    "other processes took the device's memory: a smaller batch would not help": (policy(), BEGUN + f"""
        driver 9000 500                    -> running
        {OOM}                              -> starting: close device out of memory, save, spawn 2 batch 8 of 8
            | Device out of memory: this run held 8.8 GiB, other processes held 29.8 GiB of 39.1 GiB; restarting with
            | Advice: end other processes on the device, or set memory.device_limit to what they leave.
    """),
    "within its own share the micro-batch is halved": (policy(), BEGUN + f"""
        driver 9000 30000                  -> running
        {OOM}                              -> starting: close device out of memory, save, spawn 2 batch 4 of 8
            | Device out of memory: this run held 8.8 GiB, other processes held 1.0 GiB of 39.1 GiB; restarting with
    """),
    "it waits for the device's memory, once": (policy(wait_for_memory_s=60.0), BEGUN + f"""
        driver 4000 500                    -> running
        machine 90000 device=1000          -> running
        {OOM}                              -> waiting: close device out of memory, save
            | Waiting for memory: 1,000 MiB of the device's memory free, 5,000 MiB required; at most 1m00s
        machine 90000 device=4500          -> waiting
        machine 90000 device=5500          -> starting: save, spawn 2 batch 8 of 8
            | Memory is available again (5,500 MiB of the device's memory free, 5,000 MiB required): starting.
        ready                              -> running
        steps 3 active=4000                -> running
        saved                              -> running: save
        driver 4000 500                    -> running
        machine 90000 device=1000          -> running
        {OOM}                              -> waiting: close device out of memory, save
        tick                               -> starting: save, spawn 3 batch 8 of 8
            | Memory still short after 1m00s (1,000 MiB of the device's memory free, 5,000 MiB required)
        device 10000 40000                 -> starting
        ready                              -> running
        steps 3 active=2000                -> running
        saved                              -> running: save
        driver 2000 500                    -> running
        machine 90000 device=1000          -> running
        {OOM}                              -> starting: close device out of memory, save, spawn 4 batch 4 of 8
    """),
}  # fmt: skip

"""Plays many seeds over all cores and prints the results."""

import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed

from tests.simulation.bugs import BUGS, seed_that_finds
from tests.simulation.checks.tally import Tally
from tests.simulation.seeds import Failure, play_seed

CHUNK_SEEDS = 50
PROGRESS_S = 30.0


def play(seeds: range, processes: int, every: bool) -> int:
    """Many seeds; ends at the first violation, unless `every`."""
    began_s = reported_s = time.monotonic()
    total, failures = Tally(), []
    for tally, failed in _results(seeds, processes):
        total.add(tally)
        failures += failed
        if failures and not every:
            break
        if time.monotonic() - reported_s > PROGRESS_S:
            reported_s = time.monotonic()
            print(f"… {total.seeds:,} of {len(seeds):,} seeds, {total.events:,} events", flush=True)
    for line in total.lines():
        print(line)
    took_s = time.monotonic() - began_s
    print(f"{took_s:.0f} s with {processes} processes, {total.events / max(took_s, 1e-3):,.0f} events a second")
    print_failures(failures)
    return 1 if failures else 0


def _results(seeds: range, processes: int) -> Iterator[tuple[Tally, list[Failure]]]:
    chunks = [seeds[i : i + CHUNK_SEEDS] for i in range(0, len(seeds), CHUNK_SEEDS)]
    if processes <= 1 or len(chunks) == 1:
        yield from map(play_chunk, chunks)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting: Iterable[Future[tuple[Tally, list[Failure]]]] = [pool.submit(play_chunk, chunk) for chunk in chunks]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def play_chunk(seeds: range) -> tuple[Tally, list[Failure]]:
    """Some seeds in this process."""
    total, failures = Tally(), []
    for seed in seeds:
        tally, failure = play_seed(seed)
        total.add(tally)
        if failure is not None:
            failures.append(failure)
    return total, failures


def print_failures(failures: list[Failure]) -> None:
    """For each rule the shortest violation, and how to replay it."""
    by_rule: dict[str, list[Failure]] = {}
    for each in sorted(failures, key=lambda one: (one.world, one.event)):
        by_rule.setdefault(each.rule, []).append(each)
    for rule, found in by_rule.items():
        first = found[0]
        print(f"VIOLATED in {len(found)} seeds: {rule}", file=sys.stderr)
        print(f"  {first.text[:600]}", file=sys.stderr)
        print(f"  world {first.world}, event {first.event}; replay: make simulate SEED={first.seed}", file=sys.stderr)


def find_bugs(seeds: range, processes: int) -> int:
    """Each planted bug, and the first seed that finds it."""
    missed = 0
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(BUGS, pool.map(seed_that_finds, BUGS, [seeds] * len(BUGS)), strict=True):
            if found is None:
                missed += 1
                print(f"{name}: NOT FOUND in {len(seeds):,} seeds")
            else:
                print(f"{name}: found by seed {found.seed}: {found.rule}", flush=True)
    return 1 if missed else 0

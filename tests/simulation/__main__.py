"""`python -m tests.simulation --seeds 10000`: many seeds over all cores, or one seed with its timeline.

Exits with 1 at a violation and prints how to replay it, with 2 for invalid arguments.
"""

import argparse
import os
import sys

from tests.simulation.checks.timeline import EventTimeline
from tests.simulation.many import find_bugs, play, print_failures
from tests.simulation.seeds import play_seed, seeds_of
from tests.simulation.world.world import World

LINES_SHOWN = 80


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", default="1000", help="a count, from seed 0, or FIRST..LAST")
    parser.add_argument("--seed", type=int, help="replay this one, with its timeline")
    parser.add_argument(
        "--all", action="store_true", help="with --seed: every line; otherwise: continue after a violation"
    )
    parser.add_argument("--bugs", action="store_true", help="find the first seed that finds each planted bug")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        return replay(chosen.seed, chosen.all)
    try:
        seeds = seeds_of(chosen.seeds)
    except ValueError:
        parser.error(f"--seeds {chosen.seeds}: a number, or FIRST..LAST")
    return find_bugs(seeds, chosen.processes) if chosen.bugs else play(seeds, chosen.processes, chosen.all)


def replay(seed: int, every: bool) -> int:
    """One seed, its last world's timeline."""
    lines: list[EventTimeline] = []

    def record(world: World) -> EventTimeline:
        timeline = EventTimeline(every)
        timeline.add_text(f"world {len(lines) + 1}: {world.target_steps} steps; {world.faults}; {world.policy}")
        lines.append(timeline)
        return timeline

    tally, failure = play_seed(seed, timeline=record)
    shown = list(lines[-1].lines)
    head, tail = (shown, []) if every or len(shown) <= LINES_SHOWN else (shown[:1], shown[-LINES_SHOWN:])
    print(
        "\n".join(head + ([f"… {len(shown) - len(tail) - 1} lines omitted (ALL=1 shows them)"] if tail else []) + tail)
    )
    if failure is None:
        print("\n".join(tally.lines()))
        return 0
    print_failures([failure])
    return 1


if __name__ == "__main__":
    sys.exit(main())

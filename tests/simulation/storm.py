"""Run many seeds: ``python -m tests.simulation.storm --seeds 5000``. Failing seeds are added to known_seeds.txt."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tests.simulation.settings import Settings, draw
from tests.simulation.world import World

KNOWN_SEEDS = Path(__file__).with_name("known_seeds.txt")
LIMIT = 200_000


def run(settings: Settings) -> World:
    """One whole job; raises if anything happens that must not."""
    world = World(settings)
    try:
        world.run(LIMIT)
    except AssertionError as error:
        raise AssertionError(f"seed {settings.seed}: {error}") from error
    return world


def known_seeds() -> list[int]:
    lines = KNOWN_SEEDS.read_text().splitlines()
    return [int(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--off", action="append", default=[], help="switch a protection off")
    parser.add_argument("--forget", action="store_true", help="do not append failing seeds to known_seeds.txt")
    parser.add_argument("--verbose", action="store_true", help="print what the runs have exercised")
    options = parser.parse_args()
    began = time.perf_counter()
    ends: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    failed: list[int] = []
    for seed in range(options.start, options.start + options.seeds):
        try:
            world = run(draw(seed, frozenset(options.off)))
        except Exception as error:
            failed.append(seed)
            ends["failed"] += 1
            if len(failed) <= 20:
                print(f"{type(error).__name__}: {str(error).splitlines()[0][:300]} (seed {seed})")
            continue
        ends[type(world.job.phase).__name__] += 1
        ends["recoveries"] += len(world.job.recoveries)
        ends["restarts"] += world.job.restarts
        ends["events"] += world.events
        seen.update(world.seen)
    if failed and not options.off and not options.forget:
        with KNOWN_SEEDS.open("a") as file:
            file.writelines(f"{seed}\n" for seed in failed)
    if options.verbose:
        print("\n".join(f"{number:9} {what}" for what, number in sorted(seen.items())))
    print(f"{options.seeds} seeds in {time.perf_counter() - began:.1f} s: {dict(ends)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

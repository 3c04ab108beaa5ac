"""``python -m tests.fuzz``: make calls in a process of their own, go on after its death, and print one line."""
import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CRASHED, WRONG = 'crashed', 'wrong'


class Summary(NamedTuple):
    """What came of the calls.

    Attributes:
        counts: Of right, refused, wrong and crashed calls.
        failures: Wrong and crashed calls, in words.
    """
    counts: Counter[str]
    failures: list[str]

    def __str__(self) -> str:
        names = ('right', 'refused', WRONG, CRASHED)
        return f'{self.counts.total()} calls: ' + ', '.join(f'{self.counts[name]} {name}' for name in names)


def fuzz(calls: int, seed: int, first: int = 0) -> Summary:
    """Make calls, the numbers ``first`` and following, and count what came of them."""
    counts: Counter[str] = Counter()
    failures = []
    number, last = first, first + calls
    while number < last:
        command = [sys.executable, '-m', 'tests.fuzz', '--worker', str(number), str(last), '--seed', str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
            for line in worker.stdout:
                outcome = line.rstrip('\n')
                counts[outcome if outcome in ('right', 'refused') else WRONG] += 1
                if outcome not in ('right', 'refused'):
                    failures.append(f'{number}: {outcome}')
                number += 1
        if number < last:
            counts[CRASHED] += 1
            failures.append(f'{number}: the process ended with {worker.returncode}')
            number += 1
    return Summary(counts, failures)


def work(seed: int, first: int, last: int) -> None:
    """Make calls in this process and print a line for each."""
    from .calls import make_call

    for number in range(first, last):
        print(' '.join((make_call(seed, number) or 'right').split()), flush=True)


def main() -> int:
    """Read the arguments, and do it."""
    parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__)
    parser.add_argument('--calls', type=int, default=500, help='how many (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='which (%(default)s)')
    parser.add_argument('--first', type=int, default=0, help='number of the first, to make one again (%(default)s)')
    parser.add_argument('--worker', type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.seed, *args.worker)
        return 0
    summary = fuzz(args.calls, args.seed, args.first)
    print('\n'.join([*summary.failures, str(summary)]))
    return int(bool(summary.failures))


if __name__ == '__main__':
    sys.exit(main())

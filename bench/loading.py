"""How long a person waits for a toy model, in a fresh process: the import, the first load, and one more.

python -m bench.loading
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.timing import machine

SCRIPT = """
import time
a = time.process_time()
import nnsplice as ns
b = time.process_time()
ns.load({name!r})
c = time.process_time()
ns.load({name!r})
d = time.process_time()
print(b - a, c - b, d - c)
"""


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(arguments).rounds
    print(machine())
    print(f"\n{'CPU seconds':12}{'import':>9}{'first load':>12}{'next load':>11}")
    for name in ("toy", "toy-llama"):
        times = []
        for _ in range(rounds):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT.format(name=name)], capture_output=True, text=True, check=True
            )
            times.append([float(number) for number in done.stdout.split()])
        middle = [sorted(column)[rounds // 2] for column in zip(*times, strict=True)]
        print(f"{name:12}{middle[0]:9.2f}{middle[1]:12.2f}{middle[2]:11.3f}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""How fast the parts of the teach phase are: runs the benchmark of each, one after the other, with its defaults.

    scripts/bench_teach.py [judges programs collect select]

Each is a script of its own, `scripts/bench_PART.py`, whose --help shows what it measures and its options.
"""

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = {"judges": [], "programs": [], "collect": ["collect", "resume"], "select": ["select", "decontaminate"]}


def main() -> None:
    """Run the parts that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them by default")
    for part in parser.parse_args().parts or PARTS:
        if part not in PARTS:
            sys.exit(f"bench_teach.py: no part '{part}'; there are {', '.join(PARTS)}")
        command = [sys.executable, str(Path(__file__).with_name(f"bench_{part}.py")), *PARTS[part]]
        if code := subprocess.run(command).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()

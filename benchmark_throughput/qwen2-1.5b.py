"""Throughput of Qwen2-1.5B, plain or encoded."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # A script looks for modules in its own folder; these are named from the root.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from benchmark_throughput.single import main

    sys.exit(main(__doc__, embedded="qwen2"))

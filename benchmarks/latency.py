"""`qvl-edge bench` from a clone: python -m benchmarks.latency BUNDLE [--peer CHECKPOINT] [-p 512] [-n 128]"""

import argparse

from benchmarks.report import exits_with_its_message
from qvl_edge.commands import bench


@exits_with_its_message("benchmarks.latency")
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=bench.__doc__)
    bench.add_arguments(parser)
    bench.execute(parser.parse_args(arguments))


if __name__ == "__main__":
    main()

"""`flowsteer data`: look at demonstrations, convert, collect and fetch them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowsteer.cli.dispatch import Command, Parser, dispatch

COMMANDS = {
    "inspect": Command("flowsteer.cli.data:inspect", "print and plot what to know before training"),
    "convert": Command("flowsteer.cli.data:convert", "write a data set in another format"),
    "collect": Command("flowsteer.cli.collect:main", "roll a scripted expert or a checkpoint in a task"),
    "fetch": Command("flowsteer.cli.data:fetch", "download a public data set"),
}


def main(args: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    return dispatch("flowsteer data", "Demonstrations.", COMMANDS, args)


def inspect(args: Sequence[str]) -> int:
    """`flowsteer data inspect PATH [--plot FILE]`."""
    from flowsteer.datasets.report import inspect as look
    from flowsteer.datasets.report_plot import plot
    from flowsteer.datasets.report_table import print_report

    parser = Parser("flowsteer data inspect", description=COMMANDS["inspect"].summary)
    parser.add_argument("path", help="a zarr store, an HDF5 or npz file, a LeRobot folder, or minari:ID")
    parser.add_argument("--plot", type=Path, help="where the picture goes; NAME.inspect.png in this folder by default")
    options = parser.parse_args(args)
    report = look(options.path)
    print_report(report)
    picture = options.plot or Path(f"{Path(options.path.rstrip('/')).name}.inspect.png".replace(":", "_"))
    print(f"picture: {plot(report, picture)}")
    return 0


def convert(args: Sequence[str]) -> int:
    """`flowsteer data convert SRC DST [--observe]`."""
    from flowsteer.cli.observe import hint, observe
    from flowsteer.datasets.opening import WRITERS
    from flowsteer.datasets.opening import convert as write

    parser = Parser("flowsteer data convert", description=COMMANDS["convert"].summary)
    parser.add_argument("source", help="a data set of any known form")
    parser.add_argument("target", type=Path, help=f"a new name that ends in {', '.join(WRITERS)}")
    parser.add_argument(
        "--observe", action="store_true", help="add what robosuite observes in the simulator states of a raw demo.hdf5"
    )
    options = parser.parse_args(args)
    print(write(options.source, options.target, observe if options.observe else hint))
    return 0


def fetch(args: Sequence[str]) -> int:
    """`flowsteer data fetch NAME [FOLDER]`."""
    from flowsteer.datasets.download import REMOTES
    from flowsteer.datasets.download import fetch as download

    parser = Parser("flowsteer data fetch", description=COMMANDS["fetch"].summary)
    parser.add_argument("name", help=", ".join(REMOTES))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data"), help="where to; data/ by default")
    options = parser.parse_args(args)
    print(download(options.name, options.folder))
    return 0

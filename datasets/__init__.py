"""Demonstrations in, tensors out."""

from flowsteer.datasets.batches import Batches, epoch_batches
from flowsteer.datasets.demo_hdf5 import write_robomimic
from flowsteer.datasets.download import REMOTES, fetch
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.key_statistics import KeyStatistics, statistics
from flowsteer.datasets.opening import convert, open_dataset
from flowsteer.datasets.replay_buffer import ReplayBuffer
from flowsteer.datasets.report import Report, inspect
from flowsteer.datasets.report_plot import plot
from flowsteer.datasets.report_table import print_report, render
from flowsteer.datasets.splits import split_episodes
from flowsteer.datasets.windows import Batch, Windows
from flowsteer.datasets.zarr_store import write_zarr

__all__ = [
    "REMOTES",
    "Batch",
    "Batches",
    "DataError",
    "KeyStatistics",
    "ReplayBuffer",
    "Report",
    "Windows",
    "convert",
    "epoch_batches",
    "fetch",
    "inspect",
    "open_dataset",
    "plot",
    "print_report",
    "render",
    "split_episodes",
    "statistics",
    "write_robomimic",
    "write_zarr",
]

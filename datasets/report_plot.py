"""One picture of a data set: episode lengths, ranges, actions, first images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flowsteer.datasets.replay_buffer import ACTION
from flowsteer.datasets.report import KeyReport, Report
from flowsteer.datasets.temporary import replaced_by

IMAGES_SHOWN = 4
EPISODES_DRAWN = 3
BAR_COLOURS = ("tab:blue", "tab:green")


def plot(report: Report, out_png: Path | str) -> Path:
    """Write the picture; an older one of that name is replaced.

    Raises:
        DataError: if the disk is full; then the older one stays.
    """
    # Imported here: half a second that readers and training need not spend.
    from matplotlib.figure import Figure

    target = Path(out_png)
    cameras = [key for key in report.keys if key.first_frame is not None][:IMAGES_SHOWN]
    vectors = [key for key in report.keys if len(key.channels) > 1]
    figure = Figure(figsize=(13, 7.5 if cameras else 5), layout="constrained")
    upper, *lower = figure.subfigures(
        2 if cameras else 1, 1, height_ratios=[3, 2][: 2 if cameras else 1], squeeze=False
    )[:, 0]
    lengths, ranges, actions = upper.subplots(1, 3)
    _draw_lengths(lengths, report)
    _draw_ranges(ranges, vectors)
    _draw_actions(actions, report)
    for row in lower:
        for axes, key in zip(row.subplots(1, len(cameras), squeeze=False)[0], cameras, strict=True):
            _draw_image(axes, key)
    figure.suptitle(f"{Path(report.path).name}: {len(report.lengths)} episodes, {report.lengths.sum()} frames")
    with replaced_by(target, overwrite=True) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return target


def _draw_lengths(axes: Any, report: Report) -> None:
    axes.hist(report.lengths, bins=min(30, max(5, len(report.lengths) // 4)), color="tab:blue")
    axes.set(title="episode lengths", xlabel="frames", ylabel="episodes")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _draw_ranges(axes: Any, vectors: list[KeyReport]) -> None:
    """Each channel's mean, standard deviation and range, as a share of the key's largest magnitude."""
    labels, place = [], 0
    for number, key in enumerate(vectors):
        scale = np.nanmax([max(abs(channel.low), abs(channel.high)) for channel in key.channels] + [1e-12])
        start = place
        for channel in key.channels:
            colour = "tab:red" if channel.constant or channel.non_finite else BAR_COLOURS[number % 2]
            axes.plot([channel.low / scale, channel.high / scale], [place, place], color=colour, linewidth=1)
            axes.errorbar(channel.mean / scale, place, xerr=channel.std / scale, fmt=".", color=colour, linewidth=2.5)
            place += 1
        labels.append(((start + place - 1) / 2, f"{key.key}\n(x {scale:.3g})"))
    axes.set_yticks([where for where, _ in labels], [text for _, text in labels], fontsize=7)
    axes.set(title="range, mean and std of channels\n(red: constant or NaN)", xlabel="share of the key's largest value")
    axes.locator_params(axis="x", nbins=5)
    axes.invert_yaxis()


def _draw_actions(axes: Any, report: Report) -> None:
    share = "" if report.noop_share is None else f"\n({report.noop_share:.1%} no-op in all)"
    axes.set(title=f"actions of the first episodes{share}", xlabel="frame")
    if report.actions is None:
        axes.set(title=f"there is no key '{ACTION}'")
        return
    end = int(report.lengths[:EPISODES_DRAWN].sum())
    axes.plot(report.actions[:end].reshape(end, -1), linewidth=0.8)
    for edge in np.cumsum(report.lengths[: EPISODES_DRAWN - 1]):
        axes.axvline(edge, color="grey", linestyle=":", linewidth=0.8)


def _draw_image(axes: Any, key: KeyReport) -> None:
    frame = key.first_frame
    assert frame is not None
    axes.imshow(frame.squeeze(), cmap="gray" if frame.shape[-1] == 1 else None)
    axes.set_title(f"{key.key} {key.shape}", fontsize=8)
    axes.axis("off")

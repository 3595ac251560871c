"""LeRobot data sets, versions 2.0, 2.1 and 3.0: parquet tables, `meta/info.json`, video files.

Keys keep LeRobot's names (`observation.state`, `observation.images.front`, `action`). Row counters are left out.
Version 2 has a table and a video per episode, version 3 packs many episodes into one; what belongs to which episode
is taken from the rows' own `episode_index` and compared with the meta files. Video is decoded only where its key is
loaded. Clocks may start anywhere: an episode's first row belongs to its first video frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from flowsteer.datasets import json_text, video
from flowsteer.datasets.errors import DataError
from flowsteer.datasets.images import decode
from flowsteer.datasets.source import Column, Reader, Source

COUNTERS = ("index", "episode_index", "frame_index")
TIME_TOLERANCE_S = 1e-4


def accepts(path: Path) -> bool:
    """A folder with `meta/info.json`."""
    return (path / "meta" / "info.json").is_file()


def open_source(path: Path) -> Source:
    """Describe the data set.

    Raises:
        DataError: if pyarrow is absent, a file is damaged or missing, or rows and meta files disagree.
    """
    info = _read_info(path)
    table = _read_tables(path, sorted((path / "data").glob("**/*.parquet")))
    if len(table) != info["total_frames"]:
        raise DataError(
            f"{path}: its tables hold {len(table)} of {info['total_frames']} frames: download the missing data files"
        )
    episode_index = table.values("episode_index")
    ends = np.append(np.flatnonzero(np.diff(episode_index)) + 1, len(table))
    episodes = _read_episodes(path)
    _check_lengths(path, ends, episodes)
    timestamps = _since_episode_start(table.values("timestamp"), ends)
    fps = float(info["fps"])
    columns = {
        **{name: table.column(name) for name in table.names if name not in COUNTERS},
        **_video_columns(path, info, episodes, timestamps, ends),
    }
    meta = _meta(info, columns, episodes)
    return Source(path, columns, ends, meta, partial(_check_clock, path, timestamps, ends, fps))


def _read_info(path: Path) -> dict[str, Any]:
    file = path / "meta" / "info.json"
    info: dict[str, Any] = json_text.parse(file.read_text(), str(file))
    for key in ("fps", "total_frames", "features"):
        if key not in info:
            raise DataError(f"{file}: there is no key '{key}': this is not a LeRobot data set of version 2 or 3")
    fps = info["fps"]
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise DataError(f"{file}: key 'fps' must be a positive number, got {fps!r:.40}: write the control rate there")
    return info


@final
class _Table:
    """The rows of several parquet files, one after another."""

    def __init__(self, path: Path, table: Any) -> None:
        self._path = path
        self._table = table
        self.names = [field.name for field in table.schema if not str(field.type).endswith("string")]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def values(self, name: str) -> NDArray[Any]:
        """A column of numbers or of equally long lists, [N] or [N, ...]."""
        if name not in self._table.column_names:
            raise DataError(f"{self._path}: its tables have no column '{name}': this is not LeRobot's form")
        return _numbers(self._table.column(name), f"{self._path}: key '{name}'")

    def column(self, name: str) -> Column:
        if str(self._table.schema.field(name).type).startswith("struct"):
            encoded = self._table.column(name)
            sample = decode(encoded[0].as_py()["bytes"])
            return Column(len(self), sample.shape, sample.dtype, lambda: _decoded_images(encoded))
        values = self.values(name)
        return Column(len(self), values.shape[1:], values.dtype, lambda: iter([values]))


def _numbers(column: Any, name: str) -> NDArray[Any]:
    shape, flat = [len(column)], column.combine_chunks()
    while hasattr(flat, "flatten") and "list" in str(flat.type):
        if flat.null_count:
            raise DataError(f"{name} has empty rows: the table is incomplete, download it again")
        inner = flat.flatten()
        width, rest = divmod(len(inner), max(1, len(flat)))
        if rest or any(len(row) != width for row in (flat[0], flat[-1])):
            raise DataError(f"{name} has rows of different widths: record them alike")
        shape.append(width)
        flat = inner
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(shape)


def _decoded_images(encoded: Any) -> Iterator[NDArray[np.uint8]]:
    for cell in encoded:
        yield decode(cell.as_py()["bytes"])[None]


def _read_tables(path: Path, files: list[Path]) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: needs the package pyarrow: pip install 'flowsteer[lerobot]'") from error
    if not files:
        raise DataError(f"{path}: there are no parquet files where a LeRobot data set has them: download it again")
    tables = []
    for file in files:
        try:
            tables.append(pq.ParquetFile(file).read())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file}: the parquet file is truncated or damaged ({error}): download it again") from error
    return _Table(path, pa.concat_tables(tables, promote_options="permissive"))


def _read_episodes(path: Path) -> list[dict[str, Any]]:
    """One row per episode, from either version's meta files."""
    lines = path / "meta" / "episodes.jsonl"
    if lines.is_file():
        told = enumerate(lines.read_text().splitlines(), 1)
        return [json_text.parse(line, f"{lines}: line {number}") for number, line in told if line.strip()]
    table = _read_tables(path, sorted((path / "meta" / "episodes").glob("**/*.parquet")))
    wanted = [name for name in table._table.column_names if not name.startswith("stats/")]
    rows: list[dict[str, Any]] = table._table.select(wanted).to_pylist()
    return rows


def _check_lengths(path: Path, ends: NDArray[np.int64], episodes: list[dict[str, Any]]) -> None:
    found = np.diff(ends, prepend=0).tolist()
    told = [row["length"] for row in episodes]
    if found != told:
        where = next((i for i, pair in enumerate(zip(found, told, strict=False)) if pair[0] != pair[1]), len(told))
        raise DataError(
            f"{path}: its tables hold {len(found)} episodes and its meta files {len(told)}, differing from episode "
            f"{where} on: download the data set again, or convert it again if it was cut"
        )


def _since_episode_start(timestamps: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    starts = np.concatenate([[0], ends[:-1]])
    clock_s: NDArray[np.float64] = timestamps.astype(np.float64)
    since_s: NDArray[np.float64] = clock_s - np.repeat(clock_s[starts], np.diff(ends, prepend=0))
    return since_s


def _check_clock(path: Path, timestamps: NDArray[np.float64], ends: NDArray[np.int64], fps: float) -> None:
    """Consecutive frames of an episode are 1 / fps apart."""
    steps_s = np.diff(timestamps)
    steps_s[ends[:-1] - 1] = 1 / fps
    # Timestamps are often float32, whose steps grow with the time they tell.
    tolerance_s = TIME_TOLERANCE_S + 2 * float(np.spacing(np.float32(timestamps.max())))
    late = np.flatnonzero(np.abs(steps_s - 1 / fps) > tolerance_s)
    if late.size:
        frame = int(late[0]) + 1
        raise DataError(
            f"{path}: key 'timestamp': frame {frame} (episode {int(np.searchsorted(ends, frame, side='right'))}) comes "
            f"{steps_s[frame - 1]:.4f} s after the one before, at {fps:g} Hz it must be {1 / fps:.4f} s: "
            f"remove the episode, or open it with strict=False to take the rows as they are"
        )


def _video_columns(
    path: Path,
    info: Mapping[str, Any],
    episodes: list[dict[str, Any]],
    timestamps: NDArray[np.float64],
    ends: NDArray[np.int64],
) -> dict[str, Column]:
    columns = {}
    for key, feature in info["features"].items():
        if feature["dtype"] != "video":
            continue
        segments = _segments(path, key, episodes, np.split(timestamps, ends[:-1]))
        missing = [segment.file for segment in segments if not segment.file.is_file()]
        shape = tuple(feature["shape"]) if missing else _frame_shape(segments[0].file, feature)
        blocks = (
            partial(_absent, key, missing[0]) if missing else partial(video.read_frames, segments, float(info["fps"]))
        )
        note = f"{len(missing)} of {len(segments)} videos absent" if missing else ""
        columns[key] = Column(int(ends[-1]), shape, np.dtype(np.uint8), blocks, by_default=not missing, note=note)
    return columns


def _frame_shape(file: Path, feature: Mapping[str, Any]) -> tuple[int, ...]:
    """As the video has it; as it should be where that cannot be read, so that the other keys can be."""
    try:
        return video.frame_shape(file)
    except DataError:
        return tuple(feature["shape"])


def _absent(key: str, file: Path) -> Iterator[NDArray[np.uint8]]:
    raise DataError(f"{file}: key '{key}' needs this video, which is absent: download it or leave the key out")


def _segments(
    path: Path, key: str, episodes: list[dict[str, Any]], times_s: list[NDArray[np.float64]]
) -> list[video.Segment]:
    files = {file.stem: file for file in (path / "videos").glob("**/*.mp4") if key in file.parts}
    segments = []
    for row, since_start_s in zip(episodes, times_s, strict=True):
        chunk, number = row.get(f"videos/{key}/chunk_index"), row.get(f"videos/{key}/file_index")
        if number is not None:
            file = path / f"videos/{key}/chunk-{chunk:03d}/file-{number:03d}.mp4"
            segments.append(video.Segment(file, since_start_s + row[f"videos/{key}/from_timestamp"]))
        else:
            name = f"episode_{row['episode_index']:06d}"
            absent = path / "videos" / key / f"{name}.mp4"
            segments.append(video.Segment(files.get(name, absent), since_start_s))
    return segments


def _meta(info: Mapping[str, Any], columns: Mapping[str, Column], episodes: list[dict[str, Any]]) -> dict[str, Any]:
    meta: dict[str, Any] = {"format": f"LeRobot {info.get('codebase_version', '')}", "control_hz": float(info["fps"])}
    if info.get("robot_type"):
        meta["robot"] = info["robot_type"]
    names = {key: _channel_names(feature.get("names")) for key, feature in info["features"].items()}
    meta["names"] = {key: told for key, told in names.items() if key in columns and columns[key].shape == (len(told),)}
    if all(row.get("tasks") for row in episodes):
        meta["episodes"] = {"task": [str(row["tasks"][0]) for row in episodes]}
    return meta


def _channel_names(names: Any) -> list[str]:
    """LeRobot gives a list, or a list in a dictionary of one entry such as "motors"."""
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return [str(name) for name in names or []]


READER = Reader("LeRobot", accepts, open_source)

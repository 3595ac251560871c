from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from flowsteer.datasets import DataError, inspect, open_dataset

pa = pytest.importorskip("pyarrow", reason="needs the lerobot extra")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the lerobot extra")

FPS = 10
LENGTHS = (4, 6, 5)
CAMERA = "observation.images.front"


def write_video(path, shades):
    """One grey frame per shade; decoding gives the shade back to about 2 of 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "g": "4"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 48, "yuv420p", Fraction(1, FPS)
        for shade in shades:
            picture = np.full((48, 64, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def table(episodes, clock_start=0.0):
    """Rows of the given episode numbers; state[n] = (n, episode)."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    columns = {
        "observation.state": [],
        "action": [],
        "timestamp": [],
        "frame_index": [],
        "episode_index": [],
        "index": [],
    }
    for episode in episodes:
        for step in range(LENGTHS[episode]):
            columns["observation.state"].append([float(starts[episode] + step), float(episode)])
            columns["action"].append([10.0 * step])
            columns["timestamp"].append(np.float32(clock_start + step / FPS))
            columns["frame_index"].append(step)
            columns["episode_index"].append(episode)
            columns["index"].append(int(starts[episode]) + step)
    return pa.table({**columns, "next.done": [False] * len(columns["index"])})


def write_info(path, version):
    features = {
        "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}},
        "action": {"dtype": "float32", "shape": [1], "names": ["u"]},
        CAMERA: {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]},
    }
    info = {
        "codebase_version": version,
        "fps": FPS,
        "total_frames": sum(LENGTHS),
        "robot_type": "arm",
        "features": features,
    }
    (path / "meta").mkdir(parents=True)
    (path / "meta/info.json").write_text(json.dumps(info))


def shade(frame):
    return 20 + 12 * frame


@pytest.fixture
def version_2(tmp_path):
    """A table and a video per episode; the clock starts at one step, as some converters write it."""
    path = tmp_path / "v21"
    write_info(path, "v2.1")
    rows, start = [], 0
    for episode, length in enumerate(LENGTHS):
        file = path / f"data/chunk-000/episode_{episode:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([episode], clock_start=1 / FPS), file)
        write_video(
            path / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4", shade(np.arange(start, start + length))
        )
        rows.append(json.dumps({"episode_index": episode, "tasks": [f"task {episode}"], "length": length}))
        start += length
    (path / "meta/episodes.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture
def version_3(tmp_path):
    """Two tables and two videos for three episodes; an unused second lies between the first two in the video."""
    path = tmp_path / "v30"
    write_info(path, "v3.0")
    (path / "data/chunk-000").mkdir(parents=True)
    (path / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(table([0, 1]), path / "data/chunk-000/file-000.parquet")
    pq.write_table(table([2]), path / "data/chunk-000/file-001.parquet")
    frames = np.arange(sum(LENGTHS))
    write_video(
        path / f"videos/{CAMERA}/chunk-000/file-000.mp4", [*shade(frames[:4]), *[255] * FPS, *shade(frames[4:10])]
    )
    write_video(path / f"videos/{CAMERA}/chunk-000/file-001.mp4", shade(frames[10:]))
    episodes = {
        "episode_index": [0, 1, 2],
        "length": list(LENGTHS),
        "tasks": [["task 0"], ["task 1"], ["task 2"]],
        f"videos/{CAMERA}/chunk_index": [0, 0, 0],
        f"videos/{CAMERA}/file_index": [0, 0, 1],
        f"videos/{CAMERA}/from_timestamp": [0.0, 1.4, 0.0],
        "stats/action/min": [[0.0]] * 3,
    }
    pq.write_table(pa.table(episodes), path / "meta/episodes/chunk-000/file-000.parquet")
    return path


@pytest.fixture(params=["version_2", "version_3"])
def dataset(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_and_video_frames_belong_together(dataset, in_memory):
    buffer = open_dataset(dataset, in_memory=in_memory)
    assert set(buffer.data) == {"observation.state", "action", "timestamp", "next.done", CAMERA}
    assert buffer.episode_lengths.tolist() == list(LENGTHS)
    assert buffer.data["observation.state"][:, 0].tolist() == list(range(15))
    video = buffer.data[CAMERA]
    assert (video.shape, video.dtype) == ((15, 48, 64, 3), np.uint8)
    assert np.abs(video[:, 20, 30, 1].astype(int) - shade(np.arange(15))).max() <= 3
    assert buffer.meta["control_hz"] == FPS
    assert buffer.meta["robot"] == "arm"
    assert buffer.meta["names"] == {"observation.state": ["x", "y"], "action": ["u"]}
    assert buffer.meta["episodes"]["task"] == ["task 0", "task 1", "task 2"]


def test_images_are_resized_while_they_are_read(dataset):
    video = open_dataset(dataset, keys=[CAMERA], image_size=(24, 32)).data[CAMERA]
    assert video.shape == (15, 24, 32, 3)
    assert np.abs(video[:, 10, 15, 1].astype(int) - shade(np.arange(15))).max() <= 3


def test_absent_videos_matter_only_to_who_asks(dataset):
    for file in dataset.glob("videos/**/*.mp4"):
        file.unlink()
    assert CAMERA not in open_dataset(dataset).data
    with pytest.raises(DataError, match=rf"\.mp4: key '{CAMERA}' needs this video, which is absent: download it"):
        open_dataset(dataset, keys=["action", CAMERA])


@pytest.mark.parametrize("number", [0, 1])
def test_an_unreadable_video_is_refused_by_name(dataset, number):
    file = sorted(dataset.glob("videos/**/*.mp4"))[number]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"{file.name}: the video cannot be read .*: download it again"):
        open_dataset(dataset)
    assert open_dataset(dataset, keys=["action"]).num_frames == 15


def test_a_video_shorter_than_its_episodes_is_refused(dataset):
    file = sorted(dataset.glob("videos/**/*.mp4"))[-1]
    write_video(file, shade(np.arange(3)))
    with pytest.raises(DataError, match=rf"{file.name}: no frame at 0.300 s \(frame 3 of 5 wanted\)"):
        open_dataset(dataset)


def test_a_truncated_table_is_refused(dataset):
    file = sorted(dataset.glob("data/**/*.parquet"))[1]
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"{file.name}: the parquet file is truncated or damaged"):
        open_dataset(dataset)


def test_missing_tables_are_refused(dataset):
    sorted(dataset.glob("data/**/*.parquet"))[-1].unlink()
    with pytest.raises(DataError, match="its tables hold 10 of 15 frames: download the missing data files"):
        open_dataset(dataset)


def test_episode_lengths_that_do_not_match_are_refused(version_2):
    meta = version_2 / "meta/episodes.jsonl"
    meta.write_text(meta.read_text().replace('"length": 6', '"length": 5'))
    with pytest.raises(DataError, match="its tables hold 3 episodes and its meta files 3, differing from episode 1 on"):
        open_dataset(version_2)


def test_an_uneven_clock_is_refused_unless_asked_for(version_2):
    file = sorted(version_2.glob("data/**/*.parquet"))[1]
    rows = pq.read_table(file).to_pydict()
    rows["timestamp"][3] += 0.02
    pq.write_table(pa.table(rows), file)
    message = (
        r"key 'timestamp': frame 7 \(episode 1\) comes 0.1200 s after the one before, at 10 Hz it must be 0.1000 s"
    )
    with pytest.raises(DataError, match=message):
        open_dataset(version_2)
    assert open_dataset(version_2, strict=False).num_frames == 15


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"fps": 10}', "no key 'total_frames': this is not a LeRobot data set")],
)
def test_a_foreign_info_file_is_refused(dataset, content, message):
    (dataset / "meta/info.json").write_text(content)
    with pytest.raises(DataError, match=rf"info.json.* {message}"):
        open_dataset(dataset)


@pytest.mark.parametrize("fps", [0, -5, float("nan"), float("inf"), None, "fast"])
@pytest.mark.parametrize("look", [open_dataset, inspect])
def test_a_rate_that_is_none_is_refused(dataset, fps, look):
    file = dataset / "meta/info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fps": fps}))
    with pytest.raises(DataError, match=r"info.json: key 'fps' must be a positive number, got .*: write the control"):
        look(dataset)


def test_meta_files_cut_short_are_refused_by_name(dataset):
    (file,) = [*dataset.glob("meta/episodes.jsonl"), *dataset.glob("meta/episodes/**/*.parquet")]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{file.name}: (line 3 is not JSON|the parquet file is truncated)") as caught:
        open_dataset(dataset)
    assert "\n" not in str(caught.value)


def test_a_row_without_its_length_is_refused(version_2):
    (version_2 / "meta/episodes.jsonl").write_text('{"episode_index": 0}')
    with pytest.raises(DataError, match=r"v21: cannot be read \(KeyError: 'length'\): it is damaged or departs"):
        open_dataset(version_2)


def test_images_stored_in_the_table(version_2):
    import imageio.v3 as iio

    pictures = [iio.imwrite("<bytes>", np.full((10, 12, 3), n, np.uint8), extension=".png") for n in range(15)]
    for episode, file in enumerate(sorted(version_2.glob("data/**/*.parquet"))):
        first = sum(LENGTHS[:episode])
        cells = [{"bytes": picture, "path": None} for picture in pictures[first : first + LENGTHS[episode]]]
        pq.write_table(pq.read_table(file).append_column("observation.image", pa.array(cells)), file)
    images = open_dataset(version_2, keys=["observation.image"]).data["observation.image"]
    assert images[:, 4, 5, 2].tolist() == list(range(15))


def test_without_pyarrow_the_extra_is_named(version_2, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package pyarrow: pip install 'flowsteer\[lerobot\]'"):
        open_dataset(version_2)

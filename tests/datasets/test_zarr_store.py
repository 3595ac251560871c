from __future__ import annotations

import errno
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from flowsteer.datasets import DataError, convert, open_dataset, write_zarr


def same(found, expected):
    assert found.data.keys() == expected.data.keys()
    for key, array in expected.data.items():
        stored = np.asarray(found.data[key][:])
        assert stored.dtype == array.dtype
        np.testing.assert_array_equal(stored, array)
    np.testing.assert_array_equal(found.episode_ends, expected.episode_ends)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_written_store_reads_back(make_buffer, tmp_path, zarr_format, in_memory):
    facts = {"control_hz": 20.0, "env_args": {"env_name": "Lift"}, "episodes": {"task": ["a", "b", "ü"]}}
    buffer = make_buffer((4, 6, 5), images=True, **facts)
    found = open_dataset(write_zarr(buffer, tmp_path / "d.zarr", zarr_format=zarr_format), in_memory=in_memory)
    same(found, buffer)
    assert {key: found.meta[key] for key in facts} == facts
    assert found.meta["format"] == f"zarr v{zarr_format}"
    assert isinstance(found.data["img"], np.memmap) is not in_memory


def test_images_are_stored_a_frame_per_chunk_in_few_files(make_buffer, tmp_path):
    write_zarr(make_buffer((40, 30), images=True), tmp_path / "d.zarr")
    images = zarr.open_group(tmp_path / "d.zarr", mode="r")["data/img"]
    assert images.chunks == (1, 12, 10, 3)
    assert sum(path.is_file() for path in (tmp_path / "d.zarr/data/img").rglob("*")) == 4


def test_diffusion_policys_own_layout(tmp_path):
    """As its ReplayBuffer saves it: format 2, float images, one chunk for many frames."""
    root = zarr.open_group(tmp_path / "d.zarr", mode="w", zarr_format=2)
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 8, 3)).astype(np.float32)
    root.create_array("data/img", data=image, chunks=(5, 9, 8, 3))
    root.create_array("data/action", data=np.arange(14.0).reshape(7, 2), chunks=(5, 2))
    root.create_array("meta/episode_ends", data=np.array([3, 7]))
    for in_memory in (True, False):
        buffer = open_dataset(tmp_path / "d.zarr", in_memory=in_memory)
        assert buffer.data["img"].dtype == np.uint8
        assert isinstance(buffer.data["img"], np.memmap) is not in_memory
        np.testing.assert_array_equal(buffer.data["img"], image.astype(np.uint8))
        assert buffer.data["action"][3].tolist() == [6, 7]


def test_a_zipped_store_is_read(make_buffer, tmp_path):
    buffer = make_buffer(images=True)
    write_zarr(buffer, tmp_path / "d.zarr")
    shutil.make_archive(str(tmp_path / "d.zarr"), "zip", tmp_path / "d.zarr")
    same(open_dataset(tmp_path / "d.zarr.zip"), buffer)


def test_a_missing_chunk_is_refused_and_not_read_as_zeros(make_buffer, tmp_path):
    path = write_zarr(make_buffer(images=True), tmp_path / "d.zarr")
    (path / "data/action/c/0/0").unlink()
    with pytest.raises(DataError, match="key 'action': 1 of its chunks are missing and would read as zeros: copy"):
        open_dataset(path)
    assert open_dataset(path, strict=False).data["action"][:].max() == 0


def test_a_truncated_chunk_is_refused(make_buffer, tmp_path):
    path = write_zarr(make_buffer(), tmp_path / "d.zarr")
    chunk = path / "data/action/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"d.zarr: key 'action' cannot be read .*: the file is damaged, copy"
    ) as refused:
        open_dataset(path)
    assert "\n" not in str(refused.value)


def test_a_foreign_store_is_refused(tmp_path):
    zarr.open_group(tmp_path / "d.zarr", mode="w").create_array("weather", data=np.zeros(3))
    with pytest.raises(DataError, match=r"this zarr store has no 'data' and is no replay buffer"):
        open_dataset(tmp_path / "d.zarr")


def test_a_damaged_group_file_is_refused(make_buffer, tmp_path):
    path = write_zarr(make_buffer(), tmp_path / "d.zarr")
    (path / "zarr.json").write_text("{")
    with pytest.raises(DataError, match="the zarr store cannot be opened"):
        open_dataset(path)


def test_episode_ends_that_do_not_match_are_refused(make_buffer, tmp_path):
    path = write_zarr(make_buffer(), tmp_path / "d.zarr")
    zarr.open_group(path, mode="r+")["meta/episode_ends"][:] = np.array([4, 10, 14])
    with pytest.raises(DataError, match="has 15 frames but 'episode_ends' ends at 14"):
        open_dataset(path)


def test_a_full_disk_leaves_nothing_behind(make_buffer, tmp_path):
    """The kernel refuses writes beyond a limit half-way through, in a process of its own."""
    buffer = make_buffer((50, 60), images=True)
    buffer.data["img"] = np.random.default_rng(0).integers(0, 256, (110, 12, 10, 3), np.uint8)
    source = write_zarr(buffer, tmp_path / "source.zarr")
    program = f"""
import resource
from flowsteer.datasets import DataError, open_dataset, write_robomimic, write_zarr
buffer = open_dataset({str(source)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
for write, name in ((write_zarr, "d.zarr"), (write_robomimic, "d.hdf5")):
    try:
        write(buffer, {str(tmp_path / "out")!r} + "/" + name)
    except DataError as error:
        print(error)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    for line, name in zip(finished.stdout.splitlines(), ("d.zarr", "d.hdf5"), strict=True):
        assert f"{name}: cannot be written (File too large): free disk space" in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["d.zarr", "d.hdf5"])
def test_no_space_left_is_told_and_leaves_nothing_behind(make_buffer, tmp_path, monkeypatch, name):
    source = write_zarr(make_buffer(images=True), tmp_path / "source.zarr")
    calls = []

    def full(*_, **__):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("flowsteer.datasets.zarr_store._write", full)
    monkeypatch.setattr("flowsteer.datasets.demo_hdf5._write_demo", full)
    with pytest.raises(DataError, match=rf"{name}: cannot be written \(No space left on device\): free disk space"):
        convert(source, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["d.zarr", "d.hdf5"])
def test_nothing_is_overwritten(make_buffer, tmp_path, name):
    source = write_zarr(make_buffer(), tmp_path / "source.zarr")
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match="already exists: remove it or choose another name"):
        convert(source, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_no_room_for_unpacked_images(make_buffer, tmp_path, monkeypatch):
    root = zarr.open_group(tmp_path / "d.zarr", mode="w")
    root.create_array("data/img", data=np.full((4, 9, 8, 3), 9, np.float32))
    root.create_array("meta/episode_ends", data=np.array([4]))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"no room for 0.0 GiB of images .*: set TMPDIR to a folder on a larger disk"):
        open_dataset(tmp_path / "d.zarr", in_memory=False)

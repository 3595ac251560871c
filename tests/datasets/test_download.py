from __future__ import annotations

import hashlib
import re
import resource
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from flowsteer.datasets import REMOTES, DataError, fetch, open_dataset, write_zarr
from flowsteer.datasets import download as module
from flowsteer.datasets.download import Remote, download, unzip

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `breaks` is after how many bytes each coming reply breaks off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/data.hdf5": CONTENT}
        self.breaks, self.ranges, self.status = [], [], []
        self.knows_ranges, self.etag, self.told = True, '"v1"', None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        if server.status:
            return self.empty(server.status.pop(0))
        if self.path.startswith("/redirect"):
            return self.empty(
                302, Location=self.path.removeprefix("/redirect"), **{"X-Linked-Etag": f'"{server.told}"'}
            )
        if self.path not in server.files:
            return self.empty(404)
        content, wanted = server.files[self.path], self.headers.get("Range")
        server.ranges.append(wanted)
        start = 0
        if wanted and server.knows_ranges and self.headers.get("If-Range") == server.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        end = server.breaks.pop(0) if server.breaks else len(content)
        self.wfile.write(content[start : start + end])
        self.close_connection = True
        return None

    def empty(self, status, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "home/data.hdf5"


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def test_a_download_is_complete_and_its_checksum_noted(server, target):
    assert download(f"{server.url}/data.hdf5", target) == target
    assert target.read_bytes() == CONTENT
    assert (target.parent / "data.hdf5.sha256").read_text() == f"{SHA256}  data.hdf5\n"
    assert names(target.parent) == ["data.hdf5", "data.hdf5.sha256"]
    download(f"{server.url}/data.hdf5", target)
    assert len(server.ranges) == 1  # the second call asked nobody


def test_interrupted_replies_are_continued(server, target):
    server.breaks = [100_000, 50_000]
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_continues_an_interrupted_one(server, target, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.breaks = [100_000]
    with pytest.raises(
        DataError, match=r"data.hdf5: cannot be downloaded .*: check the network and call again, it continues"
    ):
        download(f"{server.url}/data.hdf5", target)
    assert names(target.parent) == ["data.hdf5.part", "data.hdf5.part.etag"]
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


@pytest.fixture
def full_disk():
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_at_once_and_what_fitted_is_continued(server, target, full_disk):
    message = r"data.hdf5.part: cannot be written \(File too large\): free disk space and call again"
    with pytest.raises(DataError, match=message):
        download(f"{server.url}/data.hdf5", target)
    assert server.ranges == [None], "asking again would not make room"
    assert names(target.parent) == ["data.hdf5.part", "data.hdf5.part.etag"]
    full_disk()
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT
    assert server.ranges[1] == f"bytes={len(CONTENT) // 2}-"


def test_a_file_that_changed_meanwhile_is_not_glued_together(server, target, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    server.breaks = [100_000]
    with pytest.raises(DataError):
        download(f"{server.url}/data.hdf5", target)
    server.files["/data.hdf5"], server.etag = CONTENT[::-1], '"v2"'
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("etag", ['"v1"', None, 'W/"weak"'])
def test_a_server_without_ranges_starts_again(server, target, etag):
    server.knows_ranges, server.etag, server.breaks = False, etag, [100_000]
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, target):
    with pytest.raises(DataError, match=rf"its SHA-256 is {SHA256[:16]}... and must be 0000000000000000"):
        download(f"{server.url}/data.hdf5", target, "0" * 64)
    assert names(target.parent) == []


def test_the_checksum_that_the_server_tells_is_checked(server, target):
    server.told = SHA256
    download(f"{server.url}/redirect/data.hdf5", target)
    server.told = "1" * 64
    with pytest.raises(DataError, match="must be 1111111111111111"):
        download(f"{server.url}/redirect/data.hdf5", target.with_name("other.hdf5"))


def test_a_file_that_changed_on_disk_is_noticed(server, target):
    download(f"{server.url}/data.hdf5", target)
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="delete it to fetch it anew"):
        download(f"{server.url}/data.hdf5", target)


def test_a_checksum_that_a_kill_left_empty_counts_as_none(server, target):
    target.parent.mkdir()
    noted = target.with_name("data.hdf5.sha256")
    noted.write_text("")
    download(f"{server.url}/data.hdf5", target)
    assert noted.read_text() == f"{SHA256}  data.hdf5\n"
    noted.write_text("")
    assert download(f"{server.url}/data.hdf5", target) == target


def test_the_checksum_is_noted_whole_or_not_at_all(server, target, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flowsteer.datasets.temporary.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/data.hdf5", target)
    assert "data.hdf5.sha256" not in names(target.parent)


def test_a_missing_file_is_told_at_once(server, target):
    with pytest.raises(DataError, match="the server says 404 Not Found: check the address"):
        download(f"{server.url}/nothing.hdf5", target)
    assert names(target.parent) == []


def test_a_busy_server_is_asked_again(server, target):
    server.status = [503, 500]
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT


def test_a_stale_part_larger_than_the_file_is_dropped(server, target):
    target.parent.mkdir()
    target.with_name("data.hdf5.part").write_bytes(b"x" * 400_000)
    target.with_name("data.hdf5.part.etag").write_text('"v1"')
    server.status = [416]
    download(f"{server.url}/data.hdf5", target)
    assert target.read_bytes() == CONTENT


def test_nobody_there(target, monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    with pytest.raises(DataError, match="cannot be downloaded"):
        download("http://127.0.0.1:9/data.hdf5", target)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(DataError, match="no key 'push': did you mean 'pusht'"):
        fetch("push", tmp_path)


def test_every_public_set_is_fetched_over_https():
    assert {"pusht", "lift_ph", "can_mh", "square_ph"} <= REMOTES.keys()
    assert all(remote.url.startswith("https://") for remote in REMOTES.values())


@pytest.fixture
def zipped_demonstrations(make_buffer, tmp_path):
    write_zarr(make_buffer(), tmp_path / "demo.zarr")
    with zipfile.ZipFile(tmp_path / "demo.zip", "w") as archive:
        for file in (tmp_path / "demo.zarr").rglob("*"):
            archive.write(file, f"pusht/{file.relative_to(tmp_path)}")
    return (tmp_path / "demo.zip").read_bytes()


def test_a_zipped_set_is_fetched_and_opens(server, tmp_path, monkeypatch, zipped_demonstrations):
    server.files["/demo.zip"] = zipped_demonstrations
    monkeypatch.setitem(REMOTES, "pusht", Remote(f"{server.url}/demo.zip", member="pusht/demo.zarr"))
    path = fetch("pusht", tmp_path / "data")
    assert path == tmp_path / "data/pusht/demo.zarr"
    assert open_dataset(path).num_episodes == 3
    assert fetch("pusht", tmp_path / "data") == path
    assert len(server.ranges) == 1
    assert names(path.parent) == ["demo.zarr", "demo.zip.sha256"]


def test_an_archive_without_the_set_is_told(server, tmp_path, monkeypatch, zipped_demonstrations):
    server.files["/demo.zip"] = zipped_demonstrations
    monkeypatch.setitem(REMOTES, "pusht", Remote(f"{server.url}/demo.zip", member="pusht/other.zarr"))
    with pytest.raises(DataError, match=r"holds no 'pusht/other.zarr'"):
        fetch("pusht", tmp_path / "data")
    assert names(tmp_path / "data/pusht") == ["demo.zip", "demo.zip.sha256"]


def test_a_damaged_archive_is_deleted(tmp_path):
    archive = tmp_path / "demo.zip"
    archive.write_bytes(b"PK" + CONTENT[:1000])
    with pytest.raises(DataError, match=r"damaged .* and deleted: fetch it again"):
        unzip(archive, tmp_path / "demo")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "..\\evil"])
def test_members_outside_of_the_folder_are_refused(tmp_path, name):
    archive = tmp_path / "demo.zip"
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("good", "x")
        content.writestr(name, "x")
    with pytest.raises(DataError, match="would land outside of the folder"):
        unzip(archive, tmp_path / "inner/demo")
    assert not (tmp_path / "evil").exists()
    assert not list(tmp_path.glob("inner/*"))


def test_links_in_archives_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "demo.zip", "w") as content:
        content.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="member 'link' would land outside"):
        unzip(tmp_path / "demo.zip", tmp_path / "demo")

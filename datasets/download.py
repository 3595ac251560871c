"""Fetch public demonstrations over HTTPS: resumable, checked, and complete or not there."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final
from urllib.parse import urlsplit

from flowsteer.datasets.errors import DataError
from flowsteer.datasets.progress import ProgressBar
from flowsteer.datasets.replay_buffer import missing_key_error
from flowsteer.datasets.temporary import remove, replaced_by

TIMEOUT_S = 60.0
ATTEMPTS = 4
PAUSE_S = 1.0
PIECE_BYTES = 1 << 20
MB = 1e6
SHA256 = re.compile(r"[0-9a-f]{64}")
# The revision pins the files: the same address always gives the same bytes.
ROBOMIMIC = (
    "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/74fa018461f479cd9fd15b924a16103012096203/v1.5"
)


@final
@dataclass(frozen=True)
class Remote:
    """A public file; `member` is the data set's path inside a zip file."""

    url: str
    member: str | None = None


# Push-T's owner tells no checksum: its first download is taken on trust. Hugging Face tells one for each file.
REMOTES: dict[str, Remote] = {
    "pusht": Remote(
        "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip", member="pusht/pusht_cchi_v7_replay.zarr"
    ),
    **{
        f"{task}_{kind}": Remote(f"{ROBOMIMIC}/{task}/{kind}/low_dim_v15.hdf5")
        for task in ("lift", "can", "square")
        for kind in ("ph", "mh")
    },
}


def fetch(name: str, folder: Path | str) -> Path:
    """Download the public data set `name` (a key of `REMOTES`) below `folder`, unless it is there already.

    Returns:
        the path to give to `open_dataset`.

    Raises:
        DataError: for an unknown name, a failed or incomplete download, or a wrong checksum. What has arrived of an
            interrupted download stays as `*.part`, and the next call continues it.
    """
    if name not in REMOTES:
        raise missing_key_error("public data sets", name, REMOTES)
    remote, home = REMOTES[name], Path(folder).expanduser() / name
    file = home / PurePosixPath(urlsplit(remote.url).path).name
    if remote.member is None:
        return download(remote.url, file)
    dataset = home / PurePosixPath(remote.member).name
    if not dataset.exists():
        _take_out(download(remote.url, file), remote.member, dataset)
        file.unlink()
    return dataset


def _take_out(archive: Path, member: str, dataset: Path) -> None:
    unpacked = archive.with_name(f".{archive.stem}.unpacked")
    remove(unpacked)
    unzip(archive, unpacked)
    if not (unpacked / member).exists():
        remove(unpacked)
        raise DataError(f"{archive}: it holds no '{member}': its owner has changed it, unpack it by hand")
    (unpacked / member).rename(dataset)
    remove(unpacked)


def download(url: str, target: Path, sha256: str | None = None) -> Path:
    """Download `url` to `target`, continuing an interrupted `target.part`.

    The size is checked against the server's Content-Length. The checksum is checked against `sha256`, else against
    the one that the server tells for its file (Hugging Face does), else against `target.sha256` from the first
    download; it is written there, so that a later change at the server or on disk is noticed.

    Raises:
        DataError: naming the address and the remedy.
    """
    noted = target.with_name(target.name + ".sha256")
    known = sha256 or _noted_sha256(noted)
    if target.exists():
        _check_sum(target, known, f"{target}: delete it to fetch it anew")
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    told = _receive_persistently(url, part)
    try:
        found = _check_sum(part, known or told, f"{url}: try again; if it persists, the file has changed at its owner")
    except DataError:
        _discard(part)
        raise
    with replaced_by(noted, overwrite=True) as partial:
        partial.write_text(f"{found}  {target.name}\n")
    part.rename(target)
    _tag(part).unlink(missing_ok=True)
    return target


def _noted_sha256(noted: Path) -> str | None:
    """The checksum in a file of `sha256sum`'s form, None where it holds none."""
    first = noted.read_text().split()[:1] if noted.is_file() else []
    return first[0] if first and SHA256.fullmatch(first[0]) else None


def _check_sum(file: Path, expected: str | None, remedy: str) -> str:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if expected is not None and found != expected:
        raise DataError(f"{file.name}: its SHA-256 is {found[:16]}... and must be {expected[:16]}...; {remedy}")
    return found


def _receive_persistently(url: str, part: Path) -> str | None:
    """Receive all of `url` into `part`, in several tries; the SHA-256 that the server tells, or None."""
    for attempt in range(ATTEMPTS):
        try:
            return _receive(url, part)
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                _discard(part)
            elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise DataError(f"{url}: the server says {error.code} {error.reason}: check the address") from error
            reason: Exception = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = error
        except OSError as error:
            raise DataError(f"{part}: cannot be written ({error.strerror}): free disk space and call again") from error
        time.sleep(PAUSE_S * attempt)
    raise DataError(
        f"{url}: cannot be downloaded ({reason}): check the network and call again, it continues {part.name}"
    )


def _receive(url: str, part: Path) -> str | None:
    """One request for what is missing of `part`."""
    headers, have = _resume_headers(part)
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as reply:
        continues = reply.status == http.HTTPStatus.PARTIAL_CONTENT
        length = reply.headers.get("Content-Length")
        _note_version(part, reply.headers.get("ETag"))
        total = None if length is None else int(length) + have * continues
        size = None if total is None else total / MB
        bar = ProgressBar(f"fetching {part.stem}", size, "MB", start=have * continues / MB)
        with part.open("ab" if continues else "wb") as file, bar:
            while piece := reply.read(PIECE_BYTES):
                file.write(piece)
                bar.advance(len(piece) / MB)
        if total is not None and part.stat().st_size != total:
            raise http.client.IncompleteRead(b"", total - part.stat().st_size)
        return redirects.sha256 or _told_sha256(reply.headers)


def _resume_headers(part: Path) -> tuple[dict[str, str], int]:
    """Ask for the rest only of the very version that `part` began with: If-Range needs a strong ETag."""
    version = _tag(part).read_text() if _tag(part).is_file() else ""
    have = part.stat().st_size if part.is_file() else 0
    if not (have and version.startswith('"')):
        return {}, 0
    return {"Range": f"bytes={have}-", "If-Range": version}, have


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _note_version(part: Path, etag: str | None) -> None:
    if etag:
        _tag(part).write_text(etag)
    else:
        _tag(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _told_sha256(headers: Any) -> str | None:
    """Hugging Face tells the SHA-256 of its large files in this header, on the reply that redirects to the storage."""
    told = str(headers.get("X-Linked-Etag", "")).strip('"')
    return told if SHA256.fullmatch(told) else None


@final
class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, notes a told checksum, and refuses to leave HTTPS."""

    def __init__(self) -> None:
        self.sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.sha256 = self.sha256 or _told_sha256(headers)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise DataError(
                f"{req.full_url}: redirects to an address without encryption: fetch it by hand if you trust it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def unzip(archive: Path, folder: Path) -> None:
    """Unpack into the new folder `folder`; all or nothing.

    Raises:
        DataError: if the archive is damaged or a member would land outside of `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as content, replaced_by(folder) as partial:
            for member in content.infolist():
                _check_member(archive, member)
            _check_room(content, archive)
            content.extractall(partial)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise DataError(f"{archive}: damaged ({error}) and deleted: fetch it again") from error


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    place = PurePosixPath(member.filename.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(
            f"{archive}: member '{member.filename}' would land outside of the folder: do not trust this file"
        )


def _check_room(content: zipfile.ZipFile, archive: Path) -> None:
    need, free = sum(member.file_size for member in content.infolist()), shutil.disk_usage(archive.parent).free
    if need > free:
        raise DataError(f"{archive}: unpacks to {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room")

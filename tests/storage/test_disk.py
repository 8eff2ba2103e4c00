"""Questions about files have three answers: yes, no, and *cannot tell*, which is raised."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wancli.errors import NoSuchFile, Unreadable, UnreadableNow
from wancli.storage import disk

ERRNOS = ("EIO", "ESTALE", "EROFS", "EDQUOT", "EMFILE", "ENFILE", "EACCES", "ENAMETOOLONG", "EPERM", "ELOOP")
LASTING = ("EACCES", "ENAMETOOLONG", "EPERM", "ELOOP")
QUESTIONS: dict[str, Callable[[Path], Any]] = {
    name: getattr(disk, name)
    for name in (
        *("status", "link_status", "exists", "is_taken", "is_file", "is_folder", "is_link", "size"),
        *("list_folder", "free_space", "nearest_folder", "read_bytes", "find_bytes", "read_text", "sha256"),
    )
} | {"walk": lambda path: list(disk.walk(path))}
NEEDS_FILE = ("size", "read_bytes", "read_text", "sha256")


def fail(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1000) -> list[str]:
    """Every call of `os` that asks for a path fails, `times` times; returns the calls."""
    calls: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > times:
                return real(path, *rest, **options)
            raise OSError(number, os.strerror(number), str(path))

        return call

    for name in ("stat", "lstat", "open", "scandir", "statvfs"):
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return calls


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ERRNOS)
def test_what_the_disk_cannot_tell_is_one_error_with_path_reason_and_way_out(
    monkeypatch, tmp_path, question, name
):
    fail(monkeypatch, getattr(errno, name))
    with pytest.raises(Unreadable) as caught:
        QUESTIONS[question](tmp_path / "a")
    error = caught.value
    assert error.where == str(tmp_path / "a")
    assert os.strerror(getattr(errno, name)) in error.message
    assert error.hint
    assert (type(error), error.retryable, int(error.status)) == (
        (Unreadable, False, 3) if name in LASTING else (UnreadableNow, True, 3)
    )


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ["none", "file/below", "nul\0", "half\ud800"])
def test_a_name_that_nothing_has_is_an_answer_and_no_error(tmp_path, question, name):
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / name
    if question in NEEDS_FILE:
        with pytest.raises(NoSuchFile, match="cannot be read"):
            QUESTIONS[question](path)
    elif question == "nearest_folder":
        assert disk.nearest_folder(path) in (tmp_path, tmp_path / "file")
    elif question != "free_space":
        assert not QUESTIONS[question](path)


def test_a_stale_handle_is_tried_again_once(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    calls = fail(monkeypatch, errno.ESTALE, 1)
    assert disk.read_bytes(tmp_path / "a") == b"content"
    assert calls == ["open", "open"]


def test_files_folders_and_links_are_told_apart(tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "astray").symlink_to("nowhere")
    asked = (disk.exists, disk.is_taken, disk.is_file, disk.is_folder, disk.is_link)
    answers = {path.name: "".join("ny"[ask(path)] for ask in asked) for path in tmp_path.iterdir()}
    assert answers == {"file": "yyynn", "folder": "yynyn", "link": "yyyny", "astray": "nynny"}
    assert disk.size(tmp_path / "link") == 4
    assert disk.resolve(tmp_path / "link") == tmp_path / "file"


def test_a_folder_is_listed_in_order_and_walked_without_following_links(tmp_path):
    for name in ("b/2", "b/1", "a/3", "skipped/4", "0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "round").symlink_to(tmp_path)
    assert [path.name for path in disk.list_folder(tmp_path)] == ["0", "a", "b", "round", "skipped"]
    found = [str(path.relative_to(tmp_path)) for path in disk.walk(tmp_path, without="skipped")]
    assert found == ["0", "round", "a/3", "b/1", "b/2"]


@pytest.mark.parametrize("name", [b"a\xff.mp4", "ä.mp4".encode()])
def test_names_keep_their_bytes(tmp_path, name):
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    assert [os.fsencode(path.name) for path in disk.list_folder(tmp_path)] == [name]


def test_contents_are_read_whole(tmp_path):
    (tmp_path / "a").write_bytes("ä\n".encode() * 100_000)
    assert disk.read_text(tmp_path / "a") == "ä\n" * 100_000
    assert disk.sha256(tmp_path / "a") == hashlib.sha256("ä\n".encode() * 100_000).hexdigest()


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "not a plain file"), (tmp_path, "Is a directory")):
        with pytest.raises(Unreadable, match=message):
            disk.read_bytes(path)
    ours, theirs = os.pipe()
    os.write(theirs, b"piped")
    os.close(theirs)
    with disk.opened(Path(f"/dev/fd/{ours}"), pipes=True) as file:
        assert file.read() == b"piped"
    os.close(ours)


def test_links_in_a_circle_are_an_error_that_says_so(tmp_path):
    (tmp_path / "a").symlink_to("a")
    for ask in (disk.exists, disk.resolve, disk.read_bytes):
        with pytest.raises(Unreadable, match="symbolic links"):
            ask(tmp_path / "a")
    assert disk.is_taken(tmp_path / "a")


def test_an_error_while_reading_is_translated(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"content")

    def fails(*_: Any) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fails)
    with pytest.raises(UnreadableNow, match="a: cannot be read: Input/output error"):
        disk.sha256(tmp_path / "a")


def test_what_the_kernel_does_not_say_is_none():
    assert disk.read_system_text("/proc/self/status")
    assert disk.read_system_text("/proc/self/none") is None


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert disk.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_free_space_is_known_for_a_path_that_does_not_exist_yet(tmp_path):
    assert disk.free_space(tmp_path / "a" / "b") > 0

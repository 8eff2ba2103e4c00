from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest

from wancli.errors import JobError, MachineError, NoSpace, OutputExists
from wancli.storage import atomic, disk


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_hard_links(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


# ---- publish ----


def test_a_published_file_has_its_bytes_and_leaves_nothing_else(tmp_path):
    atomic.publish_bytes(tmp_path / "new" / "folder" / "a.bin", b"content")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"content"
    assert names(tmp_path / "new" / "folder") == ["a.bin"]


def test_a_published_file_has_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.publish_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("links", [True, False])
def test_publishing_over_another_file_is_refused_and_changes_nothing(tmp_path, links, request):
    if not links:
        request.getfixturevalue("no_hard_links")
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="a: a different file"):
        atomic.publish_bytes(tmp_path / "a", b"yours")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_publishing_the_same_bytes_again_is_success(tmp_path, links, request):
    if not links:
        request.getfixturevalue("no_hard_links")
    atomic.publish_bytes(tmp_path / "a", b"same")
    atomic.publish_bytes(tmp_path / "a", b"same")
    assert names(tmp_path) == ["a"]


def test_publishing_never_writes_through_a_symbolic_link(tmp_path):
    (tmp_path / "target").write_bytes(b"same")
    (tmp_path / "a").symlink_to("target")
    with pytest.raises(OutputExists):
        atomic.publish_bytes(tmp_path / "a", b"same")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputExists):
        atomic.publish_bytes(tmp_path / "dangling", b"x")
    assert names(tmp_path) == ["a", "dangling", "target"]


def test_a_temporary_file_is_removed_when_its_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.temp_file(tmp_path / "a.mp4") as tmp:
        tmp.write_bytes(b"%d" % (1 // 0))
    assert names(tmp_path) == []


def _publish_many(folder: str, who: int) -> None:
    for number in range(50):
        try:
            atomic.publish_bytes(Path(folder) / str(number), b"%d" % who * 5000)
        except OutputExists:
            Path(folder, f"lost-{number}-{who}").touch()


def test_of_processes_that_publish_one_name_exactly_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish_many, args=(str(tmp_path), who)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for number in range(50):
        assert (tmp_path / str(number)).read_bytes() in [b"%d" % who * 5000 for who in range(4)]
        assert len(list(tmp_path.glob(f"lost-{number}-*"))) == 3
    assert not list(tmp_path.glob(".*"))


# ---- replace, move aside, remove stale files ----


def test_replacing_a_link_leaves_its_target_alone(tmp_path):
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "a").symlink_to("target")
    atomic.replace(tmp_path / "a", b"new")
    assert (tmp_path / "target").read_bytes() == b"keep"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()


def test_moving_aside_never_overwrites_a_file_moved_aside_before(tmp_path):
    path = tmp_path / "a.b.mp4"
    assert atomic.move_aside(path) is None
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert atomic.move_aside(path) == tmp_path / f"a.b.old-{number}.mp4"
    assert [(tmp_path / f"a.b.old-{n}.mp4").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    assert not path.exists()


def test_a_folder_with_the_name_of_an_output_is_not_moved_aside(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputExists, match="folder"):
        atomic.move_aside(tmp_path / "a.mp4")


def test_only_own_temporary_files_of_dead_processes_older_than_a_day_are_removed(tmp_path):
    dead = 2**22 + 1  # above the largest process id
    cases = {
        f".wancli-{dead}-old.tmp": -90_000,
        f".wancli-{dead}-young.tmp": -80_000,
        f".wancli-{dead}-future.tmp": 90_000,
        f".wancli-{os.getpid()}-live.tmp": -90_000,
        ".other.tmp": -90_000,
        "video.mp4": -90_000,
    }
    for name, age in cases.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() + age,) * 2)
    assert [path.name for path in atomic.remove_stale_temp_files(tmp_path)] == [f".wancli-{dead}-old.tmp"]
    assert len(names(tmp_path)) == 5


# ---- faults ----


class Disk:
    """Fails the nth system call of some kinds with an error number, and records all of them."""

    def __init__(self, monkeypatch, fail_at: int | None = None, number: int = errno.EIO) -> None:
        self.calls: list[str] = []
        for name in ("open", "fsync", "link", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name), fail_at, number))
        monkeypatch.setattr(Path, "replace", self._wrap("rename", Path.replace, fail_at, number))

    def _wrap(self, name, real, fail_at, number):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) - 1 == fail_at:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("write", [atomic.publish_bytes, atomic.replace])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_the_file_is_complete_or_absent_whichever_call_fails(tmp_path, write, number):
    with pytest.MonkeyPatch.context() as patch:
        calls = Disk(patch).calls
        write(tmp_path / "count" / "a", b"content")
    assert calls.count("fsync") >= 2
    for fail_at in range(len(calls)):
        final = tmp_path / str(fail_at) / "a"
        written = False
        with pytest.MonkeyPatch.context() as patch, suppress(MachineError):
            Disk(patch, fail_at, number)
            write(final, b"content")
            written = True
        if written or final.exists():
            assert final.read_bytes() == b"content"


def test_after_a_failed_fsync_the_bytes_go_to_a_new_file_instead(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def first_one_fails(fd):
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        if len(synced) == 1:
            raise OSError(errno.EIO, "I/O error")
        real(fd)

    monkeypatch.setattr(os, "fsync", first_one_fails)
    atomic.replace(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert synced[0] != synced[1]
    assert names(tmp_path) == ["a"]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    atomic.publish_bytes(tmp_path / "a", b"x")
    link = disk.calls.index("link")
    assert "fsync" in disk.calls[:link]
    assert "fsync" in disk.calls[link:]


def test_the_error_of_a_full_disk_has_the_free_space():
    error = atomic.translate(OSError(errno.ENOSPC, "No space left on device"), Path("/no/such/folder/a.mp4"))
    assert isinstance(error, NoSpace)
    assert "MB are free" in str(error)
    assert str(error).startswith("/no/such/folder/a.mp4: ")


def test_a_file_size_limit_is_reported_as_no_space_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(NoSpace, match="at most 10,000 bytes a file") as caught:
            atomic.publish_bytes(tmp_path / "a", b"x" * 50_000)
        assert "ulimit -f" in caught.value.hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real, sizes = os.write, []

    def short(fd, data):
        sizes.append(real(fd, data[: len(data) // 2 + 1]))
        return sizes[-1]

    monkeypatch.setattr(os, "write", short)
    atomic.replace(tmp_path / "a", bytes(range(256)))
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == bytes(range(256))
    assert len(sizes) > 5


def test_a_published_file_that_cannot_be_synced_is_written_once_more(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def first_one_fails(fd):
        synced.append(os.fstat(fd).st_ino)
        if len(synced) == 1:
            raise OSError(errno.EIO, "I/O error")
        real(fd)

    with atomic.temp_file(tmp_path / "a") as tmp:
        tmp.write_bytes(b"content")
        monkeypatch.setattr(os, "fsync", first_one_fails)
        atomic.publish(tmp, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_ino == synced[1] != synced[0]
    assert names(tmp_path) == ["a"]


def test_a_disk_that_never_takes_the_bytes_is_reported_and_nothing_stays(tmp_path, monkeypatch):
    def fails(fd):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", fails)
    with atomic.temp_file(tmp_path / "a") as tmp, pytest.raises(MachineError, match="I/O error"):
        atomic.publish(tmp, tmp_path / "a")
    with pytest.raises(MachineError, match="I/O error"):
        atomic.replace(tmp_path / "b", b"content")
    assert names(tmp_path) == []


def test_a_temporary_file_that_another_host_removed_as_stale_is_written_again(tmp_path, monkeypatch):
    real, robbed = os.open, []

    def robbing(path, flags, *arguments, **options):
        if not flags & os.O_CREAT and not robbed and str(path).endswith(".tmp"):
            robbed.append(path)
            os.unlink(path)  # noqa: PTH108
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", robbing)
    atomic.replace(tmp_path / "a", b"content")
    assert robbed
    assert (tmp_path / "a").read_bytes() == b"content"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("years", [-1, 1])
def test_a_jumping_clock_removes_no_file_of_a_live_writer(tmp_path, monkeypatch, years):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * 366 * 86400)
    with atomic.temp_file(tmp_path / "a") as tmp:
        assert atomic.remove_stale_temp_files(tmp_path) == []
        atomic.require_writable(tmp_path)
        tmp.write_bytes(b"content")
        atomic.publish(tmp, tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_the_preflight_removes_stale_files_by_the_clock_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # what this host believes does not count
    (tmp_path / "now").touch()
    now = (tmp_path / "now").stat().st_mtime
    for name, age in {".wancli-far-1-old.tmp": 90_000, ".wancli-far-1-new.tmp": 80_000}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age,) * 2)
    atomic.require_writable(tmp_path)
    assert names(tmp_path) == [".wancli-far-1-new.tmp", "now"]


def test_a_folder_that_takes_files_passes_the_preflight_and_stays_empty(tmp_path):
    atomic.require_writable(tmp_path / "new")
    assert names(tmp_path / "new") == []


def test_a_file_with_the_name_of_a_folder_fails_the_preflight(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file/out") as caught:
        atomic.require_writable(tmp_path / "file" / "out")
    assert "not a folder" in caught.value.hint


def _unprivileged_preflight(folder: str) -> None:
    os.setuid(65534)
    try:
        atomic.require_writable(Path(folder))
    except MachineError as error:
        os._exit(0 if error.where == folder and "Permission denied" in error.message else 1)
    os._exit(2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_a_folder_of_someone_else_fails_the_preflight(tmp_path):
    worker = multiprocessing.get_context("fork").Process(
        target=_unprivileged_preflight, args=(str(tmp_path),)
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def test_a_file_system_without_links_and_exclusive_rename_fails_the_preflight(
    tmp_path, no_hard_links, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(atomic, "_rename_noreplace", refuse)
    with pytest.raises(MachineError) as caught:
        atomic.require_writable(tmp_path)
    assert "another folder" in caught.value.hint
    assert caught.value.where == str(tmp_path)  # and not a file that nobody knows


# ---- limits are named ----


def test_a_full_quota_is_named_as_one(tmp_path):
    error = atomic.translate(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), tmp_path / "a")
    assert isinstance(error, NoSpace)
    assert "quota of this user or group" in str(error)


def test_a_disk_without_inodes_is_told_from_one_without_space(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "MB are free there" in str(atomic.translate(full, tmp_path / "a"))
    monkeypatch.setattr(disk, "free_files", lambda _: 0)
    assert "no more files (inodes)" in str(atomic.translate(full, tmp_path / "a"))


@pytest.mark.parametrize(("mode", "says"), [(0o755, "chmod g+ws"), (0o775, "check who may write there")])
def test_a_folder_of_another_user_says_whose_it_is_and_how_a_group_shares_it(
    tmp_path, monkeypatch, mode, says
):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    path = tmp_path / "shared/new/a.mp4"
    error = atomic.translate(OSError(errno.EACCES, os.strerror(errno.EACCES)), path)
    assert f"{tmp_path / 'shared'} belongs to user {owner}" in error.hint
    assert says in error.hint


def test_the_longest_name_moves_aside_under_a_shorter_one(tmp_path):
    path = tmp_path / ("ä" * 125 + ".mp4")
    path.write_bytes(b"content")
    aside = atomic.move_aside(path)
    assert aside is not None
    assert aside.read_bytes() == b"content"
    assert aside.name.startswith("ä" * 120)
    assert aside.name.endswith(".old-1.mp4")


def test_a_folder_may_have_a_colon_at_its_end(tmp_path, monkeypatch):
    atomic.publish_bytes(tmp_path / "night:" / "b.png", b"content")
    monkeypatch.chdir(tmp_path)
    atomic.publish_bytes(Path("night:/c.png"), b"content")
    assert names(tmp_path / "night:") == ["b.png", "c.png"]


def test_a_url_of_an_output_does_not_become_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="s3://: is a URL"):
        atomic.publish_bytes(Path("s3://bucket/a/b.png"), b"")
    assert names(tmp_path) == []

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import time
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli import files
from wancli.errors import JobError, MachineError, NoSpace, OutputExists


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_hard_links(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


# ---- publish ----


def test_a_published_file_has_its_bytes_and_leaves_nothing_else(tmp_path):
    files.publish_bytes(tmp_path / "new" / "folder" / "a.bin", b"content")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"content"
    assert names(tmp_path / "new" / "folder") == ["a.bin"]


def test_a_published_file_has_the_rights_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        files.publish_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("links", [True, False])
def test_publishing_over_another_file_is_refused_and_changes_nothing(tmp_path, links, request):
    if not links:
        request.getfixturevalue("no_hard_links")
    (tmp_path / "a").write_bytes(b"mine")
    with pytest.raises(OutputExists, match="a: a different file"):
        files.publish_bytes(tmp_path / "a", b"yours")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_publishing_the_same_bytes_again_is_success(tmp_path, links, request):
    if not links:
        request.getfixturevalue("no_hard_links")
    files.publish_bytes(tmp_path / "a", b"same")
    files.publish_bytes(tmp_path / "a", b"same")
    assert names(tmp_path) == ["a"]


def test_publishing_never_writes_through_a_symbolic_link(tmp_path):
    (tmp_path / "target").write_bytes(b"same")
    (tmp_path / "a").symlink_to("target")
    with pytest.raises(OutputExists):
        files.publish_bytes(tmp_path / "a", b"same")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OutputExists):
        files.publish_bytes(tmp_path / "dangling", b"x")
    assert names(tmp_path) == ["a", "dangling", "target"]


def test_a_temporary_file_is_gone_when_its_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), files.temporary(tmp_path / "a.mp4") as tmp:
        tmp.write_bytes(b"%d" % (1 // 0))
    assert names(tmp_path) == []


def _publish_many(folder: str, who: int) -> None:
    for number in range(50):
        try:
            files.publish_bytes(Path(folder) / str(number), b"%d" % who * 5000)
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


# ---- replace, set aside, sweep ----


def test_replacing_a_link_leaves_its_target_alone(tmp_path):
    (tmp_path / "target").write_bytes(b"keep")
    (tmp_path / "a").symlink_to("target")
    files.replace(tmp_path / "a", b"new")
    assert (tmp_path / "target").read_bytes() == b"keep"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()


def test_setting_aside_never_overwrites_what_was_set_aside_before(tmp_path):
    path = tmp_path / "a.b.mp4"
    assert files.set_aside(path) is None
    for number in (1, 2, 3):
        path.write_text(str(number))
        assert files.set_aside(path) == tmp_path / f"a.b.old-{number}.mp4"
    assert [(tmp_path / f"a.b.old-{n}.mp4").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]
    assert not path.exists()


def test_a_folder_in_the_place_of_an_output_is_not_set_aside(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputExists, match="folder"):
        files.set_aside(tmp_path / "a.mp4")


def test_a_sweep_takes_only_own_debris_of_dead_processes_older_than_a_day(tmp_path):
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
    assert [path.name for path in files.sweep(tmp_path)] == [f".wancli-{dead}-old.tmp"]
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


@pytest.mark.parametrize("write", [files.publish_bytes, files.replace])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_whatever_call_fails_the_file_is_whole_or_absent(tmp_path, write, number):
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
    files.replace(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert synced[0] != synced[1]
    assert names(tmp_path) == ["a"]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    files.publish_bytes(tmp_path / "a", b"x")
    link = disk.calls.index("link")
    assert "fsync" in disk.calls[:link]
    assert "fsync" in disk.calls[link:]


def test_a_full_disk_is_told_with_the_space_that_is_left():
    error = files.translate(OSError(errno.ENOSPC, "No space left on device"), Path("/no/such/folder/a.mp4"))
    assert isinstance(error, NoSpace)
    assert "MB are free" in str(error)
    assert str(error).startswith("/no/such/folder/a.mp4: ")


def test_a_file_size_limit_is_told_as_no_space_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(NoSpace):
            files.publish_bytes(tmp_path / "a", b"x" * 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[: len(data) // 2 + 1])

        def fileno(self):
            return self.file.fileno()

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: Slow(real(*args, **kwargs)))
    files.replace(tmp_path / "a", bytes(range(256)))
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == bytes(range(256))


def test_a_folder_that_takes_files_passes_the_preflight_and_stays_empty(tmp_path):
    files.writable(tmp_path / "new")
    assert names(tmp_path / "new") == []


def test_a_file_in_the_place_of_a_folder_fails_the_preflight(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="file/out") as caught:
        files.writable(tmp_path / "file" / "out")
    assert "not a folder" in caught.value.hint


def _unprivileged_preflight(folder: str) -> None:
    os.setuid(65534)
    try:
        files.writable(Path(folder))
    except MachineError as error:
        os._exit(0 if "Permission denied" in str(error) else 1)
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

    monkeypatch.setattr(files, "_rename_noreplace", refuse)
    with pytest.raises(MachineError) as caught:
        files.writable(tmp_path)
    assert "another place" in caught.value.hint


def test_the_digest_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- names ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A gray tabby cat, walking!", "a-gray-tabby-cat-walking"),
        ("  --../../etc/passwd", "etc-passwd"),
        ("猫在花园里散步", "猫在花园里散步"),
        ("Cafe\u0301", "caf\u00e9"),
        ("हिन्दी", "हिन्दी"),
        ("🐈 ❤\ufe0f", "shot"),
        ("", "shot"),
        ("CON", "con-shot"),
        ("x" * 100, "x" * 48),
        ("猫" * 100, "猫" * 16),
    ],
)
def test_a_slug_is_readable_and_short(text, expected):
    assert files.slug(text) == expected


@given(st.text(), st.integers(8, 80))
def test_a_slug_of_any_text_is_one_safe_name(text, limit):
    name = files.slug(text, limit)
    assert 0 < len(name.encode()) <= max(limit, 9)
    assert name == unicodedata.normalize("NFC", name).lower() or not text.isascii()
    assert files.inside(Path("/root"), name + ".mp4") == Path("/root", name + ".mp4")


FIELDS: dict[str, str | int] = {"job": "cats", "item": 7, "slug": "a-cat", "id": "x"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{job}/{item:04d}-{slug}.mp4", "cats/0007-a-cat.mp4"),
        ("{item}{item:d}{item:3d}", "77  7"),
        ("plain", "plain"),
    ],
)
def test_a_template_takes_fields_and_zero_padded_numbers(template, expected):
    assert files.expand_template(template, FIELDS) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{slag}", "no field {slag}"),
        ("{job.__class__}", "no field"),
        ("{job[0]}", "no field"),
        ("{}", "no field {}"),
        ("{job", "a lone {"),
        ("job}", "a lone }"),
        ("{{job}}", "a lone {"),
        ("{slug:04d}", "cannot write {slug}"),
        ("{item:>9999999999}", "cannot write {item}"),
        ("{item:{job}}", "a lone {"),
        ("{job!r}", "no field"),
    ],
)
def test_anything_else_in_a_template_is_an_error(template, message):
    with pytest.raises(JobError, match=message.replace("{", r"\{")):
        files.expand_template(template, FIELDS)


def test_a_mistyped_field_is_corrected():
    with pytest.raises(JobError) as caught:
        files.expand_template("{slag}", FIELDS)
    assert caught.value.hint == "did you mean {slug}?"


@pytest.mark.parametrize("value", ["a/b", "..\\b", "\0", "a\nb", "a\u202eb", "\ud800"])
def test_a_field_cannot_add_folders_or_invisible_characters(value):
    with pytest.raises(JobError, match="id"):
        files.expand_template("{id}.mp4", {"id": value})


@pytest.mark.parametrize(
    "relative",
    ["", ".", "..", "../a", "a/../../b", "/a", "-y.mp4", ".hidden", "a\0b", "NUL", "com1.mp4", "x" * 250],
)
def test_an_unsafe_name_inside_the_output_folder_is_refused(tmp_path, relative):
    with pytest.raises(JobError):
        files.inside(tmp_path, relative)


def test_the_companions_of_the_longest_allowed_name_can_be_written(tmp_path):
    name = "x" * files._NAME_BYTES
    path = files.inside(tmp_path, name)
    path.with_suffix(".latents.safetensors").touch()
    with pytest.raises(JobError, match="bytes"):
        files.inside(tmp_path, name + "x")


def test_a_link_that_leads_out_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "away").symlink_to(tmp_path)
    (tmp_path / "out" / "near").symlink_to(tmp_path / "out")
    with pytest.raises(JobError, match="symbolic link"):
        files.inside(tmp_path / "out", "away/a.mp4")
    assert files.inside(tmp_path / "out", "near/a.mp4")


def test_the_folders_that_the_user_wrote_himself_may_be_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    root = Path("/jobs")
    assert files.output_path(root, "out/{job}/{item:02d}.mp4", FIELDS) == Path("/jobs/out/cats/07.mp4")
    assert files.output_path(root, "../o/{slug}.mp4", FIELDS) == Path("/jobs/../o/a-cat.mp4")
    assert files.output_path(root, "/data/.x/{slug}.mp4", FIELDS) == Path("/data/.x/a-cat.mp4")
    assert files.output_path(root, "~/v/a.mp4", FIELDS) == Path("/home/me/v/a.mp4")
    assert files.output_path(root, "a.mp4", FIELDS) == Path("/jobs/a.mp4")


@pytest.mark.parametrize("value", ["..", "-", ".git", "con", ""])
def test_what_a_field_puts_into_a_path_stays_inside(value):
    with pytest.raises(JobError):
        files.output_path(Path("/jobs"), "out/{id}", {"id": value})


def test_a_tilde_from_a_field_is_a_plain_name():
    assert files.output_path(Path("/jobs"), "{id}/a", {"id": "~"}) == Path("/jobs/~/a")


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_label_leads_out_of_the_output_folder(a, b):
    try:
        path = files.output_path(Path("/jobs"), "out/{a}/{b}-{a}.mp4", {"a": a, "b": b})
    except JobError:
        return
    assert Path(os.path.normpath(path)).is_relative_to("/jobs/out")
    assert len(path.parts) == 5


def test_free_space_is_known_for_a_path_that_does_not_exist_yet(tmp_path):
    assert files.free_space(tmp_path / "a" / "b") > 0

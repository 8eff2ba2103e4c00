from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import struct
import time
from pathlib import Path

import pytest

from wancli.errors import EntryError, MachineError
from wancli.storage import atomic
from wancli.storage.cache import Store, seal, unseal


def key(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_get_returns_the_bytes_that_were_put(store):
    assert store.get(key("a")) is None
    assert store.put(key("a"), b"payload")
    assert store.get(key("a")) == b"payload"
    assert store.put(key("a"), b"")
    assert store.get(key("a")) == b""


def test_the_layout_of_an_entry_is_the_documented_one():
    start = b"\x89wancli\n" + struct.pack("<IQ", 1, 3)
    digest = hashlib.sha256(start + b"key\0" + b"abc").digest()
    assert seal(b"abc", "key") == start + digest + b"abc"


def test_every_bit_and_every_length_of_an_entry_is_guarded():
    sealed = seal(bytes(range(256)) * 4, "key")
    damaged = [sealed[:length] for length in range(len(sealed))]
    damaged += [sealed + b"\0" * extra for extra in (1, 7, 4096)]
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    undetected = 0
    for data in damaged:
        try:
            unseal(data, "key")
            undetected += 1
        except EntryError:
            pass
    assert len(damaged) > 9000
    assert undetected == 0
    assert unseal(sealed, "key") == bytes(range(256)) * 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"something else entirely, long enough to have a header in it",
        lambda data: data[:8] + struct.pack("<I", 2) + data[12:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
    ids=["truncated", "empty", "foreign", "future version", "flipped"],
)
def test_a_bad_entry_is_a_miss_and_is_kept_for_inspection(store, damage, caplog):
    store.put(key("a"), b"payload")
    path = store.path(key("a"))
    bad = damage(path.read_bytes())
    path.write_bytes(bad)
    assert [entry.path for entry in store.verify()] == [path]
    assert path.exists()  # verify changes nothing
    assert store.get(key("a")) is None
    assert path.with_suffix(".bad").read_bytes() == bad
    assert "kept as .bad" in caplog.text
    assert store.put(key("a"), b"payload")
    assert store.get(key("a")) == b"payload"
    assert store.verify() == []


def test_an_entry_under_the_name_of_another_is_a_miss(store):
    store.put(key("a"), b"payload")
    store.put(key("b"), b"other")
    store.path(key("a")).replace(store.path(key("b")))
    assert store.get(key("b")) is None


def test_a_link_in_the_cache_is_not_followed(store, tmp_path):
    (tmp_path / "elsewhere").write_bytes(seal(b"planted", key("a")))
    store.path(key("a")).parent.mkdir(parents=True)
    store.path(key("a")).symlink_to(tmp_path / "elsewhere")
    assert store.get(key("a")) is None
    assert store.put(key("a"), b"mine")
    assert (tmp_path / "elsewhere").read_bytes() == seal(b"planted", key("a"))
    assert store.get(key("a")) == b"mine"


def test_a_folder_of_the_cache_that_is_a_link_is_not_followed(store, tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    store.root.mkdir(mode=0o700)
    store.path(key("a")).parent.symlink_to(tmp_path / "elsewhere")
    assert not store.put(key("a"), b"payload")
    assert "a symbolic link leads out of the cache" in caplog.text
    (tmp_path / "elsewhere" / store.path(key("a")).name).write_bytes(seal(b"payload", key("a")))
    assert store.get(key("a")) is None
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o757, True), (0o1777, False), (0o775, False)])
def test_a_cache_folder_that_others_may_replace_is_refused(tmp_path, mode, refused):
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(mode)
    if refused:
        with pytest.raises(MachineError, match="anybody may replace") as caught:
            Store(above / "cache")
        assert "chmod o-w" in caught.value.hint
    else:
        assert Store(above / "cache").put(key("a"), b"payload")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "mkdir", "replace"])
def test_a_disk_fault_loses_only_the_entry(store, monkeypatch, call, number):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)
    assert not store.put(key("a"), b"payload")
    monkeypatch.undo()
    assert store.get(key("a")) is None
    assert store.verify() == []


@pytest.mark.parametrize("years", [-1, 1])
def test_no_hit_depends_on_the_clock(store, monkeypatch, years):
    real = time.time
    store.put(key("a"), b"payload")
    monkeypatch.setattr(time, "time", lambda: real() + years * 366 * 86400)
    assert store.get(key("a")) == b"payload"
    assert store.put(key("b"), b"payload")
    assert store.get(key("b")) == b"payload"
    if years < 0:
        assert store.prune(older_than_days=1) == []


def test_a_full_disk_loses_the_entry_with_one_warning_but_not_the_work(store, monkeypatch, caplog):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert not store.put(key("a"), b"payload")
    assert not store.put(key("b"), b"payload")
    assert len(caplog.records) == 1
    assert "without the cache" in caplog.text
    assert not list(store.root.glob("*/*"))


def test_a_file_with_the_name_of_the_cache_folder_disables_only_the_cache(tmp_path):
    (tmp_path / "cache").touch()
    store = Store(tmp_path / "cache")
    assert not store.put(key("a"), b"payload")
    assert store.get(key("a")) is None
    assert store.entries() == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBUSY, errno.EACCES, errno.EIO])
def test_an_entry_that_cannot_be_read_is_a_miss(store, monkeypatch, number):
    store.put(key("a"), b"payload")
    real = os.open

    def fail(path, *args, **kwargs):
        if str(path).endswith(".entry"):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    assert store.get(key("a")) is None


def test_the_cache_folder_is_for_its_owner_alone(store):
    store.put(key("a"), b"payload")
    assert store.root.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_cache_folder_that_others_may_write_to_is_refused(tmp_path, mode):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(MachineError, match="others may write") as caught:
        Store(tmp_path / "cache")
    assert "chmod go-w" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 65534, 65534)
    with pytest.raises(MachineError, match="another user"):
        Store(tmp_path / "cache")


def test_entries_are_listed_by_key_with_their_size(store):
    for name in "abc":
        store.put(key(name), b"payload")
    listed = store.entries()
    assert [entry.key for entry in listed] == sorted(key(name) for name in "abc")
    assert {entry.bytes for entry in listed} == {len(seal(b"payload"))}


def age(store: Store, name: str, days: float) -> None:
    os.utime(store.path(key(name)), (time.time() - days * 86400,) * 2)


def test_pruning_by_size_keeps_what_was_used_last(store):
    for days, name in enumerate("abcd"):
        store.put(key(name), b"x" * 1000)
        age(store, name, 10 + days)
    assert store.get(key("d"))  # the oldest, but just used
    gone = store.prune(max_bytes=2 * len(seal(b"x" * 1000)))
    assert [entry.key for entry in gone] == [key("c"), key("b")]
    assert {entry.key for entry in store.entries()} == {key("a"), key("d")}


def test_pruning_by_age_keeps_new_entries_and_entries_from_the_future(store):
    for name, days in {"old": 31, "young": 29, "future": -365}.items():
        store.put(key(name), b"x")
        age(store, name, days)
    assert [entry.key for entry in store.prune(older_than_days=30)] == [key("old")]
    assert len(store.entries()) == 2


def test_pruning_without_limits_removes_only_bad_entries_and_stale_files(store):
    store.put(key("a"), b"x")
    shard = store.path(key("a")).parent
    (shard / "b.bad").touch()
    for name, hours in {".wancli-4194305-old.tmp": 25, ".wancli-4194305-new.tmp": 23}.items():
        (shard / name).touch()
        os.utime(shard / name, (time.time() - hours * 3600,) * 2)
    assert store.prune() == []
    assert sorted(path.name for path in shard.iterdir()) == [".wancli-4194305-new.tmp", f"{key('a')}.entry"]


def test_a_key_is_never_a_path(store):
    for bad in ("../../x", "", "ABCDEF0123", "a/b"):
        with pytest.raises(ValueError, match="not a key"):
            store.get(bad)


def _hammer(root: str, who: int) -> None:
    store, rng = Store(Path(root)), random.Random(who)
    for _ in range(150):
        name = rng.randrange(10)
        known = store.get(key(name))
        if known is None:
            store.put(key(name), b"%d" % name * 3000)
        elif known != b"%d" % name * 3000:
            os._exit(1)
        if rng.random() < 0.2:
            store.path(key(rng.randrange(10))).unlink(missing_ok=True)


def test_processes_that_share_a_cache_never_read_a_wrong_or_mixed_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "sync", lambda path: None)  # durability is not in question here
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_hammer, args=(str(tmp_path / "cache"), who)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert Store(tmp_path / "cache").verify() == []


def test_pruning_removes_a_damaged_entry_so_that_the_store_verifies_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.put("a" * 64, b"whole")
    store.put("b" * 64, b"damaged")
    path = store.path("b" * 64)
    path.write_bytes(path.read_bytes()[:-1])
    assert [entry.key for entry in store.prune()] == ["b" * 64]
    assert store.verify() == []
    assert store.get("a" * 64) == b"whole"

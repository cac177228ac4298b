"""The sealed tier under vLLM's tiering manager: hits, misses and damage."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys

import pytest

from lab.root_keys import new_key_file
from scx.errors import SCXConfigError
from scx.sealed import store as stores
from scx.sealed.format import OVERHEAD
from tests.sealed_world import BLOCK_BYTES, FACTS, keys, start

FILE_BYTES = BLOCK_BYTES + OVERHEAD
MISSES = [None, None, None]


@pytest.fixture(autouse=True)
def key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SCX_KEY_FILE", str(new_key_file(tmp_path / "key")))


@pytest.fixture
def begin():
    engines = []

    def begin(*args, **settings):
        engines.append(start(*args, **settings))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.stop()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
def blocks():
    return {key: os.urandom(BLOCK_BYTES) for key in keys(1, 2, 3)}


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_another_engine_reads_what_one_stored_and_no_file_shows_it(begin, folder, blocks):
    first = begin(folder)
    first.store(blocks)
    assert first.counts() == {"scx_kv_sealed_blocks": 3}
    second = begin(folder)
    assert second.load(blocks) == list(blocks.values())
    assert second.counts() == {"scx_kv_opened_blocks": 3}
    files = files_of(folder)
    assert [file.stat().st_size for file in files] == [FILE_BYTES] * 3
    for file in files:
        assert file.stat().st_mode & 0o077 == 0
        for key, block in blocks.items():
            assert key[:8].hex() not in file.name
            assert block[:16] not in file.read_bytes()


def test_another_key_model_dtype_encoding_or_rank_misses(
    begin, folder, blocks, tmp_path, monkeypatch
):
    begin(folder).store(blocks)
    others = [FACTS | {name: "other"} for name in FACTS]
    assert [begin(folder, facts).load(blocks) for facts in others] == [MISSES] * 4
    assert begin(folder, rank=1, tp_size=2).load(blocks) == MISSES
    assert begin(folder, tp_size=2).load(blocks) == MISSES
    monkeypatch.setenv("SCX_KEY_FILE", str(new_key_file(tmp_path / "other key")))
    assert begin(folder).load(blocks) == MISSES
    assert len(files_of(folder)) == 3


def test_a_tenant_reads_its_own_blocks_alone(begin, folder, blocks):
    tenants = [None, "", "alice", "bob", 1, "1", ["a", "b"], "a, b"]
    for owner in tenants:
        begin(folder).store(blocks, owner)
        for reader in tenants:
            found = begin(folder).load(blocks, reader)
            assert (found == list(blocks.values())) == (reader == owner)
        shutil.rmtree(folder)


def test_tenants_at_one_time_share_no_answer(begin, folder, blocks):
    begin(folder).store(blocks, "alice")
    engine = begin(folder)
    assert engine.load(blocks, "bob") == MISSES
    assert engine.load(blocks, "alice") == list(blocks.values())


def flip(files):
    content = bytearray(files[0].read_bytes())
    content[100] ^= 1
    files[0].write_bytes(content)


def cut(files):
    os.truncate(files[0], FILE_BYTES // 2)


def lengthen(files):
    files[0].write_bytes(files[0].read_bytes() + b"\0")


def empty(files):
    os.truncate(files[0], 0)


def swap(files):
    shutil.copy(files[1], files[0])


def pipe(files):
    files[0].unlink()
    os.mkfifo(files[0])


@pytest.mark.parametrize("damage", [flip, cut, lengthen, empty, swap, pipe])
def test_a_damaged_file_is_one_miss_counted_logged_once_and_replaced(
    damage, begin, folder, blocks, caplog
):
    begin(folder).store(blocks)
    damage(files_of(folder))
    engine = begin(folder)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING, "vllm.scx"):
        found = engine.load(blocks)
    assert found.count(None) == 1
    assert all(a in (None, b) for a, b in zip(found, blocks.values(), strict=True))
    assert engine.counts() == {"scx_kv_opened_blocks": 2, "scx_kv_refused_blocks": 1}
    assert len([r for r in caplog.records if "sealed tier" in r.message]) == 1
    begin(folder).store(blocks)
    assert begin(folder).load(blocks) == list(blocks.values())


def test_a_file_of_another_rank_or_tenant_is_refused_under_our_name(
    begin, folder, blocks, tmp_path
):
    begin(folder).store(blocks)
    for number, (rank, tenant) in enumerate([(1, None), (0, "bob")]):
        other = tmp_path / str(number)
        begin(other, rank=rank, tp_size=1).store(blocks, tenant)
        for ours, theirs in zip(files_of(folder), files_of(other), strict=True):
            shutil.copy(theirs, ours)
        engine = begin(folder)
        assert engine.load(blocks) == MISSES
        assert engine.counts() == {"scx_kv_refused_blocks": 3}
        begin(folder).store(blocks)


def test_a_full_disk_is_counted_and_leaves_nothing(begin, folder, blocks, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    engine = begin(folder)
    with monkeypatch.context() as patch:
        patch.setattr(stores.os, "replace", full)
        engine.store(blocks)
    assert engine.counts() == {"scx_kv_failed_blocks": 3}
    assert files_of(folder) == []
    assert begin(folder).load(blocks) == MISSES


def test_a_folder_that_vanishes_is_a_miss_and_is_not_made_again(begin, folder, blocks):
    engine = begin(folder)
    shutil.rmtree(folder)
    engine.store(blocks)
    assert engine.counts() == {"scx_kv_failed_blocks": 3}
    assert begin(folder).load(blocks) == MISSES
    assert files_of(folder) == []


def test_files_that_vanish_after_the_lookup_are_a_miss(
    begin, folder, blocks, monkeypatch
):
    begin(folder).store(blocks)
    engine = begin(folder)
    monkeypatch.setattr(stores.Store, "has", lambda *_: True)
    for file in files_of(folder):
        file.unlink()
    assert engine.load(blocks) == MISSES
    assert engine.counts() == {"scx_kv_failed_blocks": 3}


def test_the_least_recently_used_go_and_nothing_foreign_does(begin, folder):
    limit = 32 * FILE_BYTES
    folder.mkdir()
    (folder / "ab").mkdir()
    foreign = folder / "ab" / "notes"
    foreign.write_bytes(bytes(2 * limit))
    many = {key: os.urandom(BLOCK_BYTES) for key in keys(*range(60))}
    engine, items = begin(folder, max_bytes=limit), list(many.items())
    for start_at in range(0, 60, 5):
        engine.store(dict(items[start_at : start_at + 5]))
    sealed = [file for file in files_of(folder) if file != foreign]
    assert limit * 3 // 4 < sum(file.stat().st_size for file in sealed) <= limit
    assert foreign.exists()
    last = [key for key, _ in items[-10:]]
    assert begin(folder).load(last) == [many[key] for key in last]
    assert begin(folder).load([items[0][0]]) == [None]


def test_without_a_key_file_or_our_plugin_there_is_no_tier(begin, folder, monkeypatch):
    with pytest.raises(SCXConfigError, match="SCX_KEY_FILE"):
        begin(folder, None)
    monkeypatch.delenv("SCX_KEY_FILE")
    with pytest.raises(SCXConfigError, match="SCX_KEY_FILE"):
        begin(folder)


WRITER = """
import sys
from tests.sealed_world import BLOCK_BYTES, keys, start
engine = start(sys.argv[1])
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    for first in range(0, 240, 8):
        numbers = range(first, first + 8)
        engine.store({keys(n)[0]: bytes([n]) * BLOCK_BYTES for n in numbers})
engine.stop()
"""


def writer(folder, turns):
    command = [sys.executable, "-c", WRITER, str(folder), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603


def all_good(engine):
    """Blocks of the writer that are found, each as it was written."""
    found = 0
    for first in range(0, 240, 8):
        numbers = range(first, first + 8)
        blocks = engine.load(keys(*numbers))
        for number, block in zip(numbers, blocks, strict=True):
            assert block in (None, bytes([number]) * BLOCK_BYTES)
            found += block is not None
    return found


def test_two_processes_share_a_folder_and_one_killed_leaves_nothing_bad(begin, folder):
    processes = [writer(folder, 1), writer(folder, 1000)]
    for process in processes:
        process.stdout.readline()
    assert processes[0].wait(60) == 0
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait(60)
    engine = begin(folder)
    assert all_good(engine) == 240
    assert engine.counts() == {"scx_kv_opened_blocks": 240}

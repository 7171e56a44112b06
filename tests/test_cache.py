"""The cache of tokens: what was damaged is made again and never trained on, in whatever way it was; processes do not harm each other."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import write_prose
from filelock import FileLock
from test_data import config, prepare

from hyperlm import data
from hyperlm.data import cache, folders
from hyperlm.data import tokenise as preparation

FILES = ["meta.json", "tokenizer.json", "train_00.bin", "val_00.bin", "val_00.npy"]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def to_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "emptied": lambda p: p.write_bytes(b""),
    "cut to half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 4 * 2]),
    "zeroed": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "a bit flipped": flip,
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"ab"),
    "deleted": Path.unlink,
    "a folder": to_folder,
    "a pipe": to_pipe,
    "a dead link": lambda p: (p.unlink(), p.symlink_to("nowhere")),
}
METAS = [
    *("null", "3", "[]", "{}", '"x"', "nan", "[" * 100_000, '{"a":' * 100_000, "\ud800", '{"format": ' + "9" * 5000 + "}"),
    '{"format": 2, "dtype": "uint16", "chat": true, "entries": {}}',
    '{"format": 2, "dtype": "uint16", "chat": true, "entries": null, "digest": 0}',
]


@pytest.fixture
def cached(tmp_path):
    """A corpus in the cache: its configuration, its folder and its training tokens."""
    cfg = config(write_prose(tmp_path / "short.txt", 4000), val_fraction=0.3)
    corpus = prepare(cfg)
    return cfg, data.cache_folder(cfg.data) / corpus.fingerprint, corpus.shards[0].train.copy()


def heals(cached, name: str = "") -> None:
    """The next start says what it mends, and has what there was; the one after it finds everything in place."""
    cfg, folder, train = cached
    said = []
    corpus = data.prepare(cfg, say=said.append)
    assert np.array_equal(corpus.shards[0].train, train)
    again = [line for line in said if line.startswith("cache")]
    assert (
        len(again) == 1
        and again[0].startswith(f"cache      {folder}: {name}")
        and again[0].endswith("; made again")
        and "\n" not in again[0]
    )
    data.prepare(cfg, say=said.append)
    assert said[-1].endswith("(cached)") and not any(line.startswith("cache") for line in said[-2:])
    assert sorted(os.listdir(folder.parent)) == [folder.name] and sorted(os.listdir(folder)) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_and_made_again(cached, damage, name):
    damage(cached[1] / name)
    heals(cached, name)


@pytest.mark.parametrize("meta", METAS, ids=range(len(METAS)))
def test_a_folder_that_does_not_say_what_it_holds_is_made_again(cached, meta):
    (cached[1] / "meta.json").write_text(meta, errors="surrogatepass")
    heals(cached, "meta.json")


@pytest.mark.parametrize("key", ["format", "dtype", "chat", "entries", "digest"])
def test_every_value_of_meta_is_covered_by_its_digest(cached, key):
    path = cached[1] / "meta.json"
    meta = json.loads(path.read_text())
    for value in (None, 0, -1, True, "x", [], {}, 1e300):
        path.write_text(json.dumps({**meta, key: value}))
        assert cache.damage(cached[1]) == ["meta.json is missing or damaged"]
    heals(cached, "meta.json")


@pytest.mark.parametrize("damage", [lambda f: (shutil.rmtree(f), f.write_text("x")), lambda f: (shutil.rmtree(f), f.symlink_to("nowhere"))])
def test_what_stands_in_the_place_of_a_folder_makes_way(cached, damage):
    damage(cached[1])
    heals(cached, "meta.json")


def test_a_file_that_cannot_be_read_is_damaged(cached, monkeypatch):
    real = open

    def fails(path, *rest, **more):
        if str(path).startswith(str(cached[1])) and str(path).endswith("train_00.bin") and "b" in str(rest):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(cache, "open", fails, raising=False)
    assert cache.damage(cached[1]) == ["train_00.bin cannot be read (Permission denied)"]


def test_large_files_are_checked_by_their_ends_and_a_sample_and_wholly_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 100)
    folder = tmp_path / "cache" / ("0" * 24)
    with cache.writing(folder) as part:
        (part / "large").write_bytes(random.Random(0).randbytes(100_000))
        (part / "empty").write_bytes(b"")
        cache.seal(part, {})
    assert cache.damage(folder) == cache.damage(folder, whole=True) == list(cache.verify(folder.parent)) == []
    raw = bytearray((folder / "large").read_bytes())
    read = []
    monkeypatch.setattr(cache.zlib, "crc32", lambda block, crc32=cache.zlib.crc32: read.append(len(block)) or crc32(block))
    assert cache.damage(folder) == [] and len(read) == 2 + cache.SAMPLE
    for place in (0, 99_999, 50_000):
        raw[place] ^= 1
        (folder / "large").write_bytes(raw)
        if place != 50_000:
            assert cache.damage(folder) == ["large does not match its checksum"]
        assert cache.damage(folder, whole=True) == ["large does not match its checksum"]
        assert list(cache.verify(folder.parent)) == [f"{folder.name}/large does not match its checksum"]
        raw[place] ^= 1


def test_folders_of_other_versions_are_no_damage(tmp_path):
    for name, meta in (("1" * 24, '{"format": 1}'), ("2" * 24, "{")):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "meta.json").write_text(meta)
    assert list(data.verify_cache(tmp_path / "c")) == ["2" * 24 + "/meta.json is missing or damaged"]
    assert list(data.verify_cache(tmp_path / "none")) == []


def test_a_running_process_keeps_what_it_has_mapped_while_another_makes_it_again(cached):
    cfg, folder, train = cached
    mapped = prepare(cfg).shards[0].train
    (folder / "val_00.bin").write_bytes(b"")
    prepare(cfg)
    assert np.array_equal(mapped, train)


KILLED = """
import os, runpy, signal, sys
from pathlib import Path
with runpy.run_path(sys.argv[1])["writing"](Path(sys.argv[2])) as part:
    (part / "train_00.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(prose, tmp_path):
    root = tmp_path / "cache" / "hyperlm"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, cache.__file__, root / ("a" * 24)], env=environment)
    assert killed.returncode == -signal.SIGKILL and len(os.listdir(root)) == 2
    (root / ("b" * 24 + ".0123abcd.old")).mkdir()  # of a kill between making way and removing
    with cache.writing(root / ("c" * 24)) as living:
        (living / "x").write_bytes(b"")
        corpus = prepare(config(prose))
        assert sorted(os.listdir(root)) == sorted([corpus.fingerprint, living.name, f"{living.name}.lock"])
        cache.seal(living, {})
    assert sorted(os.listdir(root)) == sorted([corpus.fingerprint, "c" * 24])


def test_processes_that_tokenise_the_same_text_at_once_all_succeed(prose, tmp_path):
    together, results = threading.Barrier(3), []
    write = preparation.write

    def at_once(*arguments):
        write(*arguments)
        together.wait(10)  # all have written, none has finished

    with pytest.MonkeyPatch.context() as during:
        during.setattr(preparation, "write", at_once)
        threads = [threading.Thread(target=lambda: results.append(prepare(config(prose)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 3 and len({c.fingerprint for c in results}) == 1
    assert os.listdir(tmp_path / "cache" / "hyperlm") == [results[0].fingerprint]


def test_a_name_whose_lock_a_sweeping_process_took_is_given_up(tmp_path, monkeypatch):
    names = iter(["00000000", "11111111"])
    monkeypatch.setattr(cache.secrets, "token_hex", lambda n: next(names))
    with FileLock(tmp_path / ("0" * 24 + ".00000000.lock")), cache.writing(tmp_path / ("0" * 24)) as part:
        assert part.name.endswith(".11111111")


# -- what the name of a folder stands for --------------------------------------------------------------------------------------------


def test_the_same_files_on_other_sides_are_another_corpus(tmp_path):
    a, b = write_prose(tmp_path / "a.txt", 5000, 1), write_prose(tmp_path / "b.txt", 5000, 2)
    (tmp_path / "both.toml").write_text('[[sources]]\npath = "a.txt"\n[[sources]]\npath = "b.txt"\n')
    (tmp_path / "one.toml").write_text('[[sources]]\npath = "a.txt"\n')
    both = prepare(config(tmp_path / "both.toml"))
    apart = prepare(config(tmp_path / "one.toml", val_sources=(str(b),)))
    assert both.fingerprint != apart.fingerprint
    assert [len(s.train) > 0 for s in apart.shards] == [True, False] and [len(s.val) > 0 for s in apart.shards] == [False, True]
    text = apart.tokenizer.decode(apart.shards[0].train.tolist(), skip_special_tokens=True)
    assert text == a.read_text()


def test_what_is_asked_for_in_another_way_and_is_the_same_is_found(tmp_path, prose):
    (tmp_path / "r.toml").write_text('[[sources]]\npath = "prose.txt"\nweight = 2\n')
    same = [prose, tmp_path / "r.toml", f"{prose}:3"]
    same = [config(source, val_fraction=0.3) for source in same] + [
        config(prose, max_mib=100, val_fraction=0.3),
        config(prose, val_fraction=0.31),
    ]
    assert len({prepare(c).fingerprint for c in same}) == 1


# -- faults while it is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_one_line_and_leaves_nothing(prose, tmp_path, monkeypatch, name):
    real = {"open": open, "write_bytes": Path.write_bytes, "write_text": Path.write_text}

    def full(how):
        def call(path, *rest, **more):
            if Path(path).name == name and "cache" in str(path):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real[how](path, *rest, **more)

        return call

    monkeypatch.setattr(preparation, "open", full("open"), raising=False)
    monkeypatch.setattr(Path, "write_bytes", full("write_bytes"))
    monkeypatch.setattr(Path, "write_text", full("write_text"))
    with pytest.raises(data.DataError) as e:
        prepare(config(prose))
    said = str(e.value)
    assert f"cannot write the cache {tmp_path / 'cache' / 'hyperlm'} (No space left on device: " in said and "\n" not in said
    assert "MiB are free" in said and " 0.0 at most" not in said and "set --data.cache" in said
    assert os.listdir(tmp_path / "cache" / "hyperlm") == []


def test_a_cache_that_is_no_folder_is_one_line(prose, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="cannot write the cache .*set --data.cache"):
        prepare(config(prose, cache=str(tmp_path / "file")))


def test_text_that_changes_while_it_is_read_is_an_error_and_is_not_kept(prose, tmp_path, monkeypatch):
    make = preparation.make_tokenizer

    def meanwhile(*arguments):
        prose.write_text(prose.read_text().replace("a", "b"))
        return make(*arguments)

    monkeypatch.setattr(preparation, "make_tokenizer", meanwhile)
    with pytest.raises(data.DataError, match="prose.txt: its text changed while it was read"):
        prepare(config(prose))
    assert os.listdir(tmp_path / "cache" / "hyperlm") == []


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_source_that_cannot_be_read_is_named(prose, monkeypatch, error):
    monkeypatch.setattr(
        folders, "open", lambda path, mode: (_ for _ in ()).throw(OSError(error, os.strerror(error), str(path))), raising=False
    )
    with pytest.raises(data.DataError) as e:
        prepare(config(prose))
    assert str(e.value) == f"{prose}: cannot be read ({os.strerror(error)})"

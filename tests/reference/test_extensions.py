"""Stream extensions: into the file and back, between here and torch, and what is said where one is missing."""

import io
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _extension as theirs
from torch.distributed.tensor import Shard
from virtual_ranks import blank_like, noise, raw_bytes, shard

import reference
from reference import CheckpointException, FileSystemReader, FileSystemWriter, _extension
from reference._extension import Extension, ExtensionRegistry, StreamTransformExtension, ZStandard
from reference.metadata import load_metadata

PACKAGES = ["zstandard", "pyzstd"]


def state(seed=0):
    return {
        "big": noise((700, 1000), torch.int16, seed),
        "small": noise((3, 5), torch.bfloat16, seed),
        "empty": torch.empty(0, 4),
        "step": seed,
    }


class Shifted(io.RawIOBase):
    """Adds a number to each byte that passes; a stream of zeros in front tells how often it was made."""

    def __init__(self, stream, by):
        self.stream, self.by = stream, by

    def writable(self):
        return True

    def readable(self):
        return True

    def write(self, content):
        self.stream.write(bytes((byte + self.by) % 256 for byte in bytes(content)))
        return len(content)

    def readinto(self, memory):
        content = self.stream.read(min(len(memory), 1000))
        memory[: len(content)] = bytes((byte - self.by) % 256 for byte in content)
        return len(content)

    def close(self):
        self.stream.close()
        super().close()


class Shift(StreamTransformExtension):
    """Commutes with itself; `Flip` does not commute with it."""

    @staticmethod
    def registry_name():
        return "test.shift"

    @classmethod
    def from_descriptor(cls, version):
        assert version == "3"
        return cls()

    def get_descriptor(self):
        return f"{self.registry_name()}/3"

    def transform_to(self, output):
        return Shifted(output, 1)

    def transform_from(self, input):
        return Shifted(input, 1)


class Flipped(Shifted):
    def write(self, content):
        self.stream.write(bytes(byte ^ 0xFF for byte in bytes(content)))
        return len(content)

    def readinto(self, memory):
        content = self.stream.read(min(len(memory), 1000))
        memory[: len(content)] = bytes(byte ^ 0xFF for byte in content)
        return len(content)


class Flip(Shift):
    @staticmethod
    def registry_name():
        return "test.flip"

    def transform_to(self, output):
        return Flipped(output, 0)

    def transform_from(self, input):
        return Flipped(input, 0)


def registry(kind=ExtensionRegistry):
    known = kind()
    for cls in (Shift, Flip):
        known.register(cls)
    return known


def assert_same(loaded, expected):
    assert loaded["step"] == expected["step"]
    for name in ("big", "small", "empty"):
        assert raw_bytes(loaded[name]) == raw_bytes(expected[name]), name


def ours_from(path, extensions_of=registry, **options):
    loaded = blank_like(state())
    reference.load(loaded, storage_reader=FileSystemReader(path, extensions_of(), **options))
    return loaded


def torch_from(path, extensions_of=registry):
    loaded = blank_like(state())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(path, extensions_of(theirs.ExtensionRegistry)))
    return loaded


def torch_to(path, *extensions):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(1), storage_writer=dcp.FileSystemWriter(path, _extensions=extensions, sync_files=False))


def ours_to(path, *extensions, **options):
    writer = FileSystemWriter(path, _extensions=extensions, sync_files=False, **options)
    return reference.save(state(1), storage_writer=writer)


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    """Only one of the packages that know Zstandard can be imported."""
    pytest.importorskip(request.param, reason="an optional package")
    for name in PACKAGES:
        if name != request.param:
            monkeypatch.setitem(sys.modules, name, None)
    return request.param


@pytest.mark.parametrize("options", [{}, {"thread_count": 2}, {"single_file_per_rank": False}])
def test_zstandard_goes_there_and_back(tmp_path, package, options):
    metadata = ours_to(tmp_path, ZStandard(), **options)
    assert {tuple(info.transform_descriptors) for info in metadata.storage_data.values()} == {("stream.zstd/1",)}
    assert load_metadata((tmp_path / ".metadata").read_bytes()).storage_data == metadata.storage_data
    assert_same(ours_from(tmp_path, ExtensionRegistry), state(1))
    for index, info in metadata.storage_data.items():
        raw = (tmp_path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        assert raw[:4] == b"\x28\xb5\x2f\xfd", index


@pytest.mark.parametrize("our_registry", [ExtensionRegistry, theirs.ExtensionRegistry])
def test_zstandard_between_here_and_torch(tmp_path, package, our_registry):
    torch_to(tmp_path / "theirs", theirs.ZStandard())
    assert_same(ours_from(tmp_path / "theirs", our_registry), state(1))
    ours_to(tmp_path / "ours", ZStandard())
    assert_same(torch_from(tmp_path / "ours"), state(1))
    ours_to(tmp_path / "mixed", theirs.ZStandard())
    assert_same(torch_from(tmp_path / "mixed"), state(1))


def test_what_compresses_is_smaller(tmp_path, package):
    zeros = {"w": torch.zeros(1 << 20)}
    reference.save(zeros, storage_writer=FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    assert (tmp_path / "__0_0.distcp").stat().st_size < 10_000


@pytest.mark.parametrize("check_crc", ["always", "whole", "never"])
def test_extensions_of_ones_own(tmp_path, check_crc):
    ours_to(tmp_path, Shift())
    assert_same(ours_from(tmp_path, check_crc=check_crc), state(1))
    assert_same(torch_from(tmp_path), state(1))
    torch_to(tmp_path / "theirs", Shift())
    assert_same(ours_from(tmp_path / "theirs", check_crc=check_crc), state(1))


def test_several_extensions_are_undone_in_the_right_order(tmp_path):
    metadata = ours_to(tmp_path, Shift(), Flip())
    assert {tuple(info.transform_descriptors) for info in metadata.storage_data.values()} == {
        ("test.flip/3", "test.shift/3")
    }
    assert_same(ours_from(tmp_path), state(1))
    assert_same(torch_from(tmp_path), state(1))


def test_torch_cannot_read_what_it_writes_through_two_extensions(tmp_path):
    torch_to(tmp_path, Shift(), Flip())
    with pytest.raises(dcp.CheckpointException):
        torch_from(tmp_path)


def test_parts_of_transformed_tensors_are_loaded(tmp_path):
    ours_to(tmp_path, Shift())
    whole = state(1)["big"]
    for dim in (0, 1):
        expected = shard(whole, 2, range(3), [Shard(dim)])
        loaded = {"big": blank_like(expected)}
        reference.load(loaded, storage_reader=FileSystemReader(tmp_path, registry()), no_dist=True)
        assert raw_bytes(loaded["big"]) == raw_bytes(expected)


def test_damage_behind_an_extension_is_found(tmp_path):
    metadata = ours_to(tmp_path, Shift())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "big"]
    path = tmp_path / info.relative_path
    raw = bytearray(path.read_bytes())
    raw[info.offset + 100_000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointException, match="'big'"):
        ours_from(tmp_path)


def test_damage_that_an_extension_itself_finds_is_named(tmp_path, package):
    metadata = ours_to(tmp_path, ZStandard())
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == "big"]
    path = tmp_path / info.relative_path
    raw = bytearray(path.read_bytes())
    raw[info.offset] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointException, match=r"'big'.*stream\.zstd/1"):
        ours_from(tmp_path)


def test_an_unknown_extension_is_refused_before_anything_changes(tmp_path):
    ours_to(tmp_path, Shift())
    loaded = state(2)
    with pytest.raises(
        CheckpointException, match=r"registered extension but got 'test\.shift/3'\. Known: stream\.zstd"
    ):
        reference.load(loaded, storage_reader=FileSystemReader(tmp_path))
    assert_same(loaded, state(2))


def test_without_a_package_zstandard_says_so(monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    assert not ZStandard.is_available()
    for make in (
        ZStandard,
        lambda: ZStandard.from_descriptor("1"),
        lambda: ExtensionRegistry().from_descriptor_list(["stream.zstd/1"]),
    ):
        with pytest.raises(ValueError, match=r"package zstandard or pyzstd .* Install one\.$"):
            make()


def test_versions_are_told_apart(package):
    assert ZStandard.from_descriptor("1.7").get_descriptor() == "stream.zstd/1"
    with pytest.raises(ValueError, match="version='2'"):
        ZStandard.from_descriptor("2")
    with pytest.raises(ValueError, match="version=''"):
        ExtensionRegistry().from_descriptor_list(["stream.zstd"])


def test_what_is_no_extension_is_refused(tmp_path):
    with pytest.raises(TypeError, match="_extensions"):
        FileSystemWriter(tmp_path, _extensions=[object()])


def test_names_are_torchs():
    assert set(_extension.__all__) == set(theirs.__all__)
    assert issubclass(ZStandard, theirs.StreamTransformExtension)
    assert Extension is theirs.Extension

"""Seals tell a file in the place of another, and metadata that is not what was written; torch does not mind them."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

import reference
from reference.items import CorruptItemError
from reference.metadata import MetadataError
from reference.seals import check_file_seal, check_metadata_seal, file_seal, sealed_metadata


def test_metadata_of_any_length_keeps_its_seal():
    for raw in (b"", b"x", bytes(1000)):
        check_metadata_seal(sealed_metadata(raw))
        check_metadata_seal(raw)


@pytest.mark.parametrize("at", range(16))
def test_each_changed_byte_of_sealed_metadata_is_refused_or_in_the_mark(at):
    raw = bytearray(sealed_metadata(b"abcd"))
    raw[at] ^= 4
    if at < 8:
        with pytest.raises(MetadataError, match="damaged"):
            check_metadata_seal(bytes(raw))
    else:
        check_metadata_seal(bytes(raw))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__ü.distcp"])
def test_a_file_knows_its_name(tmp_path, name):
    path, other = tmp_path / name, tmp_path / "__1_0.distcp"
    path.write_bytes(b"items" + file_seal(name))
    check_file_seal(path)
    path.rename(other)
    with pytest.raises(CorruptItemError, match="__1_0"):
        check_file_seal(other)


def test_files_without_a_seal_pass(tmp_path):
    path = tmp_path / "a"
    for content in (b"", b"short", bytes(500)):
        path.write_bytes(content)
        check_file_seal(path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # one process is what is meant
def test_torch_loads_what_is_sealed(tmp_path):
    reference.save({"w": torch.arange(4.0)}, checkpoint_id=tmp_path)
    assert (tmp_path / "__0_0.distcp").read_bytes().endswith(file_seal("__0_0.distcp"))
    state = {"w": torch.zeros(4)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["w"].tolist() == [0, 1, 2, 3]


def test_swapped_files_are_refused(tmp_path):
    writer = reference.FileSystemWriter(tmp_path, single_file_per_rank=False)
    reference.save({"a": torch.zeros(4), "b": torch.ones(4)}, storage_writer=writer)
    one, two = sorted(tmp_path.glob("*.distcp"))
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    with pytest.raises(reference.CheckpointException, match="but got that which was written as"):
        reference.load({"a": torch.zeros(4), "b": torch.zeros(4)}, checkpoint_id=tmp_path)

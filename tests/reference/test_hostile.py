"""Checkpoints made to harm: links out of the folder, pipes, compressed records, metadata that stands for millions."""

import io
import os
import pickle
import zipfile

import pytest
import torch

import reference
from reference import CheckpointException
from reference.items import CorruptItemError, verify_zip
from reference.metadata import MetadataError, load_metadata

TIMES = 60


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "ckpt"
    reference.save({"w": torch.arange(6.0)}, checkpoint_id=folder)
    return folder


def refused(folder, match):
    with pytest.raises(CheckpointException, match=match):
        reference.load({"w": torch.zeros(6)}, checkpoint_id=folder)


def test_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    data = saved / "__0_0.distcp"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    refused(saved, "inside the checkpoint's folder")


def test_a_link_within_the_folder_is_followed(saved):
    data = saved / "__0_0.distcp"
    data.rename(saved / "kept")
    data.symlink_to(saved / "kept")
    state = {"w": torch.zeros(6)}
    reference.load(state, checkpoint_id=saved)
    assert state["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_folder_that_is_a_link_is_followed(saved, tmp_path):
    (tmp_path / "latest").symlink_to(saved)
    state = {"w": torch.zeros(6)}
    reference.load(state, checkpoint_id=tmp_path / "latest")
    assert state["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_a_pipe_is_no_metadata(saved):
    (saved / ".metadata").unlink()
    os.mkfifo(saved / ".metadata")
    refused(saved, "Expected a file")


def test_lists_that_hold_each_other_twice_are_visited_once(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    bomb = ["leaf"]
    for _ in range(TIMES):
        bomb = [bomb, bomb]
    metadata.planner_data = bomb
    held = load_metadata(pickle.dumps(metadata)).planner_data
    for _ in range(TIMES):
        assert held[0] is held[1]
        held = held[0]
    assert held == ["leaf"]


def test_an_error_about_them_is_short(saved):
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    bomb = []
    for _ in range(TIMES):
        bomb = [bomb, bomb]
    metadata.state_dict_metadata["w"].size = bomb
    with pytest.raises(MetadataError, match="a size") as caught:
        load_metadata(pickle.dumps(metadata))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("check_crc", [True, False])
def test_compressed_records_are_refused(check_crc):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(CorruptItemError, match="compressed, of 1048576 bytes"):
        verify_zip(stream.getvalue(), "an item", check_crc=check_crc)

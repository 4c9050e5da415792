"""PyTorch's getting-started recipe for DCP, with ``import reference as dcp``: three programs and a conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference.format_utils import dcp_to_torch_save, torch_save_to_dcp
from tests.reference.recipe.app_state import digests

ROOT = Path(__file__).parents[2]
SAVING_RANKS = 4
ABORT_AT_EXIT = "terminate called without an active exception"
"""gloo's threads now and then abort a process of torch's that has ended all its work; the report is written by then."""


def run(program, checkpoint, report, num_ranks):
    """Runs a program of the recipe under torchrun, or alone where ``num_ranks`` is 0; returns what it reported."""
    launcher = [] if not num_ranks else ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, f"tests.reference.recipe.{program}", checkpoint, report],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0 or ABORT_AT_EXIT in done.stderr, done.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return folder / "ckpt", run("save", folder / "ckpt", folder / "saved.json", SAVING_RANKS)


@pytest.mark.parametrize("num_ranks", [SAVING_RANKS, 3])
def test_load_under_a_world_size(saved, tmp_path, num_ranks):
    checkpoint, before = saved
    assert len(before) > 8
    assert run("load", checkpoint, tmp_path / "loaded.json", num_ranks) == before


def test_load_without_a_process_group(saved, tmp_path):
    checkpoint, before = saved
    model_part = {name: digest for name, digest in before.items() if name.startswith("/model")}
    assert run("load_alone", checkpoint, tmp_path / "loaded.json", 0) == model_part


def test_conversion_to_torch_save_and_back(saved, tmp_path):
    checkpoint, before = saved
    dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
    assert digests(torch.load(tmp_path / "whole.pt", weights_only=False)["app"]) == before
    torch_save_to_dcp(tmp_path / "whole.pt", tmp_path / "again")
    dcp_to_torch_save(tmp_path / "again", tmp_path / "again.pt")
    assert digests(torch.load(tmp_path / "again.pt", weights_only=False)["app"]) == before


@pytest.mark.parametrize(
    ("mode", "source", "target"), [("dcp_to_torch", "ckpt", "whole.pt"), ("torch_to_dcp", "in.pt", "out")]
)
def test_conversion_by_command_line(saved, tmp_path, mode, source, target):
    checkpoint, before = saved
    dcp_to_torch_save(checkpoint, tmp_path / "in.pt")
    given = checkpoint if source == "ckpt" else tmp_path / source
    done = subprocess.run(
        [sys.executable, "-m", "reference.format_utils", mode, given, tmp_path / target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if mode == "torch_to_dcp":
        dcp_to_torch_save(tmp_path / target, tmp_path / "whole.pt")
    assert digests(torch.load(tmp_path / "whole.pt", weights_only=False)["app"]) == before

"""C6, for real: a process is terminated or killed in the middle of a step; what it saved goes on to the same end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from tests.contract.cases import assert_same
from tests.contract.victim import run
from tests.support import ROOT


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_c06_killed_in_the_middle_of_a_step(how, tmp_path):
    command = [sys.executable, "-m", "tests.contract.victim", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.strip() == "7":  # inside the eighth step
                process.send_signal(how)
                break
        process.stdout.read()
        code = process.wait(60)
    assert code == (-9 if how == signal.SIGKILL else 0)  # on SIGTERM Lightning ends the step and exits by itself
    assert not (tmp_path / "finished.pt").exists()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == (6 if how == signal.SIGKILL else 8)
    resumed = run(str(tmp_path / "resumed"), str(tmp_path / "last.ckpt"))
    whole = run(str(tmp_path / "whole"))
    assert_same(whole.state_dict(), resumed.state_dict())
    assert (resumed.model[3].weight == 0).float().mean() > 0.7

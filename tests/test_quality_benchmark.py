"""Quality against network calls: every way of sampling calls its network as often as its column says."""

import copy

import pytest
import torch

from benchmarks import quality
from benchmarks._quality_networks import SIDE, Judge, Networks, unet
from effdl.diffusion.instaflow import ReflowModule
from effdl.diffusion.prodiff import ProDiffModule


@pytest.fixture(scope="module")
def networks():
    made, net = Networks(), unet(0)
    made.nets["noise"] = made.nets["int8"] = net
    made.flows = {name: ReflowModule(net, stage="flow") for name in ("flow", "reflow", "distilled")}
    made.teacher = ProDiffModule(copy.deepcopy(net), steps=16, schedule="cosine", loss="l1")
    made.students = {
        calls: ProDiffModule(stage="distill", teacher=made.teacher, time_scale=16 // calls, steps=16,
                             schedule="cosine", loss="l1")
        for calls in (8, 4, 2, 1)
    }  # fmt: skip
    return made.eval()


def counted(networks, run) -> int:
    """Calls of any U-Net in here."""
    calls, students = [], [student.model for student in (*networks.students.values(), networks.teacher)]
    flows = [flow.model for flow in networks.flows.values()]
    nets = {id(net): net for net in (*networks.nets.values(), *flows, *students)}
    handles = [net.register_forward_hook(lambda *_: calls.append(1)) for net in nets.values()]
    try:
        return len(calls) if run() is not None else 0
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("name", quality.SAMPLERS)
def test_a_column_counts_the_calls(networks, name):
    noise, labels = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])
    found = {}
    for calls in (1, 2, 4, 8, 25, 42):
        images = []

        def run(calls=calls, images=images):
            images.append(quality.SAMPLERS[name](networks, noise, labels, calls))
            return images[0]

        found[calls] = counted(networks, run)
        if images[0] is not None:
            assert images[0].shape == noise.shape
            assert images[0].isfinite().all()
    only = {"2-reflow, distilled to one step": {1}}
    only |= dict.fromkeys(("x_0 teacher (prodiff)", "progressive distillation (prodiff)"), {1, 2, 4, 8})
    assert found == {calls: calls if calls in only.get(name, found) else 0 for calls in found}


@torch.no_grad()
def test_distances_tell_images_from_noise():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge().eval()
    stream = torch.Generator().manual_seed(1)
    bars = lambda n: torch.ones(n, 1, SIDE, SIDE) * torch.rand(n, 1, 1, SIDE, generator=stream)  # noqa: E731
    real, same, noise = bars(600), bars(600), torch.randn(600, 1, SIDE, SIDE, generator=stream)
    near, far = quality.distances(judge, same, real), quality.distances(judge, noise, real)
    assert near["fid"] < 0.2 * far["fid"]
    assert near["kid"] < 0.2 * far["kid"]


def test_the_table_has_a_row_for_each_way_and_a_gap_where_it_does_not_exist():
    rows = {"DDIM @ 1": {"fid": 9.0}, "DDIM @ 2": {"fid": 4.0}, "score-sde, ODE (RK45, 0.1)": {"fid": 1.0, "calls": 20}}
    table = quality.lines([{"rows": rows}, {"rows": {"DDIM @ 1": {"fid": 11.0}} | {
        "score-sde, ODE (RK45, 0.1)": {"fid": 3.0, "calls": 22}}}])  # fmt: skip
    assert table[1][:4] == ["DDIM", "10 ± 1.4", "4 ± nan", "–"]
    assert table[-1] == ["score-sde, ODE (RK45, 0.1): 21 calls", "2 ± 1.4"]
    assert len(table) == 2 + len(quality.SAMPLERS)

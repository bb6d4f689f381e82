"""nupes, checks 7 and 8: digits at 2, 3 and 4 bits; seconds per million weights."""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from effdl.callbacks import NUPESCallback
from effdl.compression import _nupes_learning, _nupes_network
from effdl.compression._nupes_learning import Learning, learn_layer
from effdl.compression._nupes_network import learn_network
from effdl.compression.nupes import largest, power_quantize, power_records, top_code
from effdl.core.export import save_model
from effdl.core.quantized import load_quantized, quantize_
from effdl.core.quantizers import symmetric
from effdl.core.select import select_weights
from tests.support import real_data, trained_on_digits

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
ITERATIONS = 800


def network():
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()

    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def trained(seed, epochs=20):
    torch.manual_seed(seed)
    model, (x, _), test = trained_on_digits(network(), seed, epochs)
    return model, list(x[:256].split(64)), test


@torch.no_grad()
def accuracy(model, test):
    return 100 * float((model(test[0]).argmax(-1) == test[1]).float().mean())


def reopened(model, records, folder):
    """The network as its file holds it."""
    quantised = copy.deepcopy(model)
    quantize_(quantised, records)
    save_model(quantised, folder)
    return load_quantized(network(), folder).eval()


def adaround(weight, record, run, inputs, targets, how, outputs=0):
    """Nagel et al. 2020 on the same uniform grid: each weight up or down."""
    n, scale = top_code(record.bits), record.scale
    low = (weight / scale).floor()
    share = (weight / scale - low).clamp(0.01, 0.99)
    v = torch.logit((share + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([v], 1e-2)
    g = torch.Generator().manual_seed(0)
    for step in range(how.iterations):
        rows = torch.randperm(len(inputs), generator=g)[: how.batch_size]
        with torch.enable_grad():
            h = (1.2 * v.sigmoid() - 0.1).clamp(0, 1)
            loss = (run(scale * (low + h).clamp(-n, n), inputs[rows]) - targets[rows]).square().mean()
            done = max(0.0, step / how.iterations - 0.2) / 0.8
            if done:
                loss = loss + 0.01 * (1 - (2 * h - 1).abs().pow(20 - 18 * done)).sum() / targets[0].numel()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return symmetric(scale * (low + (v.detach() >= 0)), record.bits, record.layout, scale=scale)


def table(rows):
    for label, values in rows.items():
        spread = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        print(f"{label} | {spread} | {[round(value, 3) for value in values]}")


def test_must_07_and_08_digits_at_few_bits(tmp_path, monkeypatch):
    how = Learning(iterations=ITERATIONS)
    rows, jumps, errors, seconds = {}, [], [], []
    for seed in SEEDS:
        model, batches, test = trained(seed)
        weights = {w.name: w.data.clone() for w in select_weights(model)}

        def note(label, records, folder=tmp_path, model=model, test=test):
            rows.setdefault(label, []).append(accuracy(reopened(model, records, folder), test))

        rows.setdefault("float", []).append(accuracy(model, test))
        uniform = {b: power_records(weights, b, 1.0, "tensor") for b in (2, 3, 4)}
        power = {b: power_records(weights, b, "layer", "tensor") for b in (2, 3, 4)}
        for bits in (2, 3, 4):
            note(f"{bits} bits, uniform, nearest", uniform[bits])
            note(f"{bits} bits, power, data-free", power[bits])
            for name, w in weights.items():
                distances = [float((w - r[bits][name].dequantize()).norm()) for r in (power, uniform)]
                errors.append(distances[0] / distances[1])
        with monkeypatch.context() as patch:
            patch.setattr(_nupes_network, "learn_layer", adaround)
            note("2 bits, AdaRound", learn_network(model, uniform[2], batches, how))
            patch.setattr(_nupes_network, "learn_layer", learn_layer)
            patch.setattr(_nupes_learning, "descend", lambda codes, *args: codes)
            note("2 bits, NUPES without the descent", learn_network(model, uniform[2], batches, how))
        note("2 bits, the descent alone", learn_network(model, uniform[2], batches, Learning(iterations=1)))
        start = time.process_time()
        learned = learn_network(model, uniform[2], batches, how)
        seconds.append(time.process_time() - start)
        note("2 bits, NUPES, codes learned", learned)
        note(
            "2 bits, NUPES, codes and exponent",
            learn_network(model, power[2], batches, Learning(exponent=True, iterations=ITERATIONS)),
        )
        note("3 bits, NUPES, codes learned", learn_network(model, power[3], batches, how))
        far = {n: (r.codes - weights[n] / largest(weights[n], "tensor")).abs() > 1 for n, r in learned.items()}
        jumps.append(100 * max(float(moved.float().mean()) for moved in far.values()))
    table(rows)
    table({"codes that moved by more than 1, % of the layer with most": jumps, "CPU seconds of learning": seconds})
    mean = {label: statistics.mean(values) for label, values in rows.items()}
    assert max(errors) <= 1 + 1e-6  # the L2 error is what is promised
    assert min(rows["2 bits, NUPES, codes learned"]) >= 93
    assert min(rows["2 bits, NUPES without the descent"]) >= 93
    assert mean["2 bits, NUPES, codes learned"] >= mean["2 bits, AdaRound"]
    assert mean["2 bits, uniform, nearest"] <= 41
    assert mean["3 bits, NUPES, codes learned"] >= mean["3 bits, uniform, nearest"]
    assert mean["3 bits, NUPES, codes learned"] >= mean["float"] - 1
    assert mean["4 bits, power, data-free"] >= mean["4 bits, uniform, nearest"] - 0.5
    assert min(jumps) > 0.5


def test_activations_on_resnet20(tmp_path):
    """CIFAR-10, the given network; ranges from 512 training images of three draws."""
    real_data("cifar10_resnet20_jpeg.safetensors")
    from benchmarks.cifar import Cifar, Classifier, resnet

    images = Cifar()
    held_out = list(zip(images.test[0].split(250), images.test[1].split(250)))
    rows, began = {}, time.process_time()

    def note(label, seed, **kwargs):
        chosen = torch.randperm(len(images.train[0]), generator=torch.Generator().manual_seed(seed))[:512]
        batches = [(images.train[0][part], images.train[1][part]) for part in chosen.split(128)]
        module = Classifier(resnet())
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        callback = NUPESCallback(calibration_batches=4, **kwargs)
        Trainer(accelerator="cpu", callbacks=[callback], **quiet).validate(module, loader, verbose=False)
        save_model(module, tmp_path)
        again = load_quantized(resnet(trained=False), tmp_path).eval()
        with torch.no_grad():
            right = sum(int((again(x).argmax(1) == y).sum()) for x, y in held_out)
        rows.setdefault(label, []).append(100 * right / len(images.test[0]))

    for bits in (8, 4):
        note(f"W{bits}, power", 0, bits=bits)
    for seed in SEEDS:
        note("W8A8, uniform", seed, bits=(8, 8), exponent=1)
        note("W8A8, power", seed, bits=(8, 8))
        note("W4A4, uniform", seed, bits=(4, 4), exponent=1)
        note("W4A4, power", seed, bits=(4, 4))
        note("W4A4, power, 99.9 %", seed, bits=(4, 4), activation_percentile=99.9)
    rows = {label: values * 3 if len(values) == 1 else values for label, values in rows.items()}
    table(rows)
    print(f"{time.process_time() - began:.0f} s of CPU time")
    mean = {label: statistics.mean(values) for label, values in rows.items()}
    assert mean["W8A8, power"] >= mean["W8, power"] - 0.5
    assert mean["W4A4, power"] > mean["W4A4, uniform"]


def test_seconds_grow_linearly_with_the_weights():
    torch.manual_seed(0)
    free, driven = [], []
    sizes = (512, 1024, 2048)
    for side in sizes:
        weight, x = torch.randn(side, side) / side**0.5, torch.randn(256, side)
        start = time.process_time()
        power_records({"weight": weight}, 4)
        free.append((time.process_time() - start) / weight.numel() * 1e6)
        record = power_quantize(weight, 4, 0.7)
        start = time.process_time()
        learn_layer(weight, record, lambda w, x: F.linear(x, w), x, x @ weight.T, Learning(iterations=50))
        driven.append((time.process_time() - start) / weight.numel() * 1e6)
        print(f"{side}x{side} | {free[-1]:.2f} s | {driven[-1]:.2f} s for 50 iterations, per million weights")
    assert free[-1] < 2.5 * min(free)
    assert driven[-1] < 2.5 * min(driven)


def nf4():
    """The 16 points of QLoRA's NormalFloat: quantiles of a normal distribution, scaled to [-1, 1]."""
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    points = torch.cat([above, torch.zeros(1), below]).sort().values
    return points / points.max()


def test_l2_error_at_4_bits_beside_nf4():
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 1024, generator=g)
    heavy = normal / torch.randn(512, 1024, 4, generator=g).square().mean(-1).sqrt()  # Student's t, 4 degrees
    for label, weight in (("normal", normal), ("Student t(4)", heavy)):
        for layout in ("group:64", "row"):
            uniform = symmetric(weight, 4, layout).dequantize()
            power = power_records({"w": weight}, 4, "layer", layout)["w"]
            groups = weight.view(-1, 64 if layout != "row" else 1024)
            scale = groups.abs().amax(1, keepdim=True)
            points = nf4()
            codes = torch.bucketize(groups / scale, (points[1:] + points[:-1]) / 2)
            distances = [
                (weight - w.view_as(weight)).norm() / weight.norm()
                for w in (uniform, points[codes] * scale, power.dequantize())
            ]
            print(
                f"{label}, {layout} | "
                + " | ".join(f"{d:.4f}" for d in distances)
                + f" | a = {float(power.exponent):.2f}"
            )
            assert distances[2] < distances[0]

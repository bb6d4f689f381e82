"""prodiff: its second stage on a module that has never heard of it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from effdl import ProDiffModule, ProgressiveDistillMixin
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader
from effdl.diffusion._prodiff_example import Decoder, Decoding
from effdl.tasks.tiny import tiny_unet


class Mine(ProgressiveDistillMixin, Decoding):
    pass


def teacher(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder()


def loader(count: int = 24) -> ResumableLoader:
    images = torch.rand(count, 3, 8, 8, generator=generator(1)) * 2 - 1
    return ResumableLoader(torch.utils.data.TensorDataset(images, torch.arange(count) % 3), batch_size=6, shuffle=True)


def fit(module, *callbacks, epochs: int = 2, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), enable_checkpointing=saves, **quiet)
    run.fit(module, loader(), loader(), **kwargs)
    return module


def test_the_loss_is_that_of_the_module():
    network = teacher()
    mixed = Mine(teacher=network, seed=3)
    whole = ProDiffModule(stage="distill", teacher=ProDiffModule(network), seed=3)
    batch = (torch.rand(6, 3, 8, 8, generator=generator(1)) * 2 - 1, torch.arange(6) % 3)
    for module in (mixed, whole):
        module.log = module.log_dict = lambda *args, **kwargs: None
        module._trainer = type("T", (), {"current_epoch": 0})()
    with torch.no_grad():
        for weight in (*mixed.model.parameters(), *whole.model.parameters()):
            weight.mul_(0.9)  # else student and teacher say the same
    losses = [module.training_step(batch, 0) for module in (mixed, whole)]
    assert float(losses[0].detach()) > 1e-3
    assert torch.equal(*losses)
    noise = torch.randn(6, 3, 8, 8, generator=generator(0))
    ours = mixed.few_steps(noise, batch[1])
    assert torch.equal(ours, whole.sample(batch, noise=noise))


def test_the_teacher_is_frozen_and_no_part_of_the_checkpoint(tmp_path):
    network = teacher()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    student = fit(Mine(teacher=network), save)
    held = student.prodiff.teacher.module
    for name, value in before.items():
        assert torch.equal(network.state_dict()[name], value)
        assert torch.equal(held.state_dict()[name], value)
    assert held is not network
    assert not any(p.requires_grad or p.grad is not None for p in held.parameters())
    assert any(not torch.equal(student.model.state_dict()[name], value) for name, value in before.items())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    Decoding().load_state_dict(state, strict=True)


def test_a_teacher_that_says_the_data_leaves_nothing_to_learn():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.full((3, 1, 1), 0.3))

        def forward(self, x, t, condition):
            return self.value.expand(x.shape)

    student = Mine(model=Constant(), teacher=Constant())
    student.log_dict = lambda *args, **kwargs: None
    student._trainer = type("T", (), {"current_epoch": 0})()
    loss = student.training_step((torch.randn(4, 3, 8, 8, generator=generator(0)), torch.zeros(4).long()), 0)
    loss.backward()
    assert float(loss.detach()) < 1e-6
    assert float(student.model.value.grad.abs().max()) < 1e-6


def test_rounds_halve_the_calls_and_resume_in_the_second(tmp_path):
    def student():
        return Mine(teacher=teacher(), steps=8, rounds=2)

    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    whole = fit(student(), save, epochs=3)  # 12 steps, promoted after 6
    assert whole.prodiff.round == 1
    again = fit(student(), epochs=3, ckpt_path=str(tmp_path / "step=9.ckpt"), weights_only=True)
    for first, second in ((whole.model, again.model), (whole.prodiff.teacher.module, again.prodiff.teacher.module)):
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(whole.prodiff.teacher.module.first.weight, teacher().first.weight)
    labels = []
    handle = whole.model.register_forward_pre_hook(lambda module, args: labels.append(args[1].tolist()))
    noise = torch.randn(2, 3, 8, 8, generator=generator(0))
    whole.few_steps(noise, torch.tensor([0, 1]))
    handle.remove()
    assert labels == [[4, 4], [0, 0]]


def test_the_average_teaches_the_next_round():
    student = fit(Mine(teacher=teacher(), steps=8, rounds=2), EMAWeightAveraging(decay=0.5), epochs=2)
    assert student.prodiff.round == 1
    assert not torch.equal(student.prodiff.teacher.module.first.weight, student.model.first.weight)


class Adam(Mine):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def test_two_calls_of_the_student_come_near_the_teachers_four():
    network = teacher()
    fit(Decoding(network), epochs=4)
    noise, labels = torch.randn(64, 3, 8, 8, generator=generator(5)), torch.arange(64) % 3
    slow = ProDiffModule(network)
    student = Adam(teacher=network)
    want = slow.sample((noise, labels), noise=noise)
    coarse = float((slow.sample((noise, labels), noise=noise, calls=2) - want).abs().mean())
    untrained = float((student.few_steps(noise, labels) - want).abs().mean())
    fit(student, epochs=50)
    error = float((student.few_steps(noise, labels) - want).abs().mean())
    print(f"to the teacher's four calls: student {error:.4f}, before {untrained:.4f}, teacher in two {coarse:.4f}")
    assert error < 0.7 * coarse  # an 8-channel network; the paper's margin is asked in tests/claims
    assert error < 0.7 * untrained


def test_a_network_of_diffusers_is_taught_too():
    class Faces(ProgressiveDistillMixin, Decoding):
        pass

    unet = tiny_unet(8, 3, num_classes=3)
    student = Faces(model=tiny_unet(8, 3, num_classes=3, seed=1), teacher=Decoding(unet))
    for name, value in unet.state_dict().items():
        assert torch.equal(student.model.state_dict()[name], value)
    made = student.few_steps(torch.randn(2, 3, 8, 8, generator=generator(0)), torch.tensor([0, 2]))
    assert made.shape == (2, 3, 8, 8)


def test_refusals():
    for kwargs, name in [
        ({"teacher": None}, "teacher"), ({"teacher": nn.Linear(2, 2)}, "self.model"), ({"steps": 1}, "steps"),
        ({"steps": 6, "rounds": 2}, "steps"), ({"time_scale": 3}, "time_scale"), ({"schedule": "cubic"}, "schedule"),
        ({"reduction": "sum"}, "reduction"), ({"seed": -1}, "seed"),
    ]:  # fmt: skip
        with pytest.raises(ConfigurationError, match=name):
            Mine(**{"teacher": teacher(), **kwargs})
    with pytest.raises(ConfigurationError, match="must come first"):
        type("Wrong", (Decoding, ProgressiveDistillMixin), {})
    manual = Mine(teacher=teacher())
    manual.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="ProgressiveDistillMixin"):
        fit(manual)

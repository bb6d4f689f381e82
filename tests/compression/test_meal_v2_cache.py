"""meal-v2: soft labels asked once and kept (FKD)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effdl import ImageClassifier, MEALV2ImageClassifier
from effdl.callbacks import SAMCallback
from effdl.compression._meal_cache import smoothed
from effdl.compression.meal_v2 import Renormalize, SoftLabelCache
from effdl.core.distill import mean_probabilities
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_timm
from effdl.data.images import ImageData
from effdl.data.indexed import IndexedDataset
from effdl.data.loading import ResumableLoader
from tests.compression.meal_v2_parts import CLASSES, Mine, N, fit, loader, network, same, stock, teachers

pytestmark = pytest.mark.filterwarnings("ignore:.*untrained", "ignore:.*hidden widths below 2")


def built(given, data, k=2, **kwargs):
    return SoftLabelCache.build(given, data, k, **kwargs)


def cached(cache, **kwargs):
    return stock(**({"adversarial": None, "cache": cache} | kwargs))


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % CLASSES
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return str(tmp_path / "data.npz")


def crops(npz, count=2, **kwargs):
    return ImageData(npz, batch_size=12, augment=True, crops=count, val=0.0, **kwargs)


def counted(networks):
    calls = []
    for net in networks:
        net.register_forward_hook(lambda *args: calls.append(1))
    return calls


def indexed(x=None, batch_size=6):
    data = loader().dataset if x is None else TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    return ResumableLoader(IndexedDataset(data), batch_size=batch_size, shuffle=True)


# ---- the labels -----------------------------------------------------------------------------------------------------


def test_marginal_smoothing_by_hand():
    q = torch.tensor([[0.5, 0.05, 0.25, 0.125, 0.075], [0.0, 1.0, 0.0, 0.0, 0.0]])
    values, classes = q.topk(2)
    want = torch.tensor([[0.5, 0.25 / 3, 0.25, 0.25 / 3, 0.25 / 3], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(smoothed(classes, values, 5), want, atol=1e-7)
    for k in range(1, 6):
        values, classes = q.topk(k)
        found = smoothed(classes.to(torch.int16), values, 5)
        assert torch.allclose(found.sum(1), torch.ones(2), atol=1e-6)
        assert torch.equal(found.gather(1, classes), values)
    assert torch.equal(found, q)  # k = C


@pytest.mark.parametrize("k", [1, 2, CLASSES])
def test_the_cache_says_what_the_teachers_say(k):
    x = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    given, weights = teachers(), [0.25, 0.75]
    cache = built(given, indexed(x, batch_size=10), k, teacher_weights=weights)
    index = torch.tensor([7, 0, 7, 9])
    with torch.no_grad():
        q = mean_probabilities([t(x) for t in given], weights)[index]
    got = cache.lookup(index)
    assert (len(cache), cache.k, cache.num_classes) == (10, k, CLASSES)
    assert torch.allclose(got.sum(1), torch.ones(4), atol=1e-6)
    values, classes = q.topk(k)
    assert torch.allclose(got, smoothed(classes, values, CLASSES), atol=1e-6)
    assert torch.equal(got.argmax(1), q.argmax(1))
    if k == CLASSES:
        assert torch.allclose(got, q, atol=1e-7)


def test_each_crop_has_its_own_label(npz):
    data, net = crops(npz, count=3), teachers()[0]
    cache = built(net, data, CLASSES)
    train = data.train_dataloader()
    assert len(cache) > 2.5 * 40  # of three crops of an image some are the same
    found = {}
    for epoch in (0, 1, 5):
        train.sampler.set_epoch(epoch)
        for batch in train:
            with torch.no_grad():
                q = net(batch["image"]).softmax(1)
            got = cache.lookup(batch["index"], batch["crop"])
            assert torch.allclose(got, q, atol=1e-6)
            found.setdefault(epoch, {}).update(zip(batch["index"].tolist(), got))
    changed = [not torch.equal(found[0][i], found[1][i]) for i in found[0]]
    assert sum(changed) > 30


@pytest.mark.parametrize("crop", [None, torch.tensor([[0, 0, 0]] * 2)])
def test_what_is_not_there_is_refused(crop, npz):
    if crop is None:
        cache = built(teachers(), indexed())
    else:
        cache = built(teachers(), crops(npz))
        crop = torch.stack([crop[0], torch.tensor([9, 9, 9])])
    for wrong in (torch.tensor([3, N + 99]), torch.tensor([-1, 3])):
        with pytest.raises(ConfigurationError, match=r"index, crop: the cache has no \["):
            cache.lookup(wrong, crop)
    with pytest.raises(ConfigurationError, match="crop="):
        cache.lookup(torch.tensor([0, 1]), None if crop is not None else torch.zeros(2, 2))


# ---- training with it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stock", "foreign", "sam"])
def test_training_with_all_probabilities_is_training_with_the_teachers(kind):
    def make(**kwargs):
        torch.manual_seed(0)
        make = Mine if kind == "foreign" else stock
        return make(**({"teachers": teachers(), "adversarial": None} | kwargs))

    extra = lambda: [SAMCallback(rho=0.05)] if kind == "sam" else []  # noqa: E731
    live, given = make(), teachers()
    cache = built(given, indexed(), CLASSES)
    module, calls = make(teachers=given, cache=cache), counted(given)
    want = fit(live, indexed(), callbacks=extra())
    got = fit(module, indexed(), callbacks=extra())
    assert calls == []
    for (name, a), b in zip(live.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    for key in ("meal-v2/kl", "meal-v2/agreement"):
        assert torch.allclose(want.callback_metrics[key], got.callback_metrics[key], atol=1e-5)
    fewer = make(cache=built(given, indexed(), 2))
    fit(fewer, indexed(), callbacks=extra())
    assert not torch.allclose(next(fewer.parameters()), next(live.parameters()), atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_crops_of_a_data_module_over_more_epochs_than_there_are_crops(npz, tmp_path, precision):
    given = teachers()
    built(given, crops(npz), CLASSES).save(tmp_path / "soft.safetensors")
    live, module = stock(adversarial=None), cached(str(tmp_path / "soft.safetensors"), teachers=given)
    calls = counted(given)
    fit(module, crops(npz), epochs=5, precision=precision)
    assert calls == []
    if precision == "32-true":
        fit(live, crops(npz), epochs=5)
        for a, b in zip(live.parameters(), module.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_the_students_checkpoint_does_not_know_of_it():
    cache = built(teachers(), indexed())
    module = cached(cache)
    assert set(module.state_dict()) == set(ImageClassifier(network(), CLASSES).state_dict())
    assert copy.deepcopy(module).meal_cache is cache


# ---- other data, other teachers, damaged files ----------------------------------------------------------------------


def test_other_data_is_noticed(npz):
    given = teachers()
    cache = built(given, crops(npz))
    with pytest.raises(ConfigurationError, match="cache: it has no soft label of some"):
        fit(cached(cache), crops(npz, seed=1))  # other crops
    with pytest.raises(ConfigurationError, match="cache: it has no soft label of some"):
        fit(cached(cache), crops(npz, count=4), epochs=4)
    with pytest.raises(ConfigurationError, match="cache: it was built of other images"):
        fit(cached(cache), crops(npz, mean=0.4))
    plain = ImageData(npz, batch_size=12, val=0.0)
    with pytest.raises(ConfigurationError, match="crop=0 is not valid: expected 3 numbers"):
        fit(cached(cache), plain)
    cache = built(given, plain)
    with pytest.raises(ConfigurationError, match="cache: it was built of other images"):
        fit(cached(cache), ImageData(npz, batch_size=12, val=0.0, augment=True))
    other = ImageData(npz, batch_size=12, val=0.25)
    with pytest.raises(ConfigurationError, match="cache: it was built of other images"):
        fit(cached(cache), other)
    with pytest.raises(ConfigurationError, match=r"cache: the batch=.* expected a dict with 'index'"):
        fit(cached(cache), loader())


def test_what_a_cache_cannot_be_built_of(npz):
    with pytest.raises(ConfigurationError, match="crops come again"):
        built(teachers(), ImageData(npz, augment=True))
    data = ImageData(npz, augment=True, batch_size=12).train_dataloader()
    with pytest.raises(ConfigurationError, match="one image to an index and crop"):
        built(teachers(), data, crops=2)
    with pytest.raises(ConfigurationError, match="k=5.*no more classes"):
        built(teachers(), indexed(), 5)
    with pytest.raises(ConfigurationError, match="k=0"):
        built(teachers(), indexed(), 0)
    with pytest.raises(ConfigurationError, match="'index'"):
        built(teachers(), loader())
    with pytest.raises(ConfigurationError, match="at least one batch"):
        built(teachers(), [])
    broken = network()
    nn.init.constant_(broken[6].bias, float("nan"))
    with pytest.raises(ConfigurationError, match="finite"):
        built(broken, indexed())


def test_other_teachers_and_other_arguments_are_refused():
    given = teachers()
    cache = built(given, indexed(), teacher_weights=[0.5, 0.5])
    cached(cache)  # the same weights as none
    view = Renormalize(0.5, 0.5, 0.4, 0.3)
    for changed in ({"teachers": given[::-1]}, {"teacher_weights": [0.4, 0.6]}):
        with pytest.raises(ConfigurationError, match="cache='made with teachers.*Build it anew"):
            cached(cache, **changed)
    with pytest.raises(ConfigurationError, match="cache='made with views.*Build it anew"):
        fit(cached(cache, teacher_transform=view), indexed())
    viewed = built(given, indexed(), teacher_transform=view)
    fit(cached(viewed, teacher_transform=Renormalize(0.5, 0.5, 0.4, 0.3)), indexed())
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(ConfigurationError, match=f"num_classes 7.*num_classes {CLASSES}"):
        cached(built(wide, indexed()), teachers=wide)
    with pytest.raises(ConfigurationError, match="adversarial='reversal'.*None with a cache"):
        cached(cache, adversarial="reversal")
    with pytest.raises(ConfigurationError, match="cutmix=1.0.*mixed images"):
        cached(cache, cutmix=1.0)


def test_a_named_teachers_own_normalisation_counts(npz, tmp_path):
    timm_network = timm.create_model("test_resnet", num_classes=CLASSES)
    folder = str(save_timm(timm_network, tmp_path / "teacher", {"mean": (0.4,) * 3, "std": (0.2,) * 3}))
    live, module = stock(adversarial=None, teachers=folder), cached(built(folder, crops(npz), CLASSES), teachers=folder)
    fit(live, crops(npz))
    fit(module, crops(npz))
    for a, b in zip(live.parameters(), module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    of_a_loader = built(folder, crops(npz).train_dataloader(), crops=2)  # which does not say what its images are
    with pytest.raises(ConfigurationError, match="cache='made with views"):
        fit(cached(of_a_loader, teachers=folder), crops(npz))


def test_a_file_opens_again_and_is_small(tmp_path):
    x = torch.randn(500, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 50))
    cache = built(net, indexed(x, batch_size=100), 5)
    path = cache.save(tmp_path / "deep" / "soft.safetensors")
    assert path.stat().st_size <= 500 * (6 * 5 + 12) + 2000  # whole: 500 * 200
    again = SoftLabelCache.load(str(path))
    assert torch.equal(again.lookup(torch.arange(500)), cache.lookup(torch.arange(500)))
    again.verify(teachers=cache.teachers, views=cache.views, num_classes=50)


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    given = teachers()
    path = built(given, indexed()).save(tmp_path / "soft.safetensors")
    whole = path.read_bytes()
    tensors = load_file(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    wrong = {"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "text": b"soft labels", "empty": b""}
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    save_file(tensors, tmp_path / "unsigned")
    (tmp_path / "classes").write_bytes(whole.replace(b'num_classes\\": 4', b'num_classes\\": 9'))
    torch.save(tensors, tmp_path / "pickle")
    before = [copy.deepcopy(t.state_dict()) for t in given]
    for name in (*wrong, "unsigned", "classes", "pickle", "nothing"):
        with pytest.raises(ConfigurationError, match="^cache="):
            cached(str(tmp_path / name), teachers=given)
    assert all(torch.equal(v, t.state_dict()[k]) for t, s in zip(given, before) for k, v in s.items())
    cached(str(path), teachers=given)


def test_the_class_runs_on_a_stock_loader_of_tuples():
    """Not only the house's own loaders: ``IndexedDataset`` around any data set."""
    data = DataLoader(IndexedDataset(loader().dataset), batch_size=8, shuffle=True)
    given = teachers()
    module = MEALV2ImageClassifier(
        teachers=given, model=network(), num_classes=CLASSES, adversarial=None,
        cache=built(given, data, CLASSES),
    )  # fmt: skip
    other = copy.deepcopy(module)
    fit(module, data)
    fit(other, data)
    same(module, other)

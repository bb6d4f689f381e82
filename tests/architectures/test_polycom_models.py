"""polycom in whole models and on a Trainer: what is replaced, what is refused, what is logged and saved."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.architectures.polycom import PolyNorm, PolyReLU
from effdl.architectures.polycom_models import no_decay_groups, polycom_model, polynomials, ungate
from effdl.callbacks import PolyComCallback
from effdl.core.errors import ConfigurationError
from effdl.core.surgery import count_parameters
from tests.support import quiet_trainer

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
IDS = torch.arange(12).view(2, 6)
IMAGE = torch.randn(2, 3, 16, 16)
TOKENS = torch.randn(2, 5, 16)


def hf(name: str, config: str, **entries) -> nn.Module:
    import transformers

    entries = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **entries}
    return getattr(transformers, name)(getattr(transformers, config)(**entries))


def vit(**kwargs) -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, **kwargs)


def encoder(activation="gelu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    return hf("T5EncoderModel", "T5Config", feed_forward_proj="gated-gelu", **sizes)


MODELS = {  # make, input, names of what is replaced, change of the parameter count
    "timm-vit": (vit, IMAGE, ["blocks.0.mlp.act", "blocks.1.mlp.act"], 8),
    "bert": (
        lambda: hf("BertForMaskedLM", "BertConfig", **TINY),
        IDS,
        [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)],  # not the prediction head's
        8,
    ),
    "gpt2": (
        lambda: hf("GPT2LMHeadModel", "GPT2Config", n_layer=2, n_head=2, n_embd=32, vocab_size=50),
        IDS,
        ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"],
        8,
    ),
    "llama": (
        lambda: hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TINY),
        IDS,
        ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"],
        8,  # 3 * 64 * 32 == 2 * 96 * 32
    ),
    "t5-gated": (t5, IDS, [f"encoder.block.{i}.layer.1.DenseReluDense.act" for i in (0, 1)], 8),
    "torch-encoder": (encoder, TOKENS, ["layers.0.activation", "layers.1.activation"], 8),
    "torch-encoder-module": (lambda: encoder(nn.GELU()), TOKENS, ["layers.0.activation", "layers.1.activation"], 8),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)),
        TOKENS,
        ["1", "3"],
        8,
    ),
}


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    out = model(inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("kind", ["polynorm", "polyrelu"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_is_converted_trains_and_rebuilds(name, kind):
    make, inputs, where, delta = MODELS[name]
    torch.manual_seed(0)
    model = make()
    before = count_parameters(model)
    assert polycom_model(model, kind=kind) is model
    assert list(polynomials(model)) == where
    assert count_parameters(model) - before == delta
    output(model, inputs).square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in polynomials(model).values())
    again = polycom_model(make(), kind=kind)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(again.eval(), inputs), output(model.eval(), inputs))
    assert count_parameters(polycom_model(again, kind=kind)) == before + delta  # once is enough


def test_transformer_layer_leaves_its_fast_path():
    torch.manual_seed(0)
    model = polycom_model(encoder(), kind="polynorm")
    for layer in model.layers:
        nn.init.constant_(layer.activation.bias, 0.7)
    training = model(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS), training)


def test_converting_a_trained_relu_net_is_lossless():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    want = model(TOKENS)
    assert torch.equal(polycom_model(model, kind="polyrelu", init="relu")(TOKENS), want)


def test_ungating_without_matching_keeps_projections_and_dtype():
    model = hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TINY).to(torch.bfloat16)
    up = model.model.layers[0].mlp.up_proj
    before = count_parameters(model)
    polycom_model(model, match_params=False)
    assert model.model.layers[0].mlp.up_proj is up
    assert count_parameters(model) - before == 2 * (4 - 32 * 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.dtype is torch.bfloat16


def test_layers_of_one_model_get_different_new_weights_and_frozen_ones_stay_frozen():
    model = hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TINY)
    model.model.layers[1].requires_grad_(False)
    polycom_model(model)
    first, second = (layer.mlp for layer in model.model.layers)
    assert not torch.equal(first.up_proj.weight, second.up_proj.weight)
    assert first.up_proj.weight.requires_grad
    assert not second.up_proj.weight.requires_grad


def test_gates_that_cannot_be_rebuilt_are_refused():
    from timm.layers import GluMlp, SwiGLU

    for mlp in (GluMlp(16, 32, act_layer=nn.SiLU), SwiGLU(16, 32)):
        model = nn.ModuleDict({"mlp": mlp, "head": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))})
        with pytest.raises(ConfigurationError, match="gates in a .*exclude='mlp.act'"):
            polycom_model(model)
        assert not polynomials(model)
        assert list(polynomials(polycom_model(model, exclude="mlp.act"))) == ["head.1"]
    moe = hf("OlmoeForCausalLM", "OlmoeConfig", num_experts=2, num_experts_per_tok=1, **TINY)
    with pytest.raises(ConfigurationError, match="gates in a OlmoeExperts"):
        polycom_model(moe)
    with pytest.raises(ConfigurationError, match="itself a gated MLP"):
        polycom_model(hf("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **TINY).model.layers[0].mlp)
    with pytest.raises(ConfigurationError, match="^mlp="):
        ungate(nn.Linear(2, 2), PolyNorm())


def test_convolutions_need_to_be_asked_for_and_the_right_dimension():
    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())

    with pytest.raises(ConfigurationError, match="no activation in an MLP block"):
        polycom_model(net())
    with pytest.raises(ConfigurationError, match="dim=1 for"):
        polycom_model(net(), targets="ReLU")
    assert polycom_model(net(), targets="ReLU", dim=1)(IMAGE).shape == (2, 4, 12, 12)
    assert list(polynomials(polycom_model(net(), targets="4", kind="polyrelu"))) == ["4"]


def test_no_decay_groups_part_the_coefficients():
    model = polycom_model(vit())
    decayed, free = no_decay_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert sum(p.numel() for p in free["params"]) == 8
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert len(no_decay_groups(nn.Linear(2, 2), 0.1)) == 1
    torch.optim.AdamW(no_decay_groups(model, 0.1))


# -- on a Trainer


class Perceptron(LightningModule):
    """A foreign module."""

    def __init__(self, scale: float = 1.0, late: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.net, self.test_calls = scale, None if late else self.build(), 0

    def build(self):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))

    def configure_model(self):
        self.net = self.net or self.build()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(self.scale * batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(no_decay_groups(self, 0.1), lr=0.01)


def fit(module, callbacks, epochs=1, stage="fit", **kwargs):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(4, 6, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(4)]
    trainer = quiet_trainer(*callbacks, max_epochs=epochs)
    getattr(trainer, stage)(module, DataLoader(rows, batch_size=None), weights_only=True, **kwargs)
    return trainer


def test_trainer_learns_logs_and_reports_the_coefficients():
    module, polycom = Perceptron(), PolyComCallback()
    trainer = fit(module, [polycom])
    assert trainer.callback_metrics["polycom/parameter_delta"] == 8
    names = {f"polycom/net.{i}/a{p}" for i in (1, 3) for p in range(4)}
    assert names <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["polycom/net.1/a3"] == module.net[1].weight[0]
    assert module.net[1].weight[0] != 1 / 3
    report = polycom.report()
    assert report["parameter_delta"] == 8
    assert report["layers"]["net.3"]["a0"] == module.net[3].bias.item()
    assert polycom.matched(module) == ["net.1", "net.3"]
    fit(module, [polycom], stage="test")  # setup again: nothing is replaced twice
    assert polycom.report()["parameter_delta"] == 8
    with pytest.raises(ConfigurationError, match="needs a fit"):
        PolyComCallback().report()


def test_layers_built_late():
    module = Perceptron(late=True)
    fit(module, [PolyComCallback()])
    assert list(polynomials(module)) == ["net.1", "net.3"]


def test_two_instances_on_different_layers_and_a_conflict():
    module = Perceptron()
    both = [PolyComCallback(kind="polyrelu", targets="net.1"), PolyComCallback(targets="net.3")]
    fit(module, both)
    assert (type(module.net[1]), type(module.net[3])) == (PolyReLU, PolyNorm)
    assert both[0].matched(module) == ["net.1"]
    fit(module, both)
    with pytest.raises(ConfigurationError, match="nothing left to make"):
        fit(Perceptron(), [PolyComCallback(), PolyComCallback(kind="polyrelu", order=2)])


def test_checkpoint_says_which_polynomials_and_another_one_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True, save_weights_only=True)
    fit(Perceptron(), [PolyComCallback(eps=1e-5), save])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    row = {"kind": "PolyNorm", "order": 3, "eps": 1e-5, "norm": "rms", "dim": -1}
    assert saved["effdl"]["polycom"]["state_dict"] == {"net.1": row, "net.3": row}
    module = polycom_model(Perceptron(), eps=1e-5)
    module.load_state_dict(saved["state_dict"], strict=True)

    full = ModelCheckpoint(tmp_path / "full", save_last=True, save_on_train_epoch_end=True)
    fit(Perceptron(), [PolyComCallback(), full])
    with pytest.raises(ConfigurationError, match="The checkpoint's net.1 is"):
        fit(Perceptron(), [PolyComCallback(kind="polyrelu")], epochs=2, ckpt_path=tmp_path / "full" / "last.ckpt")


def test_weight_averaging_must_come_after():
    fit(Perceptron(), [PolyComCallback(), EMAWeightAveraging(decay=0.5)])
    with pytest.raises(ConfigurationError, match="before EMAWeightAveraging"):
        fit(Perceptron(), [EMAWeightAveraging(decay=0.5), PolyComCallback()])


def test_large_pre_activations_of_polyrelu_are_warned_of_once():
    with pytest.warns(UserWarning, match="PolyReLU cubes its input.*net.1"):
        fit(Perceptron(scale=30.0), [PolyComCallback(kind="polyrelu")])
    for calm in (lambda: PolyComCallback(kind="polyrelu"), lambda: PolyComCallback(kind="polynorm")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = Perceptron(scale=30.0 if calm().kind == "polynorm" else 1.0)
            fit(module, [calm()])
        assert not [w for w in caught if "cubes" in str(w.message)]
        assert not any(layer._forward_pre_hooks for layer in polynomials(module).values())

"""effdl.tasks.language: the ways to name a model, loss and perplexity, training, saving."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.data.text import TextData
from effdl.tasks.language import LanguageModel, next_token_loss
from effdl.tasks.tiny import tiny_gpt2, tiny_llama
from tests.support import offline_hub

CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def ids(batch: int = 4, length: int = 16, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def trainer(folder, **kwargs) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip


def loader(*batches) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


# Loss and perplexity


@pytest.mark.parametrize("maker", [tiny_gpt2, tiny_llama])
def test_loss_is_transformers_own(maker):
    model = maker(vocab_size=50, block_size=32)
    batch = {"input_ids": ids(), "labels": ids().masked_fill(ids(seed=1) < 10, -100)}
    module = LanguageModel(model)
    ours = module.compute_loss(module(batch["input_ids"]), batch)
    assert torch.allclose(ours, model(**batch).loss, atol=1e-6)


def test_labels_default_to_the_inputs_without_the_padding():
    module = LanguageModel(tiny_gpt2(50, 32))
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 12:] = 0
    logits = module(ids(), mask)
    full = module.compute_loss(logits, {"input_ids": ids()})
    assert torch.equal(full, next_token_loss(logits, ids()))
    padded = module.compute_loss(logits, {"input_ids": ids(), "attention_mask": mask})
    assert torch.allclose(padded, next_token_loss(logits[:, :12], ids()[:, :12]))


def test_attention_mask_reaches_the_model():
    module = LanguageModel(tiny_gpt2(50, 32))
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 0] = 0
    assert not torch.allclose(module(ids()), module(ids(), mask))


def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path):
    module = LanguageModel(tiny_gpt2(50, 32))
    batches = [{"input_ids": ids(seed=i)} for i in range(3)]
    out = trainer(tmp_path).validate(module, loader(*batches), verbose=False)[0]
    assert math.isclose(out["val/perplexity"], math.exp(out["val/loss"]), rel_tol=1e-4)
    assert math.isclose(out["val/perplexity"], 50, rel_tol=0.05)  # an untrained model guesses
    out = trainer(tmp_path).test(module, loader(*batches), verbose=False)[0]
    assert set(out) == {"test/loss", "test/perplexity"}


def test_the_loss_is_a_hook_for_training_only(tmp_path):
    class Doubled(LanguageModel):
        def compute_loss(self, outputs, batch):
            return 2 * super().compute_loss(outputs, batch)

    module = Doubled(tiny_gpt2(50, 32))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader({"input_ids": ids()}), loader({"input_ids": ids()}))
    metrics = run.callback_metrics
    assert 1.8 < metrics["train/loss"] / metrics["val/loss"] < 2.4


# The ways to name a model


def test_tiny_takes_the_vocabulary_of_the_data():
    assert LanguageModel(vocab_size=300).model.config.vocab_size == 300


def test_a_configuration_as_a_dict():
    module = LanguageModel(CONFIG, vocab_size=70)
    assert type(module.model).__name__ == "LlamaForCausalLM"
    assert module(ids()).shape == (4, 16, 70)
    assert LanguageModel(CONFIG | {"vocab_size": 90}, vocab_size=70).model.config.vocab_size == 90


def test_entries_of_older_configurations_are_taken():
    LanguageModel(CONFIG | {"rope_theta": 500.0}, vocab_size=70)


def test_a_configuration_as_an_object():
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    assert LanguageModel(config)(ids()).shape == (4, 16, 60)


def test_a_local_folder_with_its_weights_and_arguments(tmp_path):
    tiny_llama(50, 32, seed=5).save_pretrained(tmp_path)
    module = LanguageModel(str(tmp_path), model_kwargs={"attn_implementation": "eager"})
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), tiny_llama(50, 32, seed=5).parameters()))
    assert module.model.config._attn_implementation == "eager"


def test_any_network_from_ids_to_logits():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 50)

        def forward(self, input_ids):
            return self.table(input_ids)

    module = LanguageModel(Bigram(), vocab_size=50)
    assert module.compute_loss(module(ids()), {"input_ids": ids()}).requires_grad


def test_hub_out_of_reach_names_the_local_forms(monkeypatch):
    offline_hub(monkeypatch, "transformers.AutoModelForCausalLM.from_pretrained", OSError("no network"))
    with pytest.raises(ConfigurationError, match=r"'org/big' cannot be loaded.*a model's folder"):
        LanguageModel("org/big")


# Training


def test_a_model_learns_a_text(tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat on the mat. " * 400)
    data = TextData(str(tmp_path / "t.txt"), block_size=32, batch_size=16)
    module = LanguageModel(
        CONFIG | {"hidden_size": 32}, vocab_size=data.vocab_size, optimizer=lambda p: torch.optim.AdamW(p, 1e-2)
    )
    run = trainer(tmp_path, max_steps=80)
    run.fit(module, data)
    assert run.callback_metrics["val/perplexity"] < 2
    batch = next(iter(data.val_dataloader()))
    following = torch.cat(trainer(tmp_path).predict(module, loader({"input_ids": batch["input_ids"][:, :-1]})))
    assert following.shape == (len(batch["input_ids"]), 256)
    assert (following.argmax(-1) == batch["input_ids"][:, -1]).float().mean() > 0.8


def test_what_was_trained_opens_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    module = LanguageModel(tiny_gpt2(50, 32))
    trainer(tmp_path, max_steps=1).fit(module, loader({"input_ids": ids()}))
    module.model.save_pretrained(tmp_path / "m")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(opened(ids()).logits, module.eval()(ids()), atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(tmp_path, precision):
    run = trainer(tmp_path, max_steps=2, precision=precision)
    run.fit(LanguageModel(tiny_gpt2(50, 32)), loader({"input_ids": ids()}), loader({"input_ids": ids()}))
    assert math.isfinite(run.callback_metrics["val/perplexity"])


def test_frozen_parameters_stay_out_of_the_optimizer():
    model = tiny_gpt2(50, 32)
    model.transformer.wte.requires_grad_(False)
    groups = LanguageModel(model).configure_optimizers().param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_from_yaml_with_the_vocabulary_linked():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    parser.link_arguments("data.vocab_size", "model.init_args.vocab_size", apply_on="instantiate")
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    config = parser.parse_object(
        {
            "model": {"class_path": "effdl.LanguageModel", "init_args": {"model": CONFIG, "optimizer": optimizer}},
            "data": {"class_path": "effdl.data.text.TextData"},
        }
    )
    module = parser.instantiate(config).model
    assert module.model.config.vocab_size == 256
    assert module.configure_optimizers().defaults["lr"] == 0.5


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("model", {"model": 3}),
        ("model", {"model": {"n_layer": 2}}),
        ("gpt2", {"model": {"model_type": "gtp2"}}),
        ("n_layer", {"model": {"model_type": "gpt2", "n_layr": 2}}),
        ("vocab_size", {"model": tiny_gpt2(50, 32), "vocab_size": 51}),
        ("vocab_size", {"vocab_size": 1}),
    ],
)
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        LanguageModel(**kwargs)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"model=.*config\.json"):
        LanguageModel(str(tmp_path))

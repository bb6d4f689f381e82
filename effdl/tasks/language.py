"""The stock language-modelling task: any transformers causal LM, by hub name, folder, configuration or instance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from effdl.core.batch import logits_of, unpack
from effdl.core.errors import ConfigurationError, check, check_integer, suggest
from effdl.core.hub import from_hub
from effdl.tasks._optimizers import optimizer_and_scheduler
from effdl.tasks.tiny import tiny_gpt2

IGNORED = -100
# not in today's configurations, but transformers still reads them
OLDER_ENTRIES = {"rope_theta", "rope_scaling", "rotary_pct", "torch_dtype"}
INSTEAD = "a model's folder, or a configuration such as {model_type: gpt2, n_layer: 4}"


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in fp32.

    Args:
        logits: (B, T, V).
        labels: (B, T) int, *not* shifted (token t+1 is compared with logits t); -100 is left out.

    Example::

        loss = next_token_loss(model(input_ids).logits, input_ids)
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


class LanguageModel(LightningModule):
    """Next-token training of a causal language model.

    Args:
        model: a hub name or a local folder (with its weights); a transformers configuration, or a dict of one with
            ``model_type`` (random weights); an ``nn.Module`` from ids (B, T) to logits (B, T, V); ``"tiny"``: a GPT-2
            of 125,000 parameters.
        vocab_size: number of tokens in the data (``TextData.vocab_size``, which ``effdl run`` links): sets the size of
            a model made from a configuration, and must not exceed that of a trained one.
        model_kwargs: further arguments of transformers' ``from_pretrained`` or ``from_config``
            (``{"attn_implementation": "eager"}``).
        optimizer, scheduler: callables, as LightningCLI injects them; default AdamW 1e-3 and a constant rate.

    Batches are dicts with ``input_ids`` (B, T) int; ``labels`` (B, T), not shifted, -100 where no loss is wanted (the
    inputs themselves by default); perhaps ``attention_mask`` (B, T).

    Raises:
        ConfigurationError: a model or a configuration entry that does not exist, more tokens than the model has.
        HubError: the hub cannot be reached and the cache has no copy.

    Example::

        data = TextData("pydoc", block_size=128)
        module = LanguageModel({"model_type": "llama", "num_hidden_layers": 2, ...}, vocab_size=data.vocab_size)
        Trainer(max_epochs=1).fit(module, data)
        module.model.save_pretrained("my-model")     # AutoModelForCausalLM.from_pretrained("my-model")
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        vocab_size: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if vocab_size is not None:
            check_integer("vocab_size", vocab_size, 2)
        self.model = build_language_model(model, vocab_size, model_kwargs or {}).train()
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if vocab_size is not None and size is not None:
            fix = "Use the model's own tokenizer for the data."
            check(vocab_size <= size, "vocab_size", vocab_size, f"at most the model's {size} tokens", fix)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.val_perplexity = Perplexity(ignore_index=IGNORED)
        self.test_perplexity = Perplexity(ignore_index=IGNORED)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of token ids (B, T)."""
        kwargs: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
        if hasattr(getattr(self.model, "config", None), "use_cache"):
            kwargs["use_cache"] = False  # a cache for generation costs memory and is thrown away
        return logits_of(self.model(input_ids, **kwargs))

    def compute_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss of logits (B, T, V); the hook that methods with a loss of their own override."""
        return next_token_loss(outputs, labels_of(batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.compute_loss(self._logits(batch), batch)
        self._log("train/loss", loss, batch, on_step=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities (B, V) of the token that follows each sequence."""
        return self._logits(batch)[:, -1].float().softmax(-1)

    def _evaluate(self, batch: Any, stage: str, perplexity: Perplexity) -> None:
        logits, labels = self._logits(batch), labels_of(batch)
        perplexity(logits[:, :-1].float(), labels[:, 1:])
        self._log(f"{stage}/loss", next_token_loss(logits, labels), batch)
        self._log(f"{stage}/perplexity", perplexity, batch)

    def _logits(self, batch: Any) -> Tensor:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return self(unpack(batch).inputs, mask)

    def _log(self, name: str, value: Any, batch: Any, on_step: bool = False) -> None:
        bar, size = not name.startswith("test"), len(unpack(batch).inputs)
        self.log(name, value, prog_bar=bar, on_step=on_step, on_epoch=True, batch_size=size)

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)


def labels_of(batch: Any) -> Tensor:
    """The labels (B, T) of a batch, or its inputs with -100 where the attention mask is 0."""
    inputs, labels, _ = unpack(batch)
    if labels is not None:
        return labels
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return inputs if mask is None else inputs.masked_fill(mask == 0, IGNORED)


def build_language_model(model: Any, vocab_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """A causal LM from all that ``LanguageModel(model=...)`` takes."""
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if isinstance(model, nn.Module):
        return model
    if model == "tiny":
        return tiny_gpt2(vocab_size or 256, 1024)
    if isinstance(model, dict):
        model = _configuration(model, vocab_size)
    if isinstance(model, PretrainedConfig):
        return AutoModelForCausalLM.from_config(model, **kwargs)
    check(isinstance(model, str), "model", type(model).__name__, f"a network, a hub name, {INSTEAD}")
    folder = Path(model).expanduser()
    if folder.is_dir():
        check((folder / "config.json").is_file(), "model", model, "a transformers folder", "It has no config.json.")
    return from_hub(AutoModelForCausalLM.from_pretrained, str(folder), instead=INSTEAD, **kwargs)


def _configuration(entries: dict[str, Any], vocab_size: int | None) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    entries = dict(entries)
    kind = entries.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        close = suggest(kind, CONFIG_MAPPING) if kind else ""
        check(False, "model", kind, "a dict whose model_type is one of transformers', such as 'gpt2' or 'llama'", close)
    plain = AutoConfig.for_model(kind)
    known = {*plain.to_dict(), *plain.attribute_map, *OLDER_ENTRIES}
    unknown = sorted(set(entries) - known)
    if unknown:
        close = suggest(unknown[0], known)
        raise ConfigurationError(f"model has the entries {unknown}, which {kind!r} has not. {close}")
    if vocab_size is not None:
        entries.setdefault("vocab_size", vocab_size)
    return AutoConfig.for_model(kind, **entries)

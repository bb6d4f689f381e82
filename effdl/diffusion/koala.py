"""koala: cut a latent U-Net down and teach it the large one's self-attention.

Surgery: :mod:`effdl.diffusion._unet_shrink`; which features: :mod:`effdl.diffusion._koala_features`; losses:
:mod:`effdl.diffusion._koala_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_number
from effdl.core.paper import Paper
from effdl.core.surgery import dtype_of
from effdl.core.teacher import Frozen
from effdl.diffusion._koala_features import FEATURES, feature_pairs, paired, recorded
from effdl.diffusion._koala_loss import DistillationLoss, distillation_loss, mean_square
from effdl.diffusion._koala_report import describe, draw_beside
from effdl.diffusion._unet_shrink import KOALA_1B, KOALA_700M, PerStage, ShrinkSpec, shrink_unet, teacher_name
from effdl.tasks._denoising import prompts_of
from effdl.tasks._diffusers import TEXT_KEYS, arguments, take_apart
from effdl.tasks.diffusion import Denoising, DiffusionModule
from effdl.tasks.tiny import tiny_stable_diffusion

__all__ = [
    "FEATURES", "KOALA_1B", "KOALA_700M", "DistillationLoss", "KOALADistillationModule", "ShrinkSpec",
    "distillation_loss", "feature_pairs", "recorded", "shrink_unet", "teacher_name",
]  # fmt: skip


class KOALADistillationModule(DiffusionModule):
    """Shrinks a U-Net and distils it by its self-attention, layer by layer (KOALA).

    The student is cut from the teacher: the first (residual, attention) pairs of a stage, the first transformer layers
    of every attention, perhaps no middle, all with the teacher's weights. A training step calls both on the same noisy
    latents, times and conditions (Stable Diffusion XL's pooled text and time ids too) and adds to the usual loss the
    distances of the two outputs and of their self-attention outputs, the i-th layer to the i-th, without a projection.

    ===================== ========================================= ==========
    of SDXL (2567 M)      arguments                                 parameters
    ===================== ========================================= ==========
    KOALA-1B              ``depth=[1, 2, 6]``                       1161 M
    KOALA-700M            ``depth=[1, 2, 5], mid=False``            783 M
    ===================== ========================================= ==========

    Args:
        teacher: a ``UNet2DConditionModel`` or a whole pipeline, a folder of either, a hub id, a configuration;
            ``"tiny"``: an untrained Stable Diffusion, to try things. Frozen, outside the checkpoint; a teacher of few
            steps gives a student of few steps.
        layers_per_block: pairs of a down stage that stay, one number or one per stage; ``None``: all.
        depth: transformer layers of an attention that stay, one number or one per stage; ``None``: all.
        mid: whether the middle stays.
        student: a network to train in place of the one cut out (a folder, say); the three above are not looked at then.
        features: what is compared: ``"sa"``, ``"ca"`` self- and cross-attention, ``"ffn"``, ``"res"`` (resnets),
            ``"lf"`` (outputs of the stages), ``"lf_outer"`` (of the outermost two, which have no attention in SDXL), or
            a map ``{student's module: teacher's module}``. The paper's order: self-attention first, cross-attention and
            feed-forward last.
        tap: of the self-attention: its output (``"out"``, before the residual addition), ``"probs"`` (eager attention
            processors only) or the whole layer's output, ``"block"``.
        lambda_task, lambda_out, lambda_feature: weights of the three losses.
        noise_scheduler, prediction, seed: as in ``DiffusionModule``; by default the teacher's.
        optimizer, scheduler: as LightningCLI injects them; default Adam 1e-3, constant rate.

    Batches are ``DiffusionModule``'s; for Stable Diffusion XL ``prompt``, or ``encoder_hidden_states`` and
    ``text_embeds``, and perhaps ``time_ids`` (B, 6). For classifier-free guidance leave some prompts empty.

    Logged: ``koala/task``, ``koala/out``, ``koala/FEATURE`` (sum over the layers), ``koala/feature_share`` of the total
    (a plain sum over 20-30 layers leads at the start), in validation ``koala/val_out``, the distance to the
    teacher, and ``koala/val_teacher``, the teacher's own loss.

    Suggested: AdamW 1e-5, weight decay 0.01, batch 128, 100k iterations at 1024 x 1024 (the paper; four A100 of 80 GB),
    bf16-mixed (features of SDXL's deepest stage overflow in fp16). Cost: the teacher's forward per step.
    Fails when: the teacher's own data is out of reach and the images are few; with long captions, fewer are enough.
    Two processes draw different noise, so they are not one with the double batch. Inference: the stock pipeline.

    Raises:
        ConfigurationError: more layers than the teacher has, features that a network has not or of other channels,
            another number of output channels than the teacher's, a negative weight.

    Example::

        module = KOALADistillationModule("stabilityai/stable-diffusion-xl-base-1.0", depth=[1, 2, 6])
        Trainer(max_steps=100_000, precision="bf16-mixed", callbacks=[EMAWeightAveraging()]).fit(module, data)
        module.save_pretrained("koala-1b")                  # StableDiffusionXLPipeline.from_pretrained("koala-1b")
    """

    paper: ClassVar[Paper] = Paper(
        slug="koala",
        title="KOALA: Empirical Lessons Toward Memory-Efficient and Fast Diffusion Models for Text-to-Image Synthesis",
        authors=("Lee, Youngwan", "Park, Kwanyong", "Cho, Yoorhim", "Lee, Yong-Ju", "Hwang, Sung Ju"),
        year=2024,
        arxiv="2312.04005",
        venue="NeurIPS",
    )

    def __init__(
        self,
        teacher: nn.Module | dict[str, Any] | str = "tiny",
        layers_per_block: int | list[int] | None = 1,
        depth: int | list[int] | None = None,
        mid: bool = True,
        student: nn.Module | dict[str, Any] | str | None = None,
        features: str | tuple[str, ...] | dict[str, str] = ("sa", "lf_outer"),
        tap: Literal["out", "probs", "block"] = "out",
        lambda_task: float = 1.0,
        lambda_out: float = 1.0,
        lambda_feature: float = 1.0,
        noise_scheduler: SchedulerMixin | None = None,
        prediction: Literal["epsilon", "v_prediction", "sample"] | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        weights = {"lambda_task": lambda_task, "lambda_out": lambda_out, "lambda_feature": lambda_feature}
        for name, value in weights.items():
            check_number(name, value, 0, float("inf"), closed="[)")
        check(any(weights.values()), "lambda_task", weights, "one positive weight of the three")
        kinds = (nn.Module, DiffusionPipeline, Mapping, str)
        check(isinstance(teacher, kinds), "teacher", teacher, "a U-Net, a pipeline, a folder of one or a configuration")
        spec = ShrinkSpec(_plain(layers_per_block), _plain(depth), mid)
        tiny = tiny_stable_diffusion(layers_per_block=2) if teacher == "tiny" else None
        network, own, surroundings = take_apart(tiny or teacher)
        fix = "Give the student too, and a map of modules as features."
        check(student is not None or _stock(network), "teacher", type(network).__name__, "a stock U-Net to cut", fix)
        small = shrink_unet(network, spec)[0].float() if student is None else _given(student, network)
        super().__init__(small, noise_scheduler or own, prediction, seed, optimizer, scheduler)
        self.surroundings, self.teacher, self.tap = surroundings, Frozen(network), tap
        self.weights = weights
        self.pairs = feature_pairs(small, network, features, _renaming(small, network), tap)
        if tap == "probs":
            for ours, theirs in self.pairs.get("sa", {}).items():
                small.get_submodule(ours).set_processor(network.get_submodule(theirs).processor)
        self.example: tuple[Tensor, Tensor, dict[str, Any]] | None = None
        self._seen: dict[str, Tensor] = {}
        self._validated: Denoising | None = None

    # ---- a step -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with recorded(self.model, self.pairs, self.tap) as self._seen:
            try:
                return super().training_step(batch, batch_idx)
            finally:
                self._seen = {}  # no feature outlives its step

    def compute_loss(self, outputs: Denoising, batch: Any) -> Tensor:
        """The three losses of a step, with the features that its own forward left."""
        theirs = {feature: list(pairs.values()) for feature, pairs in self.pairs.items()}
        with recorded(self.teacher.module, theirs, self.tap) as told:
            teacher = self.teach(outputs)
        features = paired(self.pairs, self._seen, told)
        loss = distillation_loss(outputs.target, outputs.prediction, teacher, features, **self.weights)
        sums = {feature: losses.sum() for feature, losses in loss.features.items()}
        share = self.weights["lambda_feature"] * sum(sums.values()) / loss.total
        logged = {"task": loss.task, "out": loss.out, **sums, "feature_share": share}
        self.log_dict({f"koala/{name}": value.detach() for name, value in logged.items()}, batch_size=len(teacher))
        return loss.total

    @torch.no_grad()
    def teach(self, outputs: Denoising) -> Tensor:
        """The teacher's prediction (B, C, H, W) for exactly what the student was called with."""
        network = self.teacher.on(outputs.noisy)
        dtype = dtype_of(network)
        noisy, condition = tree_map(lambda it: _cast(it, dtype), (outputs.noisy, outputs.condition))
        predicted = network(noisy, outputs.timesteps, **condition)
        return predicted if isinstance(predicted, Tensor) else predicted[0]

    def denoise(self, batch: Any, generator: torch.Generator | None = None) -> Denoising:
        outputs = super().denoise(batch, generator)
        if not torch.is_grad_enabled():  # a training step's graph is not kept alive
            self._validated = outputs
        return outputs

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        outputs, self._validated = self._validated, None
        teacher, how = self.teach(outputs), {"sync_dist": True, "batch_size": len(outputs.noisy)}
        self.log("koala/val_out", mean_square(outputs.prediction, teacher), prog_bar=True, **how)
        self.log("koala/val_teacher", mean_square(teacher, outputs.target), **how)
        if batch_idx == 0:
            self.example = outputs.noisy, outputs.timesteps, outputs.condition

    def condition(self, batch: Any) -> dict[str, Any]:
        """The network's keyword arguments besides image and time; for Stable Diffusion XL ``added_cond_kwargs`` too."""
        config = getattr(self.model, "config", {})
        if config.get("addition_embed_type") != "text_time":
            return super().condition(batch)
        images = unpack(batch).inputs
        told = self._text_of(batch)
        if not isinstance(images, Tensor):  # of the size that the network is made for
            sides = [self.surroundings.factor * side for side in self._shape()[1:]]
            count = len(told["encoder_hidden_states"])
            images = torch.empty(count, 1, *sides, dtype=self.dtype, device=self.device)
        return arguments(images, {name: value.to(images) for name, value in told.items()})

    def _text_of(self, batch: Any) -> dict[str, Tensor]:
        """Embeddings, pooled text and perhaps time ids: the batch's own, or what the pipeline makes of its prompts."""
        given = batch if isinstance(batch, Mapping) else {}
        own = {name: given[name] for name in TEXT_KEYS if name in given}
        if {"encoder_hidden_states", "text_embeds"} <= set(own):
            return own
        prompts = prompts_of(batch)
        if prompts is None or not self.surroundings.text_encoders:
            wanted = "'prompt' (with a pipeline), or 'encoder_hidden_states' and 'text_embeds'"
            raise ConfigurationError(f"the network wants text: {wanted} in the batch, which has {sorted(given)}.")
        return own | self.surroundings.encode_prompts(prompts, self.device)

    # ---- what is kept and told --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})["koala"] = {"config": _sizes(self.model)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, own = checkpoint.get("effdl", {}).get("koala", {}).get("config"), _sizes(self.model)
        check(saved in (None, own), "layers_per_block", own, f"the checkpoint's: {saved}",
              "Cut the student as the run did that is resumed: layers_per_block, depth and mid.")  # fmt: skip

    def matched(self, module: Any) -> list[str]:
        """Names of the student's modules whose output is compared."""
        return [name for pairs in self.pairs.values() for name in pairs]

    def report(self) -> dict[str, Any]:
        """Teacher and student: size and latency of both; how many pairs of every feature were compared."""
        return describe(self)

    def figures(self, folder: Path) -> None:
        """``samples.png``: the same noises and conditions through the teacher (upper row) and the student."""
        draw_beside(self, folder / "samples.png")

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._koala_example import example

        return example()


def _given(student: Any, teacher: nn.Module) -> nn.Module:
    """The network that is trained in place of one that was cut out."""
    network = take_apart(student)[0]
    own = {id(p) for p in network.parameters()}
    check(not any(id(p) in own for p in teacher.parameters()), "student", type(network).__name__,
          "a network that shares no parameter with the teacher")  # fmt: skip
    ours, theirs = (getattr(net, "config", {}).get("out_channels") for net in (network, teacher))
    check(ours == theirs, "student", f"out_channels={ours}", f"out_channels={theirs}, the teacher's",
          "A learned variance is not distilled.")  # fmt: skip
    return network.requires_grad_(True)


def _renaming(student: nn.Module, teacher: nn.Module) -> Callable[[str], str]:
    """The teacher's name of a student's module: by their configurations where both are stock U-Nets."""
    return teacher_name(student.config, teacher.config) if _stock(student) and _stock(teacher) else str


def _stock(network: nn.Module) -> bool:
    return {"layers_per_block", "down_block_types"} <= set(getattr(network, "config", {}))


def _plain(value: Any) -> PerStage | None:
    return tuple(value) if isinstance(value, list) else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _sizes(network: nn.Module) -> dict[str, Any]:
    """What shrinking changes, of a configuration, in plain values."""
    config = getattr(network, "config", {})
    names = ("layers_per_block", "transformer_layers_per_block", "mid_block_type")
    kept = {name: config.get(name) for name in names}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in kept.items()}

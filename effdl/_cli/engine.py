"""From a stage of a recipe to a module, a data module and a Trainer: the LightningCLI behind ``effdl run``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from effdl._cli.explain import explain
from effdl._cli.recipe import Stage, links
from effdl.core.errors import ConfigurationError

LAST = "last.ckpt"


class RecipeCLI(LightningCLI):
    """A stage's config with its overrides, parsed, checked and instantiated; nothing has run yet.

    Args:
        stage: what to build.
        folder: of the run, for logger and checkpoints; ``None`` for a run that leaves nothing behind.
        trainer: settings that win over the recipe's.

    Raises:
        ConfigurationError: a key, class or value that does not fit, in one line.
    """

    def __init__(self, stage: Stage, folder: Path | None = None, trainer: dict[str, Any] | None = None) -> None:
        self.stage, self.folder = stage, folder
        self.forced = dict(trainer or {})
        self.linked = links(stage)
        model = stage.config.get("model")
        init = dict(model.get("init_args") or {}) if isinstance(model, dict) else {}
        self.stated = {name: init.pop(name) for name in self.linked if name in init}
        config = {**stage.config, "model": {**model, "init_args": init}} if isinstance(model, dict) else stage.config
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(config, file)
            file.flush()
            try:
                super().__init__(
                    LightningModule,
                    LightningDataModule,
                    save_config_callback=None,
                    seed_everything_default=0,
                    parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    auto_configure_optimizers=False,
                    args=["--config", file.name, *stage.overrides],
                    run=False,
                )
            except jsonargparse.ArgumentError as error:
                raise ConfigurationError(explain(str(error), stage, getattr(self, "parser", None))) from error

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(Callback, "method", subclass_mode=True, required=False)
        for name in self.linked:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        self.parser = parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # the base class warns of a sys.argv that is not its own

    @property
    def method(self) -> Any:
        """The recipe's callback, or ``None``."""
        return self.config_init.get("method")

    def config_text(self) -> str:
        """The whole config as YAML, every default written out; ``effdl run`` takes it."""
        return self.parser.dump(self.config, skip_none=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for name, value in self.stated.items():
            if (got := getattr(self.datamodule, name)) != value:
                raise ConfigurationError(f"model.{name}={value!r} in the recipe, but the data module has {got!r}.")
        settings = {**self.config_init.trainer, **self.forced, **kwargs}
        callbacks = settings["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        settings["callbacks"] = with_method(callbacks, self.method)
        if self.folder is None:
            settings |= {"logger": False, "enable_checkpointing": False}
            settings["callbacks"] = [c for c in settings["callbacks"] if not isinstance(c, ModelCheckpoint)]
        else:
            settings["logger"] = [run_logger(self.folder), *_loggers(settings["logger"])]
            if settings["enable_checkpointing"] is not False and not settings["fast_dev_run"]:
                settings["callbacks"].append(LastCheckpoint(self.folder))
        try:
            return Trainer(**settings)
        except (ValueError, MisconfigurationException) as error:
            raise ConfigurationError(f"trainer: {' '.join(str(error).split())}") from error


def with_method(callbacks: list[Any], method: Any) -> list[Any]:
    """``method`` last, but ahead of a ``WeightAveraging``, which copies the model as it finds it."""
    if method is None:
        return callbacks
    names = [[cls.__name__ for cls in type(callback).__mro__] for callback in callbacks]
    first = next((i for i, mro in enumerate(names) if "WeightAveraging" in mro), len(callbacks))
    return [*callbacks[:first], method, *callbacks[first:]]


def run_logger(folder: Path) -> CSVLogger:
    """``metrics.csv`` in the run folder itself."""
    number = folder.name.removeprefix("version_")
    version = int(number) if number.isdigit() else folder.name  # a number is what the progress bar shows
    return CSVLogger(save_dir=str(folder.parent), name="", version=version, flush_logs_every_n_steps=20)


def _loggers(value: Any) -> list[Logger]:
    """The user's loggers; ``None``, ``True`` and ``False`` name none beyond ours."""
    if isinstance(value, (bool, type(None))):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt`` in the run folder after every epoch or validation, and after the last of ``max_steps``.

    A class of its own, so that it stands beside whatever ``ModelCheckpoint`` the user has.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(dirpath=str(folder), filename="last", enable_version_counter=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.save_checkpoint(Path(self.dirpath) / LAST)


def participants(cli: RecipeCLI) -> Iterator[Any]:
    """Everything in a run that may carry a paper or a report: callbacks, module, data module."""
    seen: set[int] = set()
    for part in (cli.method, *cli.trainer.callbacks, cli.model, cli.datamodule):
        if part is not None and id(part) not in seen:
            seen.add(id(part))
            yield part

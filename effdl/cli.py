"""The command line: ``effdl list | show | run | compare | copy | export | doctor``.

Only what a command needs is imported when it is called. Exit codes: 0; 2 for what the user can put right, said in one
line on stderr; anything else stays a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import NoReturn

from effdl.core.errors import ConfigurationError, suggest

RUN_HELP = """\
NAME is a method or a recipe (effdl list), FILE.yaml a config of your own (effdl copy NAME writes one).

Overrides are --key=value, as in the config:
  effdl run gradual-pruning --method.sparsity=.95 --model.model=resnet50 --data.name=cifar10
  effdl run gradual-pruning --trainer.devices=4 --trainer.strategy=ddp --trainer.precision=bf16-mixed
In a recipe with stages they go to every stage, or to one: --stages.NAME.trainer.max_steps=100
--print_config shows the whole configuration. A run's files lie in runs/SLUG/version_N."""


COMPARE_HELP = """\
Every METHOD (and no method at all) on the same model, data, budget and seeds: a table, pareto.png, compare.json.
Killed in the middle and called again, it goes on with what is missing.

  effdl compare gradual-pruning pdp nupes --sparsity=.9 --bits=4 --seeds=3
  effdl compare pdp maestro --model.model=resnet50 --data.name=cifar10 --trainer.max_epochs=30 --pdp.sparsity=.95
--output=FOLDER (default runs/compare), --metric=val/accuracy, --mode=max; --config=FILE.yaml: model, data, trainer."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{self.prog}: {message}")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(prog="effdl", description="Methods of deep-learning papers for your Lightning Trainer.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    commands.add_parser("list", help="all methods: slug, name, kind, family, paper")
    show = commands.add_parser("show", help="documentation, arguments and citation of a method")
    show.add_argument("name", metavar="NAME")
    run = commands.add_parser(
        "run",
        help="run a recipe",
        usage="effdl run NAME|FILE.yaml [--key=value ...] [--dry-run] [--resume RUN]",
        description=RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run.add_argument("--dry-run", action="store_true", help="matched layers, optimizer steps and cost; trains nothing")
    run.add_argument("--resume", metavar="RUN", help="go on in this run folder, from its last.ckpt")
    commands.add_parser(
        "compare",
        help="several methods on one model: table, Pareto plot",
        usage="effdl compare METHOD... [--key=value ...]",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    copy = commands.add_parser("copy", help="write a recipe into the current folder")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("--plain", action="store_true", help="as a LightningCLI config that needs no `effdl run`")
    export = commands.add_parser("export", help="write the finished model of a checkpoint")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file or a run folder")
    export.add_argument("--format", default="model", help="model, program (torch.export), onnx; several with commas")
    export.add_argument("--output", metavar="FOLDER", help="default: `export` beside the checkpoint")
    export.add_argument("--config", metavar="FILE", help="default: config.yaml beside the checkpoint")
    commands.add_parser("doctor", help="packages, extras, hub and devices of this installation")
    return parser, dict(commands.choices)


def _dispatch(arguments: list[str]) -> int:
    parser, commands = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        raise ConfigurationError(f"no command {arguments[0]!r}. {suggest(arguments[0], commands)}".strip())
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command not in ("run", "compare"):
        raise ConfigurationError(f"effdl {args.command or ''}: {' '.join(rest)!r} is not understood here.")
    if args.version:
        import effdl

        print(effdl.__version__)
    elif args.command is None:
        parser.print_help()
    else:
        globals()[f"_{args.command}"](args, rest)
    return 0


def _list(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl._cli.show import list_methods

    list_methods()


def _show(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl._cli.show import show

    show(args.name)


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if name is None and args.resume is None:
        raise ConfigurationError("effdl run: name a method, a recipe or a YAML file first; `effdl list` shows all.")
    if args.dry_run and (args.resume is not None or name is None):
        raise ConfigurationError("effdl run: --dry-run starts from a name or a file, not from a run.")
    if name is not None:
        from effdl._cli.recipe import locate

        locate(name)  # a misspelt name is told before Lightning is imported
    if args.dry_run:
        from effdl._cli.dry_run import dry_run

        dry_run(name, rest)
    else:
        from effdl._cli.run import run

        run(name, rest, args.resume)


def _compare(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl import catalog

    count = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    for name in rest[:count]:
        catalog.find(name)  # a misspelt name is told before Lightning is imported
    from effdl._cli.compare import compare

    compare(rest[:count], rest[count:])


def _copy(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl._cli.copy import copy_recipe

    for path in copy_recipe(args.name, args.plain):
        print(path)


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl._cli.export import export

    export(args.checkpoint, args.format.split(","), args.output, args.config)


def _doctor(args: argparse.Namespace, rest: list[str]) -> None:
    from effdl._cli.show import doctor

    doctor()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it came from, however often a parser or Trainer wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _misconfiguration(error: BaseException) -> str | None:
    """What to tell the user, or ``None`` for an error that is not theirs."""
    for cause in _causes(error):
        if isinstance(cause, ConfigurationError) or type(cause).__name__ == "MisconfigurationException":
            return " ".join(str(cause).split())
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. ``arguments`` default to those of the process."""
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except Exception as error:
        message = _misconfiguration(error)
        if message is None:
            raise
        print(message if message.startswith("effdl ") else f"effdl: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

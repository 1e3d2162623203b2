"""clce-train: fine-tune an image model with one of the objectives."""

from __future__ import annotations

from collections.abc import Sequence

from .config import TrainConfig, add_options, command_parser, read_yaml
from .errors import run_command

_EPILOG = """\
examples:
  clce-train --data digits --objective clce --epochs 10 --output runs/digits
  clce-train --data DIR --model beit3_base_patch16_224.in22k_ft_in1k --pretrained --objective clce \\
             --images-per-class 4 --batch-size 256 --micro-batch-size 32 --amp bfloat16 --output runs/mine
  clce-train --config recipes/cub200-beit3-clce.yaml --data DIR
"""


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Options of the command line over those of --config over the defaults."""
    parser = command_parser(__doc__, _EPILOG)
    parser.add_argument("--config", metavar="FILE", help="recipe (YAML) that gives any of the options below")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    recipe = given.pop("config")
    options = read_yaml(recipe) if recipe else {}
    return TrainConfig.from_dict(options | given, recipe or "command line")


def main(arguments: Sequence[str] | None = None) -> int:
    def command() -> None:
        config = parse(arguments)
        from .loop import train  # after parsing: --help and wrong options answer at once

        train(config)

    return run_command("clce-train", command, "the same command with --resume goes on")

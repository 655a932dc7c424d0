"""The command line: `ctc-timm COMMAND`, `python -m ctc_timm COMMAND` and the scripts of a clone.

A command reads its flags, calls the function of the same name in `ctc_timm.api` with them as keyword arguments, and
says what to do next.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .. import __version__
from ..utils.errors import Stopped, UserError, nearest
from ..utils.memory import keep_freed_memory
from ..utils.settings import shorten
from ..utils.text import sanitize
from . import hints, zoo
from .flags import Parser, add_settings, as_flags, read_flags


class Command(NamedTuple):
    """A command."""

    settings: str  # module and class of its settings
    summary: str  # for the list of commands
    run: Callable[..., Any]  # called with what was typed


def _api(name: str) -> Callable[..., Any]:
    return lambda **given: getattr(import_module('ctc_timm.api'), name)(**given)


COMMANDS = {
    'train': Command('training:TrainSettings', 'train any timm model', hints.train),
    'validate': Command('measure:ValidateSettings', "measure a model's accuracy", _api('validate')),
    'linear-probe': Command(
        'measure:LinearProbeSettings', 'measure frozen features on other data sets', _api('linear_probe')
    ),
    'finetune': Command('training:FinetuneSettings', 'fine-tune a model on another data set', _api('finetune')),
    'dynamics': Command('measure:DynamicsSettings', 'measure every kept epoch of runs', _api('dynamics')),
    'detect': Command('dense:DetectSettings', "train a detector on a model's backbone", _api('detect')),
    'segment': Command('dense:SegmentSettings', "train a segmenter on a model's backbone", _api('segment')),
    'digit-scenes': Command('dense:ScenesSettings', 'write scenes of digits as COCO, VOC or ADE', hints.write_scenes),
    'embed': Command('measure:EmbedSettings', 'write the features of a folder or a data set', _api('embed')),
    'publish': Command('hub:PublishSettings', 'publish a run on the Hub', zoo.publish),
    'zoo list': Command('hub:ZooListSettings', 'show the catalogs of weights', zoo.show),
    'zoo add': Command('hub:ZooAddSettings', "catalog a run's folder or a repo of the Hub", zoo.add),
}
EXAMPLES = """
train
train -c cifar100_small --dataset hfds/FOLDER
train IMAGES --model resnet50 --epochs 100
train --resume runs/NAME
validate runs/NAME
validate resnet50 --data-dir IMAGES --split validation
linear-probe runs/NAME --target hfds/REPO_OR_FOLDER digits --shots 1 5 10
finetune resnet50 --data-dir IMAGES --train-fraction 0.1 1.0 --seeds 5
dynamics runs/SUPERVISED runs/CTC --target hfds/REPO_OR_FOLDER digits
detect
detect runs/NAME --data-dir COCO --detector maskrcnn --freeze-stages 2 --freeze-bn
segment
segment resnet50 --data-dir ADE --layout ade --reduce-zero-label
digit-scenes SCENES --layouts ade --img-size 128
embed runs/NAME --data-dir IMAGES --output features.parquet --logits
publish runs/NAME --repo-id USER/resnet50_ctc
"""
# What a file system may refuse although the command is right.
_OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def main(command: str = '', words: Sequence[str] | None = None) -> NoReturn:
    """Run a command, the first of the words by default, and exit with its code. The words are the command line's.

    Exit codes: 0; 1 for a run that cannot go on; 2 for bad input, told in one line; 75 for a run that was told to stop
    and saved its state; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if words is None else words)
    program, settings = Path(sys.argv[0]).name if command else 'ctc-timm', None
    try:
        if not command:
            command, words = _choose(words)
            program = f'ctc-timm {command}'
        settings = settings_class(command)
        _run(program, command, settings, words)
    except UserError as error:
        if os.environ.get('RANK', '0') == '0' or getattr(error, 'of_one_rank', False):
            _print_error(program, as_flags(str(error), settings), '' if isinstance(error, Stopped) else 'error: ')
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in _OUT_OF_ROOM | _REFUSED:
            raise
        _print_error(program, f'{os.fsdecode(error.filename)}: {error.strerror}')
        sys.exit(1 if error.errno in _OUT_OF_ROOM else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _choose(words: list[str]) -> tuple[str, list[str]]:
    """The command that a command line begins with, and its other words."""
    commands = '\n'.join(f'  {name:<13} {command.summary}' for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='ctc-timm',
        description='Contrastive temporal coding (CTC) for every timm backbone.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{commands}\n\n'ctc-timm COMMAND --help' lists the flags of a command.",
        usage='ctc-timm COMMAND ...',
    )
    parser.add_argument('--version', action='version', version=f'ctc-timm {__version__}')
    if not words or words[0].startswith('-'):
        parser.parse_args(words or ['--help'])
    name = ' '.join(words[:2]) if words[0] == 'zoo' else words[0]
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        raise UserError(f'{shorten(name)} is not a command{near}; the commands are {", ".join(COMMANDS)}')
    return name, words[len(name.split()) :]


def settings_class(command: str) -> type:
    """The dataclass of a command's settings."""
    wing, _, name = COMMANDS[command].settings.partition(':')
    return getattr(import_module(f'ctc_timm.{wing}.settings'), name)


def _run(program: str, command: str, settings: type, words: list[str]) -> None:
    summary = COMMANDS[command].summary
    examples = [f'\n  ctc-timm {line}' for line in EXAMPLES.splitlines() if f'{line} '.startswith(f'{command} ')]
    parser = Parser(
        prog=program,
        description=f'{summary[0].upper()}{summary[1:]}.',
        epilog=f'examples:{"".join(examples)}' if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(parser, settings, folder=settings.__name__ == 'TrainSettings')
    given = read_flags(parser, settings, words)

    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # a Hub out of reach is reported once, not at each retry
    keep_freed_memory()
    try:
        COMMANDS[command].run(**given)
        if 'torch' in sys.modules:
            import_module('ctc_timm.utils.distributed').leave_process_group()
    except RuntimeError:  # PyTorch raises the death of a data loading process wherever the program is
        from ..data.decoding import translate_errors

        with translate_errors():
            raise


def _print_error(program: str, message: str, what: str = 'error: ') -> None:
    """Print an error as one line of what a terminal can show: what was typed may hold anything."""
    print(f'{program}: {what}{sanitize(" ".join(message.split()))}', file=sys.stderr)

"""The sets that features are transferred to: flags, opening, and a check before anything is computed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..cli.arguments import positive_int
from ..data import digits
from ..data.datasets import READERS, DatasetSplit, check_classes, open_split
from ..utils.errors import UserError, nearest
from ..utils.text import file_name
from .features import SplitImages
from .sets import Labeled, check_sets

COCO = 'coco:'


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which sets to transfer to, beside timm's data flags."""
    group = parser.add_argument_group('Target')
    group.add_argument(
        '--target',
        nargs='+',
        metavar='NAME',
        help='data sets or folders to transfer to, of dynamics also coco:FOLDER; --dataset or --data-dir, else digits, '
        'when not given',
    )
    group.add_argument('--max-train', type=positive_int, metavar='N', help='draw so many training images of a target')
    group.add_argument('--max-test', type=positive_int, metavar='N', help='draw so many test images of a target')


def target_names(args: argparse.Namespace) -> list[str]:
    """The targets that the flags name, each once."""
    named = args.target or [name for name in (args.dataset or args.data_dir,) if name] or [digits.NAME]
    return list(dict.fromkeys(named))


def coco_folders(names: Sequence[str]) -> list[str]:
    """Of targets those to detect objects in: coco:FOLDER."""
    return [name for name in names if name.startswith(COCO)]


class OpenSplit:
    """A split that several models are measured on, each through its own transform.

    Args:
        source: The opened split.
        args: Data flags.
        accelerator: Device and processes.
        most: Draw so many images.
    """

    def __init__(
        self, source: DatasetSplit, args: argparse.Namespace, accelerator: Accelerator, most: int | None = None
    ) -> None:
        self.source = source
        self._args = args
        self._accelerator = accelerator
        self._most = most
        self._config = ''
        self._images: SplitImages | None = None

    def images(self, config: dict[str, Any]) -> SplitImages:
        """The images under a transform; those of the last transform are kept."""
        text = json.dumps(config, sort_keys=True, default=str)
        if self._images is None or text != self._config:
            self._images = None  # frees the last one's memory first
            self._images = SplitImages(self.source, self._args, config, self._accelerator, self._most)
            self._config = text
        return self._images


class TransferSet:
    """A set to transfer to: what probes are fitted on, and what they are measured on.

    Args:
        name: A data set, or a folder of images.
        args: Data and target flags.
        channels: Of the images that the model takes.
        accelerator: Device and processes.
        flag: What to call the name in error messages.

    Attributes:
        train: Probes are fitted on it.
        test: They are measured on it.
        num_classes: C.
        class_names: Of each class.
        slug: The name as a folder's name.

    Raises:
        UserError: Nothing there; one class only; a class in one split alone.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        channels: int,
        accelerator: Accelerator,
        flag: str = '--target',
    ) -> None:
        own = argparse.Namespace(**vars(args))
        own.in_chans, own.data, own.data_dir, own.dataset = channels, None, args.data_dir, name
        if name != digits.NAME and name.split('/')[0].lower() not in READERS:
            if not Path(name).exists():
                near = nearest(name, (digits.NAME, *(f'{reader}/' for reader in READERS)))
                raise UserError(
                    f'{flag} {name}: neither a data set nor a folder{near}; '
                    f'use digits, {"/NAME, ".join(READERS)}/NAME, or a folder of images'
                )
            own.data_dir, own.dataset = name, ''
        self.name = name
        self._flag = flag
        self.slug = slug(name)
        with accelerator.main_process_first():
            self.train = OpenSplit(open_split(own, own.train_split), own, accelerator, own.max_train)
            self.test = OpenSplit(open_split(own, own.val_split, unsplit=False), own, accelerator, own.max_test)
        sources = self.train.source, self.test.source
        check_classes(*sources)
        self.num_classes = max(source.num_classes or 0 for source in sources)
        names = {**sources[1].class_names, **sources[0].class_names}
        self.class_names = [names.get(i, str(i)) for i in range(self.num_classes)]
        if all(source.labels_N is not None for source in sources):
            train, test = (_without_features(source) for source in sources)
            self.check(train, test)

    def check(self, train: Labeled, test: Labeled) -> None:
        """Refuse features or labels on which no probe can be fitted or measured.

        Raises:
            UserError: See `sets.check_sets`.
        """
        check_sets(train, test, self.num_classes, f'{self._flag} {self.name}', self.class_names)


def open_targets(
    names: Sequence[str], args: argparse.Namespace, channels: int, accelerator: Accelerator
) -> list[TransferSet]:
    """Open all targets, so that a mistake in the last shows before the first is measured.

    Raises:
        UserError: One of them cannot be had or measured.
    """
    return [TransferSet(name, args, channels, accelerator) for name in names]


def _without_features(source: DatasetSplit) -> Labeled:
    """Labels alone, which show most of what can be wrong before anything is computed."""
    assert source.labels_N is not None
    return Labeled(torch.empty(len(source.labels_N), 0), source.labels_N)


def slug(name: str) -> str:
    """The end of a path or a data set's name, as a folder's name."""
    return file_name(Path(name.rstrip('/')).name, 'target')

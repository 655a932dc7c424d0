"""The sets that features are transferred to: opened, and checked before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import digits
from ..data.datasets import READERS, check_classes, open_split
from ..data.settings import DataSettings, LoaderSettings, TargetSettings
from ..utils.errors import UserError, nearest
from ..utils.text import file_name
from .features import SplitImages
from .sets import LabeledFeatures, check_sets

COCO = 'coco:'


def target_names(target: TargetSettings, data: DataSettings) -> list[str]:
    """Name the targets, each once: those of `target`, or the data set or folder given, or the embedded digits."""
    return list(dict.fromkeys(target.target or [data.dataset or data.data_dir or digits.NAME]))


class TransferSet:
    """A set to transfer to: probes are fitted on its training images, and measured on its test images.

    Args:
        name: A data set, or a folder of images.
        data: Splits, columns and root; its data set or folder is replaced by `name`.
        loader: Batch size and processes.
        channels: Of the images that the model takes.
        accelerator: Device and processes.
        most: Draw this many training and this many test images; all where None.
        setting: That names the set, for messages.

    Raises:
        UserError: Nothing there; one class only; a class in one split alone.
    """

    def __init__(
        self,
        name: str,
        data: DataSettings,
        loader: LoaderSettings,
        channels: int,
        accelerator: Accelerator,
        most: tuple[int | None, int | None] = (None, None),
        setting: str = 'target',
    ) -> None:
        self.name, self.slug, self.what = name, slug(name), f'`{setting}` {name}'
        data = replace(data, in_chans=channels, dataset=name)
        if name != digits.NAME and name.split('/')[0].lower() not in READERS:
            if not Path(name).exists():
                near = nearest(name, (digits.NAME, *(f'{reader}/' for reader in READERS)))
                raise UserError(
                    f'{self.what}: neither a data set nor a folder{near}; '
                    f'use digits, {"/NAME, ".join(READERS)}/NAME, or a folder of images'
                )
            data = replace(data, data_dir=name, dataset='')
        with accelerator.main_process_first():
            sources = open_split(data, data.train_split), open_split(data, data.val_split, unsplit=False)
        check_classes(*sources)
        self._splits = list(zip(sources, most))
        self._loader, self._accelerator = loader, accelerator
        self.num_classes = max(source.num_classes or 0 for source in sources)
        names = sources[1].class_names | sources[0].class_names
        self.class_names = [names.get(i, str(i)) for i in range(self.num_classes)]
        labels = [source.labels_N for source in sources if source.labels_N is not None]
        if len(labels) == 2:  # labels alone show most mistakes, before any features are computed
            self.check(*(LabeledFeatures(torch.empty(len(labels_N), 0), labels_N) for labels_N in labels))

    def images(self, config: dict[str, Any]) -> tuple[SplitImages, SplitImages]:
        """Return training and test images through a model's transform."""
        train, test = (SplitImages(s, self._loader, config, self._accelerator, most) for s, most in self._splits)
        return train, test

    def check(self, train: LabeledFeatures, test: LabeledFeatures) -> None:
        """Refuse features or labels on which no probe can be fitted or measured, see `check_sets`."""
        check_sets(train, test, self.num_classes, self.what, self.class_names)


def slug(name: str) -> str:
    """Make a folder's name of the end of a path or of a data set's name."""
    return file_name(Path(name.rstrip('/')).name, 'target')

"""The sets that features are transferred to: opened, and checked before anything is computed. Letters: N images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data import digits
from ..data.datasets import READERS, open_split, open_test
from ..data.settings import DataSettings, LoaderSettings, TargetSettings
from ..utils.errors import UserError, nearest
from ..utils.text import file_name
from .features import LabeledFeatures, SplitImages, check_finite


def target_names(target: TargetSettings, data: DataSettings) -> list[str]:
    """Name the targets, each once: those of `target`, or the data set or folder given, or the embedded digits."""
    return list(dict.fromkeys(target.target or [data.dataset or data.data_dir or digits.NAME]))


class TransferSet:
    """A set to transfer to: probes are fitted on its training images, and measured on its test images.

    `name`, a data set or a folder of images, replaces that of `data`; `setting` names it in messages. Of its images, of
    `channels` channels, `most` for training and test are drawn. A UserError: nothing there; one class only; a class in
    one split alone.
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
            train = open_split(data, data.train_split)
            sources = train, open_test(data, train.class_names)
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


def check_sets(
    train: LabeledFeatures,
    test: LabeledFeatures,
    num_classes: int,
    what: str = 'the target',
    class_names: Sequence[str] = (),
) -> None:
    """Refuse sets on which no probe can be fitted or measured; messages begin with `what`, the data set.

    A class without an image in either set is allowed.

    Raises:
        UserError: No images; a label outside 0 to C - 1; one class; a class in one set alone; features not finite.
    """

    def label(number: int) -> str:
        return f'class {number}' if not class_names else f'class {number} ({class_names[number]!r})'

    parts, present = {'training': train, 'test': test}, {}
    for name, part in parts.items():
        if not len(part):
            raise UserError(f'{what}: no {name} images')
        classes = part.labels_N.unique().tolist()
        if classes[0] < 0 or classes[-1] >= num_classes:
            span = f'from {classes[0]} to {classes[-1]}'
            raise UserError(f'{what}: {name} labels run {span}, but must lie between 0 and {num_classes - 1}')
        present[name] = set(classes)
    if len(present['training'] | present['test']) < 2:
        only = label(int(train.labels_N[0]))
        raise UserError(f'{what}: every image is of {only}, but at least two classes are needed')
    for name, other in (('test', 'training'), ('training', 'test')):
        if absent := sorted(present[other] - present[name]):
            classes = label(absent[0]) + (f' and {len(absent) - 1} more' if len(absent) > 1 else '')
            raise UserError(
                f'{what}: no {name} images of {classes}, of which there are {other} images; both splits must hold the '
                'same classes'
            )
    for name, part in parts.items():
        check_finite(part.features_ND, f'{what}: the {name} features')

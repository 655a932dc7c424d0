"""A place that detection and segmentation still import from, until they are built on `training.trainer.Trainer`."""

from __future__ import annotations

from typing import Any


class Fitting:
    """Nothing any more: use `training.trainer.Trainer`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError('use training.trainer.Trainer')

#!/usr/bin/env python3
"""Time of a pass in PyTorch's own layout, channels-last, and with batch norms folded, side by side in one run.

Every round takes each pass once: forward and backward in training mode, then forward in evaluation mode. The times are
those of the processor. `models/layout.py` chooses a layout by these figures.

    python benchmarks/layout.py --models tf_efficientnet_lite0 resnet18 resnet50
"""

from __future__ import annotations

import time
from collections.abc import Callable

import timm
import torch

import ctc_timm  # noqa: F401  registers the networks for small images
from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.folding import fold_batch_norms
from ctc_timm.models.layout import prefers_channels_last
from ctc_timm.utils.memory import keep_freed_memory
from harness import finish, read_flags, timing_table


def passes(name: str, batch_size: int, img_size: int, train: bool) -> dict[str, Callable[[], object]]:
    """A pass by the layout and kind of the model."""
    images = torch.randn(batch_size, 3, img_size, img_size)
    plain, last = (timm.create_model(name).train(train) for _ in range(2))
    last.to(memory_format=torch.channels_last)
    if train:
        return {'own': lambda: plain(images).sum().backward(), 'last': lambda: last(images).sum().backward()}
    models = {'own': plain, 'last': last}
    models |= {f'{layout}, folded': fold_batch_norms(model, images[:2]) for layout, model in models.items()}
    return {layout: torch.no_grad()(lambda m=model: features_and_logits(m, images)) for layout, model in models.items()}


if __name__ == '__main__':
    keep_freed_memory()
    args = read_flags(
        __doc__, models=['tf_efficientnet_lite0'], batch_size=32, img_size=64, rounds=6, threads=1, output='',
        compare='',
    )  # fmt: skip
    torch.set_num_threads(args.threads)
    tables = {}
    for name in args.models:
        chosen = 'channels-last' if prefers_channels_last(timm.create_model(name), torch.device('cpu')) else 'own'
        for mode in ('training', 'evaluation'):
            steps = passes(name, args.batch_size, args.img_size, mode == 'training')
            title = f'{name}, {mode}, chosen: {chosen}'
            tables[title] = timing_table(steps, args.rounds, title, clock=time.process_time)
    finish(tables, args)

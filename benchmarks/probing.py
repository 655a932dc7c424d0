#!/usr/bin/env python3
"""Cost of probing every kept epoch of a run: ridge on cached features against the published protocol.

The published protocol trains a linear head by SGD for 30 epochs and passes every image through the frozen network in
each of them. It is timed here on a few of the epochs, on images that are decoded already, which favors it. On the
others the same head is trained on cached features, which gives the same kind of accuracy, so that the two probes'
rankings of all epochs can be compared.

    python benchmarks/probing.py runs/NAME --target hfds/FOLDER
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from harness import Table, read_flags, show
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

from ctc_timm.data.transforms import data_config
from ctc_timm.measure.features import SplitImages, compute_features
from ctc_timm.measure.probes import probe
from ctc_timm.measure.settings import LinearProbeSettings
from ctc_timm.measure.transfer_sets import TransferSet, target_names
from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.loading import load_model
from ctc_timm.runs import Run
from ctc_timm.utils.settings import build

EPOCHS, BATCH = 30, 512


def through_network(model: nn.Module, train: SplitImages, test: SplitImages, head: nn.Linear) -> list[float]:
    """Test accuracy after each epoch of the published protocol, every image through the network each time."""
    optimizer = torch.optim.SGD(head.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    images, labels = (torch.cat(part) for part in zip(*train.batches('images')))
    curve = []
    for _ in tqdm(range(EPOCHS), 'published protocol'):
        for rows in torch.randperm(len(labels)).split(BATCH):
            with torch.no_grad():
                features = features_and_logits(model, images[rows])[0]
            loss = nn.functional.cross_entropy(head(features), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            hits = [head(features_and_logits(model, x)[0]).argmax(1) == y for x, y in test.batches('test')]
        curve.append(100 * float(torch.cat(hits).float().mean()))
    return curve


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def measure(settings: LinearProbeSettings, count: int) -> dict[str, Any]:
    """Time and accuracy of both ways, an epoch a row; `count` epochs are measured through the network too."""
    accelerator, run = Accelerator(), Run(str(settings.source.source))
    files = run.kept_weights()
    epochs = list(files)
    chosen = {epochs[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)}
    config = data_config(settings.data, load_model(files[epochs[0]]).model)
    name, most = target_names(settings.target, settings.data)[0], (settings.target.max_train, settings.target.max_test)
    target = TransferSet(name, settings.data, settings.loader, config['input_size'][0], accelerator, most)
    splits = target.images(config)
    for images in splits:
        list(images.batches('decode'))  # both ways start from decoded images
    rows = []
    for epoch, file in tqdm(files.items(), 'epochs'):
        model = load_model(file).model
        train, train_s = timed(compute_features, model, splits[0], accelerator)
        test, test_s = timed(compute_features, model, splits[1], accelerator)
        (ridge,), ridge_s = timed(probe, 'ridge', train, test, target.num_classes)
        (last, best), sgd_s = timed(probe, 'sgd', train, test, target.num_classes)
        row = {'epoch': epoch, 'features_s': train_s + test_s, 'ridge_s': ridge_s, 'ridge': ridge['top1']}
        row |= {'sgd_on_features_s': sgd_s, 'sgd_last': last['top1'], 'sgd_best': best['top1']}
        if epoch in chosen:
            torch.manual_seed(0)
            head = nn.Linear(train.features_ND.shape[1], target.num_classes)
            curve, seconds = timed(through_network, model, *splits, head)
            row |= {'network_s': seconds, 'network_last': curve[-1], 'network_best': max(curve)}
        rows.append(row)
    return {'run': run.path.name, 'target': name, 'train': len(train), 'test': len(test), 'rows': rows}


def report(results: dict[str, Any]) -> None:
    """Print seconds of both ways, and how the rankings of epochs agree."""
    rows: list[dict[str, Any]] = results['rows']
    table: Table = {}
    for row in rows:
        ridge, network = row['features_s'] + row['ridge_s'], row.get('network_s')
        table[f'epoch {row["epoch"]}'] = {
            'ridge, s': ridge,
            'through the network, s': network,
            'times as long': network and network / ridge,
            'points above the same on features': network and row['network_last'] - row['sgd_last'],
        }
    show({f'{results["train"]} training and {results["test"]} test images': table})
    for name in ('sgd_last', 'sgd_best'):
        rank = spearmanr([row['ridge'] for row in rows], [row[name] for row in rows]).statistic
        print(f'Spearman of ridge with {name}: {rank:.3f}')


if __name__ == '__main__':
    args = read_flags(__doc__, settings=LinearProbeSettings, through_network=2)
    output = args.values.pop('output', '')
    results = measure(build(LinearProbeSettings, args.values), args.through_network)
    if output:
        Path(output).write_text(json.dumps(results, indent=1) + '\n')
    report(results)

#!/usr/bin/env python3
"""Cost of probing every kept epoch of a run: ridge on cached features against the published protocol.

The published protocol trains a linear head by SGD for 30 epochs and passes every image through the frozen network in
each of them. Those passes are timed here on the first few epochs, on images that are decoded already, which favors it.
Its head is trained on the cached features of all epochs, so that the two probes' rankings can be compared.

    python benchmarks/probing.py runs/NAME --target hfds/FOLDER
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from scipy.stats import spearmanr
from tqdm import tqdm

from ctc_timm.data.transforms import data_config
from ctc_timm.measure.features import compute_features
from ctc_timm.measure.probes import probe
from ctc_timm.measure.settings import LinearProbeSettings
from ctc_timm.measure.transfer_sets import TransferSet, target_names
from ctc_timm.models.loading import load_model
from ctc_timm.runs import Run
from ctc_timm.utils.settings import build
from harness import Table, read_flags, show

EPOCHS = 30


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a function returns, and its seconds."""
    start = time.perf_counter()
    return function(*args), time.perf_counter() - start


def measure(settings: LinearProbeSettings, count: int) -> dict[str, Any]:
    """Time and accuracy of both ways, an epoch a row; the published passes are timed on `count` epochs."""
    accelerator, run = Accelerator(), Run(str(settings.source.source))
    files = run.kept_weights()
    config = data_config(settings.data, load_model(files[max(files)]).model)
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
        if len(rows) < count:
            passes = [images for _ in range(EPOCHS) for images in splits]
            row['network_s'] = sgd_s + sum(timed(compute_features, model, images, accelerator)[1] for images in passes)
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

#!/usr/bin/env python3
"""Cost of probing every kept epoch of a run: ridge on cached features against the published protocol.

The published protocol trains a linear head by SGD for 30 epochs and passes every image through the frozen
network in each of them. It is timed here on a few of the epochs, on images that are already decoded, which
favours it; on the others the same head is trained on cached features, which gives the same kind of accuracy, so
that the two probes' rankings of all epochs can be compared.

    python benchmarks/probing.py runs/NAME --target hfds/FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from scipy.stats import spearmanr
from tqdm import tqdm

from ctc_timm.cli.arguments import Parser, parse, positive_int, run_script
from ctc_timm.data.transforms import data_config
from ctc_timm.measure.features import SplitImages, compute_features
from ctc_timm.measure.probes import probe
from ctc_timm.measure.sets import Labeled
from ctc_timm.measure.transfer_sets import TransferSet, add_target_arguments, target_names
from ctc_timm.models.backbones import features_and_logits
from ctc_timm.models.loading import load_model

EPOCHS, BATCH = 30, 512


def through_network(
    model: torch.nn.Module, train: SplitImages, test: SplitImages, dim: int, classes: int, bar: tqdm
) -> list[float]:
    """Test accuracy after each epoch of the published protocol, every image through the network each time."""
    torch.manual_seed(0)
    head = torch.nn.Linear(dim, classes)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    images, labels = (torch.cat(part) for part in zip(*train.batches('images')))
    curve = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            with torch.no_grad():
                features = features_and_logits(model, images[rows])[0]
            loss = torch.nn.functional.cross_entropy(head(features), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            hits = [
                head(features_and_logits(model, batch)[0]).argmax(1) == targets
                for batch, targets in test.batches('test')
            ]
        curve.append(100 * float(torch.cat(hits).float().mean()))
        bar.update()
    return curve


def measure(args: argparse.Namespace) -> dict:
    """Time and accuracy of both ways, an epoch a row."""
    accelerator = Accelerator()
    files = sorted((Path(args.run) / 'weights').glob('epoch-*.safetensors'))
    chosen = {
        files[round(i * (len(files) - 1) / max(args.through_network - 1, 1))] for i in range(args.through_network)
    }
    first = load_model(str(files[0]))
    config = data_config(args, first.model)
    target = TransferSet(target_names(args)[0], args, config['input_size'][0], accelerator)
    splits = [target.train.images(config), target.test.images(config)]
    for images in splits:
        list(images.batches('decode'))  # both ways start from decoded images
    rows = []
    bar = tqdm(total=len(files) + EPOCHS * len(chosen), desc='epochs')
    for file in files:
        model = load_model(str(file)).model
        started = time.perf_counter()
        seen = [compute_features(model, images, accelerator) for images in splits]
        train, test = (Labeled(features.features_ND, features.labels_N) for features in seen)
        extracted = time.perf_counter()
        (ridge,) = probe('ridge', train, test, target.num_classes)
        solved = time.perf_counter()
        by_name = {result.method: result for result in probe('sgd', train, test, target.num_classes)}
        row = {
            'epoch': int(file.stem.split('-')[1]),
            'features_s': extracted - started,
            'ridge_s': solved - extracted,
            'ridge': ridge.scores['top1'].value,
            'sgd_on_features_s': time.perf_counter() - solved,
            'sgd_last': by_name['sgd-last'].scores['top1'].value,
            'sgd_best': by_name['sgd-best'].scores['top1'].value,
        }
        bar.update()
        if file in chosen:
            started = time.perf_counter()
            curve = through_network(model, *splits, train.features_ND.shape[1], target.num_classes, bar)
            row.update(network_s=time.perf_counter() - started, network_last=curve[-1], network_best=max(curve))
        rows.append(row)
    bar.close()
    return {'run': Path(args.run).name, 'target': target.name, 'train': len(train), 'test': len(test), 'rows': rows}


def report(results: dict) -> None:
    """Print seconds, their ratio, and how the rankings agree."""
    rows = results['rows']
    timed = [row for row in rows if 'network_s' in row]
    cheap = statistics.median(row['features_s'] + row['ridge_s'] for row in rows)
    print(f'{len(rows)} kept epochs, {results["train"]} training and {results["test"]} test images')
    print(f'ridge on cached features: {cheap:.2f} s an epoch (median), {cheap * len(rows):.0f} s for all')
    if timed:
        same = [row['network_s'] / (row['features_s'] + row['ridge_s']) for row in timed]
        dear = statistics.mean(row['network_s'] for row in timed)
        print(f'published protocol through the network: {dear:.1f} s an epoch, mean of {len(timed)} timed')
        print(f'ratio, median over the epochs timed both ways: {statistics.median(same):.1f}')
        gap = max(abs(row['network_last'] - row['sgd_last']) for row in timed)
        print(f'largest difference to the same protocol on cached features: {gap:.2f} points')
    for name in ('sgd_last', 'sgd_best'):
        rank = spearmanr([row['ridge'] for row in rows], [row[name] for row in rows]).statistic
        print(f'Spearman of ridge with {name}: {rank:.3f}')


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    parser.add_argument('run', metavar='RUN', help='folder of a run with kept epochs')
    parser.add_argument(
        '--through-network',
        type=positive_int,
        default=2,
        metavar='N',
        help='epochs on which the published way is timed',
    )
    parser.add_argument('--output', default='', metavar='FILE.json', help='keep the numbers')
    add_target_arguments(parser)
    args = parse(parser)
    results = measure(args)
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + '\n')
    report(results)


if __name__ == '__main__':
    run_script(main)

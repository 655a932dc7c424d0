#!/usr/bin/env python3
"""Put the weights of a finished run into the package: in half precision, catalogd with hash, recipe and numbers.

The numbers are those of the halved weights, measured by validate.py and transfer/linear_probe.py under the new name, as
anyone can repeat them.

    python benchmarks/ship.py runs/CTC --name cifar_wrn_16_2_ctc --source hfds/CIFAR100 --targets hfds/CIFAR10 digits
    python benchmarks/ship.py runs/VANILLA --name cifar_wrn_16_2.vanilla --source hfds/CIFAR100 --targets digits
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.hub.collect import entry_of_run
from ctc_timm.models import catalog as catalog
from ctc_timm.models.catalog import BASELINES, SHIPPED, SUFFIX, Entry
from ctc_timm.models.download import sha256
from ctc_timm.utils.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = SHIPPED.with_name('weights')


def halve(run: Path, file: Path) -> None:
    """The last weights of a run in half precision; counters stay whole numbers."""
    tensors = load_file(run / 'last.safetensors')
    WEIGHTS.mkdir(exist_ok=True)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, file, metadata={'format': 'pt'}
    )
    file.chmod(0o644)  # safetensors' files are their owner's alone, and so they would lie in a wheel


def enter(entry: Entry) -> None:
    """Put an entry into its catalog, in place of one of the same name."""
    file = SHIPPED if entry.name.partition('.')[0].endswith(SUFFIX) else BASELINES
    catalog.save(file, {**catalog.load(file), entry.name: entry}.values())


def measured(script: str, name: str, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """What a script's results.json files say of the model of that name."""
    command = [sys.executable, str(ROOT / script), '--model', name, '--pretrained', '--output', str(folder), *flags]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise RunError(f'{script} failed for {name}; its catalog entry has no numbers')
    return [json.loads(file.read_text()) for file in sorted(folder.rglob('results.json'))]


def results(name: str, source: str, targets: list[str]) -> list[dict[str, Any]]:
    """Source and target accuracies as a catalog keeps them."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (found,) = measured('validate.py', name, Path(folder) / 'source', '--dataset', source, '--split', 'test')
        dataset = f'{Path(source).name} {found["split"]}'
        rows += [{'dataset': dataset, 'metric': key, 'value': round(found[key], 2)} for key in ('top1', 'top5')]
        flags = ['--target', *targets, '--probes', 'ridge', '--no-cache']
        for found in measured('transfer/linear_probe.py', name, Path(folder) / 'targets', *flags):
            value = round(found['rows'][0]['top1'], 2)
            rows.append({'dataset': Path(found['target']).name, 'metric': 'ridge probe top1', 'value': value})
    return rows


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, metavar='RUN', help='folder of a finished run')
    parser.add_argument('--name', required=True, help='ARCH_ctc[.TAG], or ARCH.TAG for plain training')
    parser.add_argument('--source', required=True, metavar='NAME', help='the data set it was trained on')
    parser.add_argument('--targets', nargs='+', required=True, metavar='NAME', help='data sets to transfer to')
    parser.add_argument('--license', default='apache-2.0', metavar='ID', help="of the weights, by the Hub's identifier")
    args = parse(parser)
    file = WEIGHTS / f'{args.name}.safetensors'
    halve(args.run, file)
    facts = entry_of_run(str(args.run), '', 'any')
    entry = replace(
        facts, name=args.name, path=str(file.absolute()), sha256=sha256(file), license=args.license, results=[]
    )
    enter(entry)
    enter(replace(entry, results=results(args.name, args.source, args.targets)))
    print(f'{args.name}: {file.stat().st_size / 2**20:.1f} MiB in {file}')


if __name__ == '__main__':
    run_script(main)

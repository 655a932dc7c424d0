#!/usr/bin/env python3
"""Put the weights of a finished run into the package: in half precision, in a catalog with hash, recipe and numbers.

The numbers are those of the halved weights, measured by `ctc-timm validate` and `ctc-timm linear-probe` under the new
name, as anyone can repeat them.

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

from ctc_timm.api import recipe_settings
from ctc_timm.hub.collect import entry_of_run
from ctc_timm.models import catalog
from ctc_timm.utils.files import sha256
from harness import read_flags


def enter(entry: catalog.Entry) -> None:
    """Put an entry into its catalog, in place of one of the same name."""
    file = catalog.SHIPPED if catalog.NAME.fullmatch(entry.name) else catalog.BASELINES
    catalog.save(file, {**catalog.load(file), entry.name: entry}.values())


def measure(command: str, name: str, *flags: str) -> list[dict[str, Any]]:
    """Measure the model of that name by a command; the contents of its results.json files."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, '-m', 'ctc_timm', command, name, '--output', folder, *flags]
        subprocess.run(words, check=True)
        return [json.loads(file.read_text()) for file in sorted(Path(folder).rglob('results.json'))]


if __name__ == '__main__':
    args = read_flags(__doc__, 'run', name='', source='hfds/CIFAR100', targets=['digits'], license='apache-2.0')
    file = catalog.SHIPPED.with_name('weights') / f'{args.name}.safetensors'
    tensors = load_file(Path(args.run) / 'last.safetensors').items()  # counters stay whole numbers
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors}
    save_file(halved, file, metadata={'format': 'pt'})
    file.chmod(0o644)  # safetensors makes files that only their owner can read, and a wheel would keep that

    entry = entry_of_run(args.run, recipe_settings())
    entry = replace(entry, name=args.name, path=str(file), sha256=sha256(file), license=args.license, results=[])
    enter(entry)
    (found,) = measure('validate', args.name, '--dataset', args.source, '--split', 'test')
    dataset = f'{Path(args.source).name} {found["split"]}'
    rows = [{'dataset': dataset, 'metric': key, 'value': round(found[key], 2)} for key in ('top1', 'top5')]
    for found in measure('linear-probe', args.name, '--target', *args.targets, '--probes', 'ridge', '--no-cache'):
        value = round(found['rows'][0]['top1'], 2)
        rows.append({'dataset': Path(found['target']).name, 'metric': 'ridge probe top1', 'value': value})
    enter(replace(entry, results=rows))
    print(f'{args.name}: {file.stat().st_size / 2**20:.1f} MiB in {file}')

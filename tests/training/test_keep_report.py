"""What a run reports to have kept of its start's transfer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ctc_timm
from ctc_timm.runs import Run
from ctc_timm.training.build import build_trainer, train
from ctc_timm.utils.errors import UserError
from runs import forget_processes

Flags = Callable[..., Any]
WORDS = '--mode vanilla --epochs 2 --checkpoint-hist 9 --monitor-images 1000000'


def probed(weights: Path, target: str) -> float:
    """Top-1 by the command that measures whole sets."""
    forget_processes()
    (row,) = ctc_timm.linear_probe(weights, target=[target], probes=['ridge'], workers=0, no_cache=True)
    return row['top1']


def test_before_during_and_after(
    flags: Flags, tiny: list[str], image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers of the start and of the end are those of the probe on the weights; a resume gives the same files."""
    base = train(flags(*tiny, f'--mode vanilla --epochs 1 --output {tmp_path} --experiment base'))
    start = f'--initial-checkpoint {base.last_weights} --keep-report digits {image_folder} --output {tmp_path}'
    forget_processes()
    with caplog.at_level('INFO', 'ctc_timm'):
        run = train(flags(*tiny, WORDS, start, '--experiment run'))
    before, after = json.loads((run.path / 'start.json').read_text()), run.rows()[-1]
    for target, name in (('digits', 'digits'), (str(image_folder), 'images')):
        assert before[f'keep_{name}'] == pytest.approx(probed(base.last_weights, target))
        assert float(after[f'eval_keep_{name}']) == pytest.approx(probed(run.last_weights, target))
    assert before['top1'] == pytest.approx(float(base.rows()[-1]['eval_top1']))
    now = [float(after[f'eval_keep_{name}']) for name in ('digits', 'images')]
    then = [before[f'keep_{name}'] for name in ('digits', 'images')]
    line = f"kept {100 * sum(now) / sum(then):.0f}% of the start's transfer: digits {now[0]:.1f} of {then[0]:.1f}"
    assert line in caplog.text and f'; source {float(after["eval_top1"]):.1f}' in caplog.text
    assert Image.open(run.plots / 'kept.png').size[0] > 500

    shutil.copytree(run.path, tmp_path / 'cut')
    shutil.rmtree(tmp_path / 'cut' / 'state' / 'epoch-0001')
    forget_processes()
    build_trainer(flags(*tiny, WORDS, start, f'--resume {tmp_path / "cut"}')).fit()
    cut = Run(tmp_path / 'cut')
    for file in ('start.json', 'summary.csv', 'metrics.jsonl', 'last.safetensors'):
        assert (cut.path / file).read_bytes() == (run.path / file).read_bytes()


def test_what_it_refuses(flags: Flags, tiny: list[str], image_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(image_folder, tmp_path / 'other' / 'images')
    where = f'--mode vanilla --epochs 1 --output {tmp_path}'
    with pytest.raises(UserError, match='`keep_report` .*: several sets end in the same name; rename one'):
        train(flags(*tiny, where, f'--experiment run --keep-report {image_folder} {other}'))
    assert not (tmp_path / 'run').exists()
    with pytest.raises(UserError, match='`keep_report` nowhere: neither a data set nor a folder'):
        train(flags(*tiny, where, '--experiment run --keep-report digits nowhere'))
    train(flags(*tiny, where, '--experiment run'))
    with pytest.raises(UserError, match='`keep_report` digits: .* was started without it'):
        build_trainer(flags(*tiny, where, f'--resume {tmp_path / "run"} --epochs 2 --keep-report digits'))

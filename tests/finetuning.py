"""What tests of fine-tuning share by name; the run that it starts from is a fixture in training/conftest.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctc_timm.cli.flags import Parser, add_settings, read_flags
from ctc_timm.training.settings import FinetuneSettings
from ctc_timm.utils.settings import build
from ctc_timm.utils.yaml_files import read_recipe

RECIPE = '-c finetune_digits --train-split train[:128] --val-split validation[:70] -b 32 --epochs 2'
TARGET = RECIPE.split()
STEM = ('conv1.', 'bn1.')  # of timm's ResNets


def read(*words: Any) -> FinetuneSettings:
    """The settings that these words of `ctc-timm finetune` mean."""
    parser = Parser()
    add_settings(parser, FinetuneSettings)
    given = read_flags(parser, FinetuneSettings, [str(word) for word in words])
    return build(FinetuneSettings, {**read_recipe(given.pop('config')), **given})


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'results.json').read_text())

"""What the commands print at their end: where the results are, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def after_training(train: Callable[..., Any]) -> Callable[..., None]:
    """`train`, which then says where the run's files are and what to do with them."""

    def run(**given: Any) -> None:
        finished = train(**given)
        from accelerate import PartialState

        if not PartialState().is_main_process:
            return
        path = finished.path
        pictures = ', '.join(str(file) for file in sorted(finished.plots.glob('*.png')))
        print(
            f'  weights   {path / "best.safetensors"}, {path / "last.safetensors"}, {path / "weights"}/\n'
            f'  numbers   {path / "summary.csv"}, {path / "metrics.jsonl"}\n'
            f'  pictures  {pictures}\n'
            f'next:\n'
            f'  ctc-timm validate {path}\n'
            f'  ctc-timm linear-probe {path}\n'
            f'  ctc-timm dynamics {path}\n'
            f'  python -c "import timm; model = timm.create_model(\'local-dir:{path}\', pretrained=True)"'
        )

    return run


def write_scenes(**given: Any) -> None:
    """Write scenes of digits, and say where they are."""
    from ..dense.scenes import write_scenes as write
    from ..dense.settings import ScenesSettings
    from ..utils.settings import build

    settings = build(ScenesSettings, given)
    folder = write(settings)
    print(f'{settings.train_images:,} training and {settings.val_images:,} validation scenes in {folder}')

"""What a run tells the person in front of it: a line at the start, a line an epoch, and where everything is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..progress import clock


def epoch_line(epoch: int, stage: str, train: dict[str, float], metrics: dict[str, Any], lr: float) -> str:
    """An epoch's numbers in one line.

    Args:
        epoch: Counted from 0.
        stage: 'instance', 'temporal' or 'vanilla'.
        train: Mean losses, and how many images could not be read.
        metrics: Of the validation split; empty where it was not evaluated.
        lr: Learning rate at the epoch's end.
    """
    parts = [f'epoch {epoch:>3}', f'{stage:<8}', f'loss {train["loss"]:.4f}']
    if 'ctc_loss' in train:
        parts.append(f'(task {train["task_loss"]:.4f}, ctc {train["ctc_loss"]:.4f})')
    if metrics:
        parts.append(f'val loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f}%, top-5 {metrics["top5"]:.2f}%')
    parts.append(f'lr {lr:.3g}')
    if train.get('skipped'):
        parts.append(f'{train["skipped"]:.0f} unreadable')
    return '  '.join(parts)


def conclusion(run: Path, seconds: float, best: tuple[float, int] | None, pictures: Iterable[Path]) -> str:
    """Where a finished run's weights, numbers and pictures are, and what to type next."""
    reached = f'best top-1 {best[0]:.2f}% at epoch {best[1]}' if best else 'not evaluated'
    return (
        f'\ndone in {clock(seconds)}: {reached}\n'
        f'  weights   {run / "best.safetensors"}, {run / "last.safetensors"}, {run / "weights"}/\n'
        f'  numbers   {run / "summary.csv"}, {run / "metrics.jsonl"}\n'
        f'  pictures  {", ".join(str(p) for p in pictures)}\n'
        f'next:\n'
        f'  python validate.py {run}\n'
        f'  python -c "import timm; model = timm.create_model(\'local-dir:{run}\', pretrained=True)"'
    )

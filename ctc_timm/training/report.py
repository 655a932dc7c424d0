"""What a run tells, and to whom: a line at the start, a line an epoch, where everything is; the trackers there are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..errors import UserError, nearest
from ..progress import clock


def check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not have, or whose package is not installed.

    Raises:
        UserError: With the trackers that there are.
    """
    known = [str(tracker.value) for tracker in LoggerType]
    installed = ['all', *(str(tracker.value) for tracker in get_available_trackers())]
    if name not in known:
        raise UserError(f'--log-with {name}: no such tracker{nearest(name, known)}; Accelerate has {", ".join(known)}')
    if name not in installed:
        raise UserError(f'--log-with {name}: its package is not installed; installed: {", ".join(installed[1:])}')


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
    if 'top1' in metrics:
        parts.append(f'val loss {metrics["loss"]:.4f}, top-1 {metrics["top1"]:.2f}%, top-5 {metrics["top5"]:.2f}%')
    if 'monitor_ridge_top1' in metrics:
        parts.append(f'target {metrics["monitor_ridge_top1"]:.2f}%')
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
        f'  python transfer/dynamics.py {run}\n'
        f'  python -c "import timm; model = timm.create_model(\'local-dir:{run}\', pretrained=True)"'
    )

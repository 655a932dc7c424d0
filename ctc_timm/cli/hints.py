"""What the commands print at their end: where the results are, and what to do next."""

from __future__ import annotations

from typing import Any


def train(**given: Any) -> None:
    """Train, and say where the run's files are and what to do with them."""
    from ..api import train as run_training

    run = run_training(**given)
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    path, kept = run.path, bool(run.kept_weights())
    weights = [file for file in (run.best_weights, run.last_weights) if file.is_file()]
    files = [*map(str, dict.fromkeys(weights)), *([f'{run.weights_folder}/'] if kept else [])]
    next_lines = [
        f'validate {path}{" --split SPLIT" if run.best_weights == run.last_weights else ""}',
        f'linear-probe {path}',
        *([f'dynamics {path}'] if kept else []),
    ]
    print(f"""\
  weights   {', '.join(files)}
  numbers   {path / 'summary.csv'}, {path / 'metrics.jsonl'}
  pictures  {', '.join(map(str, sorted(run.plots.glob('*.png'))))}
next:""")
    print(*(f'  ctc-timm {line}' for line in next_lines), sep='\n')
    print(f"""  python -c "import timm, ctc_timm; model = timm.create_model('local-dir:{path}', pretrained=True)\"""")


def write_scenes(**given: Any) -> None:
    """Write scenes of digits, and say where they are."""
    from ..dense.scenes import write_scenes as write
    from ..dense.settings import ScenesSettings
    from ..utils.settings import build

    settings = build(ScenesSettings, given)
    print(f'{settings.train_images:,} training and {settings.val_images:,} validation scenes in {write(settings)}')

"""The commands as Python functions: settings as keyword arguments, results as values.

Every keyword is a flag of the command of the same name, with underscores for dashes (`ctc-timm train --help` lists
them), and `config` names a recipe. What is given wins over the recipe, which wins over the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .utils.settings import build, check_values, settings_of
from .utils.yaml_files import read_recipe

if TYPE_CHECKING:
    from .runs import Run

Model = str | os.PathLike
T = TypeVar('T')


def train(data_dir: str | os.PathLike | None = None, **settings: Any) -> Run:
    """Train a timm model, by contrastive temporal coding or, with `mode='vanilla'`, by supervised training.

    Without data it trains on the embedded handwritten digits. With `resume` it continues a run by that run's own
    settings.

        run = ctc_timm.train(data_dir='IMAGES', model='resnet50', epochs=100)

    Args:
        data_dir: Folder with train/ and validation/, each with a folder of images for every class.
        **settings: See `training.settings.TrainSettings`.

    Returns:
        The run: its folder, its best weights, its numbers.

    Raises:
        UserError: Settings or data that cannot work; nothing has been written then.
        RunError: The run cannot go on, for a reason outside its settings.
        Stopped: A signal told the run to stop; its state is saved.
    """
    from .training.settings import TrainSettings

    if data_dir is not None:
        settings['data_dir'] = data_dir
    values = _with_recipe(TrainSettings, settings, '' if _names_data(settings) else 'digits')
    resumed = _resumed(TrainSettings, values)
    chosen = build(TrainSettings, {**values, **resumed, **_given(TrainSettings, settings)})
    repo_id = chosen.hub.push_to_hub
    if repo_id:
        from .hub.publish import check_target

        check_target(repo_id)
    from .training.build import train as run_training

    _show_log()
    run = run_training(chosen)
    if repo_id:
        _publish_from_main_process(run, repo_id)
    return run


def finetune(source: Model | None = None, **settings: Any) -> Run:
    """Fine-tune a model on another data set, all of it or a fraction, with several seeds.

    Args:
        source: A run, a weights file, a timm name, hf-hub:REPO or local-dir:FOLDER.
        **settings: See `training.settings.FinetuneSettings`.

    Returns:
        The run with most images and the first seed; results.json in the folder above it holds the numbers of all.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    from .training.settings import FinetuneSettings

    digits = not settings.get('data_dir') and settings.get('dataset', 'digits') in ('', 'digits')
    values = _with_recipe(FinetuneSettings, _with_source(settings, source), 'finetune_digits' if digits else '')
    chosen = build(FinetuneSettings, values)
    from .training.finetune import finetune as run_finetuning

    _show_log()
    return run_finetuning(chosen)


def validate(source: Model | None = None, **settings: Any) -> dict[str, Any]:
    """Measure a model's accuracy; a run's on the data that it was validated on unless others are named.

    Args:
        source: As of `finetune`.
        **settings: See `measure.settings.ValidateSettings`.

    Returns:
        What results.json holds: 'top1', 'top5', 'loss', 'per_class', ...

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    from .measure.settings import ValidateSettings

    values = _with_recipe(ValidateSettings, _with_source(settings, source))
    from .measure.validation import validate as run_validation
    from .models.loading import data_flags, run_arguments, run_of

    named = values.get('source') or values.get('checkpoint')
    if named and not _names_data(values):
        values = {**data_flags(run_arguments(run_of(named))), **values}
    _show_log()
    return run_validation(build(ValidateSettings, values))


def linear_probe(source: Model | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Measure what a model's frozen features are worth on other data sets.

        rows = ctc_timm.linear_probe(run, target=['hfds/NAME'], probes=['ridge'])

    Args:
        source: As of `finetune`.
        **settings: See `measure.settings.LinearProbeSettings`.

    Returns:
        A row for each target, probe and number of shots, with 95% intervals.

    Raises:
        UserError: A model or a target that cannot be had or measured.
    """
    from .measure.settings import LinearProbeSettings

    chosen = build(LinearProbeSettings, _with_recipe(LinearProbeSettings, _with_source(settings, source)))
    from .measure.linear_probe import linear_probe as run_probes

    _show_log()
    return run_probes(chosen)


def dynamics(*runs: Model, **settings: Any) -> dict[str, Any]:
    """Measure every kept epoch of runs: source accuracy, transfer, information and geometry of the features.

    Args:
        *runs: Folders of runs.
        **settings: See `measure.settings.DynamicsSettings`.

    Returns:
        What results.json holds: 'rows', one for each epoch and data set, ...

    Raises:
        UserError: A run without kept weights, or a target that cannot be measured.
    """
    from .measure.settings import DynamicsSettings

    if runs:
        settings['runs'] = tuple(os.fspath(run) for run in runs)
    chosen = build(DynamicsSettings, _with_recipe(DynamicsSettings, settings))
    from .dense.frozen import open_detection
    from .measure.dynamics import dynamics as run_dynamics

    _show_log()
    return run_dynamics(chosen, open_detection)


def detect(source: Model | None = None, **settings: Any) -> Run:
    """Train a detector on a model's backbone, and measure it as COCO does.

    Without data it trains on scenes of handwritten digits.

    Args:
        source: As of `finetune`.
        **settings: See `dense.settings.DetectSettings`.

    Returns:
        The run; results.json in its folder holds the metrics.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    from .dense.settings import DetectSettings

    chosen = build(DetectSettings, _dense_values(DetectSettings, _with_source(settings, source), 'detect_digits'))
    from .dense.detection import detect as run_detection

    _show_log()
    return run_detection(chosen)


def segment(source: Model | None = None, **settings: Any) -> Run:
    """Train a semantic segmenter on a model's backbone, and measure its intersection over union.

    Without data it trains on scenes of handwritten digits.

    Args:
        source: As of `finetune`.
        **settings: See `dense.settings.SegmentSettings`.

    Returns:
        The run; results.json in its folder holds the metrics.

    Raises:
        UserError: A model or data that cannot be had, or that do not fit each other.
    """
    from .dense.settings import SegmentSettings

    chosen = build(SegmentSettings, _dense_values(SegmentSettings, _with_source(settings, source), 'segment_digits'))
    from .dense.segmentation import segment as run_segmentation

    _show_log()
    return run_segmentation(chosen)


def embed(source: Model | None = None, **settings: Any) -> Path:
    """Write the pooled features of a folder or a data set, with file names or indices, to a file.

        path = ctc_timm.embed(run, data_dir='IMAGES', output='features.parquet')

    Args:
        source: As of `finetune`.
        **settings: See `measure.settings.EmbedSettings`.

    Returns:
        The file.

    Raises:
        UserError: A model or data that cannot be had, or an output of another kind than .parquet, .npz or .csv.
    """
    from .measure.settings import EmbedSettings

    chosen = build(EmbedSettings, _with_recipe(EmbedSettings, _with_source(settings, source)))
    from .measure.embed import embed as run_embedding

    _show_log()
    return run_embedding(chosen)


def publish(run: Model, repo_id: str, **settings: Any) -> str:
    """Publish a run's best weights on the Hub, with a card, in one commit.

        url = ctc_timm.publish(run, 'USER/resnet50_ctc')

    Args:
        run: A run's folder.
        repo_id: USER/NAME; created where it is missing. Named `<arch>_ctc[.tag]` it loads by that name, too.
        **settings: See `hub.settings.PublishSettings`.

    Returns:
        URL of the commit, or the folder of a dry run.

    Raises:
        UserError: A run that cannot be published, or a Hub that refuses it; nothing is visible then.
    """
    from .hub.publish import publish as push

    return push(run, repo_id, **settings)


def _show_log() -> None:
    from .utils.progress import show_log

    show_log()


def _given(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller gave, checked."""
    return check_values(cls, {name: value for name, value in settings.items() if name != 'config'})


def _with_recipe(cls: type, settings: Mapping[str, Any], otherwise: str = '') -> dict[str, Any]:
    """What a caller gave, over the recipe that `config` names or else over a shipped one."""
    given = _given(cls, settings)
    recipe = settings.get('config') or otherwise
    if not recipe:
        return given
    return {**check_values(cls, read_recipe(recipe), f'`config` {recipe}'), **given}


def _with_source(settings: dict[str, Any], source: Model | None) -> dict[str, Any]:
    return settings if source is None else {**settings, 'source': os.fspath(source)}


def _names_data(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get('dataset') or settings.get('data_dir'))


def _resumed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that `resume` names: to continue it no setting is given again."""
    from .training.checkpoints import find_resume, run_of_state

    state = find_resume(build(cls, values)).state if values.get('resume') else None
    if state is None:
        return {}
    run = run_of_state(state)
    kept = {
        k: v for k, v in run.args().items() if k in settings_of(cls) and k not in ('resume', 'output', 'experiment')
    }
    return check_values(cls, kept, str(run.path / 'args.yaml'))


def _dense_values(cls: type, settings: Mapping[str, Any], digits: str) -> dict[str, Any]:
    """Settings of a dense command: those of a resumed run, or the digits' recipe where no data are named."""
    given = _given(cls, settings)
    values = _with_recipe(cls, settings)
    resumed = _resumed(cls, values)
    if resumed or settings.get('config') or values.get('data_dir'):
        return {**values, **resumed, **given}
    recipe = read_recipe(digits)
    if any(given.get(name) for name in ('source', 'checkpoint', 'model')):
        recipe = {key: value for key, value in recipe.items() if key not in ('model', 'from-scratch', 'from_scratch')}
    if given.get('detector') == 'retinanet':  # it has no second stage, whose sizes the recipe gives
        recipe = {key: value for key, value in recipe.items() if key not in ('detector-kwargs', 'detector_kwargs')}
    return {**check_values(cls, recipe, digits), **given}


def _publish_from_main_process(run: Run, repo_id: str) -> None:
    from accelerate import PartialState

    from .hub.publish import push

    if PartialState().is_main_process:
        print(push(run, repo_id).report())


__all__ = ['detect', 'dynamics', 'embed', 'finetune', 'linear_probe', 'publish', 'segment', 'train', 'validate']

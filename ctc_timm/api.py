"""The commands as Python functions: settings as keyword arguments, results as values.

Every keyword is a flag of the command of the same name, with underscores for dashes (`ctc-timm train --help` lists
them), and `config` names a recipe. What is given wins over the recipe, which wins over the defaults. A `source` is a
run, a weights file, a timm name, hf-hub:REPO or local-dir:FOLDER.

Settings, models and data that cannot work raise a `UserError` of one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .utils.settings import build, check_values, settings_of
from .utils.timm_args import from_timm
from .utils.yaml_files import read_recipe

if TYPE_CHECKING:
    from .runs import Run

__all__ = ['detect', 'dynamics', 'embed', 'finetune', 'linear_probe', 'publish', 'segment', 'train', 'validate']

PathLike = str | os.PathLike


def train(data_dir: PathLike | None = None, **settings: Any) -> Run:
    """Train a timm model, by contrastive temporal coding or, with `mode='vanilla'`, by supervised training.

    Without data it trains on scikit-learn's handwritten digits. With `resume` it continues a run by that run's own
    settings.

        run = ctc_timm.train(data_dir='IMAGES', model='resnet50', epochs=100)

    Args:
        data_dir: Folder with train/ and validation/, each with a folder of images for every class.
        **settings: See `training.settings.TrainSettings`.

    Returns:
        The run: its folder, its best weights, its numbers.

    Raises:
        UserError: Nothing has been written then. Its subclasses say that a run cannot go on for a reason outside its
            settings (`RunError`), or that a signal told it to stop and its state is saved (`Stopped`).
    """
    from .training.settings import TrainSettings

    if data_dir is not None:
        settings['data_dir'] = data_dir
    values = _over_recipe(TrainSettings, settings, '' if _names_data(settings) else 'digits')
    chosen = build(TrainSettings, {**values, **_resumed(TrainSettings, values), **_given(TrainSettings, settings)})
    repo_id = chosen.hub.push_to_hub
    if repo_id:
        import_module('.hub.publish', __package__).check_target(repo_id)
    run = _call('training.build:train', chosen)
    if repo_id:
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(import_module('.hub.publish', __package__).push(run, repo_id, recipe_settings()).report())
    return run


def finetune(source: PathLike | None = None, **settings: Any) -> Run:
    """Fine-tune a model on another data set, all of it or a fraction, with several seeds.

    Args:
        source: What to start from.
        **settings: See `training.settings.FinetuneSettings`.

    Returns:
        The run with most images and the first seed; results.json in the folder above it holds the numbers of all.
    """
    from .training.settings import FinetuneSettings

    settings = _with_source(settings, source)
    digits = not settings.get('data_dir') and settings.get('dataset', 'digits') in ('', 'digits')
    values = _over_recipe(FinetuneSettings, settings, 'finetune_digits' if digits else '')
    return _call('training.finetune:finetune', build(FinetuneSettings, values))


def validate(source: PathLike | None = None, **settings: Any) -> dict[str, Any]:
    """Measure a model's accuracy; a run's on the data that it was validated on unless others are named.

    Args:
        source: What to measure.
        **settings: See `measure.settings.ValidateSettings`.

    Returns:
        What results.json holds: 'top1', 'top5', 'loss', 'per_class', ...
    """
    from .measure.settings import ValidateSettings

    values = _over_recipe(ValidateSettings, _with_source(settings, source))
    named = values.get('source') or values.get('checkpoint')
    if named and not _names_data(values):
        from .models.loading import data_settings, run_of

        values = {**data_settings(run_of(named)), **values}
    return _call('measure.validation:validate', build(ValidateSettings, values))


def linear_probe(source: PathLike | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Measure what a model's frozen features are worth on other data sets.

        rows = ctc_timm.linear_probe(run, target=['hfds/NAME'], probes=['ridge'])

    Args:
        source: What to measure.
        **settings: See `measure.settings.LinearProbeSettings`.

    Returns:
        A row for each target, probe and number of shots, with 95% intervals.
    """
    from .measure.settings import LinearProbeSettings

    values = _over_recipe(LinearProbeSettings, _with_source(settings, source))
    return _call('measure.linear_probe:linear_probe', build(LinearProbeSettings, values))


def dynamics(*runs: PathLike, **settings: Any) -> dict[str, Any]:
    """Measure every kept epoch of runs: source accuracy, transfer, information and geometry of the features.

    Args:
        *runs: Folders of runs.
        **settings: See `measure.settings.DynamicsSettings`.

    Returns:
        What results.json holds: 'rows', one for each epoch and data set, ...
    """
    from .measure.settings import DynamicsSettings

    if runs:
        settings['runs'] = tuple(os.fspath(run) for run in runs)
    return _call('measure.dynamics:dynamics', build(DynamicsSettings, _over_recipe(DynamicsSettings, settings)))


def detect(source: PathLike | None = None, **settings: Any) -> Run:
    """Train a detector on a model's backbone and measure it as COCO does; without data on scenes of digits.

    Args:
        source: Whose backbone.
        **settings: See `dense.settings.DetectSettings`.

    Returns:
        The run; results.json in its folder holds the metrics.
    """
    from .dense.settings import DetectSettings

    values = _dense_values(DetectSettings, _with_source(settings, source), 'detect_digits')
    return _call('dense.detection:detect', build(DetectSettings, values))


def segment(source: PathLike | None = None, **settings: Any) -> Run:
    """Train a semantic segmenter on a model's backbone and measure its mIoU; without data on scenes of digits.

    Args:
        source: Whose backbone.
        **settings: See `dense.settings.SegmentSettings`.

    Returns:
        The run; results.json in its folder holds the metrics.
    """
    from .dense.settings import SegmentSettings

    values = _dense_values(SegmentSettings, _with_source(settings, source), 'segment_digits')
    return _call('dense.segmentation:segment', build(SegmentSettings, values))


def embed(source: PathLike | None = None, **settings: Any) -> Path:
    """Write the pooled features of a folder or a data set, with file names or indices, to a file.

        path = ctc_timm.embed(run, data_dir='IMAGES', output='features.parquet')

    Args:
        source: What to embed by.
        **settings: See `measure.settings.EmbedSettings`.

    Returns:
        The file: .parquet, .npz or .csv.
    """
    from .measure.settings import EmbedSettings

    values = _over_recipe(EmbedSettings, _with_source(settings, source))
    return _call('measure.embed:embed', build(EmbedSettings, values))


def publish(run: PathLike, repo_id: str, **settings: Any) -> str:
    """Publish a run's best weights on the Hub, with a card, in one commit.

        url = ctc_timm.publish(run, 'USER/resnet50_ctc')

    Args:
        run: A run's folder.
        repo_id: USER/NAME; created where it is missing. Named `<arch>_ctc[.tag]` it loads by that name, too.
        **settings: See `hub.settings.PublishSettings`.

    Returns:
        URL of the commit, or the folder of a dry run.
    """
    from .hub.publish import push

    return push(run, repo_id, recipe_settings(), **settings).url


def recipe_settings() -> set[str]:
    """Names of the settings that a published recipe may hold."""
    from .training.settings import FinetuneSettings, TrainSettings

    return {*settings_of(TrainSettings), *settings_of(FinetuneSettings)}


def _call(where: str, *arguments: Any) -> Any:
    """Call a function of the library, imported only now that the settings are known to be sound."""
    module, _, name = where.partition(':')
    function = getattr(import_module(f'.{module}', __package__), name)
    import_module('.utils.progress', __package__).show_log()
    return function(*arguments)


def _given(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    return check_values(cls, {name: value for name, value in settings.items() if name != 'config'})


def _over_recipe(cls: type, settings: Mapping[str, Any], otherwise: str = '') -> dict[str, Any]:
    """What a caller gave, checked, over the recipe that `config` names or else over a shipped one."""
    recipe = settings.get('config') or otherwise
    where = f'`config` {recipe}'
    values = from_timm(read_recipe(recipe), settings_of(cls), where) if recipe else {}
    preset = check_values(cls, values, where)
    return {**preset, **_given(cls, settings)}


def _with_source(settings: dict[str, Any], source: PathLike | None) -> dict[str, Any]:
    """The settings with what they are to be done to; beside a named model a folder that holds none is the data's."""
    if source is None:
        return settings
    if (settings.get('model') or settings.get('checkpoint')) and not settings.get('data_dir') and Path(source).is_dir():
        from .models.loading import is_model_folder

        if not is_model_folder(source):
            return {**settings, 'data_dir': os.fspath(source)}
    return {**settings, 'source': os.fspath(source)}


def _names_data(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get('dataset') or settings.get('data_dir'))


def _resumed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that `resume` names: to continue it no setting is given again."""
    if not values.get('resume'):
        return {}
    from .training.checkpoints import find_resume, run_of_state

    state = find_resume(build(cls, values)).state
    if state is None:
        return {}
    run = run_of_state(state)
    known = settings_of(cls).keys() - {'resume', 'output', 'experiment'}
    return check_values(cls, {k: v for k, v in run.args().items() if k in known}, str(run.args_file))


def _dense_values(cls: type, settings: Mapping[str, Any], digits: str) -> dict[str, Any]:
    """Settings of a dense command: those of a resumed run, or the digits' recipe where no data are named."""
    given, values = _given(cls, settings), _over_recipe(cls, settings)
    resumed = _resumed(cls, values)
    if resumed or settings.get('config') or values.get('data_dir'):
        return {**values, **resumed, **given}
    recipe = check_values(cls, read_recipe(digits), digits)
    if any(given.get(name) for name in ('source', 'checkpoint', 'model')):
        recipe = {key: value for key, value in recipe.items() if key not in ('model', 'from_scratch')}
    if given.get('detector') == 'retinanet':  # it has no second stage, whose sizes the recipe gives
        recipe.pop('detector_kwargs', None)
    return {**recipe, **given}

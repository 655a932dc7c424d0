"""Settings of the commands that measure. Nothing here imports torch or timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..data.settings import DataSettings, LoaderSettings, TargetSettings
from ..models.settings import SourceSettings
from ..utils.precision import PrecisionSettings
from ..utils.settings import group, setting

Probe = Literal['ridge', 'logistic', 'knn', 'sgd']


@dataclass(frozen=True)
class MeasuredModelSettings:
    """How a model is built and run to be measured."""

    model_kwargs: dict[str, Any] = setting({}, 'more for the model', metavar='KEY=VALUE')
    channels_last: bool | None = setting(None, 'channels-last memory layout; where it is faster when not given')


@dataclass(frozen=True)
class _ModelOnDataSettings:
    source: SourceSettings = group('Model', SourceSettings)
    built: MeasuredModelSettings = group('Model, built', MeasuredModelSettings)
    data: DataSettings = group('Data', DataSettings)
    loader: LoaderSettings = group('Loading', LoaderSettings)
    precision: PrecisionSettings = group('Mixed precision', PrecisionSettings)


@dataclass(frozen=True)
class ValidationSettings:
    """What is validated, and where the numbers go."""

    num_classes: int | None = setting(None, "outputs; the weights' own when not given", low=1, metavar='N')
    split: str = setting('', 'same as the validation split', metavar='NAME')
    output: str = setting('', "where results go; the run's validation/ or results/NAME", metavar='DIR')
    results_file: str = setting('', 'write the results there too: .csv or .json', metavar='FILE')
    real_labels: str = setting('', 'ImageNet-ReaL labels, which top-1 and top-5 are of', metavar='FILE')
    valid_labels: str = setting('', 'file of the outputs that count, a number a line, class by class', metavar='FILE')
    test_pool: bool = setting(False, "pool the features of images larger than the model's, as timm does")


@dataclass(frozen=True)
class ValidateSettings(_ModelOnDataSettings):
    """All settings of `ctc_timm.validate`."""

    validation: ValidationSettings = group('Validation', ValidationSettings)


@dataclass(frozen=True)
class ProbeSettings:
    """Which probes are fitted to frozen features."""

    probes: tuple[Probe, ...] = setting(('ridge', 'logistic', 'knn', 'sgd'), 'which ones', metavar='METHOD')
    shots: tuple[int, ...] = setting((), 'few-shot: images a class', low=1, metavar='N')
    seeds: int = setting(5, 'draws of the few shots', low=1, metavar='N')
    seed: int = setting(0, 'of everything random', low=0, metavar='S')
    no_cache: bool = setting(False, 'keep no features on disk')
    output: str = setting('', "where results go; the run's linear_probe/ or results/NAME", metavar='DIR')


@dataclass(frozen=True)
class LinearProbeSettings(_ModelOnDataSettings):
    """All settings of `ctc_timm.linear_probe`."""

    probe: ProbeSettings = group('Probes', ProbeSettings)
    target: TargetSettings = group('Target', TargetSettings)


@dataclass(frozen=True)
class EmbeddingSettings:
    """What is embedded, and the file that it goes to."""

    output: str = setting('features.npz', 'file to write: .parquet, .npz or .csv', metavar='FILE')
    split: str = setting('', 'which split; a folder whole, or the validation split of a data set', metavar='NAME')
    logits: bool = setting(False, 'write the class scores too')


@dataclass(frozen=True)
class EmbedSettings(_ModelOnDataSettings):
    """All settings of `ctc_timm.embed`."""

    embedding: EmbeddingSettings = group('Features', EmbeddingSettings)


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured of each kept epoch."""

    runs: tuple[str, ...] = setting((), 'folders of runs, with kept epochs in weights/', positional='+', metavar='RUN')
    probes: tuple[Probe, ...] = setting(('ridge',), 'which ones', metavar='METHOD')
    information: Literal['renyi', 'mine', 'mine-published', 'none'] = setting('renyi', 'estimator of I(X;T) and I(T;Y)')
    information_images: int = setting(2000, 'test images it is given', low=1, metavar='N')
    seed: int = setting(0, 'of everything random', low=0, metavar='S')
    every: int = setting(1, 'take each N-th kept epoch', low=1, metavar='N')
    no_cache: bool = setting(False, 'keep no features on disk')
    output: str = setting('', "where results go; the run's dynamics/, or results/dynamics for several", metavar='DIR')


@dataclass(frozen=True)
class DynamicsSettings:
    """All settings of `ctc_timm.dynamics`."""

    measures: MeasureSettings = group('Measures', MeasureSettings)
    target: TargetSettings = group('Target', TargetSettings)
    data: DataSettings = group('Data', DataSettings)
    loader: LoaderSettings = group('Loading', LoaderSettings)
    precision: PrecisionSettings = group('Mixed precision', PrecisionSettings)

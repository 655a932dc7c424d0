"""Settings of training, and those of the commands train and finetune. Nothing here imports torch or timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..data.settings import AugmentationSettings, DataSettings, LoaderSettings, MixupSettings
from ..models.settings import ArchitectureSettings, BatchNormSettings, ExecutionSettings, ModelSettings, SourceSettings
from ..utils.precision import PrecisionSettings
from ..utils.settings import group, setting

Schedule = Literal[
    'cosine', 'cosine_open', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none'
]


@dataclass(frozen=True)
class CTCSettings:
    """Contrastive temporal coding; see `contrast.task.CTCTask`."""

    mode: Literal['ctc', 'vanilla', 'distill'] = setting(
        'ctc', 'ctc; supervised training without it; or distillation of the features in place of the temporal contrast'
    )
    instance_weight: float = setting(0.5, "instance term's weight (alpha)", low=0, metavar='W')
    temporal_weight: float = setting(1.0, "temporal term's weight (beta)", low=0, metavar='W')
    instance_temperature: float = setting(0.1, 'of the instance term', above=0, metavar='T')
    temporal_temperature: float = setting(0.1, 'of the temporal term', above=0, metavar='T')
    instance_momentum: float = setting(0.9, "of the instance stage's bank", low=0, below=1, metavar='M')
    temporal_momentum: float = setting(0.9, "of the temporal stage's banks", low=0, below=1, metavar='M')
    num_negatives: int = setting(16384, 'negatives an image', low=1, high=10**7, metavar='K')
    negatives: Literal['sampled', 'shared', 'all'] = setting('sampled', 'K rows an image, K a batch, or all')
    positives: Literal['exact', 'relaxed'] = setting('exact', 'the image itself, or a random one of its class')
    past_features: Literal['model', 'bank'] = setting('model', 'run the information bank on batches, or use its rows')
    embed_dim: int = setting(128, 'embedding size', low=1, high=65536, metavar='E')
    train_projector: bool = setting(False, "train the instance stage's projector too")
    temporal_projector: Literal['separate', 'shared', 'fixed', 'centered', 'none'] = setting(
        'separate',
        'one trained for present and one for past; one trained; one fixed; features, centered or as they are',
    )
    bank_dtype: Literal['float32', 'bfloat16'] = setting('float32', "precision of the banks' rows")
    split_banks: bool = setting(False, 'each process holds a share of the banks', aliases=('--shard-banks',))


@dataclass(frozen=True)
class RetentionSettings:
    """Other ways to keep what the initial model knows; see `retention`."""

    l2_sp: float = setting(0.0, 'pull all but the classifier to the start, as L2-SP does', low=0, metavar='W')
    body_lr_scale: float = setting(1.0, 'learning rate of all but the classifier over its own', above=0, metavar='X')


@dataclass(frozen=True)
class StageSettings:
    """Where the temporal stage starts, and how the two stages' schedules differ."""

    temporal_start_epoch: int | None = setting(None, 'first of its epochs; at 2/3 when not given', low=0, metavar='N')
    temporal_from_start: bool = setting(False, 'temporal stage alone, at the full rate: the past is the initial model')
    temporal_lr_scale: float = setting(0.1, "temporal stage's learning rate over the instance's", above=0, metavar='X')
    instance_weight_decay_scale: float = setting(1.0, "instance stage's over weight_decay", low=0, metavar='X')


@dataclass(frozen=True)
class LossSettings:
    """The classification loss and the metric of the best epoch, by timm's names."""

    smoothing: float = setting(0.1, 'label smoothing', low=0, below=1, metavar='F')
    bce_loss: bool = setting(False, 'binary cross-entropy')
    bce_sum: bool = setting(False, 'sum it over classes')
    bce_target_thresh: float | None = setting(None, 'binarize mixed targets above this', low=0, high=1, metavar='F')
    eval_metric: Literal['top1', 'top5', 'loss'] = setting('top1', 'of the validation split; its best epoch is kept')


@dataclass(frozen=True)
class ScheduleSettings:
    """timm's schedules."""

    epochs: int = setting(300, 'length of the run', low=1, high=10**6, metavar='N')
    sched: Schedule = setting('cosine', "timm's schedules; cosine_open is the paper's, see CosineOpenLRScheduler")
    sched_on_updates: bool = setting(False, 'step the schedule each update, not each epoch')
    warmup_epochs: int = setting(0, 'of the first stage', low=0, metavar='N')
    warmup_lr: float = setting(1e-5, 'at the start of the warm-up', low=0, metavar='LR')
    warmup_prefix: bool = setting(False, 'the warm-up comes on top of the epochs')
    min_lr: float = setting(0.0, 'lower bound', low=0, metavar='LR')
    cooldown_epochs: int = setting(0, 'epochs at the lower bound, on top', low=0, metavar='N')
    decay_epochs: float | None = setting(None, 'interval (step) or length (wsd, rsqrt) of decay', above=0, metavar='N')
    decay_milestones: tuple[int, ...] = setting((90, 180, 270), 'for multistep', low=1, metavar='N')
    patience_epochs: int = setting(10, 'evaluations without a better one before plateau decays', low=0, metavar='N')
    decay_rate: float = setting(
        0.1, 'of step, multistep, poly, plateau', low=1e-6, high=10, aliases=('--dr',), metavar='RATE'
    )
    lr_noise: tuple[float, ...] | None = setting(None, 'noise on and off, of the run', low=0, high=1, metavar='PCT')
    lr_noise_pct: float = setting(0.67, 'limit of the noise', low=0.01, high=1, metavar='PCT')
    lr_noise_std: float = setting(1.0, 'standard deviation of the noise', low=0, high=10, metavar='STD')
    lr_cycle_mul: float = setting(1.0, 'cycle length multiplier', low=0.1, high=10, metavar='MULT')
    lr_cycle_decay: float = setting(0.5, 'decay per cycle', low=0, high=1, metavar='MULT')
    lr_cycle_limit: int = setting(1, 'number of cycles', low=1, high=1000, metavar='N')
    lr_k_decay: float = setting(1.0, 'for cosine and poly', low=0.01, high=100, metavar='K')


@dataclass(frozen=True)
class OptimizerSettings:
    """timm's optimizers, gradient accumulation and clipping."""

    opt: str = setting('sgd', "timm's optimizer; sgd is Nesterov's, momentum is plain", metavar='NAME')
    lr: float | None = setting(None, 'learning rate; lr_base by the global batch when not given', above=0, metavar='LR')
    lr_base: float = setting(0.1, 'learning rate at lr_base_size images a step', above=0, metavar='LR')
    lr_base_size: float = setting(256, 'images a step that lr_base is for', above=0, metavar='N')
    lr_base_scale: Literal['linear', 'sqrt'] | None = setting(None, 'how it scales; sqrt for adaptive optimizers')
    momentum: float = setting(0.9, 'momentum', low=0, below=1, metavar='M')
    weight_decay: float = setting(2e-5, 'weight decay', low=0, metavar='WD')
    filter_bias_and_bn: bool = setting(True, 'leave biases and norms without weight decay')
    opt_eps: float | None = setting(None, "optimizer's epsilon", above=0, metavar='EPS')
    opt_betas: tuple[float, ...] | None = setting(None, "optimizer's betas", metavar='B')
    opt_kwargs: dict[str, Any] = setting({}, 'more for the optimizer', metavar='KEY=VALUE')
    layer_decay: float | None = setting(None, 'layer-wise learning rate decay', above=0, metavar='F')
    clip_grad: float | None = setting(None, 'clip gradients', above=0, metavar='NORM')
    clip_mode: Literal['norm', 'value', 'agc'] = setting('norm', 'how')
    grad_accum_steps: int = setting(1, 'batches in an optimizer step', low=1, metavar='N')


@dataclass(frozen=True)
class EMASettings:
    """A moving average of the weights."""

    model_ema: bool = setting(False, 'keep a moving average; it is what is saved')
    model_ema_decay: float = setting(0.9998, 'its decay', low=0, high=1, metavar='D')
    model_ema_warmup: bool = setting(False, 'warm its decay up')
    model_ema_force_cpu: bool = setting(False, 'keep it on the CPU')


@dataclass(frozen=True)
class FolderSettings:
    """Which folder a run has."""

    output: str = setting('runs', 'where runs go', metavar='DIR')
    experiment: str = setting('', "the run's folder there; made of time, model and data when not given", metavar='NAME')
    resume: str = setting('', 'continue a run: its folder, a state of it, or the newest that fits', metavar='auto|PATH')


@dataclass(frozen=True)
class RunSettings:
    """What a run saves, logs and tolerates."""

    seed: int = setting(42, 'of everything random', low=0, metavar='S')
    checkpoint_hist: int = setting(2, 'states kept for a resume', low=1, metavar='N')
    checkpoint_steps: int = setting(0, 'save the state every N steps, not only after each epoch', low=0, metavar='N')
    keep_every: int | None = setting(None, 'keep weights each N epochs, 0: none; 20 over the run', low=0, metavar='N')
    log_interval: int = setting(50, 'batches between log lines', low=1, metavar='N')
    log_with: str | None = setting(None, "Accelerate's trackers: tensorboard, wandb, ...", metavar='TRACKER')
    eval_interval: int = setting(1, 'epochs between evaluations', low=1, aliases=('--val-interval',), metavar='N')
    max_bad_steps: int = setting(10, 'stop after N steps in a row that are not finite; 0: never', low=0, metavar='N')


@dataclass(frozen=True)
class MonitorSettings:
    """Transfer measured while training."""

    monitor_target: str = setting('', 'watch transfer to this data set or folder', metavar='DATASET')
    monitor_every: int | None = setting(None, 'epochs between; about 20 over the run, or fewer', low=1, metavar='N')
    keep_report: tuple[str, ...] = setting(
        (), "report what is kept of the initial model's transfer to these sets or folders", metavar='DATASET'
    )
    monitor_images: int = setting(1500, 'images, two thirds to fit the probe', low=1, metavar='N')


@dataclass(frozen=True)
class PushSettings:
    """What is done with a finished run."""

    push_to_hub: str = setting('', 'publish the run there when it is done', metavar='USER/NAME')


class CommandSettings(Protocol):
    """What the settings of every command that trains have, see `TrainSettings`."""

    @property
    def loader(self) -> LoaderSettings: ...

    @property
    def schedule(self) -> ScheduleSettings: ...

    @property
    def optimizer(self) -> OptimizerSettings: ...

    @property
    def batch_norm(self) -> BatchNormSettings: ...

    @property
    def precision(self) -> PrecisionSettings: ...

    @property
    def folder(self) -> FolderSettings: ...

    @property
    def run(self) -> RunSettings: ...


@dataclass(frozen=True)
class TrainSettings:
    """All settings of `ctc_timm.train`."""

    data: DataSettings = group('Data', DataSettings)
    loader: LoaderSettings = group('Loading', LoaderSettings)
    model: ModelSettings = group('Model', ModelSettings)
    architecture: ArchitectureSettings = group('Architecture', ArchitectureSettings)
    ctc: CTCSettings = group('Contrastive temporal coding', CTCSettings)
    stages: StageSettings = group('Two stages', StageSettings)
    retention: RetentionSettings = group('Keeping what the initial model knows', RetentionSettings)
    loss: LossSettings = group('Classification loss', LossSettings)
    schedule: ScheduleSettings = group('Schedule', ScheduleSettings)
    optimizer: OptimizerSettings = group('Optimizer', OptimizerSettings)
    augmentation: AugmentationSettings = group('Augmentation', AugmentationSettings)
    mixup: MixupSettings = group('Mixup and CutMix', MixupSettings)
    execution: ExecutionSettings = group('Execution', ExecutionSettings)
    batch_norm: BatchNormSettings = group('Batch norm with several processes', BatchNormSettings)
    precision: PrecisionSettings = group('Mixed precision', PrecisionSettings)
    ema: EMASettings = group('Moving average', EMASettings)
    monitor: MonitorSettings = group('Monitor', MonitorSettings)
    folder: FolderSettings = group('Run folder', FolderSettings)
    run: RunSettings = group('Run', RunSettings)
    hub: PushSettings = group('Hub', PushSettings)


@dataclass(frozen=True)
class PlanSettings:
    """What fine-tuning keeps, and which runs it makes."""

    freeze: Literal['none', 'stem', 'body', 'batch_norm'] = setting(
        'none', 'what stays as it is; body is all but the classifier'
    )
    probe_first: bool = setting(False, 'fit the new classifier to the features before anything else is trained')
    start_share: float = setting(0.0, "the start's in the weights averaged after training", low=0, high=1, metavar='F')
    train_fraction: tuple[float, ...] = setting((1.0,), 'of the training images', above=0, high=1, metavar='F')
    seeds: int = setting(3, 'runs of each, from seed on', low=1, metavar='N')
    min_updates: int = setting(500, 'a fraction gets as many as all images, up to this', low=0, metavar='N')
    output: str = setting('', "where the runs go; the run's finetune/ or results/NAME", metavar='DIR')


@dataclass(frozen=True)
class FinetuneSettings:
    """All settings of `ctc_timm.finetune`."""

    source: SourceSettings = group('Model', SourceSettings)
    architecture: ArchitectureSettings = group('Architecture', ArchitectureSettings)
    ctc: CTCSettings = group(
        'Contrast with the start',
        CTCSettings,
        mode='vanilla',
        num_negatives=4096,
        negatives='all',
        past_features='bank',
        temporal_projector='centered',
    )
    stages: StageSettings = group('Two stages', StageSettings, temporal_from_start=True, temporal_lr_scale=1.0)
    retention: RetentionSettings = group('Keeping what the start knows', RetentionSettings)
    plan: PlanSettings = group('Fine-tuning', PlanSettings)
    data: DataSettings = group('Data', DataSettings)
    loader: LoaderSettings = group('Loading', LoaderSettings, batch_size=64)
    loss: LossSettings = group('Classification loss', LossSettings, smoothing=0.0)
    schedule: ScheduleSettings = group('Schedule', ScheduleSettings, epochs=10, warmup_epochs=1, sched_on_updates=True)
    optimizer: OptimizerSettings = group('Optimizer', OptimizerSettings, lr_base=0.05)
    augmentation: AugmentationSettings = group('Augmentation', AugmentationSettings, scale=(0.5, 1.0), color_jitter=0.0)
    mixup: MixupSettings = group('Mixup and CutMix', MixupSettings)
    execution: ExecutionSettings = group('Execution', ExecutionSettings)
    batch_norm: BatchNormSettings = group('Batch norm with several processes', BatchNormSettings)
    precision: PrecisionSettings = group('Mixed precision', PrecisionSettings)
    ema: EMASettings = group('Moving average', EMASettings)
    monitor: MonitorSettings = group('Monitor', MonitorSettings)
    run: RunSettings = group('Run', RunSettings, seed=0, keep_every=0, checkpoint_hist=1)

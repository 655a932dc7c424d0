"""timm's own args.yaml as a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ctc_timm.api import _over_recipe
from ctc_timm.training.settings import TrainSettings
from ctc_timm.utils.errors import UserError
from ctc_timm.utils.settings import build

# What timm's training script writes, without what was asked for; names and defaults are its own.
TIMM = """
aa: null
amp: false
amp_dtype: float16
amp_impl: native
aug_repeats: 0
aug_splits: 0
batch_size: 128
bce_loss: false
bce_sum: false
bce_target_thresh: null
bn_eps: null
bn_momentum: null
channels_last: false
checkpoint_hist: 10
class_map: ''
clip_grad: null
clip_mode: norm
color_jitter: 0.4
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: null
data_dir: null
dataset: ''
dataset_download: false
decay_epochs: 90
decay_milestones: [90, 180, 270]
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
drop: 0.0
drop_block: null
drop_connect: null
drop_path: null
epoch_repeats: 0.0
epochs: 300
eval_metric: top1
experiment: ''
fast_norm: false
fuser: ''
gp: null
grad_accum_steps: 1
grad_checkpointing: false
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_size: null
interpolation: ''
jsd_loss: false
layer_decay: null
local_rank: 0
log_interval: 50
log_wandb: false
lr: null
lr_base: 0.1
lr_base_scale: ''
lr_base_size: 256
lr_cycle_decay: 0.5
lr_cycle_limit: 1
lr_cycle_mul: 1.0
lr_k_decay: 1.0
lr_noise: null
lr_noise_pct: 0.67
lr_noise_std: 1.0
mean: null
min_lr: 0
mixup: 0.0
mixup_mode: batch
mixup_off_epoch: 0
mixup_prob: 1.0
mixup_switch_prob: 0.5
model: resnet50
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_kwargs: {}
momentum: 0.9
no_aug: false
no_ddp_bb: false
no_prefetcher: false
no_resume_opt: false
num_classes: null
opt: sgd
opt_betas: null
opt_eps: null
opt_kwargs: {}
output: ''
patience_epochs: 10
pin_mem: false
pretrained: false
ratio: [0.75, 1.3333333333333333]
recount: 1
recovery_interval: 0
remode: pixel
reprob: 0.0
resplit: false
resume: ''
save_images: false
scale: [0.08, 1.0]
sched: cosine
sched_on_updates: false
seed: 42
smoothing: 0.1
split_bn: false
start_epoch: null
std: null
sync_bn: false
synchronize_step: false
torchcompile: null
torchscript: false
train_interpolation: random
train_split: train
tta: 0
use_multi_epochs_loader: false
val_split: validation
validation_batch_size: null
vflip: 0.0
wandb_tags: []
warmup_epochs: 5
warmup_lr: 1.0e-05
warmup_prefix: false
weight_decay: 2.0e-05
worker_seeding: all
workers: 4
"""


def read(folder: Path, **changes: object) -> TrainSettings:
    file = folder / 'args.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(TIMM), **changes}))
    return build(TrainSettings, _over_recipe(TrainSettings, {'config': str(file)}))


def test_what_timm_wrote_is_a_recipe(tmp_path: Path) -> None:
    """What was asked for is set, and so are timm's defaults where ours are others; the device is Accelerate's."""
    settings = read(
        tmp_path, data='images', opt='adamw', lr=0.003, mixup=0.2, amp=True, device='cuda:1', experiment='x'
    )
    assert settings.data.data_dir == 'images' and settings.schedule.warmup_epochs == 5
    assert (settings.optimizer.opt, settings.optimizer.lr, settings.mixup.mixup) == ('adamw', 0.003, 0.2)
    assert settings.precision.amp and settings.folder.experiment == 'x' and settings.folder.output == 'runs'
    assert read(tmp_path, data='a', data_dir='b').data.data_dir == 'b'


def test_all_that_is_asked_for_and_not_there_is_named_at_once(tmp_path: Path) -> None:
    asked = {'aug_splits': 3, 'jsd_loss': True, 'split_bn': True, 'epoch_repeats': 2.0, 'head_init_bias': -10.0}
    with pytest.raises(UserError) as caught:
        read(tmp_path, **asked)
    assert all(repr(name) in str(caught.value) for name in asked) and '5 names are no settings' in str(caught.value)
    assert 'torchscript' not in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(UserError, match="args.yaml: `sched`: must be one of .* got 'exp'"):
        read(tmp_path, sched='exp')
    plateau = read(tmp_path, sched='plateau', eval_metric='loss', patience_epochs=3)
    assert (plateau.schedule.sched, plateau.schedule.patience_epochs, plateau.loss.eval_metric) == (
        'plateau',
        3,
        'loss',
    )


def test_other_recipes_are_read_as_they_are(tmp_path: Path) -> None:
    """A mistyped name is refused there, also with a value that is off."""
    (tmp_path / 'mine.yaml').write_text('epochs: 3\njsd-loss: false\nmixupp: 0\n')
    with pytest.raises(UserError, match="2 names are no settings: 'jsd-loss', 'mixupp'"):
        _over_recipe(TrainSettings, {'config': str(tmp_path / 'mine.yaml')})

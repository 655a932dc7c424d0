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
bce_pos_weight: null
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
color_jitter_prob: null
cooldown_epochs: 0
crop_pct: null
cutmix: 0.0
cutmix_minmax: null
data: null
data_dir: null
dataset: ''
dataset_download: false
dataset_trust_remote_code: false
decay_epochs: 90
decay_milestones: [90, 180, 270]
decay_rate: 0.1
device: cuda
device_modules: null
dist_bn: reduce
distill_loss_weight: null
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
gaussian_blur_prob: null
gp: null
grad_accum_steps: 1
grad_checkpointing: false
grayscale_prob: null
head_init_bias: null
head_init_scale: null
hflip: 0.5
img_size: null
in_chans: null
initial_checkpoint: ''
input_img_mode: null
input_key: null
input_size: null
interpolation: ''
jsd_loss: false
kd_distill_type: logit
kd_loss_type: kl
kd_model_name: null
kd_student_feature_dim: null
kd_teacher_feature_dim: null
kd_temperature: 4.0
kd_token_distill_type: soft
layer_decay: null
layer_decay_min_scale: 0
layer_decay_no_opt_scale: null
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
model_dtype: null
model_ema: false
model_ema_decay: 0.9998
model_ema_force_cpu: false
model_ema_warmup: false
model_kwargs: {}
momentum: 0.9
naflex_loader: false
naflex_loss_scale: linear
naflex_max_seq_len: 576
naflex_patch_size_probs: null
naflex_patch_sizes: null
naflex_train_seq_lens: [128, 256, 576, 784, 1024]
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
pretrained_path: null
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
target_key: null
task_loss_weight: null
torchcompile: null
torchcompile_mode: null
torchscript: false
train_crop_mode: null
train_interpolation: random
train_num_samples: null
train_split: train
tta: 0
use_multi_epochs_loader: false
val_interval: 1
val_num_samples: null
val_split: validation
validation_batch_size: null
vflip: 0.0
wandb_project: null
wandb_resume_id: ''
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
    assert all(repr(name) in str(caught.value) for name in asked)
    assert str(caught.value).startswith(f"`config` {tmp_path / 'args.yaml'}: 5 of timm's settings do not exist here: ")
    assert "'epoch_repeats' (use `epochs`)" in str(caught.value)
    assert 'torchscript' not in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(UserError, match="args.yaml: `sched`: must be one of .* got 'exp'"):
        read(tmp_path, sched='exp')
    plateau = read(tmp_path, sched='plateau', eval_metric='loss', patience_epochs=3)
    assert (plateau.schedule.sched, plateau.schedule.patience_epochs, plateau.loss.eval_metric) == (
        'plateau',
        3,
        'loss',
    )


def test_what_belongs_to_a_switch_counts_with_it(tmp_path: Path) -> None:
    """The options of a loader, a teacher and a tracker mean nothing until it is on."""
    assert read(tmp_path, val_interval=3, wandb_project='mine', kd_temperature=2.0).run.eval_interval == 3
    for switch, value, words in (
        ('naflex_loader', True, "4 of timm's settings do not exist here: 'naflex_loader', 'naflex_loss_scale'"),
        ('kd_model_name', 'resnet18', "'kd_distill_type', 'kd_loss_type', 'kd_model_name', 'kd_temperature'"),
        ('log_wandb', True, r"1 of timm's settings do not exist here: 'log_wandb' \(use `log_with='wandb'`\)"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path, **{switch: value})


def test_other_recipes_are_read_as_they_are(tmp_path: Path) -> None:
    """A mistyped name is refused there, also with a value that is off."""
    (tmp_path / 'mine.yaml').write_text('epochs: 3\njsd-loss: false\nmixupp: 0\n')
    with pytest.raises(UserError, match="2 names are no settings: 'jsd-loss', 'mixupp'"):
        _over_recipe(TrainSettings, {'config': str(tmp_path / 'mine.yaml')})

"""Settings of data: where images come from, how they are sized and normalized, loaded, augmented and mixed.

Nothing here imports torch or timm, so that a help text is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..utils.settings import setting

LARGEST_SIDE = 16384  # pixels; a batch of larger images fits no memory
Interpolation = Literal['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos']


@dataclass(frozen=True)
class DataSettings:
    """Which images, and the size and normalization they have at evaluation; by timm's names."""

    data_dir: str | None = setting(None, 'folder with the images', metavar='DIR')
    dataset: str = setting('', 'digits, hfds/NAME, hfds/NAME:CONFIG, torch/NAME, ... (timm)', metavar='NAME')
    train_split: str = setting('train', "training split; hfds and digits take slices, 'train[:10000]'", empty=True)
    val_split: str = setting('validation', "validation split; '' trains without evaluation", empty=True)
    train_num_samples: int | None = setting(None, 'length of a stream without one', low=1, high=10**12, metavar='N')
    val_num_samples: int | None = setting(None, 'the same of the validation split', low=1, high=10**12, metavar='N')
    dataset_download: bool = setting(False, 'let torch/, tfds/ and hfids/ data sets download')
    class_map: str = setting('', 'file that maps classes to indices', metavar='FILE')
    input_img_mode: str | None = setting(None, 'PIL mode that images are converted to', metavar='MODE')
    extensions: tuple[str, ...] = setting((), 'of image files in folders; timm takes .png .jpg .jpeg', metavar='.EXT')
    input_key: str | None = setting(None, 'column of the images', metavar='KEY')
    target_key: str | None = setting(None, 'column of the labels', metavar='KEY')
    img_size: int | None = setting(None, 'image size, square', low=1, high=LARGEST_SIDE, metavar='N')
    in_chans: int | None = setting(None, 'image channels', low=1, high=4096, metavar='N')
    input_size: tuple[int, int, int] | None = setting(
        None, 'channels, height, width', low=1, high=LARGEST_SIDE, metavar='N'
    )
    crop_pct: float | None = setting(None, 'center crop share at evaluation', low=0.05, high=2, metavar='F')
    crop_mode: Literal['squash', 'border', 'center'] | None = setting(None, 'crop at evaluation')
    mean: tuple[float, ...] | None = setting(None, 'channel means, of 1', low=-1e6, high=1e6, metavar='M')
    std: tuple[float, ...] | None = setting(None, 'channel standard deviations', low=1e-6, high=1e6, metavar='S')
    interpolation: Interpolation | None = setting(None, 'resize interpolation at evaluation')


@dataclass(frozen=True)
class LoaderSettings:
    """How images are read into batches."""

    batch_size: int = setting(128, 'images of each process', low=1, short='-b', metavar='N')
    validation_batch_size: int | None = setting(None, 'the same at evaluation', low=1, short='-vb', metavar='N')
    workers: int = setting(4, 'data loading processes', low=0, high=4096, short='-j', metavar='N')
    cache_dataset: bool = setting(False, 'decode images once and keep them in memory')
    pin_mem: bool = setting(False, 'pin memory for faster transfer to a GPU')


@dataclass(frozen=True)
class AugmentationSettings:
    """timm's augmentation of training images."""

    no_aug: bool = setting(False, 'none at all')
    train_crop_mode: Literal['rrc', 'rkrc', 'rkrr'] | None = setting(None, 'random crop')
    scale: tuple[float, float] | None = setting(None, 'random resize, area range', above=0, metavar='F')
    ratio: tuple[float, float] | None = setting(None, 'random resize, aspect range', above=0, metavar='F')
    crop_padding: int = setting(0, 'pad, then crop back at random', low=0, high=LARGEST_SIDE, metavar='PIXELS')
    hflip: float = setting(0.5, 'probability of a horizontal flip', low=0, high=1, metavar='P')
    vflip: float = setting(0.0, 'probability of a vertical flip', low=0, high=1, metavar='P')
    color_jitter: float = setting(0.4, 'color jitter factor', low=0, high=100, metavar='F')
    color_jitter_prob: float | None = setting(None, 'probability of color jitter', low=0, high=1, metavar='P')
    grayscale_prob: float = setting(0.0, 'probability of grayscale', low=0, high=1, metavar='P')
    gaussian_blur_prob: float = setting(0.0, 'probability of blur', low=0, high=1, metavar='P')
    aa: str | None = setting(None, "timm's auto-augment string, such as rand-m9-mstd0.5", metavar='POLICY')
    reprob: float = setting(0.0, 'probability of random erasing', low=0, high=1, metavar='P')
    remode: Literal['const', 'rand', 'pixel'] = setting('pixel', 'random erasing fill')
    recount: int = setting(1, 'random erasing regions', low=1, high=1000, metavar='N')
    train_interpolation: Literal['random', Interpolation] = setting('random', 'resize interpolation')


@dataclass(frozen=True)
class MixupSettings:
    """timm's Mixup and CutMix."""

    mixup: float = setting(0.0, 'mixup alpha; mixes above 0', low=0, metavar='ALPHA')
    cutmix: float = setting(0.0, 'cutmix alpha; mixes above 0', low=0, metavar='ALPHA')
    cutmix_minmax: tuple[float, float] | None = setting(
        None, 'range of box sizes; turns cutmix on', low=0, high=1, metavar='F'
    )
    mixup_prob: float = setting(1.0, 'probability of mixing at all', low=0, high=1, metavar='P')
    mixup_switch_prob: float = setting(0.5, 'probability of cutmix when both are on', low=0, high=1, metavar='P')
    mixup_mode: Literal['batch', 'pair', 'elem'] = setting('batch', 'how lambda varies')
    mixup_off_epoch: int = setting(0, 'stop mixing at this epoch, 0: never', low=0, metavar='N')

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class TargetSettings:
    """Which sets features are transferred to."""

    target: tuple[str, ...] | None = setting(None, 'sets or folders; else the data given, else digits', metavar='NAME')
    max_train: int | None = setting(None, 'draw this many training images of a target', low=1, metavar='N')
    max_test: int | None = setting(None, 'draw this many test images of a target', low=1, metavar='N')

"""Folders and tar files of images: which of them is a split, which folders are classes, which files are images."""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

from accelerate import PartialState
from PIL import Image
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from ..utils.errors import UserError, one_line
from ..utils.text import sanitize
from .settings import DataSettings

SYNONYMS = (('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation', 'test', 'testing'))
_SPLITS = sum(SYNONYMS, ())

logger = logging.getLogger(__name__)


@lru_cache
def warn_once(message: str) -> None:
    """Log a warning, from the main process, the first time that it is given."""
    if not PartialState._shared_state or PartialState().is_main_process:
        logger.warning(sanitize(message))


class MissingSplitError(UserError):
    """The data have no split of this name."""


def synonyms(split: str) -> list[str]:
    """The names that a split may go by, itself first."""
    split = split.lower() if split.lower() in _SPLITS else split
    return [split, *(name for names in SYNONYMS if split in names for name in names)]


def root_of_split(root: str, split: str, unsplit: bool) -> tuple[str, str | None]:
    """Find a split's folder or tar file, and for a tar file with splits in it, the split's folder there.

    timm takes all images when it finds no split in the folder, and so would validate on the training images.
    """
    what, path, inside = f'`data_dir` {root}', Path(root), set()
    if '[' in split:
        raise UserError(f'{what}: split {split!r} is sliced, which only hfds/NAME and digits can be')
    if path.is_file():
        try:
            with tarfile.open(path) as tar:
                inside = {member.name.removeprefix('./').split('/')[0] for member in tar if member.isfile()}
        except (tarfile.TarError, OSError) as error:
            raise UserError(f'{what}: neither a folder nor a tar file ({one_line(error)})') from None
        if path.suffix.lower() != '.tar':
            raise UserError(f'{what}: must end in .tar to be read as a tar file')

    found: dict[str, tuple[str, str | None]] = {name: (root, name) for name in inside}
    if path.is_dir():
        entries = [entry.name for entry in os.scandir(path) if entry.is_dir() or entry.name.endswith('.tar')]
        found = {name.removesuffix('.tar'): (str(path / name), None) for name in sorted(entries, reverse=True)}
    places = {name: found[name] for name in sorted(found) if name == split or name.lower() in _SPLITS}
    for name in synonyms(split):
        for place in (name, *(other for other in places if other.lower() == name.lower())):
            if place in places:
                return places[place]
    if not split:
        return root, None
    if unsplit and not places and split in _SPLITS:
        words = {name: set(re.split(r'[\W_\d]+', name.lower())) for name in sorted(found) if _has_folders(path / name)}
        alike = [[name for name in words if words[name] & {*names}] for names in SYNONYMS]
        if all(alike):
            look = f'{", ".join(sum(alike, []))} look like splits'
            raise UserError(f'{what}: {look}; name one with `train_split` and one with `val_split`')
        return root, None
    others = f'no split {split!r} in it{", only " * bool(places)}{", ".join(sorted(places))}'
    other = "name another with `train_split` or `val_split` ('' trains without evaluation)"
    raise MissingSplitError(f'{what}: {others}; put its class folders into {split}/ there, or {other}')


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in os.scandir(path))


def scan_folder(folder: Path, data: DataSettings) -> str | None:
    """Refuse links that lead in circles, log which images are left out for their type; the types for timm's reader."""
    types = {f'.{extension.lower().lstrip(".")}' for extension in data.extensions} or get_img_extensions(as_set=True)
    Image.init()
    counts: Counter[str] = Counter()
    for here, folders, files in os.walk(folder, followlinks=True):
        for path in (os.path.join(here, name) for name in folders):
            if os.path.islink(path):
                real, above = os.path.realpath(path), Path(os.path.realpath(here))
                below = [Path(here), *(p for p in Path(here).parents if p.is_relative_to(folder))]
                if real in {str(p) for p in (above, *above.parents)} | {os.path.realpath(p) for p in below}:
                    fault = f'{path} is a link to {real}, a folder that it lies in'
                    raise UserError(f'`data_dir` {data.data_dir}: {fault}; remove the link')
        counts.update(os.path.splitext(file)[1].lower() for file in files if not file.startswith('.'))
    others = {name: count for name, count in counts.most_common() if name in Image.EXTENSION and name not in types}
    if others:
        shown = f'{sum(others.values()):,} images ({", ".join(f"{count:,} {name}" for name, count in others.items())})'
        fault = f'{folder}: {shown} are left out, as only {" ".join(sorted(types))} are taken'
        if types.isdisjoint(counts):
            raise UserError(f'`data_dir` {fault}; give their types with `extensions`')
        warn_once(f'{fault}; give all types with `extensions` to take them')
    return ';'.join(sorted(types)) if data.extensions else None


def check_class_folders(reader: ReaderImageFolder, what: str, class_map: str) -> None:
    """Refuse images outside of all class folders, and a class folder without images.

    timm would make a class of the former, which moves all others by one, and leave the latter out. A class map may
    leave out folders: those are not asked for.
    """
    root, folders = os.path.normpath(reader.root), {os.path.dirname(sample[0]) for sample in reader.samples}
    top = {folder for folder in folders if os.path.normpath(folder) == root}
    outside = [sample[0] for sample in reader.samples if os.path.dirname(sample[0]) in top]
    if outside:
        count = f'{len(outside):,} of {len(reader.samples):,} images lie in no class folder'
        raise UserError(f'{what}: {count}, the first is {outside[0]}; put each into the folder of its class')
    used = {Path(os.path.relpath(folder, root)).parts[0] for folder in folders}
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith('.')):
        if name not in used and (not class_map or name in reader.class_to_idx):
            raise UserError(f'{what}: class folder {name!r} has no images in it, of the types taken; see `extensions`')


def number_folders(reader: ReaderImageFolder, what: str) -> dict[int, str]:
    """Where images lie deeper than a folder of the root, decide which folders are the classes; their names, by class.

    timm takes the name of the innermost folder, which makes one class of class/images/x.png. That holds here only
    where it tells all folders apart, and all are equally deep. Otherwise the folders below the root are the classes.
    """
    folders = {os.path.dirname(file): Path(os.path.relpath(file, reader.root)).parts[:-1] for file in _files(reader)}
    if all(parts[0].lower() in _SPLITS for parts in folders.values()):  # all splits of a folder
        folders = {folder: parts[1:] or parts for folder, parts in folders.items()}
    deepest = max(folders.values(), key=lambda parts: len(parts))
    if len(deepest) == 1:
        return {}
    inner, example = {parts[-1] for parts in folders.values()}, '/'.join(deepest)
    if len(inner) == len(folders) and len({len(parts) for parts in folders.values()}) == 1:
        warn_once(f'{what}: the {len(inner)} classes are the innermost folders, such as {example}')
        return {}
    names = sorted({parts[0] for parts in folders.values()}, key=natural_key)
    warn_once(f'{what}: the {len(names)} classes are the folders below the root; some hold folders: {example}')
    reader.class_to_idx = {name: i for i, name in enumerate(names)}
    reader.samples = [(f, reader.class_to_idx[folders[os.path.dirname(f)][0]]) for f in _files(reader)]
    return dict(enumerate(names))


def _files(reader: ReaderImageFolder) -> list[str]:
    return [sample[0] for sample in reader.samples]

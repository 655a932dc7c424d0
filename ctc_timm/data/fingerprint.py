"""What tells one training set from another of the same size, without reading all of its images."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Any

import numpy as np

from .datasets import DatasetSplit

_SAMPLED = 32  # images whose content counts


def fingerprint(split: DatasetSplit) -> str:
    """Hash the labels, the names of files below their folder, and the content of some images; '' for a stream."""
    if split.labels_N is None:
        return ''
    reader = getattr(split.dataset, 'reader', None)
    digest, count = hashlib.sha256(split.labels_N.numpy().tobytes()), len(split.labels_N)
    source = getattr(reader, 'source', reader)  # of a part
    if reader is not None and hasattr(source, 'samples'):
        root = str(getattr(source, 'root', ''))
        names = (str(reader.filename(index, absolute=True)).removeprefix(root) for index in range(count))
        digest.update('\0'.join(names).encode(errors='surrogateescape'))
    images: Any = reader if reader is not None else getattr(split.dataset, 'data', None)  # torchvision's, as arrays
    for index in range(0, count, max(1, count // _SAMPLED)) if images is not None else ():
        with suppress(Exception):  # an unreadable image is no matter of a resume
            image = images[index]
            image = image[0] if reader is not None else image
            with image if hasattr(image, 'read') else np.errstate():
                digest.update(image.read() if hasattr(image, 'read') else np.asarray(image).tobytes())
    return digest.hexdigest()

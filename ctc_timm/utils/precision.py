"""Settings of mixed precision. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .settings import setting


@dataclass(frozen=True)
class PrecisionSettings:
    """Mixed precision, by timm's names."""

    amp: bool = setting(False, 'mixed precision')
    amp_dtype: Literal['float16', 'bfloat16'] = setting('float16', 'its type')

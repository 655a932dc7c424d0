"""Contrastive temporal coding (CTC) for every timm backbone.

`import ctc_timm` registers `<arch>_ctc` for every timm architecture with timm's own registry, and the `cifar_*` models
for 32x32 images. Where timm is not imported yet, this happens when it is: so the command line can show its help
without importing PyTorch. The names below are the public interface; each is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import detect, dynamics, embed, finetune, linear_probe, publish, segment, train, validate
    from .contrast.losses import InstanceDiscriminationLoss, TemporalContrastLoss
    from .contrast.negatives import NegativeSampler
    from .contrast.task import CTCTask
    from .models.backbones import feature_dim, features_and_logits
    from .runs import Run
    from .utils.errors import UserError

__version__ = '0.2.0.dev0'
__all__ = ['CTCTask', 'InstanceDiscriminationLoss', 'NegativeSampler', 'Run', 'TemporalContrastLoss', 'UserError']
__all__ += ['detect', 'dynamics', 'embed', 'feature_dim', 'features_and_logits', 'finetune', 'linear_probe', 'publish']
__all__ += ['segment', 'train', 'validate']

_MODULE_OF = {
    'CTCTask': 'contrast.task',
    'InstanceDiscriminationLoss': 'contrast.losses',
    'NegativeSampler': 'contrast.negatives',
    'Run': 'runs',
    'TemporalContrastLoss': 'contrast.losses',
    'UserError': 'utils.errors',
    'feature_dim': 'models.backbones',
    'features_and_logits': 'models.backbones',
}


class _Registrar(MetaPathFinder):
    """Registers the models as soon as timm has been imported, after which it is gone.

    Where one of the package's own modules for models imports timm, that module has to be complete first.
    """

    depth = 0  # of the imports in progress

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != 'timm' and not fullname.startswith(f'{__name__}.models.'):
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, self)
        return spec


class _ThenRegister(Loader):
    """Another loader, with the registration at its end."""

    def __init__(self, loader: Any, registrar: _Registrar) -> None:
        self._loader, self._registrar = loader, registrar

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._registrar.depth += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._registrar.depth -= 1
        if not self._registrar.depth and 'timm' in sys.modules and self._registrar in sys.meta_path:
            sys.meta_path.remove(self._registrar)
            import_module('.models.registry', __name__).register_all()


if 'timm' in sys.modules:
    import_module('.models.registry', __name__).register_all()
else:
    sys.meta_path.insert(0, _Registrar())


if not TYPE_CHECKING:  # a type checker must not take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        value = getattr(import_module(f'.{_MODULE_OF.get(name, "api")}', __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

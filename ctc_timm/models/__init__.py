"""timm models and their `_ctc` names: backbones, catalogs of weights, loading and creation."""

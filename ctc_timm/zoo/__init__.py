"""Its weights and its architectures, as timm models."""

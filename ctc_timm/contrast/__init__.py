"""The method: tensors in, loss out. Knows no files, flags or process launch."""

"""The images: which there are, how they are read and sized, by timm's readers and loaders."""

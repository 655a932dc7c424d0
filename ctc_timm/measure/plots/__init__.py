"""Every picture, drawn from the saved numbers."""

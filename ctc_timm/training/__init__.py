"""Running it, through Accelerate."""

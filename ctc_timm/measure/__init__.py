"""What it is for: measurements, and every picture drawn from them."""

"""Run `ctc-timm linear-probe` from a clone, also by `accelerate launch transfer/linear_probe.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('linear-probe')

"""Run `ctc-timm dynamics` from a clone, also by `accelerate launch transfer/dynamics.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('dynamics')

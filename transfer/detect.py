"""Run `ctc-timm detect` from a clone, also by `accelerate launch transfer/detect.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('detect')

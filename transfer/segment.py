"""Run `ctc-timm segment` from a clone, also by `accelerate launch transfer/segment.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('segment')

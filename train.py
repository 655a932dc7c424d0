"""Run `ctc-timm train` from a clone, also by `accelerate launch train.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('train')

"""Run `ctc-timm digit-scenes` from a clone, also by `accelerate launch transfer/digit_scenes.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('digit-scenes')

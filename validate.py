"""Run `ctc-timm validate` from a clone, also by `accelerate launch validate.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('validate')

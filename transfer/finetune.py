"""Run `ctc-timm finetune` from a clone, also by `accelerate launch transfer/finetune.py`."""

from ctc_timm.cli.main import main

if __name__ == '__main__':
    main('finetune')

"""`python -m ctc_timm COMMAND` and `accelerate launch -m ctc_timm COMMAND`."""

from .cli.main import main

if __name__ == '__main__':
    main()

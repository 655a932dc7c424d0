#!/usr/bin/env python3
"""Follow source accuracy, transfer, information and geometry through every kept epoch of a run.

python transfer/dynamics.py runs/NAME                                    # target: the embedded digits
python transfer/dynamics.py runs/VANILLA runs/CTC --target hfds/REPO_OR_FOLDER digits --probes ridge knn
"""

from __future__ import annotations

import ctc_timm  # noqa: F401  (registers the models)
from ctc_timm.cli.arguments import Parser, parse, run_script
from ctc_timm.measure.dynamics import add_arguments, dynamics


def main() -> None:
    parser = Parser(description=__doc__.split('\n')[0])
    add_arguments(parser)
    dynamics(parse(parser))


if __name__ == '__main__':
    run_script(main)

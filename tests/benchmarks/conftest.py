"""Scripts of benchmarks/ import each other by name."""

import sys

from runs import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))

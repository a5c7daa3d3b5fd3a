# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Measure the speed of a model on this machine. This script is equivalent to `vitcls benchmark`.

python scripts/benchmark.py --model runs/mine --work inference step --markdown speed.md
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "benchmark"]

    from modeling_vitcls.cli import main

    main()

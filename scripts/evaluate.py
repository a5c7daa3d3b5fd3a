# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Evaluate a model on labeled images. This script is equivalent to `vitcls evaluate`.

accelerate launch scripts/evaluate.py --model runs/digits --dataset digits
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "evaluate"]

    from modeling_vitcls.cli import main

    main()

# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Pre-train a ViT on images without labels, with LeJEPA.

This script is equivalent to `vitcls pretrain`.

accelerate launch scripts/pretrain.py --model vitcls-tiny --dataset path/to/images --output-dir runs/pretrained
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "pretrain"]

    from modeling_vitcls.cli import main

    main()

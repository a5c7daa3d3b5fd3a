# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Fine-tune a ViT on labeled images. This script is equivalent to `vitcls finetune`.

accelerate launch scripts/finetune.py --config scripts/recipes/digits.yaml --output-dir runs/digits
accelerate launch scripts/finetune.py --model vitcls-tiny --dataset path/to/images --output-dir runs/mine
"""

import sys


if __name__ == "__main__":
    sys.argv[:1] = ["vitcls", "finetune"]

    from modeling_vitcls.cli import main

    main()

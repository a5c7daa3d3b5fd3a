"""Fine-tune a ViT on labelled images.

    accelerate launch scripts/finetune.py --config scripts/recipes/digits.yaml --output-dir runs/digits
    accelerate launch scripts/finetune.py --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

`--help` lists the flags. The work is done in modeling_vitcls/training/finetune.py.
"""

from command_line import errors_in_one_line, parse


def main() -> None:
    """Parse, then train; the package is imported only once the flags are known to be right."""
    options = parse("FinetuneOptions")

    from modeling_vitcls.training.finetune import finetune, prepare

    with errors_in_one_line():
        run = prepare(options)
    finetune(run)


if __name__ == "__main__":
    main()

"""Fine-tune a ViT on labelled images.

    accelerate launch scripts/finetune.py --config scripts/recipes/digits.yaml --output-dir runs/digits
    accelerate launch scripts/finetune.py --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

The same command with --resume goes on where it was stopped, and with --dry-run tries one step of everything.
`--help` lists the flags. The work is done in modeling_vitcls/training/finetune.py.
"""

from command_line import errors_in_one_line, parse, stop


def main() -> None:
    """Parse, then train; the package is imported only once the flags are known to be right."""
    options = parse("FinetuneOptions")

    from modeling_vitcls.training.finetune import dry_run, finetune
    from modeling_vitcls.training.runner import RunStopped
    from modeling_vitcls.training.setup import prepare

    try:
        with errors_in_one_line():
            if options.run.dry_run:
                dry_run(options)
            else:
                finetune(prepare(options))
    except RunStopped as stopped:
        stop(str(stopped), stopped.exit_status, stopped.on_all)


if __name__ == "__main__":
    main()

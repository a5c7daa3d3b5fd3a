"""Pre-train a ViT on images without labels: it learns to fill in hidden patches (masked image modelling).

    accelerate launch scripts/pretrain.py --model vitcls-tiny --dataset path/to/images --output-dir runs/pretrained
    accelerate launch scripts/finetune.py --model runs/pretrained --dataset path/to/labelled --output-dir runs/mine

The same command with --resume goes on where it was stopped, and with --dry-run tries one step of everything.
`--help` lists the flags. The work is done in modeling_vitcls/training/pretrain.py.
"""

from command_line import errors_in_one_line, parse, stop


def main() -> None:
    """Parse, then train; the package is imported only once the flags are known to be right."""
    options = parse("PretrainOptions")

    from modeling_vitcls.training.pretrain import dry_run, prepare, pretrain
    from modeling_vitcls.training.runner import RunStopped

    try:
        with errors_in_one_line():
            if options.run.dry_run:
                dry_run(options)
            else:
                pretrain(prepare(options))
    except RunStopped as stopped:
        stop(str(stopped), stopped.exit_status, stopped.on_all)


if __name__ == "__main__":
    main()

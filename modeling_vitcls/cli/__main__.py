"""`python -m modeling_vitcls.cli`, and the same with `accelerate launch`."""

from . import main


if __name__ == "__main__":
    main()

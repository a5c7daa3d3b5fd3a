"""`python -m modeling_vitcls.cli`, and `accelerate launch -m modeling_vitcls.cli` in several processes."""

from . import main


if __name__ == "__main__":
    main()

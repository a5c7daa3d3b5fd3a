"""Write the features of images with Ray Data.

The images are a folder, or Parquet files with an image column.

    python scripts/ray_features.py --model runs/mine --images photos --output features
    python scripts/ray_features.py --model runs/mine --images images.parquet --features cls mean@6 --output features

Ray restarts workers that are lost, and repeats their batches. Install Ray with `pip install
"ray[data]"`.
"""

import argparse
from pathlib import Path

import ray

from modeling_vitcls import EmbedImages


def main() -> None:
    """Read the images, compute the features in several processes, and write Parquet files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--features", nargs="+", default=["cls"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    flags = parser.parse_args()
    is_table = Path(flags.images).suffix == ".parquet"
    images = (
        ray.data.read_parquet(flags.images)
        if is_table
        else ray.data.read_binary_files(flags.images, include_paths=True)
    )
    images.map_batches(
        EmbedImages,
        fn_constructor_args=[str(Path(flags.model).resolve()), flags.features],
        batch_size=flags.batch_size,
        num_cpus=0.5,  # leaves cores to the tasks that read files
        num_gpus=flags.gpus_per_worker,
        compute=ray.data.ActorPoolStrategy(size=flags.workers),
    ).write_parquet(str(Path(flags.output).resolve()))


if __name__ == "__main__":
    main()

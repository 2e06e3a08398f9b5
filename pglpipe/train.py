"""``torchrun --nproc_per_node=4 -m pglpipe.train``: the command ``train`` of the CLI."""

from pglpipe.cli import train_main

if __name__ == "__main__":
    train_main()

"""The file that `accelerate launch` is given: scripts/train.py CONFIG [section.key=value ...]"""

import sys

from moe_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

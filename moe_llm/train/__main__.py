"""`accelerate launch -m moe_llm.train CONFIG [overrides]`."""

import sys

from moe_llm.cli import main

sys.exit(main(["train", *sys.argv[1:]]))

"""`python -m moe_llm` is `moe-llm`."""

import sys

from moe_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())

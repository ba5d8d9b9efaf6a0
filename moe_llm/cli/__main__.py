"""`python -m moe_llm.cli` is `moe-llm`."""

import sys

from moe_llm.cli import main

sys.exit(main())

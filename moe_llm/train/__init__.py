"""Training. The package can be called: `moe_llm.train(config)` is `moe_llm.train.run.train(config)`.

An attribute of `moe_llm` cannot be both a function and the package whose modules one imports, and which of the two it
was would depend on what has been imported before. So it is always the package, which has what a function needs.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_llm.config import Config


class _CallablePackage(ModuleType):
    def __call__(self, config: "Config") -> Path:
        """Train as configured: see `moe_llm.api.train`."""
        from moe_llm.train.run import train

        return train(config)


sys.modules[__name__].__class__ = _CallablePackage

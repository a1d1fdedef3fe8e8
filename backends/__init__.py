"""The backends, one a folder. Imports none of them: `scfa_core.dispatch` loads what is asked for.

The package shares its name with the public function ``scfa_core.backends()``, and importing a
submodule rebinds that name to the package. So the package itself can be called.
"""

import sys
from types import ModuleType


class _CallablePackage(ModuleType):
    """A package that answers ``scfa_core.backends()``."""

    def __call__(self) -> dict[str, str]:
        """Every backend and whether it can run here: `scfa_core.dispatch.backends`."""
        from scfa_core.dispatch import backends

        return backends()


sys.modules[__name__].__class__ = _CallablePackage

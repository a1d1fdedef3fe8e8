"""``python -m scfa_core``: the same as the script ``scfa``."""

from scfa_core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m dcpbench`` is ``dcpbench``."""

from dcpbench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m autoreg_vit` is the command autoreg-vit."""

import sys

from .commands.cli import main

sys.exit(main())

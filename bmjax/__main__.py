"""`python -m bmjax` is `bmjax`."""

import sys

from bmjax.cli import main

sys.exit(main())

"""`python -m prefopt` is `prefopt`."""

import sys

from prefopt.cli import main

sys.exit(main())

"""`python -m loopmdm.cli`, the same as `loopmdm`."""

import sys

from . import main

sys.exit(main())

"""``python -m helpers.cli``, the same as ``metabook``."""

import sys

from helpers.cli import main

sys.exit(main())

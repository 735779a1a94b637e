"""``python -m helpers.site``: run the chapters and build the pages."""

import sys

from helpers.site.commands import main

sys.exit(main())

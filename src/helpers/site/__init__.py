"""Running the chapters, comparing their outputs, building and checking the pages: what knows no engine."""

"""What the chapters of *Learning to Learn* share. Importing a module of this package has no side effects."""

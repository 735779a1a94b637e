"""Numerics that know nothing of meta-learning: recorded programs, linear solvers, convolution, finite differences."""

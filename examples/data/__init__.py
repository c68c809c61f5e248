"""Data sets that ship in wheels, read without importing the packages that carry them."""

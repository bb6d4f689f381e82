"""Layers and networks put in place of stock ones."""

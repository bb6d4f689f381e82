"""Smaller or cheaper models: pruning, low rank, quantisation, distillation."""

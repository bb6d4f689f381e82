"""Ratios: each method's training step against the bare step, and against the peers' implementations.

python -m benchmarks overhead --pairs 20 --batch 64
python -m benchmarks peers --out peers.json
"""

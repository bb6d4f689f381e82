"""One YAML per method: what `effdl run NAME` executes."""

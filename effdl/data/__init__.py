"""LightningDataModules over HF datasets, with offline defaults."""

"""Stock LightningModules that methods attach to."""

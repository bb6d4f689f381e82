"""Why did the model say that."""

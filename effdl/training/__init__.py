"""How weights are learned."""

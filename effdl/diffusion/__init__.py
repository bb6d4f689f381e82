"""Training, accelerating and steering diffusion and flow models."""

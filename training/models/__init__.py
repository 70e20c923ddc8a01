"""Two-tower image–caption encoders and their cached backbone features."""

"""How a model learns, and what it says of images."""

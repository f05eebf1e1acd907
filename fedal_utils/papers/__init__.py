"""What each paper adds: presets, arms and tables."""

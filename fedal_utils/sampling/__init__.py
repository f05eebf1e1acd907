"""What to label next: pool and Oracle, scores, diversity, and every query strategy."""

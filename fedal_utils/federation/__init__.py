"""Who learns with whom: messages, aggregation, schemes, and the loop."""

"""A person answers: the store of answers, simulated annotators, the labelling page."""

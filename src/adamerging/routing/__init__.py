"""Models that route by input: weights of their own for every sample, mixed from the experts' task vectors."""

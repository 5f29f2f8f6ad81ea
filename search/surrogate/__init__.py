"""The sampler `front`: what is known of a space before its first trial, models of cost and accuracy, and the choice."""

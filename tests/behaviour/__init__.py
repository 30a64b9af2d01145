"""What holds from the command line to the weights: resuming, causality, bad input, surroundings, advice."""

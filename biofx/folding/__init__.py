"""Where the sums of split weights go: out of the activations and into the weights around them."""

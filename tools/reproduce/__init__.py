"""An ablation that can be repeated: mechanism × network × seed, each with its control."""

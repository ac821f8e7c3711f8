"""A script that fails as a pass did, with the model that it was given."""

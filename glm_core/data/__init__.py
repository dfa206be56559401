"""What passes between the stages: grids, tokens, layouts and references."""
